"""Render the generated parts of README.md and docs/ from committed results: `python -m benchmarks results [--check]`.

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`; what was not measured says so. With
--check nothing is written, and the exit status is 1 if a file differs from what would be.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import qnoise
from benchmarks.files import RESULTS, read_json, read_jsonl, write_text
from benchmarks.micro import tables
from benchmarks.micro.goals import CUDA_GOALS, CUDA_OPERATIONS, GOALS
from benchmarks.micro.tables import Line
from benchmarks.recovery import ptq_table, report
from benchmarks.recovery.study import page

ROOT = Path(__file__).resolve().parents[1]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in lines)


def provenance(result: dict[str, Any], seeds: bool = True) -> str:
    environment = result["environment"]
    parts = [f"`{result['command']}`"]
    if seeds:
        parts.append("seeds " + ", ".join(map(str, result["seeds"])))
    parts += [
        f"torch {environment['versions']['torch']}",
        environment["device"],
        f"commit {environment['commit'][:12]}",
    ]
    return "; ".join(parts)


def formats() -> str:
    result = _measured_formats()
    default = {row["fmt"]: row for row in result["rows"] if row["scale_mode"] == _default_mode(row["fmt"])}
    best = {
        name: max((row for row in result["rows"] if row["fmt"] == name), key=lambda row: row["sqnr_db"])
        for name in qnoise.FORMATS
    }
    rows = []
    for name, fmt in qnoise.FORMATS.items():
        scale = "E8M0" if fmt.scale == "e8m0" else "E4M3 + one fp32"
        modes = ", ".join(f"`{mode}`" for mode in fmt.scale_modes)
        rows.append(
            [
                f"`{name}`", fmt.element.name, str(fmt.block_size), scale, f"{fmt.bits_per_element:g}", modes,
                f"{default[name]['sqnr_db']:.2f}", f"{best[name]['sqnr_db']:.2f} (`{best[name]['scale_mode']}`)",
            ]
        )  # fmt: skip
    header = [
        "format",
        "element",
        "block",
        "scale",
        "bits per value",
        "scale modes (first = default)",
        "SQNR dB",
        "best",
    ]
    spread = max(row["sqnr_db_sd"] for row in result["rows"])
    note = (
        f"SQNR: signal to quantization noise on normal values of deviation {result['sigma']:g}, mean over seeds, "
        f"standard deviation at most {spread:.2g} dB; with another deviation the formats with an E8M0 scale move by "
        f"some tenths of a dB ({provenance(result)})."
    )
    return table(header, rows) + "\n\n" + note


def errors() -> str:
    """Every format and scale mode on gaussian values, figure by figure."""
    result = _measured_formats()
    shares = {"mean_relative_error": "mean relative error", "deadzone": "deadzone", "clipped": "clipped"}
    rows = [
        [f"`{row['fmt']}`", f"`{row['scale_mode']}`", f"{row['sqnr_db']:.2f}"]
        + [f"{100 * row[name]:.1f} %" for name in shares]
        for row in result["rows"]
    ]
    spread = max(row["sqnr_db_sd"] for row in result["rows"])
    note = (
        f"Normal values of deviation {result['sigma']:g} in bf16, rounded to nearest; mean over seeds, standard "
        f"deviation of the SQNR at most {spread:.2g} dB ({provenance(result)})."
    )
    return table(["format", "scale mode", "SQNR dB", *shares.values()], rows) + "\n\n" + note


def _measured_formats() -> dict[str, Any]:
    """The result of benchmarks.formats.

    Raises:
        ValueError: it lacks a format or a scale mode that exists.
    """
    result: dict[str, Any] = read_json(RESULTS / "formats.json")
    measured = {(row["fmt"], row["scale_mode"]) for row in result["rows"]}
    for name, fmt in qnoise.FORMATS.items():
        for mode in fmt.scale_modes:
            if (name, mode) not in measured:
                raise ValueError(f"formats.json has no row for {name} with {mode}; run `python -m benchmarks.formats`")
    return result


def agreement() -> str:
    """What the paths were compared on, bit for bit: vectors of other projects, and the fuzzed compiled path."""
    producers = {
        "torchao": "torchao 0.18.0",
        "mx": "microxcaling",
        "modelopt": "ModelOpt 0.40",
        "fouroversix": "fouroversix",
        "compressed_tensors": "compressed-tensors 0.20.0",
    }
    cases = read_json(ROOT / "tests" / "golden" / "manifest.json")["cases"]
    counts: dict[str, dict[str, int]] = {name: {} for name in producers}
    for case in cases:
        of = counts[case["peer"]]
        of[case["fmt"]] = of.get(case["fmt"], 0) + 1
    rows = [
        [label, ", ".join(f"`{fmt}` {counts[name][fmt]}" for fmt in qnoise.FORMATS if fmt in counts[name])]
        for name, label in producers.items()
    ]
    fuzz = read_json(RESULTS / "fuzz.json")
    note = (
        f"{len(cases)} arrays in `tests/golden`, compared by `tests/test_golden.py`. The compiled path against the "
        f"reference: {fuzz['values']:,} values in {fuzz['combinations']} combinations of spec and dtype, "
        f"{fuzz['differences']} differences (`{fuzz['command']}`; torch {fuzz['environment']['versions']['torch']}; "
        f"{fuzz['environment']['device']}; commit {fuzz['environment']['commit'][:12]})."
    )
    return table(["producer of the stored values", "arrays by format"], rows) + "\n\n" + note


def _default_mode(name: str) -> str:
    return qnoise.FORMATS[name].scale_modes[0]


def demo() -> str:
    result = read_json(RESULTS / "demo.json")
    parts = [table(*each) for each in report.tables(result)]
    where = (
        f"`{result['command']}`; seeds {', '.join(map(str, result['seeds']))}; torch {result['versions']['torch']}; "
        f"{result['device']}; commit {', '.join(commit[:12] for commit in result['commits'])}"
    )
    notes = [f"- {line}" for line in [*report.sentences(result), f"Made by {where}."]]
    return "\n\n".join([*parts, "\n".join(notes)])


def not_measured(benchmark: str) -> str:
    return f"Not measured yet (`python -m benchmarks run {benchmark}`)."


def speed() -> str:
    """The README's table: the defaults of every format, in units of a copy."""
    return _pivot(["qnoise, out=", "qnoise eager, out="])


