"""Quantized inputs: blocks along the features, a per-tensor scale for each token."""

from __future__ import annotations

from torch import Tensor

from qnoise.formats import QuantSpec
from qnoise.functional import fake_quantize
from qnoise.nn.shared_scale import turned


def quantize_tokens(x: Tensor, spec: QuantSpec, static_amax: float | None) -> Tensor:
    amax: Tensor | float | None = static_amax
    if spec.per_tensor_scale and amax is None:
        magnitude = turned(x.detach(), spec).abs().float().nan_to_num_(nan=0.0, posinf=0.0)
        amax = magnitude.amax(dim=-1, keepdim=True)
    return fake_quantize(x, spec, amax=amax)
