"""The command line, as a user types it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import qnoise
from qnoise import cli, ops
from qnoise.formats import QuantSpec
from qnoise.scan_command import checkpoint_path
from qnoise.sensitivity import ScanReport, scanning

CHECKPOINT = Path(__file__).parents[1] / "benchmarks" / "recovery" / "checkpoints" / "words-0"


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


def test_formats(capsys):
    assert cli.main(["formats"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(qnoise.FORMATS)
    assert "4.25  floor, rceil" in lines[1]
    assert cli.main(["formats", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["nvfp4"]["scale_modes"] == list(qnoise.FORMATS["nvfp4"].scale_modes)
    assert found["nvfp4"]["bits_per_element"] == 4.5


def test_scan_writes_what_is_asked(tmp_path, capsys):
    page, data = tmp_path / "deep" / "report.html", tmp_path / "report.json"
    formats = ["--fmt", "mxfp4", "nvfp4:four_over_six"]
    assert cli.main(["scan", str(CHECKPOINT), *formats, "--out", str(page), "--json", str(data)]) == 0
    expected = qnoise.scan(CHECKPOINT, ["mxfp4", QuantSpec("nvfp4", "four_over_six")])
    assert ScanReport.from_json(data.read_text()) == expected
    assert page.read_text().rstrip() == expected.to_html().rstrip()
    shown = capsys.readouterr()
    assert shown.out.rstrip() == str(expected.recommendation)
    assert shown.err == ""
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deep", "report.html", "report.json"]


def test_scan_prints_markdown_or_json(capsys):
    one = ["scan", str(CHECKPOINT), "--include", "*.layers.0.*_proj", "--exclude", "down_proj"]
    assert cli.main([*one, "--top", "3"]) == 0
    report = qnoise.scan(CHECKPOINT, "mxfp4", include="*.layers.0.*_proj", exclude="down_proj")
    assert capsys.readouterr().out == report.to_markdown(top=3) + "\n"
    assert cli.main([*one, "--json", "-"]) == 0
    assert ScanReport.from_json(capsys.readouterr().out) == report


def test_scan_of_a_damaged_checkpoint_is_told_by_the_status(tmp_path, capsys):
    """1: a report, and something is missing. 2: no report."""
    weight = torch.ones(4, 32)
    weight[2, 3] = torch.nan
    save_file({"w.weight": weight}, tmp_path / "model.safetensors")
    assert cli.main(["scan", str(tmp_path)]) == 1
    assert "NaN or Inf" in capsys.readouterr().out
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    assert cli.main(["scan", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "model.safetensors" in shown.err


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["x", "--fmt", "mxfp5"], "Did you mean 'mxfp4'"),
        (["x", "--fmt", "nvfp4:flor"], "four_over_six"),
        (["x", "--fmt", "mxfp4:block=3"], "macro_block and residual"),
        (["x", "--fmt", "mxfp4:residual=7"], "must lie in"),
        (["x", "--thresholds", "none"], "invalid choice"),
        (["no/such/thing"], "no/such/thing does not exist"),
        ([str(CHECKPOINT), "--out", "report.pdf"], "must end in .html, .md or .json"),
        ([str(CHECKPOINT), "--json", "-", "--markdown"], "standard output"),
        ([str(CHECKPOINT), "--top", "0"], "at least 1"),
        ([str(CHECKPOINT), "--include", "q_prj"], "Did you mean 'q_proj'"),
    ],
)
def test_scan_arguments_that_cannot_be(arguments, match, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    try:
        status = cli.main(["scan", *arguments])
    except SystemExit as stopped:  # what argparse finds by itself
        status = stopped.code
    shown = capsys.readouterr()
    assert status == 2
    assert match in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""


def test_formats_are_spelled_with_what_differs(capsys):
    one = ["scan", str(CHECKPOINT), "--include", "*.layers.0.mlp.up_proj", "--json", "-", "--fmt"]
    cli.main([*one, "mxfp4:mse,macro_block=128", "nvfp4:hadamard", "mxfp4:even,half_away,residual=0.5"])
    assert ScanReport.from_json(capsys.readouterr().out).specs == (
        QuantSpec("mxfp4", "mse", macro_block=128),
        QuantSpec("nvfp4", rotation="hadamard"),
        QuantSpec("mxfp4", "even", "half_away", residual=0.5),
    )


def test_a_model_on_the_hub(tmp_path, monkeypatch, capsys):
    """A name that is no path is fetched: safetensors and their index, nothing else. Offline the reason is told."""
    import huggingface_hub

    asked = {}

    def fetch(repo_id, **arguments):
        asked.update(arguments, repo_id=repo_id)
        return str(CHECKPOINT)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert checkpoint_path("org/name", "v1") == CHECKPOINT
    assert (asked["repo_id"], asked["revision"]) == ("org/name", "v1")
    assert set(asked["allow_patterns"]) == {"*.safetensors", "*.safetensors.index.json"}
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: 1 / 0)
    assert cli.main(["scan", "org/name"]) == 2
    assert "cannot be had from the hub (ZeroDivisionError" in capsys.readouterr().err
    for no_name in ("name", "a/b/c", "../name", "a/model.safetensors", "/abs"):
        with pytest.raises(FileNotFoundError, match="does not exist, and is no ORG/NAME"):
            checkpoint_path(no_name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="huggingface_hub"):
        checkpoint_path("org/name")


def test_an_interrupted_scan_keeps_what_it_has(tmp_path, monkeypatch, capsys):
    out = tmp_path / "report.json"
    command = ["scan", str(CHECKPOINT), "--out", str(out)]
    original, calls = scanning.scan_matrix, []

    def interrupted(matrix, *rest):
        calls.append(matrix.name)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(matrix, *rest)

    monkeypatch.setattr(scanning, "scan_matrix", interrupted)
    assert cli.main(command) == 130
    assert "report.json.part" in capsys.readouterr().err
    assert not out.exists()
    assert cli.main(command) == 0
    assert len(calls) == len(set(calls)) + 1  # one tensor was begun twice
    assert ScanReport.from_json(out.read_text()) == qnoise.scan(CHECKPOINT)
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.slow
def test_ctrl_c_ends_a_scan_cleanly(tmp_path):
    """The signal a terminal sends, in the middle of a long scan."""
    save_file({f"layers.{i}.w.weight": torch.randn(2048, 2048) for i in range(24)}, tmp_path / "model.safetensors")
    out = tmp_path / "report.html"
    with subprocess.Popen(
        [sys.executable, "-m", "qnoise", "scan", str(tmp_path), "--fmt", "mxfp4:mse", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        part = tmp_path / "report.html.part"
        while process.poll() is None and (not part.exists() or part.stat().st_size < 10_000):
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGINT)
        shown, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert shown == ""
    assert "Traceback" not in said
    assert len(part.read_text().splitlines()) > 1
