"""The generated parts of docs/recovery.md, and its figures."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

from benchmarks.files import write_bytes
from benchmarks.recovery.stages import STAGES
from benchmarks.recovery.study import claims, figures, hours, power, tables
from benchmarks.recovery.study.bootstrap import RESAMPLES, Bootstrap
from benchmarks.recovery.study.rows import DEV_STAGES, FOLDER, TASKS, Row, Stage, provenance, stage, with_baselines
from benchmarks.recovery.study.tables import Table

Part = str | Table

CELLS = (*TASKS, "large", "arms")
BASELINES = ("bf16", "mxfp4", "nvfp4", "mxfp4+aqn", "nvfp4+aqn")
"""What the stage "arms" takes from the stage of its task, run by run, where it has not run it itself."""
CORE = (
    *BASELINES, "bf16-aa", "mxfp4-aa", "nvfp4-aa", *claims.RECIPES, "bf16+mxfp4-cost", "bf16+nvfp4-cost",
)  # fmt: skip
PAGE = "recovery.md"
FIGURES = "figures"
"""Folder of the figures, beside the page."""
KINDS = {"arms": ("differences",)}
"""Figures of a cell, where not all."""
HOW = (
    "Accuracy in percent, flexible (the last number counts) where strict is not said: mean over runs ± their standard "
    "deviation, under the quantization of the arm, noise off. 0: before RL. Differences in points, paired over runs "
    f"and problems, with the 95 % interval of a bootstrap over checkpoints, seeds and problems ({RESAMPLES:,} draws); "
    "t: the interval of the runs alone. Detectable: the smallest effect such runs find with 80 % power."
)
DURING = (
    f"Reward, entropy and length: mean of the last {tables.LAST} steps; mismatch KL, clipped and cut off: of all "
    "steps. Clipped: share of tokens; cut off: share of answers that ran into the limit. Entropy: of the policy that "
    "samples, noise included."
)


def not_run(name: str) -> str:
    return f"Not run yet (`python -m benchmarks.recovery study --stages {name}`)."


@lru_cache(maxsize=2)
def _sources(*stages: Stage) -> dict[str, Bootstrap]:
    found = {each.name: each for each in stages if each.rows}
    if (arms := found.get("arms")) and (lender := _lender(arms, found)):
        found["arms"] = with_baselines(arms, lender, BASELINES)
    return {name: Bootstrap(each) for name, each in found.items()}


def _lender(cell: Stage, stages: dict[str, Stage]) -> Stage | None:
    """The stage of the same task and model."""
    wanted = [cell.rows[0].preset.get(name) for name in ("task", "model")]
    present = [stages[name] for name in TASKS if name in stages]
    return next((each for each in present if [each.rows[0].preset.get(n) for n in ("task", "model")] == wanted), None)


def sources(folder: Path = FOLDER) -> dict[str, Bootstrap]:
    """The stages that have been run, at least in part. Raises ValueError as `rows.stage` does."""
    return _sources(*(stage(name, folder) for name in CELLS))


def _chance(name: str, known: dict[str, Bootstrap]) -> Bootstrap:
    """The runs whose A/A arms are the size of chance for this stage: its own, or those of the stage of its task."""
    lender = _lender(known[name].stage, {each: source.stage for each, source in known.items()})
    return known[lender.name] if name == "arms" and lender else known[name]


def cell(name: str, folder: Path = FOLDER) -> list[Part]:
    """Tables and figures of a stage."""
    source = sources(folder).get(name)
    if source is None:
        return [not_run(name)]
    found = source.stage
    parts: list[Part] = [tables.accuracy(found)]
    for title, table in (
        ("Against full precision", tables.against_full_precision(source)),
        ("Against full precision, checkpoint by checkpoint", _several(tables.by_checkpoint(source))),
        ("Against the same format, unrepaired", tables.against_format(source)),
        ("During RL", tables.training(found)),
        ("Cost", tables.cost(found)),
    ):
        if table[1]:
            parts += [f"**{title}**", table]
    for kind in KINDS.get(name, figures.KINDS):
        parts.append(f"![{figures.KINDS[kind][2]}: stage {name}]({FIGURES}/{figures.name(kind, name)})")
    notes = [HOW, DURING, *found.notes]
    if missing := [arm.name for arm in STAGES[name].arms if arm.name not in found.arms]:
        notes.append(f"Not run yet: {', '.join(f'`{arm}`' for arm in missing)}.")
    least, planned = _seeds(found)
    if least < planned:
        notes.append(f"Not complete: {least} of {planned} planned seeds in every arm.")
    if len({checkpoint for row in found.rows for checkpoint, _ in [row.key]}) == 1:
        notes.append("One checkpoint: the intervals do not speak about another.")
    return [*parts, _bullets([*notes, _made(found.rows)])]


def _several(table: Table) -> Table:
    """Nothing, where there is but one checkpoint."""
    return table if len(table[0]) > 2 else (table[0], [])


def benchmark(folder: Path = FOLDER) -> list[Part]:
    """Whether the benchmark can see what it claims to see."""
    found = [source for name, source in sources(folder).items() if name != "arms"]
    table = tables.benchmark(found)
    if not table[1]:
        return [not_run("words")]
    note = (
        f"RL has to give the bf16 arm at least {tables.GAIN:g} points of flexible accuracy. Clipped: share of tokens; "
        "cut off: share of answers at the limit of length; samples a step vary where groups were drawn again. MXFP4 "
        "and NVFP4: paired differences to bf16 at the end."
    )
    return [table, note]


def summary(folder: Path = FOLDER) -> list[Part]:
    """The core arms on both tasks, for README, and what they say of the report's main claims."""
    known = sources(folder)
    found = [source for name, source in known.items() if name in TASKS]
    if not found:
        return [not_run("words")]
    arms = [arm for arm in CORE if not arm.endswith("-aa")]
    runs = ["{} of {} planned on {}".format(*_seeds(each.stage), each.stage.name) for each in found]
    note = (
        "Flexible accuracy after RL in percent, greedy and sampled, mean over paired runs "
        f"({', '.join(runs)}), and the difference to bf16 in points with its 95 % interval over checkpoints, "
        "seeds and problems. `+aqn`: noise as in the report. `-cost`: bf16 with as many more RL steps as the "
        "recipe costs. Reported: by the report this project starts from, Qwen2.5-1.5B on GSM8K, one seed. "
        f"{_made(tuple(row for each in found for row in each.stage.rows))}"
    )
    judged = [claims.judge(claim, known) for claim in claims.CLAIMS[:3]]
    lines = [f"{each.claim.sentence} ({each.claim.report})? {each.found}: **{each.word}**." for each in judged]
    lines += [f"Not below bf16 at equal cost? {claims.goal(name, known)}" for name in claims.RECIPES]
    return [tables.summary(found, arms, claims.REPORTED), note, _bullets(lines), claims.stays_open(known)]