def _pivot(names: Sequence[str], wanted: Callable[[Line], bool] = lambda line: _is_default(line)) -> str:
    """Fake quantization with a row for each spec, and a column for each dtype and contender."""
    lines = [line for line in tables.latest("fake_quantize") if wanted(line)]
    if not lines:
        return not_measured("fake_quantize")
    dtypes = list(dict.fromkeys(line["parameters"]["dtype"] for line in lines))
    specs: dict[tuple[str, ...], dict[str, Line]] = {}
    for line in lines:
        key = tuple(line["parameters"][name] for name in ("fmt", "scale_mode", "rounding"))
        specs.setdefault(key, {})[line["parameters"]["dtype"]] = line
    varying = [index for index in range(3) if len({key[index] for key in specs}) > 1]
    rows = [
        [f"`{key[index]}`" for index in varying]
        + [
            tables.times(tables.row(found[dtype], name)) if dtype in found else "–"
            for dtype in dtypes
            for name in names
        ]
        for key, found in specs.items()
    ]
    header = [("format", "scale mode", "rounding")[index] for index in varying]
    header += [f"{dtype}: {name}" for dtype in dtypes for name in names]
    shape = tables.plain(lines[0]["parameters"]["shape"])
    note = (
        f"Time in units of `Tensor.copy_` of the same {shape} tensor in the same round, one CPU thread: median and its "
        f"95 % interval ({tables.where(lines)})."
    )
    return table(header, rows) + "\n\n" + note


def _is_default(line: Line) -> bool:
    parameters = line["parameters"]
    return bool(parameters["scale_mode"] == _default_mode(parameters["fmt"]) and parameters["rounding"] == "nearest")


def modes() -> str:
    """The other scale modes and roundings."""
    return _pivot(["qnoise, out=", "qnoise eager, out="], lambda line: not _is_default(line))


def peers() -> str:
    """The cases in which other libraries stand beside us, with all contenders."""
    lines = [line for line in tables.latest("fake_quantize") if any(_is_peer(row) for row in line["rows"])]
    text = _grid(lines, "fake_quantize", lambda row: f"{tables.milliseconds(row)} ms, {tables.times(row)}")
    if not lines:
        return text
    versions = dict.fromkeys(
        f"{name} {version}"
        for line in lines
        for name, version in line["environment"]["peers"].items()
        if tables.row(line, name) is not None
    )
    return f"{text}\n\nMilliseconds, and times `copy_` of the same round. {', '.join(versions)}."


