"""The Triton kernels give the bits of the reference, under Triton's interpreter; see triton_interpreted.py.

What the interpreter cannot show is in test_triton_compiled.py: it divides exactly whatever the kernel asked for, never
contracts a product with a sum and never flushes a subnormal number.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "triton_interpreted.py"
CHECKS = [
    node.name
    for node in ast.parse(SCRIPT.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and any(getattr(d, "id", "") == "check" for d in node.decorator_list)
]


@pytest.fixture(scope="module")
def found() -> dict[str, str]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", CHECKS)
def test_equal_to_the_reference(name: str, found: dict[str, str]) -> None:
    assert not found[name], found[name]


def test_there_are_checks() -> None:
    assert len(CHECKS) >= 12
