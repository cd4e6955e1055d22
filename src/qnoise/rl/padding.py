"""Padding is replaced before any arithmetic.

A masked position may hold anything: −inf, NaN, an old token. Multiplying by the mask after the arithmetic is
not enough (NaN·0 = NaN, and the gradient of ``exp`` at inf is inf·0). So every function of this package first
writes 0 where the mask is 0 and only then computes; the gradient there is exactly 0 as well.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_same_shape(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ``ValueError`` naming both tensors and both shapes unless the shapes are equal."""
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} but {other_name} has shape {tuple(other.shape)}; "
            "they must be equal"
        )


def check_float_matrix(name: str, tensor: Tensor) -> None:
    """Raise unless ``tensor`` is a floating-point (B, T) tensor."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    if tensor.dim() != 2:
        raise ValueError(f"{name} must have shape (batch, tokens), got {tuple(tensor.shape)}")


def check_other_log_probs(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless ``tensor`` is floating point (token ids have the same shape) and has the shape of ``other``."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    check_same_shape(name, tensor, other_name, other)


def as_mask(response_mask: Tensor, name: str, like: Tensor) -> Tensor:
    """The mask as booleans, True = keep; bool, int and float masks are accepted, nonzero means keep."""
    check_same_shape("response_mask", response_mask, name, like)
    return response_mask if response_mask.dtype == torch.bool else response_mask != 0


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """fp32 for 16- and 32-bit input, fp64 if any input is fp64."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def keep_or_zero(x: Tensor, keep: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in ``dtype`` where ``keep``, exact 0 elsewhere, whatever ``x`` holds there."""
    return torch.where(keep, x.to(dtype), 0.0)


def per_token(name: str, x: Tensor, like: Tensor) -> Tensor:
    """A (B,) tensor as a broadcastable (B, 1) one; a (B, T) tensor as it is."""
    if x.dim() == 1 and x.shape[0] == like.shape[0]:
        return x[:, None]
    if x.shape == like.shape:
        return x
    raise ValueError(
        f"{name} has shape {tuple(x.shape)} but log_prob has shape {tuple(like.shape)}; "
        f"{name} must be ({like.shape[0]},) or {tuple(like.shape)}"
    )


def mean_of_kept(x: Tensor, keep: Tensor) -> Tensor:
    """Mean of ``x`` over the kept positions, 0 when there are none. ``x`` must be finite or already
    cleaned."""
    return torch.where(keep, x, 0.0).sum() / keep.sum().clamp_min(1)