def by_chance(folder: Path = FOLDER) -> list[Part]:
    """The A/A arms, and the noise arms among them."""
    parts: list[Part] = []
    known = sources(folder)
    for name, source in known.items():
        table = tables.by_chance(_chance(name, known), source)
        if table[1]:
            parts += [f"**{name}**", table]
    if not parts:
        return [not_run("words")]
    note = (
        "Differences in points to the same format without noise. Chance alone: where a mean over so many runs stays 95 "
        "times in 100, by the A/A runs of the format. p: how often chance alone is as far from 0; corrected: for the "
        "number of noise arms in the table (Holm). Greedy and sampled accuracy are of the same runs."
    )
    return [*parts, note]


def recipes(folder: Path = FOLDER) -> list[Part]:
    """The recipes against full precision, and whether they reach the goal."""
    known = sources(folder)
    table = claims.recipes(known)
    goals = _bullets([*(claims.goal(name, known) for name in claims.RECIPES), claims.chance_of_full_precision(known)])
    note = (
        f"Not below: the lower end of the 95 % interval (of bootstrap and t, the lower one) is at least "
        f"-{power.MARGIN:.1f} point, and the mean at least 0. The goal asks for it on both tasks, greedy and sampled, "
        "against the bf16 arm of equal cost."
    )
    parts: list[Part] = [*([table] if table[1] else [not_run("words")]), note, goals]
    if "arms" in known and (tried := claims.tried(known["arms"]))[1]:
        parts += ["**What else was tried, in one cell and against the bf16 arm of as many RL steps**", tried]
    return parts


