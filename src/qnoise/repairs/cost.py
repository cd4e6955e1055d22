"""What a patched model stores, and how far its weights are from full precision."""

from __future__ import annotations

import torch
from torch import nn

from qnoise.nn.linear import FakeQuantLinear
from qnoise.patch import quiet
from qnoise.summary import summary


def stored_bits(model: nn.Module) -> float:
    """Bits per quantized weight of a patched model, with everything that is stored for it.

    To `summary(model).bits_per_weight` it adds the fp32 scale that some formats keep for each tensor: 32 / numel.

    Raises:
        ValueError: the model is not patched.
    """
    bits = summary(model).bits_per_weight
    linears = [module for module in model.modules() if isinstance(module, FakeQuantLinear)]
    specs = [(module.in_features * module.out_features, module._qnoise.weight_spec) for module in linears]
    weights = sum(count for count, spec in specs if spec is not None)
    scales = sum(spec is not None and spec.per_tensor_scale for _, spec in specs)
    return (bits or 0.0) + (32 * scales / weights if weights else 0.0)


@torch.no_grad()
def weight_error(model: nn.Module) -> float:
    """Relative RMS, over all quantized weights together, of what the linears multiply by against what they hold.

    A folded model is compared in the folded basis.
    """
    error = size = 0.0
    with quiet(model):
        for module in model.modules():
            if isinstance(module, FakeQuantLinear) and module._qnoise.weight_spec is not None:
                weight = module.weight.float()
                error += (module.effective_weight().float() - weight).square().sum(dtype=torch.float64).item()
                size += weight.square().sum(dtype=torch.float64).item()
    return (error / size) ** 0.5 if size else 0.0
