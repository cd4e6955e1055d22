"""Softmax statistics of rows of logits and the gradients made of them, a cache's worth of rows at a time.

With s_j = (z_j − max z)/T, p = softmax(s) and L = log Σ exp s_j:

    log p_y = s_y − L          H = L − Σ p_j s_j
    ∂log p_y/∂z_j = (δ_jy − p_j)/T          ∂H/∂z_j = −p_j (log p_j + H)/T

L is read off the softmax as log(Σ p_j / max p): the division takes out the error of the softmax's own sum, which
reaches 1e-5 at a vocabulary of 150,000. The last subtractions are compensated, so that a log-probability is the
right fp32 number or its neighbour. Arithmetic is fp32 whatever the logits are (fp64 for fp64).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import triton_serves

# Logits taken to fp32 at a time: 1 MiB stays in a CPU's cache; anything else needs few and large steps.
_ELEMENTS_PER_STEP_ON_CPU, _ELEMENTS_PER_STEP = 1 << 18, 1 << 25
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Stands for −∞ where 0·(−∞) has to be 0: every softmax weight that far down is 0, and no gradient carries it to ∞.
_FLOOR = -1e30
# ln 2 in two parts; the first has 12 bits, so a power of two times it is exact in fp32.
_LN2_HIGH = 0.693115234375
_LN2_LOW = math.log(2) - _LN2_HIGH


def statistics(
    logits: Tensor, ids: Tensor, temperature: float, chunk_rows: int | None = None, slopes: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log_prob, entropy, max z, log Σ exp s), each (N,); ``slopes`` (N, V) is filled with ∂log p_y/∂z."""
    kernels = _kernels(logits)
    if kernels is not None:
        log_prob, *stats = kernels.log_prob_forward(logits, ids, temperature)
        if slopes is not None:
            kernels.log_prob_backward(logits, ids, temperature, stats, (torch.ones_like(log_prob), None), slopes)
        return log_prob, *stats
    step = chunk_rows or _rows_per_step(logits)
    s_rows, p_rows = _work_space(logits, step), _work_space(logits, step)
    dtype = s_rows.dtype
    divisor = logits.new_full((), temperature, dtype=dtype)
    # Of each row: max z, z_y, max p, Σ p, Σ p·s
    top, chosen, peak, total, product = torch.empty(5, len(ids), dtype=dtype, device=logits.device)
    for start in range(0, len(ids), step):
        rows = slice(start, start + step)
        z, y = logits[rows], ids[rows, None]
        s, p = s_rows[: len(z)], p_rows[: len(z)]
        z = z if z.dtype == dtype else s.copy_(z)
        torch.amax(z, -1, out=top[rows])
        chosen[rows] = z.gather(-1, y)[:, 0]
        torch.sub(z, top[rows, None], out=s)
        if temperature != 1.0:
            s.div_(divisor)
        s.clamp_(min=_FLOOR)
        torch.softmax(s, -1, out=p)
        torch.amax(p, -1, out=peak[rows])
        torch.sum(p, -1, out=total[rows])
        # Not vecdot: autocast would take it to 16 bits.
        torch.sum(s.mul_(p), -1, out=product[rows])
        if slopes is not None:
            p.neg_().scatter_add_(-1, y, p.new_ones(y.shape))
            slopes[rows] = p.div_(divisor) if temperature != 1.0 else p
    weight = total / peak
    log_sum = weight.log()
    return _log_prob(chosen, top, weight, temperature), log_sum - product / total, top, log_sum


