"""README and docs: every sample runs as it stands and prints what it shows; tables say what is there."""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import re
from pathlib import Path

import pytest
import torch

from benchmarks.render import render
from qnoise import rl

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
SAMPLE = re.compile(r"```python\n(.*?)```(?:\n```text\n(.*?)```)?", re.DOTALL)
CODE = re.compile(r"`([^`]+)`")


def page_name(path: Path) -> str:
    return path.name


def run_samples(text: str) -> list[tuple[str, str]]:
    """(printed, shown) of each python block; the blocks share their names, as a reader pastes them one by one."""
    names: dict = {"__name__": "docs"}
    results = []
    for code, shown in SAMPLE.findall(text):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "a sample", "exec"), names)
        results.append((printed.getvalue(), shown))
    return results


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_samples_print_what_they_show(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    results = run_samples(path.read_text(encoding="utf-8"))
    assert len(results) >= {"README.md": 4, "rl.md": 2}.get(path.name, 0)
    for printed, shown in results:
        assert printed == shown


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_generated_parts_are_those_of_the_committed_results(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "<!-- generated:" in text or path.name == "integrations.md"
    assert render(text) == text


def test_nobody_elses_package_is_recommended() -> None:
    for path in {*PAGES, *ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")}:
        assert not re.search(r"pip install (-U )?qnoise(?!-torch)", path.read_text(encoding="utf-8")), path


def section(title: str) -> str:
    """The text of a section of docs/rl.md."""
    text = (ROOT / "docs" / "rl.md").read_text(encoding="utf-8")
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def table(text: str) -> list[list[str]]:
    """The cells of a table's rows, without its head."""
    lines = [line.replace("\\|", "¦").strip("| \n") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")] for line in lines[2:]]


def test_the_trainer_fits_a_screen_and_uses_what_is_public() -> None:
    code = SAMPLE.findall(section("The whole trainer"))[0][0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 46
    assert rl_names(code) >= {"generate_groups", "informative_groups", "rollout_is_weights", "dapo_loss"}
    assert rl_names(code) <= set(rl.__all__)


def test_the_trainer_learns_nothing_where_nothing_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers that no response can give: no group is informative, no update is taken, and nothing is NaN."""
    monkeypatch.chdir(ROOT)
    trainer, example = (code for code, _ in SAMPLE.findall(section("The whole trainer")))
    names: dict = {"__name__": "docs"}
    exec(trainer, names)
    exec(example.split("history = ")[0], names)
    before = {name: value.clone() for name, value in names["model"].state_dict().items()}
    problems = [(prompt, "123456789") for prompt, _ in names["problems"]]
    history = names["train"](
        names["model"], names["tokenizer"], problems, steps=2, prompts=2, generations=2, length=8, rounds=1
    )
    assert [line["micro_batches"] for line in history] == [0, 0]
    assert [line["right"] for line in history] == [0, 0]
    assert all(torch.equal(value, before[name]) for name, value in names["model"].state_dict().items())


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/recovery/*.py")), ids=page_name)
def test_the_benchmark_uses_public_functions_only(path: Path) -> None:
    assert rl_names(path.read_text(encoding="utf-8")) <= set(rl.__all__)


def rl_names(code: str) -> set[str]:
    """What a program takes out of `qnoise.rl`."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "rl":
            names.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qnoise.rl"):
            names |= {f"{node.module}.{alias.name}".removeprefix("qnoise.rl.") for alias in node.names}
    return names


def test_the_names_that_are_translated_exist() -> None:
    known = {*rl.__all__, *inspect.signature(rl.Rollout).parameters, "None", "True", "False"}
    for name in rl.__all__:
        known |= set(inspect.signature(getattr(rl, name)).parameters)
    rows = table(section("Names in qnoise, verl and TRL"))
    assert len(rows) > 20
    for row in rows:
        for code in CODE.findall(row[1]):
            words = set(re.findall(r"[A-Za-z_]\w*", re.sub(r'"[^"]*"', "", code)))
            assert words <= known, f"{code}: {words - known}"


def test_every_metric_is_in_the_table() -> None:
    listed: set[str] = set()
    for row in table(section("Mismatch metrics")):
        assert len(row) == 3, row
        names = CODE.findall(row[0])
        stem = names[0].removesuffix("_mean")
        listed |= {stem + name if name.startswith("_") else name for name in names}
    zeros = torch.zeros(1, 1)
    assert listed == rl.mismatch_metrics(zeros, zeros, zeros).keys()
