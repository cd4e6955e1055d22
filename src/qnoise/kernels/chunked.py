"""The numerics of ``reference.py`` in plain PyTorch on any device, in pieces that stay in the cache.

A piece is a run of whole blocks, or of whole rows; the same few buffers serve every piece, so that nothing as large as
the tensor is allocated but the output. Bits are those of the reference for every format, scale mode, rounding and
dtype, on a device whose fp32 division is correctly rounded and which keeps subnormals. Scales are handled as bytes and
fp32 numbers: no float8 dtype, no fp64, and no copy to another device.

Rounding to nearest takes three passes over a piece. With E the exponent of ``u = x / scale``, bounded below by that of
the element's smallest normal number, a step of the grid is ``2**(E - mantissa_bits)``. Adding
``1.5 * 2**(E + 23 - mantissa_bits)`` puts the sum into the binade where fp32's own step is that step, so the adder of
the machine rounds, ties to even; subtracting the number again is exact. Whether the product with the power of two and
the addition are fused makes no difference, because that product is exact. Other roundings, the scale modes that compare
errors, macro-blocks and the second pass over a residual call the functions of the reference piece by piece. A rotation
is done on the piece, too, before and after.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..formats import E4M3, ElementFormat, QuantSpec
from ..packing import decode, encode, pack, unpack
from ..philox import uniform
from ..reference import approximate, round_units, second_pass
from ..rotation import hadamard, positive_nan
from ..rounding import BIAS, MANTISSA, round_magnitude
from ..scales import Scales, e8m0_carry, select_scales

_PIECE = 1 << 17
"""Elements of a piece on the direct path: its three fp32 buffers fill a second-level cache."""
_PIECE_OF_REFERENCE = 1 << 15
"""Elements of a piece on the path through the reference, which makes a dozen temporaries of it."""
_EXPONENT = 0xFF << MANTISSA
_DIRECT = ("floor", "rceil", "ceil", "even", "two_level", "single_level")
"""Scale modes that are computed here; the others are left to the functions of the reference."""


class _Piece(NamedTuple):
    """Rows ``top`` to ``bottom`` of a tensor of rows, and their columns from ``left`` to ``right``; ``padded`` is the
    width in whole blocks."""

    top: int
    bottom: int
    left: int
    right: int
    padded: int

    def of(self, rows: Tensor, per_block: int, block_size: int) -> Tensor:
        """What belongs to the piece in a tensor that holds ``per_block`` numbers a block."""
        left = self.left // block_size * per_block
        return rows[self.top : self.bottom, left : left + self.padded // block_size * per_block]

    def divisor(self, divisor: Tensor | None) -> Tensor | None:
        """The divisor of the piece's rows, to be broadcast against their blocks."""
        if divisor is None or divisor.ndim == 0:
            return divisor
        return divisor[self.top : self.bottom].unsqueeze(-1)


def fake_quantize_rows(
    x: Tensor, spec: QuantSpec, divisor: Tensor | None, seed: tuple[int, int] | None, out: Tensor
) -> None:
    """Quantize and dequantize the rows of ``x`` into ``out``, which may be ``x`` itself.

    Args:
        x: contiguous (R, K), any floating-point dtype of the public door; blocks run along K.
        spec: format, scale mode, rounding.
        divisor: fp32 gs of a format with E4M3 scales, () or (R,); None for E8M0.
        seed: (seed, offset) of stochastic rounding, None for the others.
        out: contiguous (R, K), of ``x``'s dtype and device.
    """
    element = spec.block_format.element
    (x, out), length = _joined(x.shape[1], _grain(spec), divisor, x, out)
    work = _Work(x, spec)
    for piece in work.pieces:
        blocks = work.load(x, piece)
        target = out[piece.top : piece.bottom, piece.left : piece.right]
        if work.direct:
            blocks = _turn(blocks, work.units) if spec.rotation else blocks
            scale = _scale(blocks, spec, piece.divisor(divisor), work)
            values = _round_to_nearest(blocks, scale, spec, work).mul_(scale.unsqueeze(-1))
            if not element.is_integer:
                if work.in_place and not spec.rotation:
                    torch.copysign(values, blocks, out=target.view_as(values))
                    continue
                torch.copysign(values, blocks, out=values)
            values = _turn(values, work.powers) if spec.rotation else values
        else:
            draws = _draws(blocks, piece, length, seed, spec)
            values = approximate(blocks, spec, piece.divisor(divisor), draws)
        target.copy_(values.flatten(1)[:, : target.shape[1]])


