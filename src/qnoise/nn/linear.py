"""`FakeQuantLinear`: an `nn.Linear` whose forward sees Q(W), and Q(x) on request.

The backward is that of the dequantized operands, straight through the rounding: with w = Q(W) and a = Q(x),
grad_x = g w and grad_W = g^T a, which reach x and the raw parameter W unchanged (Bengio et al., arXiv 1308.3432).
The parameter itself is never written to: `.weight` is the raw weight, `effective_weight()` what the forward uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qnoise.formats import QuantSpec, as_spec
from qnoise.functional import fake_quantize
from qnoise.nn import weight_cache
from qnoise.nn.patched import Patched, PatchRecord, convert, restore
from qnoise.noise import Noise, unit_normal
from qnoise.spelling import check_choice

Storage = Literal["auto", "dynamic", "cached"]
STORAGES = ("auto", "dynamic", "cached")


@dataclass
class LinearRecord(PatchRecord):
    """State of a converted linear. `scale_group` are the linears that share one per-tensor scale, itself included."""

    weight_spec: QuantSpec | None = None
    act_spec: QuantSpec | None = None
    # What fixes the per-tensor scale of the input; None: each token's own amax
    act_amax: float | None = None
    storage: str = "auto"
    scale_group: tuple[FakeQuantLinear, ...] = ()
    # amax of the weight when it was patched, for a time when the weight itself is out of reach (offloaded, sharded)
    patched_amax: Tensor | None = None


class FakeQuantLinear(Patched, nn.Linear):
    """Drop-in `nn.Linear` computing F.linear(Q(x), Q(W), bias).

    Args:
        in_features, out_features, bias, device, dtype: as for `nn.Linear`.
        fmt: format of the weight, a name or `QuantSpec`; None leaves the weight in full precision.
        act_fmt: format of the input, or None. Blocks run along the last axis; a per-tensor scale (NVFP4) is taken per
            token, so that padding, batch mates and later tokens cannot change a token.
        storage: "dynamic" quantizes in every forward. "cached" keeps Q(W) beside the weight, which doubles the weight
            memory, until the weight changes. "auto" (default) keeps Q(W) of a weight that needs no gradient in
            this forward, and quantizes the others.

    Raises:
        ValueError: unknown format or storage.
    """

    _qnoise: LinearRecord

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        fmt: str | QuantSpec | None = "mxfp4",
        act_fmt: str | QuantSpec | None = None,
        storage: Storage = "auto",
    ) -> None:
        record = _record("", fmt, act_fmt, storage)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.__dict__["_qnoise"] = record

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        fmt: str | QuantSpec | None = "mxfp4",
        act_fmt: str | QuantSpec | None = None,
        storage: Storage = "auto",
    ) -> FakeQuantLinear:
        """A FakeQuantLinear on the same parameters; `linear` itself stays as it is."""
        if type(linear) is not nn.Linear:
            raise TypeError(f"from_linear takes an nn.Linear, not {type(linear).__name__}: its forward is its own")
        twin = _empty_like(linear)
        convert(twin, cls, _record("", fmt, act_fmt, storage))
        return cast(FakeQuantLinear, twin)

    def to_linear(self) -> nn.Linear:
        """A stock `nn.Linear` on the same parameters (the raw weight); this module stays as it is."""
        twin = _empty_like(self)
        restore(twin)
        return twin

    # The raw parameter. Whoever reads it from outside may write to it through `.data`, which torch does not tell us.
    @property  # type: ignore[override]
    def weight(self) -> nn.Parameter:
        weight = self._parameters.get("weight")
        if weight is None:
            return cast(nn.Parameter, super().__getattr__("weight"))
        weight_cache.touch(weight)
        return weight

    @weight.setter
    def weight(self, value: nn.Parameter) -> None:
        # Only reached for what nn.Module.__setattr__ does not take itself.
        raise TypeError(f"cannot assign {type(value).__name__} as parameter 'weight' (nn.Parameter or None required)")

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        record = self._qnoise
        if record.full_precision:
            return F.linear(input, self._raw_weight(), self.bias)
        if record.act_spec is not None:
            input = _quantize_tokens(input, record.act_spec, record.act_amax)
        return F.linear(input, self.effective_weight(), self.bias)

    def effective_weight(self) -> Tensor:
        """The weight a forward done now uses: Q(W), or Q(W (1 + sigma z)) where weight noise acts.

        (out_features, in_features), dtype of the weight. Differentiable (straight through) where the weight needs
        gradient and grad mode is on.
        """
        record = self._qnoise
        weight = self._raw_weight()
        noise = record.noise if self.noise_sigma() > 0.0 else None
        if record.full_precision or (record.weight_spec is None and noise is None):
            return weight
        trained = weight.requires_grad and torch.is_grad_enabled()
        keep = record.storage == "cached" or (record.storage == "auto" and not trained)
        if not keep or not weight_cache.cacheable(weight):
            return self._effective(weight, noise)
        peers = tuple(_serial(peer) for peer in record.scale_group if peer is not self)
        kept = weight_cache.derived(
            weight,
            slot=record.weight_spec,
            key=(noise, record.name if noise else None, peers),
            compute=lambda w: self._effective(w, noise),
        )
        return _StraightThrough.apply(weight, kept) if trained else kept

    def extra_repr(self) -> str:
        record = self._qnoise
        parts = [super().extra_repr(), f"fmt={_short(record.weight_spec)}"]
        if record.act_spec is not None:
            parts.append(f"act_fmt={_short(record.act_spec)}")
        return ", ".join(parts)

    def train(self, mode: bool = True) -> FakeQuantLinear:
        weight = self._parameters.get("weight")
        if weight is not None and weight_cache.cacheable(weight):
            weight_cache.check_sample(weight)
        return super().train(mode)

    def _raw_weight(self) -> Tensor:
        weight = self._parameters.get("weight")
        # torch.nn.utils.parametrize moves the parameter away and serves it through a property.
        return weight if weight is not None else self.weight

    def _effective(self, weight: Tensor, noise: Noise | None) -> Tensor:
        record = self._qnoise
        spec = record.weight_spec
        if noise is not None:
            weight = _with_relative_noise(weight, noise, record.name)
        if spec is None:
            return weight
        amax = None
        if spec.per_tensor_scale and len(record.scale_group) > 1:
            amax = weight_amax(weight)
            for peer in record.scale_group:
                if peer is not self:
                    amax = torch.maximum(amax, _peer_amax(peer).to(amax.device))
        return fake_quantize(weight, spec, amax=amax)


class _StraightThrough(torch.autograd.Function):
    """A kept Q(W) with the gradient of W."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, kept: Tensor) -> Tensor:
        return kept.view_as(kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _record(name: str, fmt: str | QuantSpec | None, act_fmt: str | QuantSpec | None, storage: str) -> LinearRecord:
    check_choice("storage", storage, STORAGES)
    return LinearRecord(
        name=name,
        stock_class=nn.Linear,
        weight_spec=None if fmt is None else as_spec(fmt),
        act_spec=None if act_fmt is None else as_spec(act_fmt),
        storage=storage,
    )


def weight_amax(weight: Tensor) -> Tensor:
    """max |w| over the finite values, 0-d fp32: what fixes a per-tensor scale."""
    magnitude = weight.detach().abs().float()
    return magnitude.nan_to_num_(nan=0.0, posinf=0.0).amax() if weight.numel() else magnitude.new_zeros(())


def _peer_amax(peer: FakeQuantLinear) -> Tensor:
    weight = peer._parameters.get("weight")
    if weight is not None and weight_cache.cacheable(weight):
        return weight_cache.derived(weight, slot="amax", key=None, compute=weight_amax)
    if peer._qnoise.patched_amax is None:
        raise ValueError(
            f"{peer._qnoise.name}: its weight is out of reach (offloaded or sharded) and its amax was not recorded, "
            "so the per-tensor scale it shares with its siblings is unknown. Patch before offloading, or patch with "
            "PatchConfig(share_scales=False)."
        )
    return peer._qnoise.patched_amax


def _serial(peer: FakeQuantLinear) -> int | None:
    weight = peer._parameters.get("weight")
    return weight_cache.serial(weight) if weight is not None and weight_cache.cacheable(weight) else None


def _quantize_tokens(x: Tensor, spec: QuantSpec, static_amax: float | None) -> Tensor:
    amax: Tensor | float | None = static_amax
    if spec.per_tensor_scale and amax is None:
        magnitude = x.detach().abs().float().nan_to_num_(nan=0.0, posinf=0.0)
        amax = magnitude.amax(dim=-1, keepdim=True)
    return fake_quantize(x, spec, amax=amax)


def _with_relative_noise(weight: Tensor, noise: Noise, name: str) -> Tensor:
    """W (1 + sigma z) in fp32, one z per weight."""
    z = torch.from_numpy(unit_normal(noise.seed, noise.step, name, tuple(weight.shape))).to(weight.device)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return (weight.to(dtype) * (1.0 + noise.sigma * z)).to(weight.dtype)


def _empty_like(linear: nn.Linear) -> nn.Linear:
    """A module of the same class and state on the same parameter objects, without hooks or children."""
    twin = type(linear).__new__(type(linear))
    nn.Module.__init__(twin)
    for attribute in ("in_features", "out_features", "training"):
        twin.__dict__[attribute] = getattr(linear, attribute)
    if "_qnoise" in linear.__dict__:
        twin.__dict__["_qnoise"] = linear.__dict__["_qnoise"]
    for parameter in ("weight", "bias"):
        twin.register_parameter(parameter, linear._parameters.get(parameter))
    return twin


def _short(spec: QuantSpec | None) -> str:
    return "none" if spec is None else str(spec)
