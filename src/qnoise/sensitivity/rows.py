"""One row of a report: what one format does to one tensor. And what was found that is no figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qnoise.formats import QuantSpec
from qnoise.names import layer_index
from qnoise.sensitivity.figures import Histogram

KINDS = ("weight", "merged", "delta", "input", "output")
"""What a tensor is: the stored weight; the weight with the active adapters added; what they add; the input of a
linear; the output of a layer."""
ACTIVATIONS = ("input", "output")


@dataclass(frozen=True)
class ScanRow:
    """What one format does to one tensor.

    Attributes:
        name: canonical name of the module (for a checkpoint: of the tensor, without `.weight`).
        kind: which tensor of it, one of `KINDS`.
        spec: format, scale mode and rounding.
        shape: of the weight, its contraction axis last; (tokens, features) of an activation.
        dtype: such as "bfloat16".
        figures: see `Figures.result`; of a weight whose module got inputs also `output_relative_rms`, the relative RMS
            error of the module's output.
        decomposition: the parts of the error, see `metrics.decompose`; in the scale mode of `spec`.
        gaussian: the same figures of a gaussian tensor of this rms, row length and format.
        issues: what is worse than the thresholds allow.
        histogram: of a sample of the elements.
        scale_shared_with: names of the weights whose per-tensor scale it shares, because engines fuse them with it.
    """

    name: str
    kind: str
    spec: QuantSpec
    shape: tuple[int, ...]
    dtype: str
    figures: Mapping[str, float]
    decomposition: Mapping[str, float]
    gaussian: Mapping[str, float]
    issues: tuple[str, ...] = ()
    histogram: Histogram | None = None
    scale_shared_with: tuple[str, ...] = ()

    @property
    def fmt(self) -> str:
        """Name of the format."""
        return self.spec.fmt

    @property
    def scale_mode(self) -> str:
        """The rule of its block scales."""
        return str(self.spec.scale_mode)

    @property
    def layer(self) -> int | None:
        """Index of the layer the module lies in, or None."""
        return layer_index(self.name)

    @property
    def stack(self) -> str:
        """What comes before the layer index in the name: `model.layers`; empty outside the layers."""
        return stack_of(self.name)

    @property
    def module_kind(self) -> str:
        """The last component of the name: `down_proj`."""
        return self.name.rpartition(".")[2]

    @property
    def in_layer(self) -> str:
        """The name inside its layer: `self_attn.q_proj`; of a layer's output, the kind."""
        prefix = f"{self.stack}.{self.layer}" if self.stack else f"{self.layer}"
        return self.name.removeprefix(prefix).lstrip(".") or self.kind

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return {
            "name": self.name,
            "kind": self.kind,
            "spec": self.spec.to_dict(),
            "shape": list(self.shape),
            "dtype": self.dtype,
            "figures": dict(self.figures),
            "decomposition": dict(self.decomposition),
            "gaussian": dict(self.gaussian),
            "issues": list(self.issues),
            "histogram": None if self.histogram is None else vars(self.histogram),
            "scale_shared_with": list(self.scale_shared_with),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ScanRow:
        """The row that `to_dict` wrote."""
        histogram = values["histogram"]
        return cls(
            name=str(values["name"]),
            kind=str(values["kind"]),
            spec=QuantSpec.from_dict(values["spec"]),
            shape=tuple(int(size) for size in values["shape"]),
            dtype=str(values["dtype"]),
            figures={str(k): float(v) for k, v in values["figures"].items()},
            decomposition={str(k): float(v) for k, v in values["decomposition"].items()},
            gaussian={str(k): float(v) for k, v in values["gaussian"].items()},
            issues=tuple(str(issue) for issue in values["issues"]),
            histogram=None
            if histogram is None
            else Histogram(
                [int(n) for n in histogram["magnitudes"]], [int(n) for n in histogram["errors"]], histogram["width"]
            ),
            scale_shared_with=tuple(str(name) for name in values.get("scale_shared_with", ())),
        )


@dataclass(frozen=True)
class Finding:
    """Something about the model or checkpoint that is no figure: a tensor left out and why, NaN weights, a missing
    file.

    Attributes:
        name: module, tensor or file.
        what: a sentence.
        serious: it makes the report incomplete or the model unusable; otherwise it is said for the record.
    """

    name: str
    what: str
    serious: bool = False


def stack_of(name: str) -> str:
    """What comes before the first number in a canonical name.

    >>> stack_of("model.layers.12.mlp.up_proj")
    'model.layers'
    """
    parts = name.split(".")
    at = next((index for index, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[:at])
