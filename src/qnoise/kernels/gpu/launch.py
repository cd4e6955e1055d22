"""What the launchers of this package share: how rows are cut into programs, and what a kernel knows of a format."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...formats import QuantSpec

WARPS = 4
_SCALE_MODES = (
    "floor", "rceil", "ceil", "even", "mse",
    "two_level", "single_level", "four_over_six", "four_over_six_mae", "four_over_six_absmax",
)  # fmt: skip


def supports(spec: QuantSpec) -> bool:
    """Whether these kernels serve the format: all of the library's own, and registered ones whose blocks of codes
    fill 32-bit words and whose exponents fit the powers of two by which codes become fp32 numbers; rotated or not (in
    blocks of up to 256), but without macro-blocks or a second pass on the residual. Under E4M3 scales the largest
    element has to be 3 at least, so that neither gs nor S / gs comes near the ends of fp32."""
    block = spec.block_format
    if spec.scale_mode not in _SCALE_MODES or (block.scale == "e4m3" and block.element.max < 3):
        return False
    if not spec.storable or (spec.rotation and block.block_size > 256):
        return False
    element = block.element
    whole_words = block.block_size % (16 if element.bits == 6 else 32 // element.bits) == 0
    return whole_words and -100 <= element.emin <= 1 and element.emin <= element.emax


class Layout(NamedTuple):
    """How (rows, columns) are cut: each of the ``segments`` programs of a row works on ``tile_blocks`` of its
    ``row_blocks`` blocks."""

    rows: int
    columns: int
    row_blocks: int
    tile_blocks: int
    segments: int

    @property
    def one_row(self) -> bool:
        return self.rows == 1

    @property
    def grid(self) -> tuple[int, ...]:
        """(segments,) of one row, else (rows, segments): a device takes 65,535 programs along the second axis."""
        if self.one_row:
            return (self.segments,)
        if self.segments > 65535:
            raise ValueError(
                f"rows of {self.columns} elements that are not whole blocks, or have a divisor each, are too long for "
                f"the GPU kernels; at most {65535 * self.columns // self.segments} are possible: split them"
            )
        return (self.rows, self.segments)


def layout(rows: int, columns: int, block_size: int, divisor: Tensor | None, tile: int) -> Layout:
    """Cut for programs of ``tile`` elements, a power of two.

    Rows of whole blocks under one divisor are taken as one long row, so that no program is partly idle.
    """
    if columns % block_size == 0 and (divisor is None or divisor.ndim == 0):
        rows, columns = min(rows, 1), rows * columns
    row_blocks = -(-columns // block_size)
    tile_blocks = min(max(1, tile // block_size), triton.next_power_of_2(max(1, row_blocks)))
    return Layout(rows, columns, row_blocks, tile_blocks, -(-row_blocks // tile_blocks))


def element_arguments(spec: QuantSpec) -> dict[str, Any]:
    """The compile-time arguments that describe the element of a format, the kind of its scale, and the rotation."""
    element = spec.block_format.element
    return {
        "MANTISSA": element.mantissa_bits,
        "EMIN": element.emin,
        "EMAX": element.emax,
        "MAX": element.max,
        "INTEGER": element.is_integer,
        "E4M3": spec.block_format.scale == "e4m3",
        "BLOCK_SIZE": spec.block_format.block_size,
        "ROTATED": spec.rotation is not None,
    }


def quantizer_arguments(spec: QuantSpec) -> dict[str, Any]:
    """:func:`element_arguments`, and those of the rule for the scales and of the rounding."""
    return element_arguments(spec) | {
        "SCALE_MODE": spec.scale_mode,
        "ROUNDING": spec.rounding,
        "BUMP": _bump(spec),
    }


def _bump(spec: QuantSpec) -> int:
    """What is added to the bits of a block's amax so that its exponent becomes that of the scale (times 2**emax).

    It carries out of the 23 mantissa bits exactly where the scale mode takes the next power of two.
    """
    element, one = spec.block_format.element, 1 << 23
    if spec.scale_mode == "rceil":  # above max
        return one - 1 - round((element.max / 2.0**element.emax - 1) * one)
    if spec.scale_mode == "ceil":  # above a power of two
        return one - 1
    if spec.scale_mode == "even":  # from the midpoint below the next power of two
        return 1 << (22 - element.mantissa_bits)
    return 0


def check_noise(x: Tensor, noise: tuple[Tensor, float] | None) -> tuple[Tensor | None, float]:
    """``(z, sigma)`` of relative noise on ``x`` that a kernel can add; ``(None, 0.0)`` for none.

    Raises:
        TypeError: an fp64 ``x``, whose noise is not computed in fp32.
        ValueError: a z of another shape or device, not contiguous, or of a dtype that fp32 does not hold.
    """
    if noise is None:
        return None, 0.0
    z, sigma = noise
    if x.dtype == torch.float64:
        raise TypeError("the GPU kernels add noise in fp32, and x is float64: add it before, x * (1 + sigma * z)")
    fits = z.shape == x.shape and z.device == x.device and z.is_contiguous()
    if not fits or z.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"the z of noise must be contiguous float32, bfloat16 or float16, of the shape {tuple(x.shape)} and on "
            f"{x.device} like x; got {tuple(z.shape)} of {z.dtype} on {z.device} with strides {z.stride()}"
        )
    return z, float(sigma)


def signed64(number: int) -> int:
    """The int64 with the same 64 bits: what a kernel takes for a seed or an offset."""
    return (number + 2**63) % 2**64 - 2**63


def words(codes: Tensor) -> Tensor:
    """Packed codes as int32 words; they are copied only if their address is not a multiple of 4."""
    return (codes if codes.data_ptr() % 4 == 0 else codes.clone()).view(torch.int32)
