"""The notebooks as committed: with outputs, without warnings or paths of a machine. `make notebooks` runs them."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def code_cells(path: Path) -> list[dict]:
    return [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_committed_outputs(path: Path) -> None:
    cells = code_cells(path)
    assert any(c["outputs"] for c in cells), "run `make notebooks-write` and commit the outputs"
    assert any("assert" in "".join(c["source"]) for c in cells), "execution alone proves little"
    for cell in cells:
        assert len("".join(cell["source"]).splitlines()) <= 30, "a long cell is a missing function"
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr", output
            assert not re.search(r"(/home/|/Users/|site-packages)", json.dumps(output))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_figures_can_be_left_out(path: Path) -> None:
    """matplotlib is optional: it is imported in one `try`, and what is drawn is used by nothing but other figures."""
    drawn, made, used, figures = set(), {"plt"}, set(), 0
    for node in ast.parse("\n".join("".join(cell["source"]) for cell in code_cells(path))).body:
        names = [each for each in ast.walk(node) if isinstance(each, ast.Name)]
        stored = {each.id for each in names if isinstance(each.ctx, ast.Store)}
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "plt":
            drawn |= stored
            figures += 1
        else:
            made |= stored | {each.arg for each in ast.walk(node) if isinstance(each, ast.arg)}
            used |= {each.id for each in names if isinstance(each.ctx, ast.Load)}
    assert "plt" not in used, "draw under `if plt:`"
    assert not (drawn - made) & used
    assert bool(figures) == any("image/png" in o.get("data", {}) for c in code_cells(path) for o in c["outputs"])


@pytest.mark.slow
def test_the_microscope_runs_without_matplotlib() -> None:
    path = next(p for p in NOTEBOOKS if p.name.startswith("02"))
    code = "\n".join(
        ["import sys", "sys.modules['matplotlib'] = None", *("".join(c["source"]) for c in code_cells(path))]
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=path.parent, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "matplotlib is missing (`make install` brings it)" in run.stdout
    assert "at deviation 0.02: nvfp4" in run.stdout


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS
