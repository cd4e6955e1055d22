"""README and docs: every sample runs as it stands and prints what it shows; tables and links say what is there."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import inspect
import io
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.render import PARTS, render
from qnoise import formats, rl
from qnoise.cli import COMMANDS
from qnoise.repairs import recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
TEXTS = [
    *PAGES,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted(ROOT.glob("tests/*/README.md")),
    *sorted(ROOT.glob("benchmarks/**/README.md")),
    *sorted(ROOT.glob("notebooks/*.ipynb")),
]
"""Whatever has links: pages, what stands beside the code, the prose of the notebooks."""
SAMPLE = re.compile(r"```python\n(.*?)```(?:\n```text\n(.*?)```)?", re.DOTALL)
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")


def page_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def run_samples(text: str) -> list[tuple[str, str]]:
    """(printed, shown) of each python block; the blocks share their names, as a reader pastes them one by one."""
    names: dict = {"__name__": "docs"}
    results = []
    for code, shown in SAMPLE.findall(text):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "a sample", "exec", dont_inherit=True), names)
        results.append((printed.getvalue(), shown))
    return results


@pytest.fixture
def _tables_as_they_were() -> Iterator[None]:
    """A page may register what the next one knows nothing of."""
    tables: list[dict] = [formats._TABLE, recipe.STEPS]
    before = [dict(each) for each in tables]
    yield
    for each, rows in zip(tables, before, strict=True):
        each.clear()
        each.update(rows)


@pytest.mark.parametrize("path", PAGES, ids=page_name)
@pytest.mark.usefixtures("_tables_as_they_were")
def test_samples_print_what_they_show(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    results = run_samples(path.read_text(encoding="utf-8"))
    assert len(results) >= {"README.md": 4, "docs/rl.md": 2}.get(page_name(path), 0)
    for printed, shown in results:
        assert printed == shown


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_every_block_of_code_is_run_or_checked(path: Path) -> None:
    """Python is run above; commands exist; what they print stands right under them; nothing hides in another form."""
    text = path.read_text(encoding="utf-8")
    fences = list(FENCE.finditer(text))
    assert text.count("```") == 2 * len(fences)
    assert len(SAMPLE.findall(text)) == sum(fence[2] == "python" for fence in fences)
    for before, fence in zip([None, *fences], fences, strict=False):
        at = f"{page_name(path)}, line {text[: fence.start()].count(chr(10)) + 1}"
        assert not fence[1], f"{at}: an indented block is not run"
        assert fence[2] in ("python", "bash", "sh", "text"), f"{at}: nothing checks {fence[2]!r}"
        if fence[2] == "text":
            assert before is not None, at
            assert before.end() + 1 == fence.start(), f"{at}: not the output of the block above"
        if fence[2] in ("bash", "sh"):
            for line in fence[3].replace("\\\n", " ").splitlines():
                for command in line.split("&&"):
                    check_command(command, at)
    for block in re.findall(r"(?<=\n\n)(?: {4}\S.*\n)+", FENCE.sub("", text)):
        with pytest.raises(SyntaxError):  # formulas, not code
            ast.parse(inspect.cleandoc(block))


def check_command(text: str, at: str) -> None:
    """The program, its target or module, and of `qnoise` every option, exist."""
    words = shlex.split(text.replace(".venv/bin/", ""), comments=True)
    if not words:
        return
    program, *arguments = words
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        named = [word for word in arguments if "=" not in word]
        assert set(named) <= set(targets), f"{at}: make {named}"
    elif program == "qnoise" or words[:3] == ["python", "-m", "qnoise"]:
        commands = argparse.ArgumentParser().add_subparsers()
        for add in COMMANDS:
            add(commands)
        given = words[1:] if program == "qnoise" else words[3:]
        if given and not given[0].startswith("-"):
            assert given[0] in commands.choices, f"{at}: {text.strip()}"
            known = commands.choices[given[0]]._option_string_actions
            assert {word for word in given if word.startswith("-")} <= known.keys(), f"{at}: {text.strip()}"
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]) is not None, f"{at}: {text.strip()}"
    elif program == "python":
        assert (ROOT / arguments[0]).is_file(), f"{at}: {text.strip()}"
    else:
        assert program in ("git", "cd", "export", "pip", "torchrun", "accelerate"), f"{at}: {program}"


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_generated_parts_are_those_of_the_committed_results(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert render(text) == text


def test_every_part_that_can_be_generated_is_on_a_page() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    assert set(re.findall(r"<!-- generated: (\S+) -->", text)) == PARTS.keys()


def prose(path: Path) -> str:
    """The text of a page, or of the prose of a notebook, without blocks of code."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return FENCE.sub("", text)


def anchors(path: Path) -> set[str]:
    """What `#...` can name on a page, by GitHub's rule: lower case, no punctuation, hyphens for spaces."""
    found: set[str] = set()
    for title in re.findall(r"^#+ +(.*?) *$", prose(path), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title).lower()).replace(" ", "-")
        number, own = 0, slug
        while own in found:
            number += 1
            own = f"{slug}-{number}"
        found.add(own)
    return found


@pytest.mark.parametrize("path", TEXTS, ids=page_name)
def test_links_lead_to_something(path: Path) -> None:
    text = prose(path)
    for target in LINK.findall(text):
        if re.match(r"(https?|mailto):", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.is_relative_to(ROOT.resolve()), f"{target} leads out of the repository"
        assert there.exists(), f"{target}: there is no such file"
        if anchor:
            assert anchor in anchors(there), f"{target}: there is no such heading"
    for code in (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)):
        file = re.match(r"((?:src|tests|docs|benchmarks|notebooks)/[\w./-]+\.(?:py|md|c|json|ipynb))(::\w+)?$", code)
        if file is not None:
            assert (ROOT / file[1]).is_file(), f"`{code}`: there is no such file"
            assert file[2] is None or f"def {file[2][2:]}(" in (ROOT / file[1]).read_text(encoding="utf-8"), code
        elif re.match(r"make [a-z]|qnoise (?!eager)[a-z]|python -m (qnoise|benchmarks)", code) and "(" not in code:
            for command in re.sub(r"[…]|\.\.\.", "", code).split("&&"):
                check_command(command, page_name(path))


def test_the_index_names_every_page() -> None:
    listed = LINK.findall((ROOT / "docs" / "README.md").read_text(encoding="utf-8"))
    assert {path.name for path in PAGES[1:] if path.name != "README.md"} == {
        target for target in listed if target.endswith(".md") and "/" not in target
    }


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


def test_the_picture_is_what_the_package_computes() -> None:
    figure = ROOT / "docs" / "figures" / "block.py"
    names: dict = {"__name__": "figure"}
    exec(compile(figure.read_text(encoding="utf-8"), str(figure), "exec"), names)
    assert names["draw"]() == figure.with_suffix(".svg").read_text(encoding="utf-8")
    numbers = ", ".join(f"{number:.2f}" for number in names["BLOCK"])
    assert numbers in (ROOT / "docs" / "numerics.md").read_text(encoding="utf-8")
