"""The classic schema of SRDD scans (the verl fork this project started from), on its definitions and thresholds.

`sqnr_db` pools all elements, is 100 where there is no error and, for a layer of several tensors, pools these;
`saturation_ratio` is the share of elements within 1 % of the largest |x_hat|. Such a scan looks at the outputs of the
layers; a report without activations gives the weights instead, and says so in `config.tensors`.
"""

from __future__ import annotations

import math
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from qnoise.formats import QuantSpec
from qnoise.sensitivity.plain_json import dumps
from qnoise.sensitivity.thresholds import CLASSIC, classic_issues

if TYPE_CHECKING:
    from qnoise.sensitivity.report import LayerFigures, ScanReport

_SUMMARISED = ("sqnr_db", "deadzone_ratio", "saturation_ratio", "relative_error")
_VALUES = {
    "low_sqnr": "sqnr_db",
    "high_deadzone": "deadzone_ratio",
    "high_saturation": "saturation_ratio",
    "high_rel_error": "relative_error",
}


def srdd_json(report: ScanReport, fmt: str | QuantSpec | None = None, of: str | None = None) -> str:
    """See `ScanReport.to_srdd_json`."""
    from qnoise.sensitivity.report import layer_kind

    of, spec = layer_kind(report, of), report.spec_of(fmt)
    layers = [each for each in report.layers if each.kind == of and each.spec == spec and each.layer is not None]
    if not layers:
        raise ValueError(f"{report.source} has no rows of kind {of!r} inside numbered layers")
    # Layers of a second stack are numbered on: the schema has one number for a layer.
    entries = [_entry(number, each) for number, each in enumerate(layers)]
    if len({each.stack for each in layers}) == 1:
        for entry, each in zip(entries, layers, strict=True):
            entry["layer_id"] = each.layer
    bad = [entry["layer_id"] for entry in entries if entry["is_problematic"]]
    values = {
        "config": {
            "model_path": report.source,
            "quant_type": str(spec),
            "num_layers": len(entries),
            "tensors": of,
            "thresholds": dict(CLASSIC),
        },
        "report": {
            "summary": {
                "total_layers": len(entries),
                "problematic_layers": len(bad),
                "healthy_layers": len(entries) - len(bad),
                "problematic_layer_ids": bad,
            },
            "statistics": {name: _statistics([entry[name] for entry in entries]) for name in _SUMMARISED},
            "per_layer": entries,
        },
        "recommendations": _recommendations(entries, bad),
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return dumps(values, indent=2)


def _entry(number: int, layer: LayerFigures) -> dict[str, Any]:
    figures = layer.figures
    sqnr = figures["pooled_sqnr_db"]
    entry: dict[str, Any] = {
        "layer_id": number,
        "sqnr_db": 100.0 if math.isinf(sqnr) and sqnr > 0 else sqnr,
        "deadzone_ratio": figures["deadzone"],
        "saturation_ratio": figures["at_maximum"],
        "relative_error": figures["mean_relative_error"],
        "mean_abs_error": figures["mean_abs_error"],
        "max_abs_error": figures["max_abs_error"],
        "output_norm": figures["norm"],
    }
    found = classic_issues(figures)
    entry["is_problematic"] = bool(found)
    entry["issues"] = [f"{label} ({entry[_VALUES[label]]:.4g})" for label in found]
    return entry


def _statistics(values: list[float]) -> dict[str, float]:
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / len(values))
    return {"min": min(values), "max": max(values), "mean": mean, "std": spread}


def _recommendations(entries: list[dict[str, Any]], bad: list[int]) -> dict[str, Any]:
    share = len(bad) / len(entries)
    low = [entry["layer_id"] for entry in entries if entry["layer_id"] in bad and entry["sqnr_db"] < 15]
    mixed: list[int] = []
    noisy: list[int] = []
    if not bad:
        strategy, details = "no_action", "no layer is beyond the thresholds"
    elif share < 0.1:
        strategy, details, mixed = "targeted_mitigation", "few layers are beyond the thresholds", bad
    elif share < 0.3:
        strategy, details, mixed = "mixed_approach", "layers below 15 dB in higher precision, noise on the others", low
        noisy = [layer for layer in bad if layer not in low]
    else:
        strategy, details, mixed = "reconsider_quantization", "many layers are beyond the thresholds", bad
    return {"strategy": strategy, "details": details, "aqn_layers": noisy, "mixed_precision_layers": mixed}
