"""`FakeQuantLinear`: an `nn.Linear` whose forward sees Q(W), and Q(x) on request.

The backward is that of the dequantized operands, straight through the rounding: with w = Q(W) and a = Q(x),
grad_x = g w and grad_W = g^T a, which reach x and the raw parameter W unchanged (Bengio et al., arXiv 1308.3432).
The parameter itself is never written to: `.weight` is the raw weight, `effective_weight()` what the forward uses.

Codes that were chosen by more than the weight alone (error feedback, a search) are *pinned*: from then on they are what
the forward uses in place of Q(W), whatever the storage. The raw weight stays where it is.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qnoise.formats import QuantSpec
from qnoise.functional import quantize
from qnoise.nn import weight_cache
from qnoise.nn.effective import StraightThrough, effective_weight, kept_is_right, kept_weight, trained
from qnoise.nn.kept_linear import kept_linear
from qnoise.nn.linear_record import LinearRecord, Storage, named, new_record
from qnoise.nn.patched import Patched, convert, restore
from qnoise.nn.pinning import PINNED_IS_FROZEN, check_pinned, make_pin
from qnoise.nn.sharding import local_part
from qnoise.nn.shared_scale import joint_amax
from qnoise.nn.tokens import quantize_tokens
from qnoise.packing import BlockQuantized


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
        record = new_record("", fmt, act_fmt, storage)
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
        record = new_record("", fmt, act_fmt, storage)
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
            if plain and not noisy and not trained(weight) and kept_is_right(record, weight):
                return kept_linear(record, input, weight, self.bias)
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
        if record.pin is not None and trained(weight) and not record.full_precision:
            raise ValueError(f"{named(record)}.weight needs gradient, {PINNED_IS_FROZEN}")
        if not kept_is_right(record, weight) or torch.compiler.is_compiling():
            return effective_weight(record, weight)
        kept = kept_weight(record, weight)
        return StraightThrough.apply(weight, kept) if trained(weight) else kept

    def pin(self, quantized: BlockQuantized | None, *, asymmetric: bool = False) -> None:
        """Use these codes in place of Q(W) from now on; None: Q(W) again.

        `effective_weight()` is then `quantized.dequantize(weight.dtype)`, bit for bit; `bake` writes it out, and
        `unpatch_model` takes it off. The pin follows the module through `.to`, `copy.deepcopy`, pickling and PEFT, and
        is no part of the `state_dict`. It is for the weight as it is now: if that is written to (by an optimizer, by
        merging an adapter), the next forward raises, because the codes say nothing of the new weight.

        Args:
            quantized: codes of a tensor of the weight's shape, blocks along the last axis, in the format the linear was
                patched with. How its scales and codes were chosen (`scale_mode`, `rounding`) is its own matter.
            asymmetric: they were chosen to make good what was lost before this linear, too; a repair that fits
                something to what they leave has to know.

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
            record.pin = make_pin(record, weight, quantized, asymmetric)
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
            check_pinned(record, weight)
            return record.pin.quantized
        spec = record.weight_spec
        if spec is None:
            raise ValueError(f"{named(record)}: its weight is not quantized (fmt=None), so it has no codes")
        if spec.rounding == "stochastic":
            raise ValueError(
                f"{named(record)}: its weight is rounded stochastically, and codes made now are another draw than "
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
            check_pinned(record, before)
        super()._apply(fn, recurse)
        weight = self._parameters.get("weight")
        there = weight is not None and before is not None and not (weight.is_meta or before.is_meta)
        if record.pin is not None and there:
            # Moved and cast by its owner, it is the same weight still.
            record.pin = make_pin(record, weight, record.pin.quantized)
        return self

    def _raw_weight(self) -> Tensor:
        weight = self._parameters.get("weight")
        # torch.nn.utils.parametrize moves the parameter away and serves it through a property.
        return weight if weight is not None else self.weight


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
