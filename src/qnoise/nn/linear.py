"""`FakeQuantLinear`: an `nn.Linear` whose forward sees Q(W), and Q(x) on request.

The backward is that of the dequantized operands, straight through the rounding: with w = Q(W) and a = Q(x),
grad_x = g w and grad_W = g^T a, which reach x and the raw parameter W unchanged (Bengio et al., arXiv 1308.3432).
The parameter itself is never written to: `.weight` is the raw weight, `effective_weight()` what the forward uses.

Codes that were chosen by more than the weight alone (error feedback, a search) are *pinned*: from then on they are what
the forward uses in place of Q(W), whatever the storage. The raw weight stays where it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qnoise.formats import QuantSpec, as_spec
from qnoise.functional import fake_quantize, quantize, rotate
from qnoise.nn import weight_cache
from qnoise.nn.patched import Patched, PatchRecord, autocast_dtype, convert, noise_of, record_of, restore, unit_noise_of
from qnoise.nn.sharding import check_gathered, is_sharded, largest_over_ranks, local_part
from qnoise.ops import fake_quantize_noisy, fuses_noise, tensor_amax
from qnoise.packing import BlockQuantized
from qnoise.spelling import check_choice

Storage = Literal["auto", "dynamic", "cached", "packed"]
STORAGES = ("auto", "dynamic", "cached", "packed")


@dataclass(frozen=True, eq=False)
class Pin:
    """Codes that stand for Q(W), and what tells whether W is still the weight they were made of."""

    quantized: BlockQuantized
    dtype: torch.dtype
    # Of the weight, and of the weight rounded to narrower dtypes, as sharding with mixed precision hands it out
    fingerprints: dict[torch.dtype, tuple[Tensor, Tensor]]


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
    pin: Pin | None = None


class FakeQuantLinear(Patched, nn.Linear):
    """Drop-in `nn.Linear` computing F.linear(Q(x), Q(W), bias).

    Args:
        in_features, out_features, bias, device, dtype: as for `nn.Linear`.
        fmt: format of the weight, a name or `QuantSpec`; None leaves the weight in full precision.
        act_fmt: format of the input, or None. Blocks run along the last axis; a per-tensor scale (NVFP4) is taken per
            token, so that padding, batch mates and later tokens cannot change a token.
        storage: "dynamic" quantizes in every forward. "cached" keeps Q(W), once a forward has made it, beside the
            weight until the weight changes, which doubles the weight memory. "auto" (default) keeps Q(W) of a weight
            that needs no gradient in this forward, and quantizes the others. "packed" keeps codes and scales and no
            weight: see `qnoise.nn.packed.PackedLinear`, which `from_linear` makes then.

    Raises:
        ValueError: unknown format or storage; "packed", which needs a weight to pack.
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
        if storage == "packed":
            raise ValueError(
                "storage='packed' packs a weight that is there; use FakeQuantLinear.from_linear(linear, "
                "storage='packed')"
            )
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
        """A FakeQuantLinear on the same parameters; `linear` itself stays as it is.

        With storage="packed", a `PackedLinear` on codes and scales made here.

        Raises:
            TypeError: `linear` is not an nn.Linear, or a subclass of it.
            ValueError: unknown format or storage; "packed" and the weight needs gradient, or `fmt` is None.
        """
        if type(linear) is not nn.Linear:
            raise TypeError(f"from_linear takes an nn.Linear, not {type(linear).__name__}: its forward is its own")
        twin = _empty_like(linear)
        record = _record("", fmt, act_fmt, storage)
        if storage == "packed":
            from qnoise.nn.packed import convert_packed, pack

            convert_packed(twin, record, pack(linear, record.weight_spec))
        else:
            convert(twin, cls, record)
        return cast(FakeQuantLinear, twin)

    def to_linear(self, dequantize: bool = False) -> nn.Linear:
        """A stock `nn.Linear` on the same parameters (the raw weight); this module stays as it is.

        Args:
            dequantize: of a packed linear, whose raw weight is gone: agree to get Q(W). No meaning for others.
        """
        twin = _empty_like(self)
        restore(twin)
        return twin

    # The raw parameter. Whoever reads it from outside may write to it through `.data`, which torch does not tell us.
    @property  # type: ignore[override]
    def weight(self) -> nn.Parameter:
        weight = self._parameters.get("weight")
        if weight is None:
            return cast(nn.Parameter, super().__getattr__("weight"))
        if "_qnoise_read" in self.__dict__:  # by a WeightReader, to compute with
            return cast(nn.Parameter, self.effective_weight())
        weight_cache.touch(weight)
        for shard in self._qnoise.shards.values():
            weight_cache.forget(local_part(shard))
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
            input = quantize_tokens(input, record.act_spec, record.act_amax)
        if torch.compiler.is_compiling():
            weight = self._raw_weight()
            # The backward of `kept_linear` looks Q(W) up again, and noise may be another one by then.
            noisy = bool(record.noise_during)
            plain = type(weight) in (Tensor, nn.Parameter)
            if plain and not noisy and not _trained(weight) and _kept_is_right(record, weight):
                return _kept_linear(record, input, weight, self.bias)
        return F.linear(input, self.effective_weight(), self.bias)

    def effective_weight(self) -> Tensor:
        """The weight a forward done now uses: Q(W), or Q(W (1 + sigma z)) where weight noise acts, or pinned codes.

        (out_features, in_features), dtype of the weight. Differentiable (straight through) where the weight needs
        gradient and grad mode is on.

        Raises:
            ValueError: codes are pinned, and the weight needs gradient or was written to since.
        """
        record = self._qnoise
        weight = self._raw_weight()
        if record.pin is not None and _trained(weight) and not record.full_precision:
            raise ValueError(f"{_named(record)}.weight needs gradient, {_PINNED_IS_FROZEN}")
        if not _kept_is_right(record, weight) or torch.compiler.is_compiling():
            return _effective(record, weight)
        kept = _kept(record, weight)
        return StraightThrough.apply(weight, kept) if _trained(weight) else kept

    def pin(self, quantized: BlockQuantized | None) -> None:
        """Use these codes in place of Q(W) from now on; None: Q(W) again.

        `effective_weight()` is then `quantized.dequantize(weight.dtype)`, bit for bit; `bake` writes it out, and
        `unpatch_model` takes it off. The pin follows the module through `.to`, `copy.deepcopy`, pickling and PEFT, and
        is no part of the `state_dict`. It is for the weight as it is now: if that is written to (by an optimizer, by
        merging an adapter), the next forward raises, because the codes say nothing of the new weight.

        Args:
            quantized: codes of a tensor of the weight's shape, blocks along the last axis, in the format the linear was
                patched with. How its scales and codes were chosen (`scale_mode`, `rounding`) is its own matter.

        Raises:
            TypeError: neither a `BlockQuantized` nor None.
            ValueError: another shape, axis or format; the weight is not quantized, needs gradient, has noise or is out
                of reach (offloaded, sharded, computed by a hook).
        """
        record = self._qnoise
        weight = self._parameters.get("weight")
        if quantized is None:
            record.pin = None
        else:
            record.pin = _pin(record, weight, quantized)
        if weight is not None:
            weight_cache.forget(weight)

    def quantized(self) -> BlockQuantized:
        """Codes and scales of the weight the forward uses, without noise: pinned, or made of the raw weight now.

        `.dequantize(weight.dtype)` of it is `effective_weight()`, bit for bit.

        Raises:
            ValueError: the weight is not quantized, or rounded stochastically (each time is another draw); it was
                written to after it was pinned.
        """
        record, weight = self._qnoise, self._raw_weight()
        if record.pin is not None:
            _check_pinned(record, weight)
            return record.pin.quantized
        spec = record.weight_spec
        if spec is None:
            raise ValueError(f"{_named(record)}: its weight is not quantized (fmt=None), so it has no codes")
        if spec.rounding == "stochastic":
            raise ValueError(
                f"{_named(record)}: its weight is rounded stochastically, and codes made now are another draw than "
                "those of the forward. Fix one draw with linear.pin(qnoise.quantize(linear.weight, spec))."
            )
        with torch.inference_mode(False), torch.no_grad():
            return quantize(weight, spec, amax=joint_amax(record, weight))

    def extra_repr(self) -> str:
        record = self._qnoise
        parts = [super().extra_repr(), f"fmt={_short(record.weight_spec)}"]
        if record.pin is not None:
            parts.append("pinned")
        if record.act_spec is not None:
            parts.append(f"act_fmt={_short(record.act_spec)}")
        return ", ".join(parts)

    def train(self, mode: bool = True) -> FakeQuantLinear:
        weight = self._parameters.get("weight")
        if weight is not None:
            weight_cache.check_sample(weight)
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> FakeQuantLinear:
        record = self._qnoise
        before = self._parameters.get("weight")
        if record.pin is not None and before is not None:
            _check_pinned(record, before)
        super()._apply(fn, recurse)
        weight = self._parameters.get("weight")
        there = weight is not None and before is not None and not (weight.is_meta or before.is_meta)
        if record.pin is not None and there:
            # Moved and cast by its owner, it is the same weight still.
            record.pin = _pin(record, weight, record.pin.quantized)
        return self

    def _raw_weight(self) -> Tensor:
        weight = self._parameters.get("weight")
        # torch.nn.utils.parametrize moves the parameter away and serves it through a property.
        return weight if weight is not None else self.weight


