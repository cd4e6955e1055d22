"""Train language models through block-scaled low-bit quantization and controlled noise.

`patch_model` is the door: it converts a model's linears and norms in place, `summary` tells what it did, and
`unpatch_model` takes it all off again. Importing this package loads torch and numpy and nothing else of weight.
"""

from qnoise import faults, metrics, repairs, rl, schedules
from qnoise.calibrate import calibrate_activations
from qnoise.config import NoiseConfig, PatchConfig
from qnoise.formats import FORMATS, BlockFormat, QuantSpec, register_format
from qnoise.functional import fake_quantize, quantize
from qnoise.integrations.export import export
from qnoise.integrations.load_packed import load_packed
from qnoise.integrations.merge import merge
from qnoise.nn import FakeQuantLinear, NoisyRMSNorm
from qnoise.noise_control import NoiseScheduler
from qnoise.packing import BlockQuantized
from qnoise.patch import bake, full_precision, patch_model, phase, quiet, refresh, state, unpatch_model
from qnoise.sensitivity import Plan, ScanReport, scan
from qnoise.summary import PatchSummary, summary

__version__ = "0.1.0.dev0"

__all__ = [
    "FORMATS",
    "BlockFormat",
    "BlockQuantized",
    "FakeQuantLinear",
    "NoiseConfig",
    "NoiseScheduler",
    "NoisyRMSNorm",
    "PatchConfig",
    "PatchSummary",
    "Plan",
    "QuantSpec",
    "ScanReport",
    "bake",
    "calibrate_activations",
    "export",
    "fake_quantize",
    "faults",
    "full_precision",
    "load_packed",
    "merge",
    "metrics",
    "patch_model",
    "phase",
    "quantize",
    "quiet",
    "refresh",
    "register_format",
    "repairs",
    "rl",
    "scan",
    "schedules",
    "state",
    "summary",
    "unpatch_model",
]
