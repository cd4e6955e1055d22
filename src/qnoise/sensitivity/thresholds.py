"""When a figure is worth a word.

Published scans call a layer problematic below 20 dB, above 5 % deadzone, 1 % saturation or 10 % mean relative error.
MXFP4 on plain gaussian data has 18.5 to 18.9 dB, 8 to 11 % and 20 to 24 %: those limits flag every layer of every
model. The default here compares with what the same format does to a gaussian tensor of the same rms and row length, and
leaves room for the accident of a small sample, so that what is flagged is a property of the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from qnoise.formats import QuantSpec
from qnoise.spelling import check_choice

THRESHOLDS = ("gaussian", "classic")

SQNR_BELOW = 1.0
"""dB below the gaussian."""
DEADZONE_TIMES, RELATIVE_TIMES, CLIPPED_TIMES = 1.5, 1.25, 1.5
"""Times the gaussian."""

CLASSIC = {"sqnr_db": 20.0, "deadzone": 0.05, "saturation": 0.01, "relative_error": 0.10}
"""The published limits (SRDD scanner of the verl fork this project started from)."""


def issues(
    figures: Mapping[str, float], gaussian: Mapping[str, float], count: int, spec: QuantSpec, thresholds: str
) -> tuple[str, ...]:
    """The names of what is wrong: low_sqnr, high_deadzone, high_clipping or high_saturation, high_rel_error.

    Args:
        figures: of the tensor.
        gaussian: of its reference; not used by "classic".
        count: elements of the tensor.
        spec: the format.
        thresholds: "gaussian" or "classic".

    Raises:
        ValueError: no such thresholds.
    """
    check_choice("thresholds", thresholds, THRESHOLDS)
    if thresholds == "classic":
        return classic_issues(figures)
    if not count:
        return ()
    found = []
    blocks = max(1, count // spec.block_format.block_size)
    # Four standard errors; the constants are upper bounds of the spread on gaussian data.
    if figures["sqnr_db"] < gaussian["sqnr_db"] - SQNR_BELOW - 4 * 12.0 / math.sqrt(count):
        found.append("low_sqnr")
    for name, key, times, n, floor in (
        ("high_deadzone", "deadzone", DEADZONE_TIMES, count, 0.002),
        ("high_clipping", "clipped_blocks", CLIPPED_TIMES, blocks, 0.02),
    ):
        share = gaussian[key]
        if figures[key] > times * share + floor + 6 * math.sqrt(max(share, floor) / n):
            found.append(name)
    # A rotation gives small elements the error of their whole block: the mean of |e| / |x| has no limit there, and what
    # a sample has is an accident.
    most = RELATIVE_TIMES * gaussian["mean_relative_error"] + 4 * 0.5 / math.sqrt(count)
    if spec.rotation is None and figures["mean_relative_error"] > most:
        found.append("high_rel_error")
    return tuple(found)


def classic_issues(figures: Mapping[str, float]) -> tuple[str, ...]:
    """By the published limits, on the published definitions: `at_maximum` is what they call saturation."""
    found = []
    if figures["pooled_sqnr_db"] < CLASSIC["sqnr_db"]:
        found.append("low_sqnr")
    if figures["deadzone"] > CLASSIC["deadzone"]:
        found.append("high_deadzone")
    if figures["at_maximum"] > CLASSIC["saturation"]:
        found.append("high_saturation")
    if figures["mean_relative_error"] > CLASSIC["relative_error"]:
        found.append("high_rel_error")
    return tuple(found)
