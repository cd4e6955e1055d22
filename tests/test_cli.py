"""The command line, as a user types it."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import qnoise
from benchmarks.recovery import __main__ as recovery
from interrupts import heed_interrupts
from qnoise import cli, ops
from qnoise.commands import demo as demo_command
from qnoise.commands import env as env_command
from qnoise.commands.format_argument import format_spec
from qnoise.commands.model_argument import checkpoint_path
from qnoise.formats import QuantSpec
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
    monkeypatch.setattr(env_command, "_PACKAGES", {"torch": "everything", "a-package-nobody-has": "figures"})
    cli.main(["env"])
    shown = capsys.readouterr().out
    assert "chunked PyTorch (off: no C compiler found" in shown
    assert "a-package-nobody-has not installed (needed for: figures)" in " ".join(shown.split())
    assert cli.main(["env", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["packages"]["a-package-nobody-has"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "required: command"),
        (
            ["scna", "model"],
            "no command 'scna'; there are: scan, repair, export, demo, env, formats. Did you mean 'scan'?",
        ),
        (["env", "--jason"], "no option '--jason'; there are: --json. Did you mean '--json'?"),
        (["scan", "model", "--fmts=mxfp4"], "Did you mean '--fmt'?"),
        (["scan", "model", "--thresh", "classic"], "Did you mean '--thresholds'?"),  # no abbreviations
        (["formats", "nvfp4"], "no argument 'nvfp4'"),
        (["repair", "model", "--fmt", "nvfp5"], "Did you mean 'nvfp4'?"),
        (["repair", "model", "--fmt", "nvfp4:mse"], "unknown format 'nvfp4:mse'"),
        (["repair", "model", "--device", "cuda:77"], "this machine has: cpu"),
        (["repair", "model", "--device", "gpu"], "'gpu' is no device"),
        (["scan", "--fmt", "mxfp4", "./model"], "let it stand before --fmt"),
        (["export", "model", "--fmt", "mxfp4"], "required: --out"),
    ],
)
def test_unknown_arguments(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("usage: qnoise")
    assert said in shown.err.splitlines()[-1]
    assert shown.out == ""


@pytest.mark.parametrize("command", ["scan", "repair", "export", "demo", "env", "formats"])
def test_help_has_an_example_that_is_understood(command, capsys, monkeypatch):
    """The example of each help, up to a pipe, is given to the command's own parser."""
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0
    (example,) = [line for line in shown.splitlines() if line.startswith("example: qnoise ")]
    words = shlex.split(example.removeprefix("example: qnoise ").split("|")[0].split(">")[0])
    assert words[0] == command
    assert cli._parse(words).run.__name__ == f"run_{command}"


