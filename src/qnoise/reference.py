"""Block-scaled quantization in plain PyTorch: the numerics that every other path of the library reproduces.

What it does
------------
A block is ``block_size`` neighbours along one axis, the axis a matrix product contracts. Each block gets
one 8-bit scale, each element a code of 4 to 8 bits, and the value is ``code * scale``. "Fake"
quantization returns that value in the dtype of the input; real quantization returns the codes and scales.

The order of operations, which is part of the contract
------------------------------------------------------
1. The input is converted to fp32 (fp64 is rounded here, before anything else).
2. The block axis becomes the last one, and each row is padded with zeros to whole blocks. Blocks never
   run over the end of a row: a ragged tail is its own short block.
3. ``amax`` of each block, exactly; from it the scale, by the rule of the scale mode (``scales.py``).
   Exponents are read from the bits of the fp32 number, never from log2, which is wrong in fp32 next to a
   power of two.
4. ``u = |x| / scale``: one IEEE division by the very number that will multiply later. For NVFP4 that
   number is ``S / gs`` rounded to fp32, where ``gs = fp32(448 * 6 / amax_tensor)`` is kept as the divisor
   and ``S = E4M3(amax_block / 6 * gs)``, evaluated from left to right, with subnormals, saturating at
   448.
5. ``u`` is rounded to the element's grid and saturates at its maximum (``rounding.py``): to nearest with
   ties to even, to nearest with ties away from zero, or stochastically.
6. ``x_hat = copysign(rounded * scale, x)`` in fp32, then one cast to the dtype of the input.

What a spec may do around that
------------------------------
In fp32 throughout, with one cast at the end. Q is steps 3 to 6 without the cast.

* ``rotation="hadamard"``: x_hat = H Q(H x), with H the Hadamard transform of each block (``rotation.py``). The
  zero-padded blocks are transformed, so a ragged tail is rotated with its padding. The result is in the basis of the
  input; the codes of :func:`quantize` are those of H x. The per-tensor scale is fixed by the amax of H x.
* ``macro_block=128``: Q(f x) / f in the place of Q, with a factor f for 128 neighbours (``macro_block.py``).
* ``residual=alpha``: x1 = Q(x), x2 = Q(x - x1), x_hat = x1 + alpha * x2, with alpha rounded to fp32, and product and
  sum each rounded. Both passes have one per-tensor scale, and each its own block scales and macro-block factors. The
  second pass of stochastic rounding draws with the offset moved by 2**63.

Together: rotate, two passes of macro-blocks, rotate back. The sign of a zero is then that of the arithmetic, and the
laws below hold only as far as they follow from those of Q. A block with NaN or Inf is NaN throughout, and the others
are not touched, except that its finite elements take part in the factor of their macro-block.

Special values
--------------
* Zero stays zero and keeps its sign; a negative number that rounds to zero gives -0. MXINT8 is two's
  complement, has no -0, and gives +0. A block whose NVFP4 scale underflows to 0 is all zeros.
* A block with NaN or Inf is NaN throughout (scale byte 0xFF, or the NaN of E4M3); the other blocks are
  not touched. The per-tensor amax is taken over the finite values.
* Elements saturate, finite results can still overflow: FLT_MAX under ``rceil``, or 65504 in fp16, may
  round up to Inf. fp32 subnormals must not be flushed to zero (``torch.set_flush_denormal``): the E8M0
  scale 2**-127 is one.
* gs is at most 2**126, reached where amax_tensor < 2688 * 2**-126 (about 3e-35). Smaller tensors lose
  precision.

Laws (each is a property test)
------------------------------
* Scaling by 2**k scales the result by 2**k exactly, as long as no E8M0 scale is clamped, gs is below its
  bound and no number leaves the normal range of fp32. Not for ``single_level``, whose scales have a fixed
  range.
* Inside a block, rounded to nearest, x <= y gives x_hat <= y_hat; Q(-x) = -Q(x); blocks do not see each
  other (in NVFP4: given amax).
* Rounding to nearest is idempotent, Q(Q(x)) = Q(x), in fp32 for E8M0 scales in every mode: the maximum of
  a rounded block leads back to the same scale, or to half of it, on whose grid twice every value lies
  too; ``mse`` finds an error of 0 among its candidates.
* With E4M3 scales it holds for a fixed ``amax`` where the block scale S is a normal E4M3 number (>=
  2**-6). It fails for ``amax=None``, because the maximum of the result differs from that of the input by
  a rounding, which moves gs; and where S is subnormal, because its rounding error then shifts the block
  maximum off the code 6 that the scale is computed from. Stochastic rounding has no such law: an e4m3
  block maximum in ``even`` mode that was rounded down is clipped the second time.

Stochastic rounding
-------------------
Takes the upper neighbour with the probability of the remainder, so the mean is the input (to 2**-24 of a
step) for every element that is not clipped. Nothing is clipped by ``rceil`` and ``ceil``. ``floor``,
``even`` and ``mse`` let the largest elements of a block exceed the grid, and so does NVFP4 where S was
rounded down: there the clipping is a bias. The uniform number of an element is a function of (seed,
offset, linear index), see ``philox.py``. Scales are chosen as for rounding to nearest.

Where others differ
-------------------
* microxcaling takes exponents by log2 in the dtype of the input and rounds by adding 0.5, which lifts the
  number just below a tie; here both are exact.
* torchao divides by 2**-126 but multiplies by 2**-127 where an E8M0 scale is at its low end, keeps NVFP4
  block scales above 2**-6 and multiplies by reciprocals; here one number does both, subnormal scales
  exist, and a division is a division.
* Libraries that evaluate ``S * (1 / gs)`` differ from ``S / gs`` by one unit in the last place at some
  amax.
* ModelOpt's MXFP4 breaks ties toward zero. compressed-tensors uses the threshold of fp4 in ``even`` mode
  for 8-bit elements too.
* An all-zero NVFP4 tensor is NaN in ModelOpt and torchao, and one NaN there poisons the whole tensor;
  here neither.
* ``four_over_six`` gives a tie to the larger scale (maximum on 4); its authors give it to the smaller.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .formats import QuantSpec
from .macro_block import macro_factors
from .packing import BlockQuantized, decode, encode, pack, unpack
from .philox import uniform
from .rotation import hadamard, positive_nan
from .rounding import round_magnitude
from .scales import Scales, divide, finite_amax, per_tensor_divisor, select_scales


def fake_quantize(
    x: Tensor,
    spec: QuantSpec,
    *,
    axis: int = -1,
    amax: Tensor | None = None,
    seed: tuple[int, int] | None = None,
) -> Tensor:
    """Quantize and dequantize ``x``; no gradient rule, no checks (``functional.py`` is the public door).

    Args:
        x: floating-point tensor of any shape and stride.
        spec: format, scale mode and rounding.
        axis: the axis the blocks lie along.
        amax: what fixes the per-tensor scale: 0-d, or of ``x``'s shape with ``axis`` reduced to 1; None for
            the finite amax of ``x``. With a rotation it is that of the rotated ``x``.
        seed: (seed, offset) for stochastic rounding.

    Returns:
        Tensor of ``x``'s shape, dtype and device; contiguous.
    """
    blocks = to_blocks(x, axis, spec)
    values = approximate(blocks, spec, divisor_of(x, spec, axis, amax), _draws(blocks, x, spec, axis, seed))
    return _from_blocks(values, x.shape, axis, x.dtype)


def quantize(
    x: Tensor,
    spec: QuantSpec,
    *,
    axis: int = -1,
    amax: Tensor | None = None,
    seed: tuple[int, int] | None = None,
) -> BlockQuantized:
    """Quantize ``x`` to packed codes and scales. Arguments as for :func:`fake_quantize`.

    Raises:
        ValueError: the spec has ``macro_block`` or ``residual``, for which packed storage has no place.
    """
    check_storable(spec)
    blocks = rotated_blocks(x, spec, axis)
    blocks = positive_nan(blocks) if spec.rotation else blocks
    scales = select_scales(blocks, spec, divisor_of(x, spec, axis, amax))
    rounded = round_units(blocks, scales.value(), spec, *_draws(blocks, x, spec, axis, seed)[:1])
    element = spec.block_format.element
    codes = encode(rounded, torch.signbit(blocks), element).flatten(-2)
    return BlockQuantized(
        pack(codes, element.bits).contiguous(),
        scales.codes,
        scales.per_tensor,
        x.shape,
        spec,
        axis % max(x.ndim, 1),
        x.dtype,
    )


def dequantize(q: BlockQuantized, dtype: torch.dtype) -> Tensor:
    """The values of packed codes and scales, computed in fp32 and cast once to ``dtype``; contiguous."""
    block_format = q.spec.block_format
    values = decode(unpack(q.codes, block_format.element.bits), block_format.element)
    values = values.unflatten(-1, (values.shape[-1] // block_format.block_size, block_format.block_size))
    values = values * Scales(q.scale_codes, q.per_tensor_scale).value().unsqueeze(-1)
    return _from_blocks(hadamard(values) if q.spec.rotation else values, q.shape, q.axis, dtype)


def check_storable(spec: QuantSpec) -> None:
    """Refuse a spec of which packed codes and scales cannot hold all.

    Raises:
        ValueError: the spec has ``macro_block`` or ``residual``.
    """
    for name, lacks in (("macro_block", "the factors of macro-blocks"), ("residual", "a second pass")):
        if getattr(spec, name) is not None:
            raise ValueError(
                f"{spec} cannot be stored packed: BlockQuantized has no place for {lacks}. fake_quantize computes it, "
                f"and patch_model with storage='auto', 'cached' or 'dynamic'; leave {name} out to pack"
            )


def approximate(
    blocks: Tensor, spec: QuantSpec, divisor: Tensor | None = None, draws: Sequence[Tensor | None] = (None, None)
) -> Tensor:
    """What ``spec`` makes of blocks, before the cast.

    Args:
        blocks: fp32 (..., blocks, block_size), zero-padded; macro-blocks start at the first block.
        divisor: gs of a format with E4M3 scales, to be broadcast against (..., blocks); None for E8M0.
        draws: the uniform numbers of stochastic rounding, of ``blocks``'s shape: one tensor for each pass.

    Returns:
        fp32 tensor of ``blocks``'s shape, in the basis of ``blocks``.
    """
    turned = hadamard(blocks) if spec.rotation else blocks
    values = _one_pass(turned, spec, divisor, draws[0])
    if spec.residual is not None:
        values = values + _one_pass(turned - values, spec, divisor, draws[1]) * spec.residual
    return hadamard(values) if spec.rotation else values


def _one_pass(blocks: Tensor, spec: QuantSpec, divisor: Tensor | None, draws: Tensor | None) -> Tensor:
    if spec.macro_block is None:
        scale = select_scales(blocks, spec, divisor).value()
        return signed_values(round_units(blocks, scale, spec, draws), blocks, scale, spec)
    factor = macro_factors(blocks, spec).unsqueeze(-1)
    raised = blocks * factor
    scale = select_scales(raised, spec, divisor).value()
    return signed_values(round_units(raised, scale, spec, draws), raised, scale, spec) / factor


def block_scales(x: Tensor, spec: QuantSpec, *, axis: int = -1, amax: Tensor | None = None) -> Tensor:
    """The fp32 scale that multiplies each element of ``x``: same shape as ``x``, equal within a block.

    With a rotation that of the rotated elements; with a macro-block divided by its factor; with a residual that of the
    first pass.
    """
    blocks = rotated_blocks(x, spec, axis)
    factor = None if spec.macro_block is None else macro_factors(blocks, spec)
    raised = blocks if factor is None else blocks * factor.unsqueeze(-1)
    value = select_scales(raised, spec, divisor_of(x, spec, axis, amax)).value()
    value = value if factor is None else value / factor
    return _from_blocks(value.unsqueeze(-1).expand(blocks.shape), x.shape, axis, torch.float32)


def rotated_blocks(x: Tensor, spec: QuantSpec, axis: int = -1) -> Tensor:
    """:func:`to_blocks`, rotated where ``spec`` rotates: what is quantized."""
    blocks = to_blocks(x, axis, spec)
    return hadamard(blocks) if spec.rotation else blocks


def amax_of(x: Tensor, spec: QuantSpec, axis: int = -1) -> Tensor:
    """The amax that fixes a per-tensor scale where none is given, 0-d fp32: over the finite values of what is
    quantized, so of the rotated ``x`` where ``spec`` rotates."""
    return finite_amax(rotated_blocks(x, spec, axis) if spec.rotation else x)


def divisor_of(x: Tensor, spec: QuantSpec, axis: int, amax: Tensor | None) -> Tensor | None:
    """The divisor gs of ``x``, 0-d or (..., 1) with the reduced axis of ``amax`` last; None for E8M0."""
    if not spec.block_format.per_tensor_scale:
        return None
    if amax is None:
        amax = amax_of(x, spec, axis) if spec.per_tensor_scale else x.new_zeros((), dtype=torch.float32)
    return per_tensor_divisor(amax if amax.ndim == 0 else amax.movedim(axis, -1), spec)


def to_blocks(x: Tensor, axis: int, spec: QuantSpec) -> Tensor:
    """``x`` in fp32 as (..., blocks, block_size): ``axis`` last, rows padded with zeros to whole blocks."""
    size = spec.block_format.block_size
    rows = (x.reshape(1) if x.ndim == 0 else x.movedim(axis, -1)).to(torch.float32)
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % size))
    return rows.unflatten(-1, (rows.shape[-1] // size, size))


def _from_blocks(blocks: Tensor, shape: torch.Size, axis: int, dtype: torch.dtype) -> Tensor:
    if not shape:
        return blocks.flatten()[0].to(dtype)
    rows = blocks.flatten(-2)[..., : shape[axis]]
    return rows.movedim(-1, axis).to(dtype).contiguous()


def round_units(blocks: Tensor, scale: Tensor, spec: QuantSpec, uniform: Tensor | None) -> Tensor:
    """Magnitudes of ``blocks`` in units of the blocks' ``scale`` (..., blocks), rounded to the element's grid."""
    units = divide(blocks.abs(), scale.unsqueeze(-1))
    return round_magnitude(units, spec.block_format.element, spec.rounding, uniform)


def signed_values(rounded: Tensor, blocks: Tensor, scale: Tensor, spec: QuantSpec) -> Tensor:
    """``rounded * scale`` in fp32 with the signs of ``blocks``."""
    values = rounded * scale.unsqueeze(-1)
    if spec.block_format.element.is_integer:
        # Two's complement has no -0, so neither has what it dequantizes to.
        return torch.where((blocks < 0) & (rounded > 0), -values, values)
    return torch.copysign(values, blocks)


def _draws(
    blocks: Tensor, x: Tensor, spec: QuantSpec, axis: int, seed: tuple[int, int] | None
) -> tuple[Tensor | None, Tensor | None]:
    """The uniform numbers of the elements for the first pass and for the second."""
    if spec.rounding != "stochastic":
        return None, None
    if seed is None:
        raise ValueError("rounding='stochastic' needs a (seed, offset) pair")
    index = _linear_index(blocks, x.shape[axis] if x.ndim else 1)
    second = None if spec.residual is None else uniform(index, *second_pass(seed))
    return uniform(index, *seed), second


def second_pass(seed: tuple[int, int]) -> tuple[int, int]:
    """The (seed, offset) of the pass over the residual: counters as far from those of the first as there are."""
    return seed[0], seed[1] + 2**63


def _linear_index(blocks: Tensor, length: int) -> Tensor:
    """Index of each element in the row-major tensor with the block axis last; padding has arbitrary ones."""
    padded = blocks.shape[-2] * blocks.shape[-1]
    rows = blocks.numel() // padded if padded else 0
    start = torch.arange(rows, device=blocks.device).unsqueeze(-1) * length
    return (start + torch.arange(padded, device=blocks.device)).reshape(blocks.shape)
