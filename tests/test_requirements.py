"""Versions of other packages: too old is an error, newer than tested a warning, and one place says which is which."""

from __future__ import annotations

import re
import runpy
import warnings
from importlib import metadata
from pathlib import Path

import pytest

from qnoise import requirements
from qnoise.requirements import REQUIREMENTS, require
from qnoise.schedules import Constant
from tests.tiny_models import tiny_model, with_lora

ROOT = Path(__file__).parents[1]


@pytest.fixture
def installed(monkeypatch):
    """Pretend that every package is installed in this version; None: in none."""
    monkeypatch.setattr(requirements, "_warned", set())

    def pretend(version: str | None) -> None:
        def found(package: str) -> str:
            if version is None:
                raise metadata.PackageNotFoundError(package)
            return version

        monkeypatch.setattr(metadata, "version", found)

    return pretend


@pytest.mark.parametrize("version", ["0.19.9", "0.9", "0"])
def test_too_old_raises(installed, version: str) -> None:
    installed(version)
    message = (
        rf"qnoise.export needs compressed-tensors >= 0.20; found {version}: pip install 'compressed-tensors>=0.20'"
    )
    with pytest.raises(ImportError, match=message):
        require("compressed-tensors", "qnoise.export")


def test_missing_raises(installed) -> None:
    installed(None)
    with pytest.raises(ImportError, match="needs trl >= 1.16, which is not installed: pip install 'trl>=1.16'"):
        require("trl", "the callback")


def test_the_callback_asks_for_what_is_in_use(installed) -> None:
    from qnoise.integrations.transformers import NoiseCallback

    class SFTConfig:
        __module__ = "trl.trainer.sft_config"

    installed("0.12")
    callback = NoiseCallback(Constant(0.1))
    with pytest.raises(ImportError, match="NoiseCallback needs trl >= 1.16; found 0.12"):
        callback.on_train_begin(SFTConfig(), None, None, model=tiny_model())
    with pytest.raises(ImportError, match="NoiseCallback needs peft >= 0.20; found 0.12"):
        callback.on_train_begin(object(), None, None, model=with_lora(tiny_model()))


@pytest.mark.parametrize("version", ["0.20", "0.20.0", "0.20.7.post1", "0.20.0.dev3", "v0.20rc1"])
def test_supported_is_silent(installed, version: str) -> None:
    installed(version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        require("compressed-tensors", "qnoise.export")


@pytest.mark.parametrize("version", ["0.21.0", "0.100", "1.0"])
def test_newer_than_tested_warns_once(installed, version: str) -> None:
    installed(version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for user in ("qnoise.export", "qnoise.load_packed"):
            require("compressed-tensors", user)
    (told,) = caught
    assert f"qnoise.export was tested with compressed-tensors 0.20 to 0.20; found {version}" in str(told.message)


def test_what_is_installed_here_is_what_was_tested() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for package in REQUIREMENTS:
            require(package, "this test")


def test_the_project_file_and_the_pins_say_the_same() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    asked = dict(re.findall(r'"([a-z-]+)>=([\d.]+)"', project))
    pinned = dict(re.findall(r"^([a-z_-]+)==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M))
    for package, row in REQUIREMENTS.items():
        assert asked[package] == row.minimum, package
        assert pinned[package] == row.tested, package
    minima = re.findall(r'"([a-z-]+)>=([\d.]+)"', project)
    assert all(asked[package] == minimum for package, minimum in minima if package in REQUIREMENTS), "extras disagree"


def test_the_docs_show_the_same_versions() -> None:
    page = (ROOT / "docs" / "integrations.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| ([a-z-]+) \| (\d+\.\d+) \| (\d+\.\d+) \|", page, re.M)
    assert table == [(package, row.minimum, row.tested) for package, row in REQUIREMENTS.items()]


def test_each_row_of_what_works_says_how_that_is_known() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"\| works with \| \| by \|\n\|---\|---\|---\|\n((?:\|.*\n)+)", readme)
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()]
    assert len(rows) > 9
    for what, state, by in rows:
        assert state.partition(",")[0] in ("tested in CI", "expected", "no"), what
        if by or state.startswith("tested"):
            assert (ROOT / "tests" / f"{by.strip('`')}.py").is_file(), what


def test_a_transformers_that_is_too_old_is_named_before_it_is_imported(installed) -> None:
    installed("4.57.6")
    source = ROOT / "src" / "qnoise" / "integrations" / "transformers.py"
    with pytest.raises(ImportError, match="qnoise.integrations.transformers needs transformers >= 5.20; found 4.57.6"):
        runpy.run_path(str(source))
