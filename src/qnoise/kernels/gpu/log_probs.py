"""Log-probabilities of given ids and the entropies of their distributions, in one pass over the logits.

Formulas and special values are those of ``qnoise.rl.token_softmax``, fp32 inside: with s_j = (z_j - max z) / T and
L = log(sum(exp(s_j))), log p_y = s_y - L and H = L - sum(p_j s_j). The forward keeps a running maximum; sums made
under an older, smaller one are scaled down to it (Milakov and Gimelshein, arXiv 1805.02867), and so is the sum of
exp(s_j) s_j.
"""

# mypy: allow-untyped-defs
# The arguments of device functions are values of the compiler, not of Python: they have no type to write down.

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rounding import as_bits, as_float, quotient

_WARPS = 8
_TILE = 4096
# Stands for -inf where 0 * -inf has to be 0: no weight of more than 0 is that far down.
_FLOOR = tl.constexpr(-1e30)
# ln 2 in two parts; the first has 12 bits, so a small integer times it is exact in fp32.
_LN2_HIGH = tl.constexpr(0.693115234375)
_LN2_LOW = tl.constexpr(math.log(2) - 0.693115234375)


def log_prob_forward(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Statistics of the rows of logits / temperature, in nats.

    Args:
        logits: (N, V) fp32, bf16 or fp16, on the GPU; each row contiguous.
        ids: (N,) int64, 0 … V-1; not checked.
        temperature: > 0.

    Returns:
        ``(log_prob, entropy, top, log_sum)``, fp32 (N,): log p of the ids, the entropy, max z, log(sum(exp(s))).

    Raises:
        TypeError: logits of another dtype; fp64 would be rounded to fp32.
        ValueError: logits that are not (N, V), or whose rows are not contiguous.
    """
    _check(logits)
    rows, vocabulary = logits.shape
    log_prob, entropy, top, log_sum = torch.empty(4, rows, dtype=torch.float32, device=logits.device).unbind(0)
    if rows:
        with torch.cuda.device_of(logits):
            _forward[(rows,)](
                logits,
                ids.contiguous(),
                log_prob,
                entropy,
                top,
                log_sum,
                logits.stride(0),
                vocabulary,
                float(temperature),
                SCALED=temperature != 1.0,
                TILE=min(_TILE, triton.next_power_of_2(vocabulary)),
                num_warps=_WARPS,
                enable_fp_fusion=False,
            )
    return log_prob, entropy, top, log_sum


def log_prob_backward(
    logits: Tensor,
    ids: Tensor,
    temperature: float,
    stats: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    out: Tensor,
) -> None:
    """The gradient with respect to the logits into ``out``: (N, V) of their dtype, contiguous.

    d log p_y / dz_j = (delta_jy - p_j) / T and dH / dz_j = -p_j (log p_j + H) / T.

    Args:
        logits, ids, temperature: as in the forward.
        stats: ``(entropy, top, log_sum)`` of the forward.
        grads: gradients of ``log_prob`` and of ``entropy``, fp32 (N,), or None for 0.
        out: contiguous, of the shape and dtype of ``logits``, written.

    Raises:
        TypeError: as the forward.
        ValueError: as the forward, or an ``out`` that does not fit.
    """
    _check(logits)
    if out.shape != logits.shape or out.dtype != logits.dtype or not out.is_contiguous():
        raise ValueError(
            f"out must be contiguous {tuple(logits.shape)} of {logits.dtype}, got {tuple(out.shape)} of {out.dtype}"
        )
    rows, vocabulary = logits.shape
    if grads[0] is None and grads[1] is None:
        out.zero_()
    elif out.numel():
        tile = min(_TILE, triton.next_power_of_2(vocabulary))
        with torch.cuda.device_of(logits):
            _backward[(rows, -(-vocabulary // tile))](
                logits,
                ids.contiguous(),
                *stats,
                *(None if g is None else g.contiguous() for g in grads),
                out,
                logits.stride(0),
                vocabulary,
                float(temperature),
                SCALED=temperature != 1.0,
                TILE=tile,
                num_warps=_WARPS,
                enable_fp_fusion=False,
            )


def _check(logits: Tensor) -> None:
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"the GPU kernel takes float32, bfloat16 or float16 logits, got {logits.dtype}")
    if logits.ndim != 2 or (logits.shape[1] > 1 and logits.stride(1) != 1):
        raise ValueError(
            f"the GPU kernel takes (N, V) logits with contiguous rows, got shape {tuple(logits.shape)} with strides "
            f"{logits.stride()}; make them contiguous"
        )


@triton.jit
def _softmax_arguments(z, top, temperature, SCALED: tl.constexpr):
    """(z - top) / temperature, not below ``_FLOOR``; NaN stays."""
    s = z - top
    s = tl.where(s < _FLOOR, _FLOOR, s)
    if SCALED:
        s = quotient(s, temperature, tl.div_rn(1.0, temperature), 1)
    return s


@triton.jit
def _forward(
    logits_pointer,
    ids_pointer,
    log_prob_pointer,
    entropy_pointer,
    top_pointer,
    log_sum_pointer,
    stride,
    vocabulary,
    temperature: tl.float32,
    SCALED: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_pointer += row * stride
    offset = tl.arange(0, TILE)
    # One running maximum, and two running sums for each lane; the lanes are added up once, at the end.
    top = -float("inf")
    total = tl.zeros([TILE], tl.float32)
    weighted = tl.zeros([TILE], tl.float32)
    for first in range(0, vocabulary, TILE):
        inside = offset < vocabulary - first
        z = tl.load(logits_pointer + first + offset, mask=inside, other=-float("inf")).to(tl.float32)
        new_top = tl.maximum(top, tl.max(z, axis=0))
        s = _softmax_arguments(z, new_top, temperature, SCALED)
        weight = tl.exp(s)
        # Sums that are still empty stay empty: their old maximum is -inf.
        drop = tl.maximum(_softmax_arguments(top, new_top, temperature, SCALED), -1e4)
        shrink = tl.exp(drop)
        weighted = (weighted + total * drop) * shrink + weight * s
        total = total * shrink + weight
        top = new_top
    total_sum = tl.sum(total, axis=0)
    mean = tl.div_rn(tl.sum(weighted, axis=0), total_sum)
    log_sum = tl.log(total_sum)
    chosen = tl.load(logits_pointer + tl.load(ids_pointer + row)).to(tl.float32)
    tl.store(log_prob_pointer + row, _log_prob(chosen, top, total_sum, temperature, SCALED))
    tl.store(entropy_pointer + row, log_sum - mean)
    tl.store(top_pointer + row, top)
    tl.store(log_sum_pointer + row, log_sum)


@triton.jit
def _log_prob(chosen, top, total, temperature, SCALED: tl.constexpr):
    """(chosen - top) / temperature - log(total), rounded about once."""
    value, error = _subtract(chosen, top)
    if SCALED:
        divided = tl.div_rn(value, temperature)
        error = tl.div_rn(tl.fma(divided, -temperature, value) + error, temperature)
        value = divided
    plain = value - tl.log(total)
    # total = m * 2**k with 1 <= m < 2, so the logarithm that has to be rounded is below 0.7.
    bits = as_bits(total)
    k = ((bits >> 23) - 127).to(tl.float32)
    m = as_float((bits & 0x7FFFFF) | 0x3F800000)
    value, further = _subtract(value, k * _LN2_HIGH)
    exact = value + (further + error - tl.log(m) - k * _LN2_LOW)
    # Infinities have no rounding error to take out.
    return tl.where(tl.abs(plain) < float("inf"), exact, plain)


@triton.jit
def _subtract(a, b):
    """a - b rounded, and exactly what the rounding left (Knuth, The Art of Computer Programming 2, 4.2.2)."""
    difference = a - b
    back = difference - a
    return difference, (a - (difference - back)) - (b + back)


@triton.jit
def _backward(
    logits_pointer,
    ids_pointer,
    entropy_pointer,
    top_pointer,
    log_sum_pointer,
    grad_log_prob_pointer,
    grad_entropy_pointer,
    grad_pointer,
    stride,
    vocabulary,
    temperature: tl.float32,
    SCALED: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < vocabulary
    z = tl.load(logits_pointer + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    s = _softmax_arguments(z, tl.load(top_pointer + row), temperature, SCALED)
    log_p = s - tl.load(log_sum_pointer + row)
    p = tl.exp(log_p)
    slope = tl.zeros([TILE], tl.float32)
    if grad_entropy_pointer is not None:
        slope = (log_p + tl.load(entropy_pointer + row)) * -tl.load(grad_entropy_pointer + row)
    if grad_log_prob_pointer is not None:
        grad_log_prob = tl.load(grad_log_prob_pointer + row)
        grad = p * (slope - grad_log_prob)
        grad = tl.where(column == tl.load(ids_pointer + row), grad + grad_log_prob, grad)
    else:
        grad = p * slope
    if SCALED:
        grad *= tl.div_rn(1.0, temperature)
    tl.store(grad_pointer + row * vocabulary + column, grad.to(grad_pointer.dtype.element_ty), mask=inside)
