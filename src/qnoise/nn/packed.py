"""`PackedLinear`: a `FakeQuantLinear` that holds codes and block scales, and no weight.

4.25 bits a weight in MXFP4 and 4.5 in NVFP4, instead of 16 or 32. Forward and backward each dequantize the weight anew,
into memory that is free again when the product is done; what autograd keeps between them are the codes. For a few
tokens on a CPU, as in decoding, the weight is never there as a whole: see `_by_rows`. It is frozen: gradient reaches
the input and the bias.

Everything is kept in `uint8` buffers, so that `.to(torch.bfloat16)`, `.half()` and what prepares a model for training
on 4 bits cannot round it; the fp32 divisor of NVFP4 is its four bytes:

    weight_codes    (out_features, bytes of a row)   as `qnoise.packing` lays them out
    weight_scales   (out_features, blocks)           E8M0 or E4M3 bytes
    weight_divisor  (4,)                             NVFP4 only: gs of the rule code * (S / gs), fp32, native byte order
    weight_format   (length of the name,)            the format's name in ASCII, with its rotation (nvfp4+hadamard);
                                                     checked when a checkpoint is loaded

`quantized_weight` shows the same memory as torch's float8 and fp32 tensors. DistributedDataParallel broadcasts buffers
in every forward: give it `broadcast_buffers=False`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from qnoise.formats import QuantSpec
from qnoise.functional import quantize
from qnoise.nn.kept_linear import autocast
from qnoise.nn.linear import FakeQuantLinear
from qnoise.nn.linear_record import LinearRecord
from qnoise.nn.patched import convert, restore
from qnoise.nn.tokens import quantize_tokens
from qnoise.ops import dequantize_rows
from qnoise.packing import BlockQuantized
from qnoise.reference import check_storable

_BUFFERS = ("weight_codes", "weight_scales", "weight_divisor", "weight_format")


class PackedLinear(FakeQuantLinear):
    """What `FakeQuantLinear.from_linear(linear, storage="packed")` and `patch_model(storage="packed")` make.

    Computes F.linear(Q(x), Q(W), bias), bit for bit what the other storages compute. Q(W) is dequantized to the dtype
    of the module, which follows `.to(dtype)` as a weight would, and cast to the dtype of the input where they differ.

    `.weight` is a `PackedWeight`: it has the shape, dtype and device of the weight, dequantizes when it is read, and
    refuses to be written to.
    """

    # Of the weight that the codes stand for
    _qnoise_dtype: torch.dtype

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("a PackedLinear is made of a linear: FakeQuantLinear.from_linear(linear, storage='packed')")

    @property
    def quantized_weight(self) -> BlockQuantized:
        """Codes, scales and divisor as a `BlockQuantized` on the buffers' own memory."""
        divisor = self._buffers["weight_divisor"]
        return BlockQuantized(
            cast(Tensor, self._buffers["weight_codes"]),
            cast(Tensor, self._buffers["weight_scales"]),
            None if divisor is None else divisor.view(torch.float32).reshape(()),
            torch.Size((self.out_features, self.in_features)),
            cast(QuantSpec, self._qnoise.weight_spec),
            1,
            self._qnoise_dtype,
        )

    @property  # type: ignore[misc]
    def weight(self) -> PackedWeight:  # type: ignore[override]
        return PackedWeight(self.quantized_weight, self._qnoise.name)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        record = self._qnoise
        if record.full_precision:
            raise ValueError(f"{_named(record.name)}: {_GONE}, so there is no full-precision forward")
        if record.act_spec is not None:
            input = quantize_tokens(input, record.act_spec, record.act_amax)
        input, bias = autocast(input, self.bias)
        spec, divisor = cast(QuantSpec, record.weight_spec), self._buffers["weight_divisor"]
        codes, scales = cast(Tensor, self._buffers["weight_codes"]), cast(Tensor, self._buffers["weight_scales"])
        gs = codes.new_empty(0, dtype=torch.float32) if divisor is None else divisor.view(torch.float32).reshape(())
        shape = (self.out_features, self.in_features)
        reading = _Reading(spec.fmt, cast(str, spec.scale_mode), spec.rotation, shape, self._qnoise_dtype)
        if torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad)):
            return cast(Tensor, _Product.apply(input, bias, codes, scales, gs, reading))
        return _product(input, bias, codes, scales, gs, reading)

    def effective_weight(self) -> Tensor:
        """Q(W), dequantized anew: (out_features, in_features), dtype of the module, no gradient."""
        return self.quantized_weight.dequantize()

    def pin(self, quantized: BlockQuantized | None, *, asymmetric: bool = False) -> None:
        """Refuses: the codes it holds are all there is of its weight."""
        raise ValueError(
            f"{_named(self._qnoise.name)}: {_GONE}, so the codes it has are pinned already. Pin codes with "
            "storage='auto', then switch to packed storage with qnoise.patch.pack_model(model)."
        )

    def quantized(self) -> BlockQuantized:
        """`quantized_weight`."""
        return self.quantized_weight

    def to_linear(self, dequantize: bool = False) -> nn.Linear:
        """A stock `nn.Linear` on Q(W); this module stays as it is.

        Raises:
            ValueError: unless `dequantize` is true: the weight before quantization is gone.
        """
        if not dequantize:
            raise ValueError(f"{_named(self._qnoise.name)}: {_GONE}; to_linear(dequantize=True) gives Q(W)")
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=False)
        linear.weight = nn.Parameter(self.effective_weight(), requires_grad=False)
        linear.bias = cast(nn.Parameter, self._parameters["bias"])
        return linear.train(self.training)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuses a new weight, for which there is no place."""
        if name == "weight" and param is not None:
            _refuse(self._qnoise.name)
        super().register_parameter(name, param)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, storage=packed"

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLinear:
        def of_tensor(tensor: Tensor) -> Tensor:
            # `Module.type` converts integers too: what is wanted of codes is their device.
            done = fn(tensor)
            return done if tensor.is_floating_point() or done.dtype == tensor.dtype else tensor.to(done.device)

        super()._apply(of_tensor, recurse)
        codes = cast(Tensor, self._buffers["weight_codes"])
        dtype = fn(torch.empty(0, dtype=self._qnoise_dtype, device=codes.device)).dtype
        if dtype.is_floating_point:
            self.__dict__["_qnoise_dtype"] = dtype
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = {name: state_dict[prefix + name] for name in _BUFFERS if prefix + name in state_dict}
        own = _tag(cast(QuantSpec, self._qnoise.weight_spec))
        stored = given.get("weight_format")
        wrong = [f"{name} as {tensor.dtype}" for name, tensor in given.items() if tensor.dtype != torch.uint8]
        if f"{prefix}weight" in state_dict:
            error_msgs.append(
                f"{prefix}weight is a full-precision weight and this linear is packed: load it into the stock model "
                "and patch that, or call unpatch_model(model, dequantize=True) first"
            )
        elif wrong:
            error_msgs.append(f"{prefix}: the checkpoint holds {', '.join(wrong)}; packed tensors are torch.uint8")
        elif stored is not None and bytes(stored.tolist()) != own.encode():
            error_msgs.append(
                f"{prefix}weight_codes are {bytes(stored.tolist()).decode(errors='replace')!r} and the linear was "
                f"patched with {own!r}; patch the model with the format of the checkpoint"
            )
        else:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )


class PackedWeight(Tensor):
    """Stands for the weight of a `PackedLinear`: shape, dtype and device are there, any operation dequantizes first.

    Writing (in place, through `.data`, asking for gradient) raises ValueError: it could not last. A view is a view of a
    dequantized copy.
    """

    _packed: BlockQuantized
    _name: str

    @staticmethod
    def __new__(cls, packed: BlockQuantized, name: str = "") -> PackedWeight:
        self = Tensor._make_wrapper_subclass(cls, packed.shape, dtype=packed.dtype, device=packed.codes.device)
        self._packed, self._name = packed, name
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight({self._packed.spec}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def dequantize(self) -> Tensor:
        """Q(W) as an ordinary tensor."""
        return self._packed.dequantize()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(args[0] if args else None, cls):
            if func in _WRITES or (func in _TRAINS and (args[1:] or (True,))[0]):
                _refuse(args[0]._name)
            if func == _DATA:
                return cls(args[0]._packed, args[0]._name)
            if func in _NEEDS_MEMORY:
                return func(args[0].dequantize(), *args[1:], **(kwargs or {}))
        # Not Tensor's own, which would make PackedWeights of the results.
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func is torch.ops.aten.detach.default:
            return cls(args[0]._packed, args[0]._name)
        kwargs = kwargs or {}
        for place, declared in enumerate(func._schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(declared.name)
            if declared.is_write and isinstance(value, cls):
                _refuse(value._name)
        args, kwargs = tree_map_only(cls, cls.dequantize, (args, kwargs))
        return func(*args, **kwargs)


_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_WRITES = {Tensor.data.__set__, Tensor.__setitem__}  # type: ignore[attr-defined]
_TRAINS = {Tensor.requires_grad.__set__, Tensor.requires_grad_}  # type: ignore[attr-defined]
_NEEDS_MEMORY = {Tensor.numpy, Tensor.tolist, Tensor.__array__}

_GONE = "its weight is stored as codes and scales, the full-precision weight is gone"


def _named(name: str) -> str:
    return name or "this linear"


def _refuse(name: str) -> NoReturn:
    raise ValueError(
        f"{_named(name)}: {_GONE}, and codes cannot be trained or written to through it. For merging an adapter or "
        "changing the weight, call qnoise.unpatch_model(model, dequantize=True) first; to train the weight itself, "
        "patch the stock model with storage='auto'."
    )


def pack(linear: nn.Linear, spec: QuantSpec | None, amax: Tensor | None = None, name: str = "") -> BlockQuantized:
    """Codes and scales of a linear's weight.

    Args:
        linear: a stock linear with a frozen weight.
        spec: format of the weight.
        amax: 0-d, what fixes the per-tensor scale; None for the weight's own.
        name: for the messages.

    Raises:
        ValueError: `spec` is None, the weight needs gradient, or it is out of reach (offloaded, computed by a hook).
    """
    if spec is None:
        raise ValueError(f"{_named(name)}: storage='packed' stores a quantized weight, and fmt is None")
    weight = check_packed(linear, name)
    try:
        check_storable(spec)
    except ValueError as error:
        raise ValueError(f"{_named(name)}: {error}") from None
    with torch.inference_mode(False), torch.no_grad():
        return quantize(weight, spec, amax=amax)


def check_packed(linear: nn.Module, name: str) -> nn.Parameter:
    """The weight of a linear that may be packed; ValueError if it may not, as `pack` says."""
    weight = linear._parameters.get("weight")
    if weight is None:
        raise ValueError(f"{_named(name)}: its weight is no parameter of its own, so it cannot be stored packed")
    if weight.requires_grad:
        raise ValueError(
            f"{_named(name)}.weight needs gradient, and storage='packed' keeps no weight that could be trained. Freeze "
            "it (model.requires_grad_(False), then add an adapter), or use storage='auto' to train it through the "
            "quantization."
        )
    if weight.device.type == "meta" and "_hf_hook" in linear.__dict__:
        raise ValueError(
            f"{_named(name)}.weight is offloaded; pack the model before it is offloaded (packed, it may fit without)"
        )
    return weight


def convert_packed(linear: nn.Module, record: LinearRecord, packed: BlockQuantized) -> None:
    """Make `linear` a PackedLinear on `packed`, in place. Its weight is let go of."""
    convert(linear, PackedLinear, record)
    gs = packed.per_tensor_scale
    tag = torch.tensor(list(_tag(packed.spec).encode()), dtype=torch.uint8, device=packed.codes.device)
    linear._parameters["weight"] = None
    linear._buffers["weight_codes"] = packed.codes
    linear._buffers["weight_scales"] = packed.scale_codes
    linear._buffers["weight_divisor"] = None if gs is None else gs.reshape(1).view(torch.uint8)
    linear._buffers["weight_format"] = tag
    linear.__dict__["_qnoise_dtype"] = packed.dtype


def restore_packed(linear: PackedLinear, weight: nn.Parameter | None = None) -> None:
    """A stock linear again, in place, on `weight`, or on Q(W), frozen."""
    if weight is None:
        weight = nn.Parameter(linear.effective_weight(), requires_grad=False)
    for name in _BUFFERS:
        linear._buffers.pop(name, None)
    restore(linear)
    linear._parameters["weight"] = weight


def _tag(spec: QuantSpec) -> str:
    """How the codes are to be read, as a checkpoint has it."""
    return spec.fmt if spec.rotation is None else f"{spec.fmt}+{spec.rotation}"


class _Reading(NamedTuple):
    """What is to be known of codes beside the tensors: how they are read, and the weight they stand for."""

    fmt: str
    scale_mode: str
    rotation: str | None
    shape: tuple[int, int]
    # Q(W) is rounded to this first, whatever dtype the product is computed in
    dtype: torch.dtype

    @property
    def spec(self) -> QuantSpec:
        return QuantSpec(self.fmt, self.scale_mode, rotation=self.rotation)

    def rounded(self, wanted: torch.dtype) -> torch.dtype:
        """The dtype to dequantize to on the way to `wanted`."""
        # fp32 holds every value before it is rounded, so it needs no step of its own.
        return wanted if self.dtype in (torch.float32, torch.float64) else self.dtype


def _product(
    input: Tensor, bias: Tensor | None, codes: Tensor, scales: Tensor, gs: Tensor, reading: _Reading
) -> Tensor:
    if _by_rows(input, bias, reading):
        return cast(Tensor, torch.ops.qnoise.packed_linear(input, codes, scales, gs, bias, *reading))
    return F.linear(input, _dense(codes, scales, gs, reading, input.dtype), bias)


class _Product(torch.autograd.Function):
    """F.linear with a packed weight. What it saves are codes and scales; grad_input = grad_output Q(W)."""

    generate_vmap_rule = True
    forward = staticmethod(_product)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[2:5])
        ctx.reading = inputs[5]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        of_input = of_bias = None
        if ctx.needs_input_grad[0]:
            codes, scales, gs = ctx.saved_tensors
            of_input = grad @ _dense(codes, scales, gs, ctx.reading, grad.dtype)
        if ctx.needs_input_grad[1]:
            of_bias = grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad
        return of_input, of_bias, None, None, None, None


def _dense(codes: Tensor, scales: Tensor, gs: Tensor, reading: _Reading, wanted: torch.dtype) -> Tensor:
    """Q(W) rounded to the dtype of the weight, as `wanted`."""
    fmt, scale_mode, rotation, shape, _ = reading
    dtype = reading.rounded(wanted)
    dense = torch.ops.qnoise.dequantize(codes, scales, gs, fmt, scale_mode, shape, 1, dtype, rotation)
    return cast(Tensor, dense.to(wanted))


# ---- a few tokens on a CPU ----
#
# There, most of the time would go into the pages of a dense weight that lives for one product. So it is made some rows
# at a time, in memory that stays in the cache, and each piece is multiplied at once.

_FEW_TOKENS = 64
_PIECE_BYTES = 1 << 22
"""Threads meet twice for each piece, so it is not smaller than it has to be."""
_LEAST_ROWS = 128
"""A matrix product sums shorter pieces, of a few rows, in another order than the whole weight."""


def _piece(reading: _Reading, itemsize: int) -> int:
    """Rows of a piece, at least; the last one takes the remainder, too."""
    wanted = _PIECE_BYTES // max(1, reading.shape[1] * itemsize)
    return max(_LEAST_ROWS, wanted // _LEAST_ROWS * _LEAST_ROWS)


def _by_rows(input: Tensor, bias: Tensor | None, reading: _Reading) -> bool:
    """Whether the weight is dequantized and multiplied piece by piece.

    The result has the bits of the product with the whole weight where torch's product sums an output in an order that
    does not depend on how many outputs there are. On x86 it does so from `_LEAST_ROWS` on, in these three dtypes (the
    tests hold it to that) and not in fp64. Elsewhere the last bit may differ.
    """
    if input.device.type != "cpu" or input.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    if reading.shape[0] < 2 * _piece(reading, input.element_size()):
        return False
    return 0 < math.prod(input.shape[:-1]) <= _FEW_TOKENS and not _transformed(input) and not _transformed(bias)


def _transformed(x: Tensor | None) -> bool:
    """Whether a transform of `torch.func` has to see through the product, which it cannot if that is one operator."""
    return x is not None and not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x)


torch.library.define(
    "qnoise::packed_linear",
    "(Tensor input, Tensor codes, Tensor scales, Tensor divisor, Tensor? bias, str fmt, str scale_mode, "
    "str? rotation, SymInt[] shape, ScalarType dtype) -> Tensor",
)


@torch.library.impl("qnoise::packed_linear", "CompositeExplicitAutograd")
def _packed_linear(input: Tensor, codes: Tensor, scales: Tensor, gs: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    """F.linear(input, Q(W), bias) for a few tokens, with the bits of the product with the whole Q(W)."""
    reading = _Reading(*how)
    spec, (outputs, inputs) = reading.spec, reading.shape
    divisor = gs if spec.block_format.per_tensor_scale else None
    step = _piece(reading, input.element_size())
    result = input.new_empty(*input.shape[:-1], outputs)
    buffer = torch.empty(step + outputs % step, inputs, dtype=reading.rounded(input.dtype), device=input.device)
    for top in range(0, outputs - step + 1, step):
        bottom = top + step if top + 2 * step <= outputs else outputs
        weight = buffer[: bottom - top]
        dequantize_rows(codes[top:bottom], scales[top:bottom], divisor, spec, weight)
        part = None if bias is None else bias[top:bottom]
        result[..., top:bottom] = F.linear(input, weight.to(input.dtype), part)
    return result


@torch.library.register_fake("qnoise::packed_linear")
def _packed_linear_fake(
    input: Tensor, codes: Tensor, scales: Tensor, gs: Tensor, bias: Tensor | None, *how: Any
) -> Tensor:
    return input.new_empty(*input.shape[:-1], codes.shape[0])
