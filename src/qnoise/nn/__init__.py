"""Drop-in modules: `FakeQuantLinear` and `NoisyRMSNorm`."""

from qnoise.nn.linear import FakeQuantLinear
from qnoise.nn.norm import NoisyRMSNorm

__all__ = ["FakeQuantLinear", "NoisyRMSNorm"]
