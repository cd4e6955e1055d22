"""The command line: what a user types, what they read when it goes wrong, and Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.files import alone
from benchmarks.recovery.__main__ import main
from benchmarks.recovery.policy import model_path
from interrupts import heed_interrupts

ROOT = Path(__file__).resolve().parents[1]
SHORT = ["split=dev", "prompts_per_step=8", "num_generations=4", "eval_problems=12", "noise_stages=3"]


def log_rows(folder):
    rows = {}
    for path in sorted((folder / "runs").glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        measured = ("seconds", "cpu_seconds", "prepare_seconds", "peak_memory_mb")
        kept = [line for line in lines if line["event"] in ("step", "evaluation", "result")]
        rows[path.name] = [{key: value for key, value in line.items() if key not in measured} for line in kept]
    return rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--preset", "tiny-words", "--arm", "mxfp5"], "no arm 'mxfp5', did you mean 'mxfp4'?"),
        (["train", "--preset", "tiny", "--arm", "bf16"], "there are tiny-words, gsm8k-qwen2.5-1.5b"),
        (["demo", "--set", "step=3"], "no field 'step', did you mean 'steps'?"),
        (["demo", "--set", "steps:3"], "--set steps:3: it must read FIELD=VALUE"),
        (["demo", "--workers", "-1"], "--workers is -1; it must be at least 1"),
        (["report", "nothing.json"], "nothing.json: there is no such result file"),
    ],
)
def test_mistakes_are_named_without_a_traceback(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "study"])
def test_two_at_once_in_one_folder_are_refused(command, tmp_path, capsys):
    folder = tmp_path / "words" if command == "study" else tmp_path
    rest = ["--quick", "--stages", "words", "--arms", "bf16"] if command == "study" else []
    with alone(folder):
        assert main([command, "--out", str(tmp_path), *rest]) == 2
    assert f"{folder} is in use by another process" in capsys.readouterr().err
    with alone(folder):
        pass  # and given back


def test_the_list_of_presets_shows_every_field_and_arm(capsys):
    assert main(["presets"]) == 0
    text = capsys.readouterr().out
    for needed in (
        "preset tiny-words",
        "preset gsm8k-qwen2.5-1.5b",
        "clip_ratio_high = 0.25",
        "mxfp4-aa",
        "mxfp4+noise",
    ):
        assert needed in text


def test_the_real_preset_says_everything_it_lacks_in_one_go(monkeypatch, capsys):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    started = time.monotonic()
    code = main(
        ["train", "--preset", "gsm8k-qwen2.5-1.5b", "--arm", "mxfp4", "--model", "no/model", "--data", "no/data"]
    )
    assert time.monotonic() - started < 30
    assert code == 2
    error = capsys.readouterr().err
    assert "--model DIR" in error
    assert "--data PATH" in error


def test_the_real_preset_runs_on_a_local_model_and_a_local_file(tmp_path, capsys):
    """The same trainer, in bf16 and with gradient checkpointing, on a model small enough for a test."""
    rows = [{"question": f"Tom has {n} pens. He buys 2 more. How many?", "answer": f"#### {n + 2}"} for n in range(40)]
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["steps=1", "prompts_per_step=4", "max_new_tokens=40", "overlong_buffer=8", "eval_problems=3"]
    arguments = ["train", "--preset", "gsm8k-qwen2.5-1.5b", "--arm", "mxfp4", "--out", str(tmp_path / "runs")]
    arguments += ["--model", model_path("checkpoints/words-0"), "--data", str(data), "--set", *settings]
    assert main(arguments) == 0
    assert "MXFP4 + LoRA" in capsys.readouterr().out
    ((_, rows),) = log_rows(tmp_path / "runs").items()
    assert [row["event"] for row in rows] == ["evaluation", "step", "evaluation", "result"]
    assert 32 < rows[1]["samples"] <= 64  # a second round, since few groups of this size are informative
    assert main([*arguments, "--resume"]) == 0
    assert "is finished" in capsys.readouterr().out


@pytest.mark.slow
def test_ctrl_c_leaves_what_was_done_and_resume_gives_the_same_numbers(tmp_path):
    def demo(folder, *more):
        command = [
            sys.executable,
            "-m",
            "benchmarks.recovery",
            "demo",
            "--seeds",
            "0",
            "--arms",
            "mxfp4",
            "mxfp4+noise",
        ]
        command += ["--workers", "2", "--out", str(folder), "--set", "steps=24", *SHORT]
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        return subprocess.Popen(
            [*command, *more], cwd=ROOT, env=environment, start_new_session=True, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=heed_interrupts,
        )  # fmt: skip

    whole = demo(tmp_path / "whole")
    assert whole.wait(400) == 0, whole.stdout.read()

    stopped = demo(tmp_path / "stopped")
    deadline = time.monotonic() + 200
    # A step is in the log before its checkpoint is on disk; the second one in a log tells that the first is.
    while not any(sum(row["event"] == "step" for row in rows) >= 2 for rows in log_rows(tmp_path / "stopped").values()):
        assert time.monotonic() < deadline, "no two steps within 200 seconds"
        time.sleep(0.1)
    os.killpg(stopped.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    output = stopped.communicate(timeout=60)[0]
    assert stopped.returncode == 130, output
    assert "--resume" in output.splitlines()[-1]
    assert (tmp_path / "stopped" / "demo.html").is_file()

    resumed = demo(tmp_path / "stopped", "--resume")
    output = resumed.communicate(timeout=400)[0]
    assert resumed.returncode == 0, output
    assert log_rows(tmp_path / "stopped") == log_rows(tmp_path / "whole")
    assert any('"resumed"' in path.read_text() for path in (tmp_path / "stopped" / "runs").glob("*.jsonl"))
