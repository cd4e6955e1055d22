"""The tables of the study, each a header and its cells. Every number comes from the rows; none is made here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence

from benchmarks.recovery.stages import EQUAL_COST
from benchmarks.recovery.study import student
from benchmarks.recovery.study.bootstrap import GAP, LEVEL, Bootstrap, Difference, Share
from benchmarks.recovery.study.chance import Chance, chance, holm
from benchmarks.recovery.study.equal_cost import LongerRuns, mean_of_both
from benchmarks.recovery.study.rows import HOWS, Row, Stage

Table = tuple[list[str], list[list[str]]]

LAST = 5
"""Steps that "at the end" is averaged over."""
GAIN = 5.0
"""Points of flexible accuracy that RL must give the bf16 arm for the benchmark to count."""


def plain(stage: Stage, arm: str) -> str | None:
    """The arm with the same format and nothing else done to it; None for full precision and for that arm itself."""
    settings = _settings(stage, arm)
    if not settings.get("fmt"):
        return None
    name = settings["fmt"] + _suffix(settings)
    return name if name != arm and name in stage.arms else None


def reference(stage: Stage, arm: str) -> str | None:
    """The arm in full precision that trains the same parameters; None for that arm itself."""
    name = "bf16" + _suffix(_settings(stage, arm))
    return name if name != arm and name in stage.arms else None


def matched(stage: Stage, arm: str) -> str | None:
    """The arm in full precision with as many more RL steps as the preparation of this recipe costs."""
    name = EQUAL_COST.get(arm, "")
    return name if name in stage.arms else None


def _suffix(settings: dict) -> str:
    return "-full" if settings.get("tuning") == "full" else ""


def _settings(stage: Stage, arm: str) -> dict:
    return next(iter(stage.arms[arm].values())).settings


def accuracy(stage: Stage) -> Table:
    """Before RL and after it, in percent: mean over runs, and their standard deviation."""
    header = ["arm", "runs", "bits", "greedy 0", "greedy end", "sampled 0", "sampled end", "strict, greedy"]
    cells = []
    for arm, runs in stage.arms.items():
        found = list(runs.values())
        ends = [_percent(found, when, how) for how in HOWS for when in ("initial", "final")]
        strict = [_mean(row.accuracy(when, "greedy", "strict") for row in found) for when in ("initial", "final")]
        cells.append(
            [
                f"`{arm}`",
                str(len(found)),
                f"{_mean(row.bits for row in found):.4g}",
                *ends,
                " → ".join("–" if value is None else f"{value:.1f}" for value in strict),
            ]
        )
    return header, cells


def summary(sources: Sequence[Bootstrap], arms: Sequence[str], reported: Mapping[str, str]) -> Table:
    """In few columns: accuracy at the end, and the paired difference to the bf16 arm, of these arms in every stage.

    `reported`: what others say of an arm, under their own conditions.
    """
    header = ["arm", "bits"]
    for source in sources:
        header += [f"{source.stage.name}: {words}" for how in HOWS for words in (how, "− bf16")]
    header.append("reported, not reproduced")
    cells = []
    for arm in arms:
        present = [source for source in sources if arm in source.stage.arms]
        if not present:
            continue
        bits = _mean(row.bits for source in present for row in source.stage.arms[arm].values())
        line = [f"`{arm}`", f"{bits:.4g}"]
        for source in sources:
            found = list(source.stage.arms.get(arm, {}).values())
            other = reference(source.stage, arm) if found else None
            for how in HOWS:
                end = _mean(row.accuracy("final", how) for row in found)
                line.append(_shown(end, ".1f"))
                line.append(points(source.difference({arm: 1, other: -1}, how)) if other else "–")
        cells.append([*line, reported.get(arm, "–")])
    return header, cells


def against_full_precision(source: Bootstrap) -> Table:
    """Paired differences to the bf16 arm, with both intervals."""
    header = ["arm", "greedy − bf16", "t", "sampled − bf16", "t", "detectable, greedy"]
    return header, _differences(source, reference)


def against_format(source: Bootstrap) -> Table:
    """Paired differences to the arm's format with nothing done about it, and the share of its loss that came back."""
    header = ["arm", "against", "greedy", "t", "sampled", "t", "detectable, greedy", "recovered, greedy", "sampled"]
    cells = []
    for row, arm in zip(_differences(source, plain), _having(source.stage, plain), strict=True):
        base = plain(source.stage, arm)
        full = reference(source.stage, arm)
        shares = [source.share(arm, base, full, how) if base and full else None for how in HOWS]
        cells.append([row[0], f"`{base}`", *row[1:], *(share_text(share) for share in shares)])
    return header, cells