def verdicts(folder: Path = FOLDER) -> list[Part]:
    """The table of verdicts."""
    known = sources(folder)
    note = (
        f"Here: the effect in the direction of the claim, in points of greedy flexible accuracy. {claims.REPRODUCED}: "
        f"bootstrap and t interval lie above 0; {claims.OPPOSITE}: both below; {claims.UNMEASURED}: fewer than "
        f"{claims.MIN_RUNS} paired runs."
    )
    return [claims.verdicts(known), note, claims.stays_open(known)]


def planned(folder: Path = FOLDER) -> list[Part]:
    """The calculation of power, and the spread that was found."""
    lines = [power.sentence()]
    for name, source in sources(folder).items():
        found = source.difference({"mxfp4": 1, "bf16": -1}) if name != "arms" else None
        if found and found.runs > 1:
            problems = source.stage.rows[0].problems("final", "greedy")
            lines.append(
                f"Found on {name}: SD {found.sd:.2f} points of `mxfp4` − `bf16` between {found.runs} paired runs at "
                f"{problems:,} problems."
            )
    return [power.table(), _bullets(lines)]


def chosen_by(name: str, folder: Path = FOLDER) -> list[Part]:
    """What the settings were chosen by."""
    found = stage(name, folder)
    return [tables.tuning(found), _bullets([_made(found.rows)])] if found.rows else [not_run(name)]


def duration(folder: Path = FOLDER) -> list[Part]:
    """What the whole study takes."""
    found = [each for name in STAGES if (each := stage(name, folder)).rows]
    if not found:
        return [not_run("words")]
    note = (
        f"CPU seconds are those of the process of a run, with as many runs at a time as cores, mean of the last "
        f"{hours.RECENT} of a stage: earlier ones were made by slower code. Pretraining of the checkpoints, which come "
        "with the study, is not counted."
    )
    return [hours.table(found), note]


def _seeds(found: Stage) -> tuple[int, int]:
    """How many seeds every arm of a stage has, and how many are planned."""
    return min(map(len, found.arms.values())), len(STAGES[found.name].seeds)


def _made(rows: tuple[Row, ...]) -> str:
    return f"{len(rows)} runs. Made by {provenance(rows)}."


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


PARTS: dict[str, Callable[[], list[Part]]] = {
    "recovery-power": planned,
    "recovery-benchmark": benchmark,
    "recovery-summary": summary,
    **{f"recovery-{name}": partial(cell, name) for name in CELLS},
    "recovery-chance": by_chance,
    "recovery-recipes": recipes,
    "recovery-verdicts": verdicts,
    **{f"recovery-{name}": partial(chosen_by, name) for name in DEV_STAGES},
    "recovery-hours": duration,
}


def draw(into: Path, *, check: bool, folder: Path = FOLDER) -> list[str]:
    """Draw the figures that do not show the committed results; with `check` only name them.

    Raises:
        ValueError: figures have to be drawn and matplotlib is not installed.
    """
    stale = []
    known = sources(folder)
    for name, source in known.items():
        for kind in KINDS.get(name, figures.KINDS):
            data = figures.data(kind, source, _chance(name, known))
            path = into / figures.name(kind, name)
            if figures.drawn(path) == figures.digest(data):
                continue
            stale.append(path.name)
            if check:
                continue
            try:
                write_bytes(path, figures.svg(kind, data, source.stage))
            except ImportError as error:
                raise ValueError("the figures of docs/recovery.md need matplotlib (pip install matplotlib)") from error
            print(f"{path.name}: drawn")
    return stale