class StraightThrough(torch.autograd.Function):
    """A kept Q(W) with the gradient of W."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, kept: Tensor) -> Tensor:
        return kept.view_as(kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


# What compiled code calls for a linear served from the cache. The look-up happens when it runs: a write to the weight
# is seen as it is without a compiler, and the compiler cannot take the kept Q(W) for memory of its own.
torch.library.define(
    "qnoise::kept_linear",
    "(Tensor input, Tensor weight, Tensor? bias, Tensor[] peers, Tensor handle) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)
torch.library.define(
    "qnoise::kept_linear_backward",
    "(Tensor grad, Tensor weight, Tensor[] peers, Tensor handle) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)


def _kept_linear(record: LinearRecord, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    peers = [w for w in [peer._parameters.get("weight") for peer in record.scale_group] if w is not None]
    input, bias = autocast(input, bias)
    return cast(Tensor, torch.ops.qnoise.kept_linear(input, weight, bias, peers, record.handle))


@torch.library.impl("qnoise::kept_linear", "CompositeExplicitAutograd")
def _kept_linear_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, peers: list[Tensor], handle: Tensor
) -> Tensor:
    kept = _kept(cast(LinearRecord, record_of(handle)), weight)
    return F.linear(input, kept.to(input.dtype), bias)


@torch.library.impl("qnoise::kept_linear_backward", "CompositeExplicitAutograd")
def _kept_linear_backward(grad: Tensor, weight: Tensor, peers: list[Tensor], handle: Tensor) -> Tensor:
    kept = _kept(cast(LinearRecord, record_of(handle)), weight)
    return grad @ kept.to(grad.dtype)


@torch.library.register_fake("qnoise::kept_linear")
def _kept_linear_fake(
    input: Tensor, weight: Tensor, bias: Tensor | None, peers: list[Tensor], handle: Tensor
) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


@torch.library.register_fake("qnoise::kept_linear_backward")
def _kept_linear_backward_fake(grad: Tensor, weight: Tensor, peers: list[Tensor], handle: Tensor) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], weight.shape[1])


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, _, peers, handle = inputs
    ctx.save_for_backward(weight, handle, *peers)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, list[None], None]:
    weight, handle, *peers = ctx.saved_tensors
    of_input = of_bias = None
    if ctx.needs_input_grad[0]:
        of_input = torch.ops.qnoise.kept_linear_backward(grad, weight, peers, handle)
    if ctx.needs_input_grad[2]:
        of_bias = grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad
    return of_input, None, of_bias, [None] * len(peers), None


torch.library.register_autograd("qnoise::kept_linear", _gradients, setup_context=_save_for_backward)


def autocast(input: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """What autocast makes of the operands of a linear: for code that does not call one."""
    dtype = autocast_dtype(input.device)
    if dtype is None or input.dtype == torch.float64:
        return input, bias
    return input.to(dtype), None if bias is None else bias.to(dtype)


def _record(name: str, fmt: str | QuantSpec | None, act_fmt: str | QuantSpec | None, storage: str) -> LinearRecord:
    check_choice("storage", storage, STORAGES)
    return LinearRecord(
        name=name,
        stock_class=nn.Linear,
        weight_spec=None if fmt is None else as_spec(fmt),
        act_spec=None if act_fmt is None else as_spec(act_fmt),
        storage=storage,
    )


def _trained(weight: Tensor) -> bool:
    return weight.requires_grad and torch.is_grad_enabled()


def _kept_is_right(record: LinearRecord, weight: Tensor) -> bool:
    """Whether a forward done now is served from the cache."""
    if record.full_precision or (record.weight_spec is None and not record.acts):
        return False
    if record.pin is not None:
        return not record.shards
    if record.shards:
        return False
    return record.storage == "cached" or (record.storage == "auto" and not _trained(weight))


def _kept(record: LinearRecord, weight: Tensor) -> Tensor:
    """Q(W), made if the cache has none."""
    if record.pin is not None:
        return weight_cache.derived(weight, slot=record.pin, key=None, compute=lambda w: _effective(record, w))
    group = record.scale_group
    peers = tuple([_serial(peer) for peer in group if peer._qnoise is not record]) if group else ()
    noise = record.noise if record.acts else None
    return weight_cache.derived(
        weight,
        slot=record.weight_spec,
        key=(noise, record.name if noise else None, peers),
        compute=lambda w: _effective(record, w),
    )


def _effective(record: LinearRecord, weight: Tensor) -> Tensor:
    """Q(W) or Q(W (1 + sigma z)), computed."""
    spec = record.weight_spec
    if record.full_precision:
        return weight
    if not torch.compiler.is_compiling():
        check_gathered(weight, f"{_named(record)}.weight")
    if record.pin is not None:
        _check_pinned(record, weight)
        return record.pin.quantized.to(weight.device).dequantize(weight.dtype)
    if record.acts and spec is not None and not _trained(weight) and fuses_noise(weight, spec):
        z = unit_noise_of(record, weight)
        return fake_quantize_noisy(weight, spec, z, record.sigma, _peers_amax(record, weight))
    used = _with_relative_noise(weight, record) if record.acts else weight
    if spec is None:
        return used
    return fake_quantize(used, spec, amax=joint_amax(record, weight, used))


def joint_amax(record: LinearRecord, weight: Tensor, used: Tensor | None = None) -> Tensor | None:
    """What fixes the per-tensor scale the linear shares with its siblings; None: the weight's own amax, or no such
    scale. `used` is the weight with its noise."""
    peers = _peers_amax(record, weight)
    if peers is None:
        return None
    spec = record.weight_spec
    own = _amax_of(record, weight, weight.dtype) if used is None or used is weight else weight_amax(used, spec)
    return torch.maximum(own, peers)


def _peers_amax(record: LinearRecord, weight: Tensor) -> Tensor | None:
    """The largest amax among the siblings, without the linear itself; None: no shared scale."""
    spec = record.weight_spec
    if spec is None or not spec.per_tensor_scale or len(record.scale_group) < 2:
        return None
    each = [_peer_amax(peer, weight.dtype) for peer in record.scale_group if peer._qnoise is not record]
    return torch.stack([amax.to(weight.device) for amax in each]).amax() if each else None


_PINNED_IS_FROZEN = (
    "and its quantized codes are pinned: they would not follow it. Freeze it (requires_grad_(False)) and train an "
    "adapter, or take the pin off with linear.pin(None)"
)


def _pin(record: LinearRecord, weight: Tensor | None, quantized: BlockQuantized) -> Pin:
    """The pin of these codes, checked against the weight as it is now."""
    name, spec = _named(record), record.weight_spec
    if not isinstance(quantized, BlockQuantized):
        raise TypeError(
            f"{name}: pin takes a BlockQuantized (of qnoise.quantize) or None, not {type(quantized).__name__}"
        )
    if spec is None:
        raise ValueError(f"{name}: its weight is not quantized (fmt=None), so no codes can be pinned to it")
    if weight is None or weight.is_meta or type(weight) not in (Tensor, nn.Parameter):
        where = "no parameter of its own" if weight is None else f"a {type(weight).__name__} on {weight.device}"
        raise ValueError(f"{name}.weight is out of reach ({where}); pin its codes before offloading or sharding")
    if weight.requires_grad:
        raise ValueError(f"{name}.weight needs gradient, {_PINNED_IS_FROZEN}")
    if record.noise_during:
        raise ValueError(
            f"{name}: noise acts on its weight before it is quantized, and pinned codes leave no place for that. Patch "
            "with noise='rmsnorm', or without noise on this linear."
        )
    if quantized.shape != weight.shape or quantized.axis != 1:
        raise ValueError(
            f"{name}: the codes are of a tensor of shape {tuple(quantized.shape)} with blocks along axis "
            f"{quantized.axis}; the weight has shape {tuple(weight.shape)} and blocks along axis 1"
        )
    if _layout(quantized.spec) != _layout(spec):
        raise ValueError(f"{name}: the codes are in {quantized.spec}, and the linear was patched with {spec}")
    narrower = [d for d in (torch.bfloat16, torch.float16) if d.itemsize < weight.dtype.itemsize]
    fingerprints = {d: weight_cache.fingerprint(weight.detach().to(d)) for d in (weight.dtype, *narrower)}
    return Pin(quantized.to(weight.device), weight.dtype, fingerprints)


def _layout(spec: QuantSpec) -> QuantSpec:
    """The spec without what only says how scales and codes were chosen."""
    return replace(spec, scale_mode=None, rounding="nearest")


def _check_pinned(record: LinearRecord, weight: Tensor) -> None:
    """Raise if the weight is not the one the pinned codes were made of."""
    pin = record.pin
    if pin is None or weight.is_meta or torch.compiler.is_compiling():
        return
    # A weight that was only stored wider since still is what it was.
    dtype = weight.dtype if weight.dtype in pin.fingerprints else pin.dtype
    if not weight_cache.same_bits(weight.detach().to(dtype), pin.fingerprints[dtype]):
        raise ValueError(
            f"{_named(record)}.weight was written to after quantized codes were pinned to it (an adapter merged or "
            "unmerged, a checkpoint loaded, a step taken), so they are not its own any more. Take the pin off with "
            "linear.pin(None), or pin codes made of the weight as it is now."
        )


def _named(record: LinearRecord) -> str:
    return record.name or "this linear"


def weight_amax(weight: Tensor, spec: QuantSpec | None = None) -> Tensor:
    """max |w| over the finite values, 0-d fp32: what fixes a per-tensor scale. With a spec that rotates, that of the
    rotated weight."""
    if type(weight) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling() and weight.device.type != "meta":
        return tensor_amax(weight, spec)
    magnitude = _turned(weight.detach(), spec).abs().float()
    return magnitude.nan_to_num_(nan=0.0, posinf=0.0).amax() if weight.numel() else magnitude.new_zeros(())


def kept_amax(weight: Tensor, spec: QuantSpec | None = None) -> Tensor:
    """`weight_amax`, computed once for each change of the weight."""
    if torch.compiler.is_compiling():
        return weight_amax(weight, spec)
    if spec is None or spec.rotation is None:
        return weight_cache.derived(weight, slot="amax", key=None, compute=weight_amax)
    slot = ("amax", spec.rotation, spec.block_format.block_size)
    return weight_cache.derived(weight, slot=slot, key=None, compute=lambda w: weight_amax(w, spec))


def _turned(x: Tensor, spec: QuantSpec | None) -> Tensor:
    """What `spec` quantizes: x, or x rotated."""
    return x if spec is None or spec.rotation is None else rotate(x, spec)


def _peer_amax(peer: FakeQuantLinear, dtype: torch.dtype) -> Tensor:
    weight = peer._parameters.get("weight")
    reachable = weight is not None and (torch.compiler.is_compiling() or weight_cache.cacheable(weight))
    if weight is not None and (reachable or is_sharded(weight)):
        return _amax_of(peer._qnoise, weight, dtype)
    if peer._qnoise.patched_amax is None:
        raise ValueError(
            f"{peer._qnoise.name}: its weight is out of reach (offloaded) and its amax was not recorded, "
            "so the per-tensor scale it shares with its siblings is unknown. Patch before offloading, or patch with "
            "PatchConfig(share_scales=False)."
        )
    return peer._qnoise.patched_amax


def _amax_of(record: LinearRecord, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The amax of a linear's weight in that dtype, computed once for each change of the weight."""
    spec, shard = record.weight_spec, record.shards.get("weight")
    if shard is None or torch.compiler.is_compiling():
        return kept_amax(weight, spec)
    # The memory a weight is gathered into says nothing of its changes; the shard does, on all ranks at once.
    return weight_cache.derived(
        local_part(shard),
        slot=("amax", spec, dtype),
        key=None,
        compute=lambda part: (
            largest_over_ranks(shard, weight_amax(part.to(dtype), spec))
            if is_sharded(weight)
            else weight_amax(weight, spec)
        ),
    )


def _serial(peer: FakeQuantLinear) -> int | None:
    weight = peer._parameters.get("weight")
    return None if weight is None else weight_cache.serial(weight)


def quantize_tokens(x: Tensor, spec: QuantSpec, static_amax: float | None) -> Tensor:
    amax: Tensor | float | None = static_amax
    if spec.per_tensor_scale and amax is None:
        magnitude = _turned(x.detach(), spec).abs().float().nan_to_num_(nan=0.0, posinf=0.0)
        amax = magnitude.amax(dim=-1, keepdim=True)
    return fake_quantize(x, spec, amax=amax)


def _with_relative_noise(weight: Tensor, record: LinearRecord) -> Tensor:
    """W (1 + sigma z) in fp32, one z per weight."""
    noise = noise_of(record, weight)
    return (weight.to(noise.dtype) * (1.0 + noise)).to(weight.dtype)


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