def by_checkpoint(source: Bootstrap) -> Table:
    """The greedy differences to the bf16 arm on each checkpoint alone, with the t interval of its runs."""
    names = sorted({row.data["checkpoint"] for row in source.stage.rows})
    cells = []
    for arm in _having(source.stage, reference):
        found = source.difference({arm: 1, str(reference(source.stage, arm)): -1})
        runs = zip(found.keys, found.by_run.tolist(), strict=True) if found else ()
        values: dict[str, list[float]] = {}
        for (checkpoint, _), value in runs:
            values.setdefault(checkpoint, []).append(value)
        cells.append([f"`{arm}`", *(_of_runs(values.get(name, [])) for name in names)])
    return ["arm", *(f"{name}: greedy − bf16" for name in names)], cells


def _of_runs(values: list[float]) -> str:
    """Mean of runs and its t interval."""
    if len(values) < 2:
        return f"{values[0]:+.2f} (one run)" if values else "–"
    freedom = len(values) - 1
    half = student.quantile((1 + LEVEL) / 2, freedom) * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return f"{mean:+.2f} ({_bounds((mean - half, mean + half))})"


def _differences(source: Bootstrap, other: Callable[[Stage, str], str | None]) -> list[list[str]]:
    cells = []
    for arm in _having(source.stage, other):
        found = [source.difference({arm: 1, str(other(source.stage, arm)): -1}, how) for how in HOWS]
        both = [text for each in found for text in (points(each), t_text(each))]
        cells.append([f"`{arm}`", *both, f"{found[0].detectable:.2f}" if found[0] and found[0].freedom else "–"])
    return cells


def _having(stage: Stage, other: Callable[[Stage, str], str | None]) -> list[str]:
    return [arm for arm in stage.arms if other(stage, arm) and stage.shared((arm, str(other(stage, arm))))]


def training(stage: Stage) -> Table:
    """What happened during RL, averaged over runs."""
    header = ["arm", "reward", "entropy", "mismatch KL", "length", "clipped", "cut off", "noise σ"]
    cells = []
    for arm, runs in stage.arms.items():
        found = list(runs.values())
        sigma = [value for value in found[0].curve("sigma") if value]
        cells.append(
            [
                f"`{arm}`",
                _shown(_late(found, "reward"), ".3f"),
                _shown(_late(found, "entropy"), ".4f"),
                _shown(_whole(found, "mismatch_kl"), ".1e"),
                _shown(_late(found, "response_length"), ".1f"),
                _share(_whole(found, "clip_fraction")),
                _share(_whole(found, "truncated")),
                f"{sigma[0]:g} → {sigma[-1]:g}" if sigma else "0",
            ]
        )
    return header, cells


def cost(stage: Stage) -> Table:
    """Time, tokens, parameters and memory, averaged over runs."""
    header = [
        "arm", "seconds a step", "CPU seconds in all", "of them before RL", "tokens before RL", "tokens sampled",
        "tokens trained on", "parameters trained", "peak MB",
    ]  # fmt: skip
    names = ("step_seconds", "cpu_seconds", "prepare_seconds")
    tokens = ("prepare_tokens", "rollout_tokens", "train_tokens")
    cells = []
    for arm, runs in stage.arms.items():
        found = list(runs.values())
        trained, every = found[0].data["trainable_parameters"], found[0].data["parameters"]
        cells.append(
            [
                f"`{arm}`",
                *(_shown(_cost(found, name), ".2f" if name == "step_seconds" else ",.0f") for name in names),
                *(_shown(_cost(found, name), ",.0f") for name in tokens),
                f"{trained:,} of {every:,}",
                f"{max(row.data['peak_memory_mb'] for row in found):,.0f}",
            ]
        )
    return header, cells


def benchmark(sources: Sequence[Bootstrap]) -> Table:
    """Whether the benchmark can see what it claims to see: what RL gives the bf16 arm, and what each format loses."""
    header = [
        "stage", "checkpoints", "problems", "bf16 greedy", "gain", "bf16 sampled", "gain", "clipped", "cut off",
        "samples a step", "MXFP4, greedy", "NVFP4, greedy",
    ]  # fmt: skip
    cells = []
    for source in sources:
        runs = list(source.stage.arms.get("bf16", {}).values())
        if not runs:
            continue
        ends = [text for how in HOWS for text in _gain(runs, how)]
        losses = [source.difference({fmt: 1, "bf16": -1}) for fmt in ("mxfp4", "nvfp4")]
        samples = [value for row in runs for value in row.curve("samples") if value is not None]
        cells.append(
            [
                source.stage.name,
                str(len({checkpoint for checkpoint, _ in source.stage.arms["bf16"]})),
                f"{runs[0].problems('final', 'greedy'):,}",
                *ends,
                _share(_whole(runs, "clip_fraction")),
                _share(_whole(runs, "truncated")),
                f"{min(samples):g} … {max(samples):g}" if samples else "–",
                *map(points, losses),
            ]
        )
    return header, cells


def _gain(runs: Sequence[Row], how: str) -> tuple[str, str]:
    before, after = (_mean(row.accuracy(when, how) for row in runs) for when in ("initial", "final"))
    if before is None or after is None:
        return "–", "–"
    gain = after - before
    return f"{before:.1f} → {after:.1f}", f"{gain:+.1f} ({'enough' if gain >= GAIN else f'**under {GAIN:g}**'})"