def write_logit_gradient(
    out: Tensor,
    logits: Tensor,
    ids: Tensor,
    temperature: float,
    stats: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    chunk_rows: int | None = None,
) -> None:
    """Gradient with respect to the (N, V) logits into ``out``, from (entropy, max z, log Σ exp s) of the rows."""
    kernels = _kernels(logits)
    if kernels is not None:
        kernels.log_prob_backward(logits, ids, temperature, stats, grads, out)
        return
    step = chunk_rows or _rows_per_step(logits)
    s_rows, p_rows = _work_space(logits, step), _work_space(logits, step)
    divisor = logits.new_full((), temperature, dtype=s_rows.dtype)
    for_log_prob, for_entropy = (None if g is None else (g / divisor)[:, None] for g in grads)
    entropy, top, log_sum = (x[:, None] for x in stats)
    for start in range(0, len(ids), step):
        rows = slice(start, start + step)
        z, s = logits[rows], s_rows[: len(ids[rows])]
        p = out[rows] if out.dtype == s.dtype else p_rows[: len(z)]
        z = z if z.dtype == s.dtype else s.copy_(z)
        if temperature != 1.0 or for_entropy is not None:
            z = torch.sub(z, top[rows], out=s)
            if temperature != 1.0:
                z.div_(divisor)
        torch.softmax(z, -1, out=p)
        if for_entropy is not None:
            # 0·log 0 = 0 in the limit, for values and gradients alike.
            s.clamp_(min=_FLOOR).add_(entropy[rows] - log_sum[rows]).mul_(-for_entropy[rows])
            if for_log_prob is not None:
                s.sub_(for_log_prob[rows])
            p.mul_(s)
        elif for_log_prob is not None:
            p.mul_(-for_log_prob[rows])
        if for_log_prob is not None:
            p.scatter_add_(-1, ids[rows, None], for_log_prob[rows])
        if p.dtype != out.dtype:
            out[rows] = p


def _kernels(logits: Tensor) -> Any:
    """The Triton kernels that do the same in one pass, where they serve these logits; None elsewhere."""
    if not (logits.is_cuda and logits.dtype in _KERNEL_DTYPES and logits.stride(-1) == 1 and triton_serves()):
        return None
    from ..kernels.gpu import log_probs

    return log_probs


def _log_prob(chosen: Tensor, top: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """(chosen − top)/temperature − log(weight), (N,), rounded about once where the dtype is fp32."""
    difference = chosen - top
    plain = difference / torch.full_like(difference, temperature) - weight.log()
    if chosen.dtype != torch.float32:
        return plain
    value, error = _subtract(chosen, top)
    if temperature != 1.0:
        value, error = _divide(value, error, temperature)
    # weight = m·2^k with 1 ≤ m < 2, so the logarithm that has to be rounded is below 0.7.
    bits = weight.view(torch.int32)
    k, m = ((bits >> 23) - 127).float(), ((bits & 0x7FFFFF) | 0x3F800000).view(torch.float32)
    value, further = _subtract(value, k * _LN2_HIGH)
    # Infinities have no rounding error to take out.
    return torch.where(plain.isfinite(), value + (further + error - m.log() - k * _LN2_LOW), plain)


def _subtract(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """a − b rounded, and exactly what the rounding left (Knuth, The Art of Computer Programming 2, 4.2.2)."""
    difference = a - b
    back = difference - a
    return difference, (a - (difference - back)) - (b + back)


def _divide(a: Tensor, error: Tensor, by: float) -> tuple[Tensor, Tensor]:
    """(a + error) / by in fp32: the rounded quotient, and the rest (Dekker, Numer. Math. 18, 1971)."""
    # Halves of 12 bits, whose products are exact.
    scale = 2.0 ** (math.frexp(by)[1] - 12)
    by_high = round(by / scale) * scale
    quotient = a / torch.full_like(a, by)
    spread = quotient * 4097
    high = spread - (spread - quotient)
    rest = (a - high * by_high) - (quotient - high) * by_high - quotient * (by - by_high)
    return quotient, (rest + error) / torch.full_like(a, by)


def _work_space(logits: Tensor, rows: int) -> Tensor:
    """Room for so many rows of the logits in the dtype of the arithmetic."""
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return torch.empty(min(rows, logits.shape[0]), logits.shape[-1], dtype=dtype, device=logits.device)


def _rows_per_step(logits: Tensor) -> int:
    elements = _ELEMENTS_PER_STEP_ON_CPU if logits.device.type == "cpu" else _ELEMENTS_PER_STEP
    return max(1, elements // max(1, logits.shape[-1]))


def check_ids(ids: Tensor, vocabulary: int) -> None:
    """Raise ``ValueError`` for an id that is no token. On a CPU only: elsewhere it would wait for the device."""
    if ids.device.type != "cpu" or not len(ids):
        return
    low, high = (int(x) for x in ids.aminmax())
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"ids must be 0 to {vocabulary - 1}, got {low if low < 0 else high}; "
            "where the mask is 0 any valid id will do"
        )