def test_options_are_called_the_same_everywhere(capsys):
    """What prints says --json, what writes --out, what quantizes --fmt, and a model stands first."""
    options = {}
    for command in ("scan", "repair", "export", "demo", "env", "formats"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        usage = capsys.readouterr().out.split("\n\n")[0]
        options[command] = set(re.findall(r"--[a-z-]+|PATH_OR_HUB_ID$", usage))
    having = {word: {c for c, found in options.items() if word in found} for word in ("--json", "--out", "--fmt")}
    models = {c for c, found in options.items() if "PATH_OR_HUB_ID" in found}
    assert models == {"scan", "repair", "export"}
    assert having["--fmt"] == models
    assert having["--json"] == models | {"env", "formats"}
    assert having["--out"] == models | {"demo"}


def test_output_that_nobody_reads_is_no_error(monkeypatch, capsys):
    """`| head`: printed in the end, and more than a pipe holds."""
    for command in (["formats"], ["scan", str(CHECKPOINT), "--json"]):
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w") as nobody:
            monkeypatch.setattr(sys, "stdout", nobody)
            assert cli.main(command) == 0
        assert capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_an_error(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["formats"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("qnoise formats: ")


def test_what_a_command_raises_is_a_line_and_what_is_a_fault_of_ours_is_not(monkeypatch, capsys):
    def fails(error):
        def run(options):
            warnings.warn("it is\nso", stacklevel=1)
            print("half", end="")
            raise error

        return lambda commands: commands.add_parser("env").set_defaults(run=run)

    expected = {
        ValueError("a\n  b"): (2, "a b"),
        FileNotFoundError("no file"): (2, "no file"),
        torch.OutOfMemoryError("40 GiB"): (2, "out of memory: 40 GiB"),
        KeyboardInterrupt(): (130, "interrupted"),
        KeyboardInterrupt("kept"): (130, "interrupted; kept"),
    }
    for error, (status, said) in expected.items():
        monkeypatch.setattr(cli, "COMMANDS", (fails(error),))
        assert cli.main(["env"]) == status
        lines = [line for line in capsys.readouterr().err.splitlines() if line]
        assert lines == ["qnoise env: warning: it is so", f"qnoise env: {said}"]
    monkeypatch.setattr(cli, "COMMANDS", (fails(KeyError("a fault")),))
    with pytest.raises(KeyError):
        cli.main(["env"])


def test_the_demo_is_the_benchmarks(tmp_path, monkeypatch, capsys):
    """In a clone it becomes the benchmark, with the options it was given."""
    became = []
    monkeypatch.setattr(os, "execv", lambda path, words: became.append((path, words)))
    monkeypatch.setattr(os, "environ", os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError):  # nothing comes back from it: there is no status
        cli.main(["demo", "--workers", "-1", "--seeds", "3", "4", "--out", "x", "--resume"])
    assert Path.cwd() == Path(__file__).parents[1]
    ((python, words),) = became
    assert words[:4] == [python, "-m", "benchmarks.recovery", "demo"]
    assert words[4:] == ["--seeds", "3", "4", "--workers", "-1", "--out", str(tmp_path / "x"), "--resume"]
    assert recovery.main(words[3:]) == 2
    assert capsys.readouterr().err == "error: --workers is -1; it must be at least 1\n"


def test_a_clone_is_known_by_its_name(tmp_path):
    assert demo_command.find_clone(CHECKPOINT) == Path(__file__).parents[1]
    (tmp_path / "pyproject.toml").write_text('name = "another"')
    (tmp_path / "benchmarks" / "recovery").mkdir(parents=True)
    (tmp_path / "benchmarks" / "recovery" / "__main__.py").write_text("raise SystemExit(5)")
    assert demo_command.find_clone(tmp_path) is None


def test_the_demo_without_a_clone(monkeypatch, capsys):
    monkeypatch.setattr(demo_command, "find_clone", lambda folder: None)
    assert cli.main(["demo"]) == 2
    said = capsys.readouterr().err
    assert "`make demo`" in said
    assert "need no clone" in said


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
    assert cli.main(["scan", str(CHECKPOINT), *formats, "--out", str(page), str(data)]) == 0
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
    assert cli.main([*one, "--json"]) == 0
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
        ([str(CHECKPOINT), "--json", "--markdown"], "standard output"),
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
    one = ["scan", str(CHECKPOINT), "--include", "*.layers.0.mlp.up_proj", "--json", "--fmt"]
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
    formats = [f"{fmt}:mse" for fmt in ("mxfp4", "nvfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxint8")]
    with subprocess.Popen(
        [sys.executable, "-m", "qnoise", "scan", str(tmp_path), "--fmt", *formats, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_interrupts,
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


def test_the_page_shows_what_is_printed(tmp_path, monkeypatch, capsys):
    """The samples of docs/cli.md in their order, and each spelling of a format in its table."""
    root = Path(__file__).parents[1]
    text = (root / "docs" / "cli.md").read_text(encoding="utf-8")
    (tmp_path / "benchmarks").symlink_to(root / "benchmarks")
    monkeypatch.chdir(tmp_path)
    samples = re.findall(r"```sh\nqnoise (.*?)\n```\n```text\n(.*?)```", text, re.DOTALL)
    assert len(samples) == text.count("```sh") == 3
    for command, shown in samples:
        assert cli.main(shlex.split(command)) == 0
        assert capsys.readouterr().out == shown
    spelled = re.findall(r"^\| `([^`]+)` \| `(QuantSpec\([^`]+\))` \|$", text, re.MULTILINE)
    assert len(spelled) == 5
    for spelling, spec in spelled:
        assert format_spec(spelling) == eval(spec, {"QuantSpec": QuantSpec})