def by_chance(source: Bootstrap, cell: Bootstrap | None = None) -> Table:
    """The A/A arms of `source`, and every noise arm of `cell` (or of `source`) among them; p-values by Holm."""
    header = ["arm", "how", "runs", "difference", "by run", "chance alone", "p", "p, corrected"]
    cell = cell or source
    known: dict[tuple[str, str], Chance | None] = {}
    rows: list[tuple[list[str], float]] = []
    for fmt in ("bf16", "mxfp4", "nvfp4"):
        for how in HOWS:
            found = known[fmt, how] = chance(source, fmt, how)
            if found:
                cells = _chance_row(f"{fmt}-aa", how, found.difference, found)
                rows.append((cells, math.nan))
    for arm in cell.stage.arms:
        base = plain(cell.stage, arm)
        if not base or not _settings(cell.stage, arm).get("noise_during"):
            continue
        for how in HOWS:
            aa, difference = known.get((base, how)), cell.difference({arm: 1, base: -1}, how)
            if aa and difference:
                rows.append((_chance_row(arm, how, difference, aa), aa.p(difference)))
    corrected = dict.fromkeys(range(len(rows)), math.nan)
    for how in HOWS:  # the two accuracies of a run are no two tests of an arm
        places = [place for place, (cells, _) in enumerate(rows) if cells[1] == how]
        corrected |= dict(zip(places, holm([rows[place][1] for place in places]), strict=True))
    return header, [[*cells, _probability(p), _probability(corrected[place])] for place, (cells, p) in enumerate(rows)]


def _probability(p: float) -> str:
    if math.isnan(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _chance_row(arm: str, how: str, difference: Difference, aa: Chance) -> list[str]:
    spread = f"{difference.by_run.min():+.1f} … {difference.by_run.max():+.1f}"
    within = f"± {aa.half_width(difference.runs):.2f}"
    return [f"`{arm}`", how, str(difference.runs), points(difference), spread, within]


def tuning(stage: Stage) -> Table:
    """What the settings were chosen by: a line for each arm and set of settings, on problems of the stream "dev"."""
    header = [
        "arm", "settings that differ", "runs", "greedy end", "sampled end", "mean of both", "seconds before RL",
        "mean of both − bf16 of equal cost",
    ]  # fmt: skip
    groups: dict[tuple[str, str], list[Row]] = {}
    varying = _varying(stage.rows)
    for row in stage.rows:
        words = ", ".join(f"{name} {row.preset.get(name, '–')}" for name in varying)
        groups.setdefault((row.arm, words), []).append(row)
    longer = LongerRuns(stage.rows)
    cells = []
    for (arm, words), found in sorted(groups.items()):
        seconds = _mean(row.data["cost"].get("prepare_seconds") for row in found)
        ends = [_percent(found, "final", how) for how in HOWS]
        both = _shown(_mean(map(mean_of_both, found)), ".2f")
        runs = str(len(found))
        cells.append([f"`{arm}`", words or "–", runs, *ends, both, _shown(seconds, ".1f"), longer.text(found)])
    return header, cells


def _varying(rows: Sequence[Row]) -> list[str]:
    """Names of the preset's fields that are not the same in all rows."""
    names = dict.fromkeys(name for row in rows for name in row.preset)
    return [name for name in names if len({repr(row.preset.get(name)) for row in rows}) > 1]


def points(found: Difference | None) -> str:
    """Mean and bootstrap interval."""
    if found is None:
        return "–"
    if found.freedom < 1:
        return f"{found.mean:+.2f} (one run)"
    return f"{found.mean:+.2f} ({_bounds(found.interval)})"


def t_text(found: Difference | None) -> str:
    return "–" if found is None or found.freedom < 1 else _bounds(found.t_interval)


def share_text(found: Share | None) -> str:
    if found is None:
        return "–"
    if math.isnan(found.mean):
        return f"gap of {found.gap:.1f} too small" if found.gap < GAP else "gap not certain"
    if not math.isfinite(found.interval[0]):
        return f"{100 * found.mean:.0f} % (one run)"
    low, high = found.interval
    return f"{100 * found.mean:.0f} % ({100 * low:.0f} … {100 * high:.0f})"


def _bounds(interval: tuple[float, float]) -> str:
    return f"{interval[0]:+.2f} … {interval[1]:+.2f}"


def _percent(rows: Sequence[Row], when: str, how: str) -> str:
    values = [value for row in rows if (value := row.accuracy(when, how)) is not None]
    if not values:
        return "–"
    return f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def _late(rows: Sequence[Row], name: str) -> float | None:
    return _mean(value for row in rows for value in row.curve(name)[-LAST:])


def _whole(rows: Sequence[Row], name: str) -> float | None:
    return _mean(value for row in rows for value in row.curve(name))


def _cost(rows: Sequence[Row], name: str) -> float | None:
    return _mean(row.data["cost"].get(name) for row in rows)


def _mean(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return statistics.fmean(present) if present else None


def _shown(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"