def _is_peer(row: Line) -> bool:
    return row["contender"] in ("torchao", "compressed-tensors", "microxcaling")


def _grid(lines: Sequence[Line], benchmark: str, cell: Callable[[Line], str]) -> str:
    if not lines:
        return not_measured(benchmark)
    header, rows, notes = tables.grid(lines, cell)
    same = tables.constants(lines)
    below = [*notes, (f"{same}; " if same else "") + tables.where(lines) + "."]
    return table(header, rows) + "\n\n" + "\n\n".join(below)


def threads() -> str:
    """Milliseconds with one thread and with two."""
    return _grid(tables.latest("fake_quantize_threads"), "fake_quantize", lambda row: f"{tables.milliseconds(row)} ms")


def memory() -> str:
    """Peak memory in multiples of the output."""
    return _grid(tables.latest("fake_quantize_memory"), "fake_quantize", lambda row: f"{row['peak_per_unit']:.2f}")


def operation(name: str, benchmark: str) -> str:
    """Every case of an operation."""
    return _cases(tables.latest(name), benchmark)


def _cases(lines: Sequence[Line], benchmark: str) -> str:
    if not lines:
        return not_measured(benchmark)
    same = tables.constants(lines)
    return table(*tables.cases(lines)) + "\n\n" + (f"{same}; " if same else "") + tables.where(lines) + "."


def goals() -> str:
    return table(*tables.goals(GOALS))


def on_a_gpu() -> str:
    """The goals of a GPU; and, where they were measured, all cases of its operations."""
    found = [(name, lines) for name in CUDA_OPERATIONS if (lines := tables.latest(name))]
    parts = [table(*tables.goals(CUDA_GOALS))]
    missing = [f"`{name}`" for name in CUDA_OPERATIONS if name not in dict(found)]
    if missing:
        parts.append(
            f"Not measured, and the kernels of torchao and ModelOpt beside ours neither: {', '.join(missing)}. On a "
            "machine with a GPU, `python -m benchmarks run cuda` does."
        )
    return "\n\n".join([*parts, *(f"**{name}**\n\n{_cases(lines, 'cuda')}" for name, lines in found)])


ALU_GOALS = {
    "fake_quantize mxfp4 bf16": 9,
    "fake_quantize nvfp4 bf16": 10,
    "pack mxfp4 bf16": 10,
    "pack nvfp4 bf16": 10,
}
"""Instructions of the integer, logic and compare pipe per element on sm_90, at most."""


def artefacts() -> str:
    """Instructions per element of the Triton kernels, counted in what the compiler made."""
    path = RESULTS / "kernel_artefacts.json"
    if not path.is_file():
        return "Not recorded yet (`python -m benchmarks.kernel_artefacts`)."
    result = read_json(path)
    found = {(row["kernel"], row["target"]): row for row in result["rows"]}
    targets = list(dict.fromkeys(row["target"] for row in result["rows"]))
    rows = []
    for kernel in dict.fromkeys(row["kernel"] for row in result["rows"]):
        if sum((kernel, target) in found for target in targets) < 2:
            continue  # compiled for one target only, to compare formats, modes and dtypes: left to the file
        limit = ALU_GOALS.get(kernel)
        judged = "–"
        if limit is not None:
            alu = found[kernel, "sm_90"]["alu_per_element"]
            judged = f"at most {limit}: {'met' if alu <= limit else '**missed**'}"
        rows.append([f"`{kernel}`", *(_instructions(found.get((kernel, target))) for target in targets), judged])
    note = (
        "Instructions per element, in brackets those of the integer, logic and compare pipe; registers of a thread; "
        f"benchmarks/results/{path.name} has the other formats, modes and dtypes "
        f"(triton {result['triton']}; {provenance(result, seeds=False)})."
    )
    return table(["kernel", *targets, "goal (sm_90)"], rows) + "\n\n" + note


def _instructions(row: Line | None) -> str:
    if row is None:
        return "–"
    if "instructions_per_element" not in row:
        return f"{row['registers']} registers"
    counts = f"{row['instructions_per_element']:.1f} ({row['alu_per_element']:.1f})"
    return f"{counts}, {row['registers']} registers"


