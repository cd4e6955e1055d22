"""The claims of the report this project starts from, each with the comparison that decides it, and the verdicts.

A contrast is written so that the claim says it is positive. Verdicts go by the outer interval of greedy flexible
accuracy (the report has one number an arm), averaged over the tasks where several have it; the sampled one stands
beside it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.recovery.stages import EQUAL_COST
from benchmarks.recovery.study import student
from benchmarks.recovery.study.bootstrap import LEVEL, Bootstrap, Difference, pooled
from benchmarks.recovery.study.chance import chance
from benchmarks.recovery.study.power import MARGIN
from benchmarks.recovery.study.rows import HOWS, TASKS
from benchmarks.recovery.study.tables import Table, matched, points, t_text

MIN_RUNS = 4
"""Fewer paired runs give no verdict."""
REPRODUCED, OPEN, OPPOSITE, UNMEASURED = "reproduced", "not distinguishable", "opposite", "not measured"
WRONG = "not reproduced"

BITS = 4.6
"""A frozen weight may have 4.5 bits, and what an NVFP4 tensor needs for its fp32 scale."""
RECIPES = tuple(EQUAL_COST)

REPORTED = {
    "bf16": "71.27", "mxfp4": "65.88", "mxfp4+aqn": "67.48 (accumulating)", "nvfp4": "63.84 (faulty)",
    "nvfp4+aqn": "66.11 (faulty, accumulating)",
}  # fmt: skip
"""Accuracies of the report: Qwen2.5-1.5B on GSM8K, step 20 of 29, one seed."""


@dataclass(frozen=True)
class Claim:
    """A sentence of the report, its figures, and the contrast of final accuracies that is positive if it is true.

    `expected` is the report's effect in the units of the contrast (points; for "speed" a factor), None where it gave
    none. `stages` are averaged; what one of them lacks is decided by the others.
    """

    sentence: str
    report: str
    contrast: Mapping[str, int]
    expected: float | None = None
    stages: tuple[str, ...] = TASKS
    kind: str = "accuracy"  # or "speed": the contrast's arms are compared by their seconds a step


CLAIMS = (
    Claim(
        "MXFP4 costs LoRA training accuracy", "BF16 71.27, MXFP4 65.88", {"bf16": 1, "mxfp4": -1}, 5.39
    ),
    Claim(
        "Noise (AQN 0.01 → 0.0001) wins some of it back: 30 % of the loss", "67.48 against 65.88",
        {"mxfp4+aqn": 1, "mxfp4": -1}, 1.60,
    ),
    Claim(
        "NVFP4 is worse than MXFP4", "63.84 against 65.88, by a faulty NVFP4", {"mxfp4": 1, "nvfp4": -1}, 2.04
    ),
    Claim(
        "... and a faulty one-level NVFP4 is", "63.84 against 65.88", {"mxfp4": 1, "nvfp4-one-level": -1}, 2.04,
        ("arms",),
    ),
    Claim(
        "Noise helps NVFP4 too", "66.11 against 63.84, by a faulty NVFP4", {"nvfp4+aqn": 1, "nvfp4": -1}, 2.27
    ),
    Claim(
        "Noise that accumulates, as in the report's LoRA runs, helps MXFP4", "67.48 against 65.88",
        {"mxfp4+aqn-accumulating": 1, "mxfp4": -1}, 1.60, ("arms",),
    ),
    Claim(
        "MXFP4 hurts full fine-tuning less than LoRA", "0.98 points lost against 5.39",
        {"bf16": 1, "mxfp4": -1, "bf16-full": -1, "mxfp4-full": 1}, 4.41, ("arms",),
    ),
    Claim(
        "NVFP4 hurts full fine-tuning less than LoRA", "2.65 points lost against 7.43, by a faulty NVFP4",
        {"bf16": 1, "nvfp4": -1, "bf16-full": -1, "nvfp4-full": 1}, 4.78, ("arms",),
    ),
    Claim(
        "Noise helps MXFP4 in full fine-tuning", "74.37 against 73.77", {"mxfp4-full+aqn": 1, "mxfp4-full": -1}, 0.60,
        ("arms",),
    ),
    Claim(
        "Noise helps NVFP4 in full fine-tuning", "73.24 against 72.10, by a faulty NVFP4",
        {"nvfp4-full+aqn": 1, "nvfp4-full": -1}, 1.14, ("arms",),
    ),
    Claim(
        "Noise on the layers that need it (RIN, targeted) is better than noise on all", "hoped for, not measured",
        {"mxfp4+aqn-targeted": 1, "mxfp4+aqn": -1}, None, ("arms",),
    ),
    Claim(
        "Noise varied by layer (RIN, variable) is better than the same on all", "hoped for, not measured",
        {"mxfp4+aqn-variable": 1, "mxfp4+aqn": -1}, None, ("arms",),
    ),
    Claim(
        "Targeted noise makes a step 1.7 times faster", "8.9 against 5.2 iterations a second, by fewer hooks",
        {"mxfp4+aqn-targeted": 1, "mxfp4+aqn": -1}, 1.71, ("arms",), "speed",
    ),
    Claim(
        "Half the noise (0.005 → 0.00005) is better", "hoped for, not measured",
        {"mxfp4+aqn-0.005": 1, "mxfp4+aqn": -1}, None, ("arms",),
    ),
    Claim(
        "A tenth of the noise (0.001 → 0.00001) is better", "hoped for, not measured",
        {"mxfp4+aqn-0.001": 1, "mxfp4+aqn": -1}, None, ("arms",),
    ),
    Claim(
        "With more noise (0.05 → 0.0005) MXFP4 ends above BF16", "72.48 against 71.27, its log lost",
        {"mxfp4+aqn-0.05": 1, "bf16": -1}, 1.21, ("arms",),
    ),
    Claim(
        "MXFP4 in weights and activations ends at BF16's level or above", "71.42 against 71.27",
        {"mxfp4-w4a4": 1, "bf16": -1}, 0.15, ("arms",),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What a claim came to: the word, what was found on each stage, and what there is to say about the size."""

    claim: Claim
    word: str
    found: str
    remark: str = ""