def quantize_rows(
    x: Tensor,
    spec: QuantSpec,
    divisor: Tensor | None,
    seed: tuple[int, int] | None,
    codes: Tensor,
    scales: Tensor,
) -> None:
    """Quantize the rows of ``x`` to packed codes and bytes of scales; arguments as for :func:`fake_quantize_rows`.

    Args:
        codes: uint8, contiguous (R, blocks * block_size * bits / 8), written.
        scales: uint8, contiguous (R, blocks), written.
    """
    size, element = spec.block_format.block_size, spec.block_format.element
    (x, codes, scales), length = _joined(x.shape[1], size, divisor, x, codes, scales)
    work = _Work(x, spec)
    for piece in work.pieces:
        blocks = work.load(x, piece)
        if spec.rotation:
            blocks = positive_nan(_turn(blocks, work.units) if work.direct else hadamard(blocks))
        chosen = select_scales(blocks, spec, piece.divisor(divisor))
        if work.direct:
            one_a_byte = _codes_to_nearest(blocks, chosen.value(), spec, work)
        else:
            draws, _ = _draws(blocks, piece, length, seed, spec)
            one_a_byte = encode(round_units(blocks, chosen.value(), spec, draws), torch.signbit(blocks), element)
        piece.of(codes, size * element.bits // 8, size).copy_(pack(one_a_byte.flatten(1), element.bits))
        piece.of(scales, 1, size).copy_(chosen.codes)


def dequantize_rows(codes: Tensor, scales: Tensor, divisor: Tensor | None, spec: QuantSpec, out: Tensor) -> None:
    """The values of packed rows, computed in fp32 and cast once to ``out``'s dtype.

    Args:
        codes: uint8, contiguous (R, blocks * block_size * bits / 8).
        scales: uint8, contiguous (R, blocks).
        divisor: as for :func:`fake_quantize_rows`.
        spec: the format and the rotation; its scale mode and rounding do not matter.
        out: contiguous (R, K), written.
    """
    size, element = spec.block_format.block_size, spec.block_format.element
    (codes, scales, out), _ = _joined(out.shape[1], size, divisor, codes, scales, out)
    limit = max(_PIECE, size)
    buffer = torch.empty(_largest(out, size, limit), dtype=torch.float32, device=out.device)
    spare = torch.empty_like(buffer if spec.rotation else buffer[:0])
    for piece in _pieces(out, size, limit):
        rows = piece.bottom - piece.top
        values = buffer[: rows * piece.padded].view(rows, -1, size)
        _decode(piece.of(codes, size * element.bits // 8, size), element, values)
        scale = Scales(piece.of(scales, 1, size), piece.divisor(divisor)).value()
        values.mul_(scale.unsqueeze(-1))
        if spec.rotation:
            values = _turn(values, spare[: values.numel()].view_as(values))
        target = out[piece.top : piece.bottom, piece.left : piece.right]
        target.copy_(values.flatten(1)[:, : target.shape[1]])


def tensor_amax(x: Tensor) -> Tensor:
    """max |x| over the finite elements of a contiguous tensor, 0-d fp32; 0 if there is none."""
    flat = x.view(-1)
    if not flat.numel():
        return torch.zeros((), dtype=torch.float32, device=x.device)
    buffer = torch.empty(min(_PIECE, flat.numel()), dtype=torch.float32, device=x.device)
    peaks = torch.empty(-(-flat.numel() // _PIECE), dtype=torch.float32, device=x.device)
    for i, part in enumerate(flat.split(_PIECE)):
        magnitude = buffer[: part.numel()]
        magnitude.copy_(part).abs_()
        torch.amax(magnitude.nan_to_num_(nan=0.0, posinf=0.0), 0, out=peaks[i])
    return peaks.amax()


def rotated_amax(x: Tensor, spec: QuantSpec) -> Tensor:
    """:func:`tensor_amax` of the rotated blocks of contiguous rows."""
    size = spec.block_format.block_size
    (x,), _ = _joined(x.shape[1], size, None, x)
    limit = max(_PIECE // size * size, size)
    buffers = [torch.empty(_largest(x, size, limit), dtype=torch.float32, device=x.device) for _ in range(2)]
    peaks = [torch.zeros((), dtype=torch.float32, device=x.device)]
    for piece in _pieces(x, size, limit):
        shape = piece.bottom - piece.top, piece.padded
        loaded, spare = (b[: shape[0] * shape[1]].view(shape) for b in buffers)
        _fill(loaded, x[piece.top : piece.bottom, piece.left : piece.right])
        turned = _turn(loaded.view(shape[0], -1, size), spare.view(shape[0], -1, size))
        peaks.append(turned.abs_().nan_to_num_(nan=0.0, posinf=0.0).amax())
    return torch.stack(peaks).amax()


class _Work:
    """How one call goes through its tensor: the pieces, and the buffers that serve all of them.

    Attributes:
        pieces: in the order of memory.
        direct: False where the functions of the reference do the work.
        in_place: True where pieces are read where they lie.
        units, powers: fp32 (rows, blocks, block_size), the shape of the current piece, and
        unit_bits, power_bits: the same memory as int32.
    """

    def __init__(self, x: Tensor, spec: QuantSpec) -> None:
        self.size = spec.block_format.block_size
        self.direct = spec.storable and spec.rounding == "nearest" and spec.scale_mode in _DIRECT and _has_room(spec)
        self.in_place = x.dtype == torch.float32 and x.shape[1] % self.size == 0 and not spec.rotation
        # The counters of stochastic rounding are int64.
        limit = _PIECE if self.direct else _PIECE_OF_REFERENCE >> (spec.rounding == "stochastic")
        grain = _grain(spec)
        limit = max(limit // grain * grain, grain)
        self.pieces = _pieces(x, self.size, limit)
        self._buffers = [
            torch.empty(_largest(x, self.size, limit) if needed else 0, dtype=torch.float32, device=x.device)
            for needed in (not self.in_place, self.direct, self.direct)
        ]
        self._shape: tuple[int, int] | None = None

    def load(self, x: Tensor, piece: _Piece) -> Tensor:
        """The piece in fp32 as (rows, blocks, block_size), padded with zeros: a view of ``x`` where that is it."""
        part = x[piece.top : piece.bottom, piece.left : piece.right]
        shape = part.shape[0], piece.padded
        if shape != self._shape:
            self._shape = shape
            self._loaded, self.units, self.powers = (
                b[: shape[0] * shape[1]].view(shape[0], -1, self.size) if b.numel() else b for b in self._buffers
            )
            self.unit_bits, self.power_bits = self.units.view(torch.int32), self.powers.view(torch.int32)
        if self.in_place:
            return part.view(shape[0], -1, self.size)
        _fill(self._loaded.view(shape), part)
        return self._loaded


def _fill(rows: Tensor, part: Tensor) -> None:
    """Copy ``part`` to the left of ``rows``, and zeros to the rest."""
    if part.shape[1] == rows.shape[1]:
        rows.copy_(part)
    else:
        rows[:, : part.shape[1]].copy_(part)
        rows[:, part.shape[1] :].zero_()


def _turn(values: Tensor, spare: Tensor) -> Tensor:
    """The transform of ``rotation.py``, in place; ``spare`` has the same shape and is overwritten."""
    size = values.shape[-1]
    now, then = values, spare
    half = 1
    while half < size:
        (a, b), (plus, minus) = (t.unflatten(-1, (-1, 2, half)).unbind(-2) for t in (now, then))
        torch.add(a, b, out=plus)
        torch.sub(a, b, out=minus)
        now, then = then, now
        half *= 2
    return torch.mul(now, 1 / math.sqrt(size), out=values)


def _grain(spec: QuantSpec) -> int:
    """Elements that have to stay together: those of a block, or of a macro-block."""
    return spec.macro_block or spec.block_format.block_size


def _has_room(spec: QuantSpec) -> bool:
    """Whether the number that rounds is a normal fp32 number on the whole grid; so for every format of the table."""
    element = spec.block_format.element
    return element.emin >= 1 - BIAS and element.emax < 100 and not (element.is_integer and element.emax > element.emin)


def _scale(blocks: Tensor, spec: QuantSpec, divisor: Tensor | None, work: _Work) -> Tensor:
    """What ``select_scales(...).value()`` gives, in fewer passes over the blocks; not for modes that search."""
    torch.abs(blocks, out=work.units)
    # Bits of magnitudes are in the order of the magnitudes, NaN last, and torch reduces short runs of them faster.
    peak_bits = work.unit_bits.amax(-1)
    peak = peak_bits.view(torch.float32)
    spoil = peak * 0.0  # NaN for a block with NaN or Inf, and 0 for the others
    element = spec.block_format.element
    if divisor is None:
        if element.emax == 0 and spec.scale_mode != "floor":
            # Here the binade of a subnormal maximum matters, which its exponent field does not tell.
            return select_scales(blocks, spec).value()
        field = peak_bits.add_(e8m0_carry(spec)).bitwise_and_(_EXPONENT).sub_(element.emax << MANTISSA)
        # 2**-127, the smallest E8M0 number, is a subnormal of fp32.
        return spoil.add_(field.clamp_(1 << (MANTISSA - 1), 2 * BIAS << MANTISSA).view(torch.float32))
    target = peak / torch.full_like(peak, element.max) * divisor
    return spoil.add_(round_magnitude(target, E4M3)) / divisor


def _round_to_nearest(blocks: Tensor, scale: Tensor, spec: QuantSpec, work: _Work) -> Tensor:
    """``blocks / scale`` rounded to the grid of the element, ties to even; numbers that become zero are +0."""
    element = spec.block_format.element
    units = _units(blocks, scale, spec, work).clamp_(-element.max, element.max)
    lift = _powers(element, work)
    torch.add(units, work.powers, alpha=lift, out=units)
    return torch.sub(units, work.powers, alpha=lift, out=units)


def _codes_to_nearest(blocks: Tensor, scale: Tensor, spec: QuantSpec, work: _Work) -> Tensor:
    """The codes of ``blocks / scale``, one a byte. In a block with NaN or Inf they are zero but for the sign.

    After the addition that rounds, the mantissa holds the number of steps, counted from its half.
    """
    element = spec.block_format.element
    units = _units(blocks, scale, spec, work).nan_to_num_(nan=0.0)
    if element.is_integer:
        units.clamp_(-element.max, element.max)
    else:
        units.abs_().clamp_(max=element.max)
    torch.add(units, work.powers, alpha=_powers(element, work), out=units)
    code, binade = work.unit_bits, work.power_bits
    if element.is_integer:  # two's complement, as the sum already has it
        return code.bitwise_and_(2**element.bits - 1).to(torch.uint8)
    # The ladder of a normal binade starts at 2**mantissa_bits: that is the first unit of the exponent field.
    binade.bitwise_right_shift_(MANTISSA - element.mantissa_bits).sub_((BIAS + element.emin) << element.mantissa_bits)
    code.bitwise_and_((1 << (MANTISSA - 1)) - 1).add_(binade)
    sign = binade.copy_(torch.signbit(blocks)).bitwise_left_shift_(element.bits - 1)
    return code.bitwise_or_(sign).to(torch.uint8)


def _units(blocks: Tensor, scale: Tensor, spec: QuantSpec, work: _Work) -> Tensor:
    if spec.block_format.per_tensor_scale:
        # An E4M3 scale that underflowed to 0 makes the block zero: so does a division by Inf.
        scale = torch.where(scale == 0, torch.inf, scale)
    return torch.div(blocks, scale.unsqueeze(-1), out=work.units)


def _powers(element: ElementFormat, work: _Work) -> float:
    """Fills ``work.powers`` with 2**E of each unit; returns the factor that makes it the number that rounds."""
    torch.bitwise_and(work.unit_bits, _EXPONENT, out=work.power_bits)
    work.power_bits.clamp_min_((BIAS + element.emin) << MANTISSA)
    return 1.5 * 2.0 ** (MANTISSA - element.mantissa_bits)


def _draws(
    blocks: Tensor, piece: _Piece, length: int, seed: tuple[int, int] | None, spec: QuantSpec
) -> tuple[Tensor | None, Tensor | None]:
    """The uniform numbers of a piece's elements for the first pass and for the second; padding draws some, too, which
    matter only where padding is rotated."""
    if seed is None:
        return None, None
    rows = torch.arange(piece.top, piece.bottom, device=blocks.device).unsqueeze(-1) * length
    columns = torch.arange(piece.left, piece.left + piece.padded, device=blocks.device)
    index = (rows + columns).view_as(blocks)
    return uniform(index, *seed), None if spec.residual is None else uniform(index, *second_pass(seed))


def _decode(packed: Tensor, element: ElementFormat, values: Tensor) -> None:
    """The values of packed codes into the fp32 buffer ``values``."""
    if element.bits == 4:
        # Both codes of a byte at once, as the eight bytes of two fp32 numbers.
        index, table, target = packed, _pair_values(element, values.device), values.view(-1).view(torch.int64)
    else:
        index, table, target = unpack(packed, element.bits), _values(element, values.device), values.view(-1)
    torch.index_select(table, 0, index.reshape(-1).to(torch.int32), out=target)


@lru_cache
def _values(element: ElementFormat, device: torch.device) -> Tensor:
    return decode(torch.arange(2**element.bits, dtype=torch.uint8, device="cpu"), element).to(device)


@lru_cache
def _pair_values(element: ElementFormat, device: torch.device) -> Tensor:
    byte = torch.arange(256, dtype=torch.uint8, device="cpu")
    return decode(torch.stack([byte & 15, byte >> 4], dim=-1), element).view(torch.int64).flatten().to(device)


def _joined(length: int, size: int, divisor: Tensor | None, *tensors: Tensor) -> tuple[tuple[Tensor, ...], int]:
    """Rows that end where a block ends, under one divisor, are one long row; and the length of a row before that."""
    if length % size == 0 and (divisor is None or divisor.ndim == 0):
        return tuple(t.view(1, -1) for t in tensors), length
    return tensors, length


def _pieces(rows: Tensor, size: int, limit: int) -> Iterator[_Piece]:
    """Whole rows, as many as ``limit`` elements hold; or parts of one row where a row has more."""
    count, length = rows.shape
    step, together = _steps(rows, size, limit)
    for top in range(0, count if length else 0, together):
        for left in range(0, length, step):
            right = min(left + step, length)
            yield _Piece(top, min(top + together, count), left, right, -(-(right - left) // size) * size)


def _steps(rows: Tensor, size: int, limit: int) -> tuple[int, int]:
    """Columns and rows of a piece."""
    width = -(-rows.shape[1] // size) * size
    return min(width, limit), max(1, limit // max(width, 1))


def _largest(rows: Tensor, size: int, limit: int) -> int:
    """Elements of the largest piece."""
    step, together = _steps(rows, size, limit)
    return step * min(rows.shape[0], together)