def scan() -> str:
    """Millions of weights a second."""
    lines = tables.latest("scan")
    if not lines:
        return not_measured("scan")
    speeds: dict[tuple[str, str], dict[tuple[str, int], str]] = {}
    for line in lines:
        parameters = line["parameters"]
        for found in line["rows"]:
            speed = found["figures"]["weights"] / found["wall_ms"]["median"] / 1e3
            key = (found["contender"], parameters["threads"])
            speeds.setdefault((parameters["fmt"], parameters["dtype"]), {})[key] = tables.number(speed)
    columns = list(dict.fromkeys(key for each in speeds.values() for key in each))
    header = ["format", "dtype", *(f"{name}, {n} thread{'s' * (n > 1)}" for name, n in columns)]
    rows = [[f"`{fmt}`", dtype, *(each.get(key, "–") for key in columns)] for (fmt, dtype), each in speeds.items()]
    shape = tables.plain(lines[0]["parameters"]["shape"])
    return table(header, rows) + f"\n\nMillions of weights a second; {shape} normal weights ({tables.where(lines)})."


def baked() -> str:
    """The arrangements in which a base and its adapters can be served."""
    result = read_json(RESULTS / "baked.json")
    found = {(row["arrangement"], row["fmt"]): row for row in result["rows"]}
    fmts = list(dict.fromkeys(fmt for _, fmt in found))
    rows = [
        [arrangement, *(_decibels(found[arrangement, fmt]) for fmt in fmts)]
        for arrangement in dict.fromkeys(name for name, _ in found)
    ]
    note = (
        f"SQNR in dB of all weights of `{result['policy']}` taken together, in fp32, when they are quantized to the "
        f"format ({provenance(result)})."
    )
    return table(["", *(f"`{fmt}`" for fmt in fmts)], rows) + "\n\n" + note


def _decibels(row: dict[str, Any]) -> str:
    if row["sqnr_db"] is None:
        return "no error"
    return "a rounding of fp32" if row["sqnr_db"] > 120 else f"{row['sqnr_db']:.2f}"


def rl() -> str:
    """Log-probabilities: time, memory; the loss; and rollouts."""
    return "\n\n".join(
        f"**{title}**\n\n{operation(name, benchmark)}"
        for title, name, benchmark in (
            ("Log-probabilities, forward and backward", "rl_log_probs", "rl_log_probs"),
            ("Their memory, in bytes per logit at the peak", "rl_log_probs_memory", "rl_log_probs"),
            ("DAPO loss, forward and backward with its metrics", "rl_dapo_loss", "rl_dapo_loss"),
            ("Groups of samples, through MXFP4 and LoRA", "rl_rollout", "rl_rollout"),
        )
    )


def repairs() -> str:
    """Formats and repairs on the shipped policies, without RL."""
    path = RESULTS / "ptq.jsonl"
    if not path.is_file():
        return "Not measured yet (`python -m benchmarks.recovery ptq`)."
    lines = read_jsonl(path)
    rows = ptq_table.results(lines)
    settings, environment = lines[0]["settings"], lines[0]["environment"]
    commits = sorted({line["commit"][:12] + "+changes" * ("+" in line["commit"]) for line in lines[1:]})
    note = (
        f"Greedy accuracy (flexible) on {settings['problems']:,} problems for each of {len(settings['policies'])} "
        f"policies, mean; 95 % intervals of the paired bootstrap over problems. KL: nats per token, on text of other "
        f"problems that the policy wrote in full precision. Bits: with every scale, per quantized weight; behind the "
        f"plus those of the adapter, in bf16. Weight error: relative RMS of the base, in the basis it is quantized in. "
        f"Seconds: processor time of the repair. (`{lines[0]['command']}`; torch {environment['versions']['torch']}; "
        f"{environment['device']}; commit {', '.join(commits)})"
    )
    sentences = ptq_table.judged(rows)
    if missing := ptq_table.missing(rows):
        sentences.append("Not measured yet: " + ", ".join(f"`{name}`" for name in missing) + ".")
    goals = "\n".join(f"- {sentence}" for sentence in sentences)
    return "\n\n".join([table(*ptq_table.grid(rows)), note, goals])


