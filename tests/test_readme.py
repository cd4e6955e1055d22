"""Every sample of the README runs as it stands and prints what it shows; generated parts are those of the results."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

from benchmarks.render import render

README = Path(__file__).parents[1] / "README.md"
SAMPLE = re.compile(r"```python\n(.*?)```(?:\n```text\n(.*?)```)?", re.DOTALL)


def run_samples(text: str) -> list[tuple[str, str]]:
    """(printed, shown) of each python block; the blocks share their names, as a reader pastes them one by one."""
    names: dict = {"__name__": "readme"}
    results = []
    for code, shown in SAMPLE.findall(text):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), names)
        results.append((printed.getvalue(), shown))
    return results


def test_samples_print_what_they_show() -> None:
    results = run_samples(README.read_text(encoding="utf-8"))
    assert len(results) >= 4
    for printed, shown in results:
        assert printed == shown


def test_generated_parts_are_those_of_the_committed_results() -> None:
    text = README.read_text(encoding="utf-8")
    assert text.count("<!-- generated:") == 3
    assert render(text) == text


def test_nobody_elses_package_is_recommended() -> None:
    for path in [README, *README.parent.glob("*.md"), *README.parent.glob("docs/**/*.md")]:
        assert not re.search(r"pip install (-U )?qnoise(?!-torch)", path.read_text(encoding="utf-8")), path