def judge(claim: Claim, sources: Mapping[str, Bootstrap], how: str = "greedy") -> Verdict:
    """The verdict on a claim, from the stages that have its arms."""
    if claim.kind == "speed":
        return _judge_speed(claim, sources)
    parts = {
        name: found
        for name in claim.stages
        if name in sources and (found := sources[name].difference(claim.contrast, how)) is not None
    }
    enough = [found for found in parts.values() if found.runs >= MIN_RUNS]
    beside = {name: sources[name].difference(claim.contrast, how) for name in _beside(claim) if name in sources}
    text = "; ".join(f"{name} {points(found)}" for name, found in {**parts, **beside}.items() if found)
    if not enough:
        few = f"{sum(found.runs for found in parts.values())} paired runs" if parts else ""
        return Verdict(claim, UNMEASURED, text or "–", few)
    found = pooled(enough)
    if len(enough) > 1:
        text += f"; mean of {' and '.join(parts)} {points(found)}"
    low, high = found.outer
    if low > 0:
        return Verdict(claim, REPRODUCED, text, _size(claim, low, high))
    if high < 0:
        return Verdict(claim, OPPOSITE, text)
    seen = f"the runs could have seen {found.detectable:.2f} points"
    return Verdict(claim, OPEN, text, "; ".join(filter(None, [seen, _ruled_out(claim, high)])))


def _beside(claim: Claim) -> tuple[str, ...]:
    """Stages that are shown and do not decide."""
    return ("large",) if claim.stages == TASKS else ()