def study(name: str) -> str:
    """A part of docs/recovery.md."""
    return "\n\n".join(table(*part) if isinstance(part, tuple) else part for part in page.PARTS[name]())


def faults() -> str:
    """Layers found by their injected deadzone."""
    path = RESULTS / "faults.json"
    if not path.is_file():
        return "Not measured yet (`python -m benchmarks.faults`)."
    result = read_json(path)
    found: dict[tuple[str, str, str], dict[float, str]] = {}
    for each in result["results"]:
        for row in each["trials"]:
            key = (each["model"], each["dtype"], row["at"])
            found.setdefault(key, {})[row["threshold"]] = f"{row['right']} of {row['layers']}"
    thresholds = list(dict.fromkeys(threshold for row in found.values() for threshold in row))
    header = ["model", "dtype", "at", *(f"{100 * threshold:g} %" for threshold in thresholds)]
    rows = [[*key, *(row.get(threshold, "–") for threshold in thresholds)] for key, row in found.items()]
    trials = [row for each in result["results"] for row in each["trials"] if row["threshold"] >= 0.003]
    layers, elsewhere = sum(row["layers"] for row in trials), sum(row["elsewhere"] for row in trials)
    healthy = sum(each["healthy_scans"] for each in result["results"])
    alarms = sum(len(each["false_alarms"]) for each in result["results"])
    notes = [
        f"From 0.3 % on {sum(row['right'] for row in trials)} of {layers} faults are found where they are, and "
        f"{elsewhere} places are accused wrongly. The layer of the least gain is right in "
        f"{sum(row['least_gain_right'] for row in trials)} of {layers}, the layer of the oddest kurtosis in "
        f"{sum(row['kurtosis_right'] for row in trials)}.",
        f"Healthy models, {healthy} scans: {alarms} false alarms.",
        f"{result['prompts']} prompts ({provenance(result, seeds=False)}).",
    ]
    return table(header, rows) + "\n\n" + "\n".join(f"- {note}" for note in notes)


PARTS: dict[str, Callable[[], str]] = {
    "formats": formats,
    "errors": errors,
    "agreement": agreement,
    "demo": demo,
    "repairs": repairs,
    "speed": speed,
    "modes": modes,
    "peers": peers,
    "threads": threads,
    "memory": memory,
    "quantize": partial(operation, "quantize", "pack"),
    "dequantize": partial(operation, "dequantize", "pack"),
    "norm": partial(operation, "norm", "norm"),
    "linear": partial(operation, "linear", "modules"),
    "model": partial(operation, "model", "modules"),
    "patching": partial(operation, "patching", "modules"),
    "rl": rl,
    "scan": scan,
    "faults": faults,
    "baked": baked,
    "artefacts": artefacts,
    "goals": goals,
    "cuda": on_a_gpu,
    **{name: partial(study, name) for name in page.PARTS},
}


def documents() -> list[Path]:
    """The files that may hold generated parts."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def render(text: str) -> str:
    """The text with every generated part made anew.

    Raises:
        ValueError: a part of another name, or one without its end.
    """
    if text.count("<!-- generated:") != text.count("<!-- end -->"):
        raise ValueError("a `<!-- generated: NAME -->` has no `<!-- end -->`")

    def part(match: re.Match[str]) -> str:
        name = match[1]
        if name not in PARTS:
            raise ValueError(f"no generated part is called {name!r}; there are: {', '.join(PARTS)}")
        return f"<!-- generated: {name} -->\n{PARTS[name]()}\n<!-- end -->"

    return re.sub(r"<!-- generated: (\S+) -->.*?<!-- end -->", part, text, flags=re.DOTALL)


def results(paths: Sequence[Path], check: bool) -> int:
    """Render the files, or with `check` only compare them. Returns 1 if `check` finds a difference, else 0."""
    differing = []
    for path in paths:
        if path.name == page.PAGE:
            stale = page.draw(path.parent / page.FIGURES, check=check)
            differing += stale if check else []
        text = path.read_text(encoding="utf-8")
        rendered = render(text)
        if rendered == text:
            print(f"{path.name}: up to date")
        elif check:
            differing.append(path.name)
        else:
            write_text(path, rendered)
            print(f"{path.name}: rendered")
    if differing:
        print(
            f"error: {', '.join(differing)}: not what the committed results give; run `make results` and commit it",
            file=sys.stderr,
        )
    return int(bool(differing))
