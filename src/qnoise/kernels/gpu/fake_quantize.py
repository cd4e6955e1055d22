"""Quantize and dequantize in one pass over the tensor, with relative noise before on request.

The noise is given as a tensor and not drawn in the kernel: z is numpy's Philox stream through a ziggurat
(``qnoise.noise``), a function of seed, step and name that has to give the same bits on every machine, so it is made on
the CPU, where such a table walk with rejections has one order, and copied.
"""

# mypy: allow-untyped-defs
# The arguments of device functions are values of the compiler, not of Python: they have no type to write down.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...formats import QuantSpec
from .blocks import load_blocks, quantize_blocks, with_noise
from .launch import WARPS, check_noise, layout, quantizer_arguments, signed64
from .rotation import hadamard
from .rounding import as_bits, as_float

_TILE = 2048  # elements of a program: two or four 16-byte loads for each thread


def fake_quantize_rows(
    x: Tensor,
    spec: QuantSpec,
    divisor: Tensor | None,
    seed: tuple[int, int] | None,
    out: Tensor,
    noise: tuple[Tensor, float] | None = None,
) -> None:
    """Write the fake-quantized ``x`` to ``out``; bits as in ``qnoise.reference``.

    Args:
        x: (R, K) contiguous, fp64, fp32, bf16 or fp16, on the GPU; blocks along K.
        spec: format, scale mode, rounding and rotation.
        divisor: fp32 gs, 0-d or (R,) contiguous; None for E8M0 formats. With noise, that of the noisy ``x``.
        seed: (seed, offset) for stochastic rounding, unused otherwise.
        out: of ``x``'s shape and dtype, contiguous; may be ``x``.
        noise: (z, sigma): quantize x (1 + sigma z) instead, computed in fp32 and cast once to the dtype of ``x``. z is
            fp32, bf16 or fp16, of ``x``'s shape and device, contiguous.

    Raises:
        TypeError: noise on an fp64 ``x``.
        ValueError: a z that does not fit ``x``.
    """
    z, sigma = check_noise(x, noise)
    rows, columns = x.shape
    cut = layout(rows, columns, spec.block_format.block_size, divisor, _TILE)
    if not x.numel():
        return
    key, offset = seed or (0, 0)
    with torch.cuda.device_of(x):
        _kernel[cut.grid](
            x,
            out,
            divisor,
            z,
            sigma,
            cut.columns,
            signed64(key),
            signed64(offset),
            BLOCKS=cut.tile_blocks,
            ONE_ROW=cut.one_row,
            PER_ROW=divisor is not None and divisor.ndim == 1,
            **quantizer_arguments(spec),
            num_warps=WARPS,
            enable_fp_fusion=False,
        )


@triton.jit
def _kernel(
    x_pointer,
    out_pointer,
    divisor_pointer,
    z_pointer,
    sigma,
    columns,
    seed: tl.int64,
    offset: tl.int64,
    BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ONE_ROW: tl.constexpr,
    PER_ROW: tl.constexpr,
    E4M3: tl.constexpr,
    SCALE_MODE: tl.constexpr,
    ROUNDING: tl.constexpr,
    BUMP: tl.constexpr,
    MANTISSA: tl.constexpr,
    EMIN: tl.constexpr,
    EMAX: tl.constexpr,
    MAX: tl.constexpr,
    INTEGER: tl.constexpr,
    ROTATED: tl.constexpr,
):
    row = tl.cast(0 if ONE_ROW else tl.program_id(0), tl.int64)
    first = tl.program_id(0 if ONE_ROW else 1).to(tl.int64) * (BLOCKS * BLOCK_SIZE)
    column = tl.arange(0, BLOCKS)[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    start = row * columns + first
    left = columns - first
    x = load_blocks(x_pointer + start, left, BLOCKS, BLOCK_SIZE, False)
    if z_pointer is not None:
        x = with_noise(x, load_blocks(z_pointer + start, left, BLOCKS, BLOCK_SIZE, False), sigma)
    x, rounded, value, _ = quantize_blocks(
        x, divisor_pointer, row, offset + start + column, seed,
        PER_ROW, ROTATED, E4M3, SCALE_MODE, ROUNDING, BUMP, MANTISSA, EMIN, EMAX, MAX,
    )  # fmt: skip
    sign = as_bits(x) & -0x80000000
    if INTEGER:
        # Adding 0 turns -0 into the +0 of two's complement.
        values = (as_float(as_bits(rounded) | sign) + 0.0) * value[:, None]
    else:
        values = as_float(as_bits(rounded * value[:, None]) | sign)
    if ROTATED:
        values = hadamard(values)
    tl.store(out_pointer + start + column, values.to(out_pointer.dtype.element_ty), mask=column < left)
