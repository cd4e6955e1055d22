"""The house rules: imports go down only, and importing the package is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "qnoise"

FLOORS: dict[str, int] = {
    "formats": 0, "schedules": 0, "names": 0, "spelling": 0, "requirements": 0,
    "philox": 1, "rounding": 1, "scales": 1, "packing": 1, "rotation": 1, "macro_block": 1, "reference": 1,
    "metrics": 1, "noise": 1,
    "kernels": 2, "ops": 2, "functional": 2,
    "nn": 3, "faults": 3,
    "config": 4, "config_file": 4, "targets": 4, "patch": 4, "summary": 4,
    "noise_control": 5, "calibrate": 5, "plots": 5, "rl": 5, "sensitivity": 5, "repairs": 5,
    "integrations": 6, "commands": 6, "cli": 6,
    "__init__": 7, "__main__": 7,
}  # fmt: skip


def imports_of(path: Path, source: str) -> set[str]:
    """The qnoise modules a file imports, as dotted names below `qnoise`."""
    module = ("qnoise", *path.relative_to(PACKAGE).with_suffix("").parts)
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module[: len(module) - node.level], *filter(None, [base])])
            # `from qnoise import rl` names the module; `from qnoise.rl import x` has it in the base.
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "qnoise" else [base]
        else:
            continue
        found |= {name.removeprefix("qnoise.") for name in names if name.startswith("qnoise.")}
    return found


def floor_of(dotted: str) -> int:
    head = dotted.split(".")[0]
    assert head in FLOORS, f"{head} stands on no floor: give it one in tests/test_house.py and CONTRIBUTING.md"
    return FLOORS[head]


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path: Path) -> None:
    relative = path.relative_to(PACKAGE).with_suffix("")
    own = floor_of(relative.parts[0])
    for imported in imports_of(path, path.read_text(encoding="utf-8")):
        assert floor_of(imported) <= own, f"{relative} (floor {own}) imports {imported}, from above it"
        if relative.parts[0] == "rl":
            assert imported.split(".")[0] not in ("nn", "patch", "targets", "summary", "config"), (
                f"{relative} imports {imported}: rl/ knows modules by duck type only"
            )


def test_the_import_reader_sees_every_form() -> None:
    source = "from ..patch import x\nfrom qnoise import rl\nimport qnoise.scan\nfrom .linear import y\n"
    assert imports_of(PACKAGE / "nn" / "probe.py", source) == {"patch", "rl", "scan", "nn.linear"}


def test_no_dumping_grounds() -> None:
    names = {path.stem for path in FILES}
    assert not names & {"utils", "util", "helpers", "common", "misc"}


def test_import_is_cheap() -> None:
    """torch and numpy, and nothing else of weight; no CUDA initialised."""
    code = (
        "import sys, qnoise, torch\n"
        "heavy = {'transformers', 'peft', 'triton', 'safetensors', 'accelerate', 'trl', 'matplotlib', 'datasets'}\n"
        "print(sorted(heavy & set(sys.modules)), torch.cuda.is_initialized())"
    )
    bare = "import sys, torch\nprint(sorted({'triton'} & set(sys.modules)))"
    run = [subprocess.run([sys.executable, "-c", c], capture_output=True, text=True, check=True) for c in (code, bare)]
    assert run[1].stdout.strip() == "[]", "torch itself loads triton here: the test would not see qnoise do it"
    assert run[0].stdout.strip() == "[] False"