def _judge_speed(claim: Claim, sources: Mapping[str, Bootstrap]) -> Verdict:
    """By the ratio of seconds a step, with the t interval of its logarithm over paired runs."""
    fast, slow = (next(arm for arm, weight in claim.contrast.items() if weight == sign) for sign in (1, -1))
    logs: list[float] = []
    for name in claim.stages:
        if name not in sources:
            continue
        stage = sources[name].stage
        for key in stage.shared((fast, slow)):
            pair = [stage.arms[arm][key].data for arm in (slow, fast)]
            seconds = [each["cost"].get("step_seconds") for each in pair]
            if all(seconds) and pair[0]["commit"] == pair[1]["commit"]:  # seconds of one version of the library
                logs.append(math.log(seconds[0] / seconds[1]))
    if len(logs) < MIN_RUNS:
        return Verdict(claim, UNMEASURED, "–", f"{len(logs)} paired runs" if logs else "")
    middle = statistics.fmean(logs)
    half = student.quantile((1 + LEVEL) / 2, len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    low, high = math.exp(middle - half), math.exp(middle + half)
    text = f"{math.exp(middle):.3f} times as fast ({low:.3f} … {high:.3f})"
    if low > 1:
        return Verdict(claim, REPRODUCED, text, _size(claim, low, high))
    if high < 1:
        return Verdict(claim, OPPOSITE, text)
    return Verdict(claim, OPEN, text, _ruled_out(claim, high))


def _size(claim: Claim, low: float, high: float) -> str:
    if claim.expected is None:
        return ""
    if low <= claim.expected <= high:
        return f"the size, {claim.expected:g}, too"
    return f"but {'less' if claim.expected > high else 'more'} than {claim.expected:g}"


def _ruled_out(claim: Claim, high: float) -> str:
    return f"{claim.expected:g} is ruled out" if claim.expected is not None and claim.expected > high else ""


def verdicts(sources: Mapping[str, Bootstrap]) -> Table:
    """The table of verdicts."""
    header = ["the report says", "its figures", "here", "verdict", "by sampled accuracy"]
    cells = []
    for claim in CLAIMS:
        found = judge(claim, sources)
        words = f"**{found.word}**" + (f" ({found.remark})" if found.remark else "")
        beside = "–" if claim.kind == "speed" else judge(claim, sources, "sampled").word
        cells.append([claim.sentence, claim.report, found.found, words, beside])
    cells.append(_parameters(sources))
    return header, cells


def _parameters(sources: Mapping[str, Bootstrap]) -> list[str]:
    """LoRA against full fine-tuning: no chance is in it, so it is told and not tested."""
    real = adapter_parameters()
    told = [f"at 1.5 B, by arithmetic, {real / 1e6:.1f} M, {100 * (1 - real / QWEN_PARAMETERS):.1f} % fewer"]
    for name, source in sources.items():
        for row in list(source.stage.arms.get("bf16", {}).values())[:1]:
            trained, every = row.data["trainable_parameters"], row.data["parameters"]
            told.append(f"{name} {100 * (1 - trained / every):.1f} % fewer")
        peaks = [
            max(row.data["peak_memory_mb"] for row in source.stage.arms[arm].values())
            for arm in ("bf16-full", "bf16")
            if arm in source.stage.arms
        ]
        if len(peaks) == 2:
            told.append(f"{name} {peaks[1]:,.0f} MB a process against {peaks[0]:,.0f}")
    return [
        "LoRA trains 99.998 % fewer parameters than full fine-tuning, at similar memory", "about 32 K parameters",
        "; ".join(told), f"**{WRONG}** (the number; memory of so small policies says nothing)", "–",
    ]  # fmt: skip


QWEN_PARAMETERS = 1_543_714_304
"""Of Qwen2.5-1.5B, as its checkpoint has them."""


def adapter_parameters(rank: int = 32) -> int:
    """Of a LoRA on every linear of Qwen2.5-1.5B: rank times inputs and outputs of each, in 28 layers."""
    hidden, keys, wide = 1536, 256, 8960
    linears = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden), *[(hidden, wide)] * 3]
    return 28 * rank * sum(a + b for a, b in linears)


def stays_open(sources: Mapping[str, Bootstrap]) -> str:
    """The sentence that every reading of the verdicts ends with."""
    sizes = [row.data["parameters"] for source in sources.values() for row in source.stage.rows]
    size = "small policies"
    if sizes:
        ends = dict.fromkeys(f"{size / 1e6:.2g}" for size in (min(sizes), max(sizes)))
        size = f"policies of {' to '.join(ends)} million parameters"
    return (
        f"These are verdicts on this benchmark, with {size}. Every claim stays open at 1.5 B until somebody "
        "runs the preset `gsm8k-qwen2.5-1.5b` with enough seeds."
    )


def not_inferior(found: Difference) -> bool:
    """Lower end of the (outer) 95 % interval at least -1.0 point, and the mean at least 0."""
    return found.runs >= MIN_RUNS and found.outer[0] >= -MARGIN and found.mean >= 0


def recipes(sources: Mapping[str, Bootstrap], names: Sequence[str] = RECIPES) -> Table:
    """Each recipe against the bf16 arm that cost as much, and against those of as many RL steps."""
    header = ["recipe", "stage", "bits", "against", "greedy", "t", "sampled", "t", "not below: greedy", "sampled"]
    cells = []
    for name in names:
        for stage, source in sources.items():
            if name not in source.stage.arms:
                continue
            rows = list(source.stage.arms[name].values())
            bits = f"{statistics.fmean(row.bits for row in rows):.4g}"
            for other in filter(None, (matched(source.stage, name), "bf16", "bf16-aa")):
                found = [source.difference({name: 1, other: -1}, how) for how in HOWS]
                if not any(found):
                    continue
                both = [text for each in found for text in (points(each), t_text(each))]
                cells.append([f"`{name}`", stage, bits, f"`{other}`", *both, *map(_not_below, found)])
    return header, cells


def chance_of_full_precision(sources: Mapping[str, Bootstrap]) -> str:
    """What other random samples do to the bf16 arm itself, which is in every difference to it."""
    told = []
    for stage, source in sources.items():
        for how in HOWS:
            found = chance(source, "bf16", how)
            if found and found.difference.runs >= MIN_RUNS:
                told.append(f"{stage}, {how} {points(found.difference)}")
    return f"Chance alone, `bf16-aa` − `bf16`: {'; '.join(told) if told else 'not measured'}."


def tried(source: Bootstrap) -> Table:
    """Everything else that was tried at 4 bits and without noise, against bf16, the highest lower end first."""
    header = ["arm", "bits", "greedy − bf16", "t", "lower end", "sampled − bf16", "t", "lower end"]
    rows = []
    for arm, runs in source.stage.arms.items():
        one = next(iter(runs.values()))
        settings, bits = one.settings, one.bits
        if not settings.get("fmt") or settings.get("noise_during") or settings.get("tuning") == "full" or bits > BITS:
            continue
        found = [source.difference({arm: 1, "bf16": -1}, how) for how in HOWS]
        if found[0] is None or found[0].freedom < 1:
            continue
        each = [text for one in found for text in (points(one), t_text(one), f"{one.outer[0]:+.2f}" if one else "–")]
        rows.append((found[0].outer[0], [f"`{arm}`", f"{bits:.4g}", *each]))
    return header, [cells for _, cells in sorted(rows, key=lambda row: -row[0])]


def _not_below(found: Difference | None) -> str:
    if found is None or found.runs < MIN_RUNS:
        return "not measured"
    if not_inferior(found):
        return "met"
    return "**missed**: " + (f"lower end {found.outer[0]:+.2f}" if found.mean >= 0 else f"mean {found.mean:+.2f}")


def goal(name: str, sources: Mapping[str, Bootstrap]) -> str:
    """Whether a recipe reaches the goal: not below its compute-matched bf16, on both tasks, greedy and sampled."""
    found: dict[str, Difference | None] = {}
    for task in TASKS:
        source = sources.get(task)
        other = matched(source.stage, name) if source and name in source.stage.arms else None
        for how in HOWS:
            found[f"{task}, {how}"] = source.difference({name: 1, other: -1}, how) if source and other else None
    lacking = [where for where, each in found.items() if each is None or each.runs < MIN_RUNS]
    missed = [
        f"{where} {each.mean:+.2f}, from {each.outer[0]:+.2f}"
        for where, each in found.items()
        if where not in lacking and each and not not_inferior(each)
    ]
    if missed:
        return f"`{name}`: **missed** ({'; '.join(missed)})."
    return f"`{name}`: not measured yet ({'; '.join(lacking)})." if lacking else f"`{name}`: met."
