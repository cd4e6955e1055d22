"""The notebooks as committed: with outputs, without warnings or paths of a machine. `make notebooks` runs them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_committed_outputs(path: Path) -> None:
    cells = [c for c in json.loads(path.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    assert any(c["outputs"] for c in cells), "run `make notebooks-write` and commit the outputs"
    assert any("assert" in "".join(c["source"]) for c in cells), "execution alone proves little"
    for cell in cells:
        assert len("".join(cell["source"]).splitlines()) <= 30, "a long cell is a missing function"
        for output in cell["outputs"]:
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr", output
            assert not re.search(r"(/home/|/Users/|site-packages)", json.dumps(output))


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS
