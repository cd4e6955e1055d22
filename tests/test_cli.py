"""The command line, as a user types it."""

import json
import subprocess
import sys

import pytest
import torch

import qnoise
from qnoise import cli, ops


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "qnoise", *arguments], capture_output=True, text=True, check=False)


def test_env_tells_versions_and_what_serves():
    done = run("env")
    assert done.returncode == 0, done.stderr
    assert f"qnoise {qnoise.__version__}" in done.stdout
    assert torch.__version__ in done.stdout
    assert "fake quantization: " in done.stdout


def test_env_as_json(capsys):
    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["devices"]["cpu"]["backend"] == ops.backend("cpu")
    assert found["packages"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()


def test_env_names_what_is_not_there(monkeypatch, capsys):
    """Without a compiler the reason stands in the output, and a missing package is said to be missing."""
    monkeypatch.setattr(ops.native, "available", lambda: False)
    monkeypatch.setattr(ops.native, "status", lambda: "off: no C compiler found ($CC, cc, gcc, clang)")
    monkeypatch.setattr(cli, "_PACKAGES", ("torch", "a-package-nobody-has"))
    cli.main(["env"])
    shown = capsys.readouterr().out
    assert "chunked PyTorch (off: no C compiler found" in shown
    assert "a-package-nobody-has not installed" in " ".join(shown.split())


@pytest.mark.parametrize("arguments", [[], ["environment"], ["env", "--yaml"]])
def test_unknown_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "usage: qnoise" in capsys.readouterr().err
