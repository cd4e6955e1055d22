"""Repairs: what wins back the accuracy that a format costs, each one function in a file of its own."""

from qnoise.repairs.distill import distill
from qnoise.repairs.fold_scales import fold_scales
from qnoise.repairs.gptq import gptq
from qnoise.repairs.rank import Ranking, rank
from qnoise.repairs.recipe import Recipe
from qnoise.repairs.residual_adapter import init_lora_from_residual
from qnoise.repairs.text import self_generated

__all__ = [
    "Ranking",
    "Recipe",
    "distill",
    "fold_scales",
    "gptq",
    "init_lora_from_residual",
    "rank",
    "self_generated",
]
