"""Intervals by hand, and a report whose every number can be found in the logs."""

import json
import re
import sys

import pytest

from benchmarks.files import write_bytes
from benchmarks.recovery.__main__ import main
from benchmarks.recovery.arms import arm
from benchmarks.recovery.figure import draw
from benchmarks.recovery.intervals import paired_difference, wilson
from benchmarks.recovery.presets import TINY_WORDS
from benchmarks.recovery.report import sentences, tables, to_html, to_text, write_report
from benchmarks.recovery.runs import SCHEMA, Run
from benchmarks.recovery.summary import summarize

ARM_NAMES = ("bf16", "mxfp4", "mxfp4-aa", "mxfp4+noise")
PRESET = TINY_WORDS.changed(steps=7, eval_problems=4)
# Final flexible outcomes of four problems for each (arm, seed): chosen so that every figure can be computed by hand.
FINAL = {
    "bf16": ("1111", "1110"), "mxfp4": ("1010", "1000"), "mxfp4-aa": ("1010", "1100"), "mxfp4+noise": ("1011", "1001"),
}  # fmt: skip


def made_up_run(folder, name, seed):
    """The files of a finished run, with round numbers."""
    run = Run(PRESET, arm(name), seed, folder)
    final = FINAL[name][seed]
    lines = [
        {
            "event": "run", "schema": SCHEMA, "run": run.name, "config_hash": run.config_hash, "config": run.config,
            "code_hash": "c0de", "commit": "abc", "versions": {"torch": "2.13.0"}, "device": "a processor",
        },
        evaluation(0, "0000", "1100"),
        *(step(number, sigma=0.01 * number * ("noise" in name)) for number in range(7)),
        evaluation(7, final, final),
        {
            "event": "result", "run": run.name, "config_hash": run.config_hash, "trainable_parameters": 10,
            "parameters": 100, "peak_memory_mb": 50.0 + seed,
        },
    ]  # fmt: skip
    write_bytes(run.log_path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return run


def evaluation(step, strict, flexible):
    return {
        "event": "evaluation", "step": step, "strict": strict.count("1") / 4, "flexible": flexible.count("1") / 4,
        "response_length": 20.0, "strict_outcomes": strict, "flexible_outcomes": flexible,
    }  # fmt: skip


def step(number, sigma):
    metrics = {
        "reward": 0.1 * number, "strict": 0.3, "flexible": 0.5, "response_length": 21.0, "entropy": 0.125,
        "sigma": sigma, "seconds": 2.0, "cpu_seconds": 1.0, "informative": 0.5,
    }  # fmt: skip
    if number:  # the first step had nothing to train on
        metrics |= {"mismatch_kl": 1e-3 * number, "mismatch_abs": 2e-3, "clip_fraction": 0.01}
    return {"event": "step", "step": number + 1, **metrics}


@pytest.fixture
def runs(tmp_path):
    return [made_up_run(tmp_path, name, seed) for seed in (0, 1) for name in ARM_NAMES]


def test_wilson_interval():
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-6)
    assert wilson(10, 10) == pytest.approx((0.7224672, 1.0), abs=1e-6)
    assert wilson(50, 100) == pytest.approx((0.4038315, 0.5961685), abs=1e-6)
    with pytest.raises(ValueError, match="at least one trial"):
        wilson(0, 0)


def test_paired_difference_counts_a_problem_once():
    # differences a problem, averaged over two seeds: 1, 0, 0.5, 0; mean 0.375, standard deviation 0.478714
    mean, low, high = paired_difference([[1, 1, 1, 0], [1, 1, 0, 0]], [[0, 1, 0, 0], [0, 1, 0, 0]])
    assert (mean, high - mean, mean - low) == pytest.approx((0.375, 0.469131, 0.469131), abs=1e-6)
    with pytest.raises(ValueError, match="same seeds and the same problems"):
        paired_difference([[1, 0]], [[1, 0], [1, 0]])
    with pytest.raises(ValueError, match="same seeds and the same problems"):
        paired_difference([[1, 0]], [[1, 0, 1]])


def test_rows_are_what_the_logs_say(runs):
    rows = {row["arm"]: row for row in summarize(runs, "command")["rows"]}
    assert list(rows) == list(ARM_NAMES)
    assert [rows[name]["bits_per_weight"] for name in ("bf16", "mxfp4")] == [16.0, 4.25]
    bf16, noise = rows["bf16"], rows["mxfp4+noise"]
    assert (bf16["initial_flexible"]["mean"], bf16["initial_strict"]["mean"]) == (0.5, 0.0)
    assert (bf16["final_flexible"]["mean"], bf16["final_flexible"]["seeds"]) == (7 / 8, [1.0, 0.75])
    assert (bf16["final_flexible"]["low"], bf16["final_flexible"]["high"]) == wilson(7, 8)
    assert rows["mxfp4"]["difference_flexible"] is None
    assert bf16["difference_flexible"]["mean"] == pytest.approx(0.5)
    assert noise["difference_flexible"]["mean"] == pytest.approx(0.25)
    assert noise["difference_flexible"]["seeds"] == pytest.approx([0.25, 0.25])
    assert noise["sigma"] == pytest.approx([0.01 * number for number in range(7)])
    assert (noise["mean_mismatch_kl"], noise["mean_clip_fraction"]) == pytest.approx((3.5e-3, 0.01))
    assert noise["end_reward"] == pytest.approx(0.4)  # the last five of seven steps
    assert noise["peak_memory_mb"] == 51.0


def test_unfinished_runs_are_named_and_left_out(runs):
    text = runs[-1].log_path.read_text()
    runs[-1].log_path.write_text("".join(text.splitlines(keepends=True)[:-1]))
    runs[0].log_path.unlink()
    summary = summarize(runs, "command")
    assert set(summary["unfinished"]) == {runs[0].name, runs[-1].name}
    rows = {row["arm"]: row for row in summary["rows"]}
    assert rows["mxfp4+noise"]["seeds"] == [0]
    assert rows["bf16"]["seeds"] == [1]
    assert rows["bf16"]["difference_flexible"]["seeds"] == [0.5]  # against mxfp4 of the same seed
    assert f"Not finished, so not in the tables: {runs[0].name}" in to_text(summary)


def test_nothing_finished_still_gives_a_page(runs, tmp_path):
    for run in runs:
        run.log_path.unlink()
    summary = summarize(runs, "command")
    paths = write_report(summary, tmp_path / "report")
    assert [path.suffix for path in paths] == [".json", ".html"]
    assert "No run is finished." in paths[1].read_text()


def test_the_text_holds_the_table_and_its_limits(runs):
    summary = summarize(runs, "command")
    text = to_text(summary)
    line = next(line for line in text.splitlines() if line.startswith("MXFP4 + LoRA + noise"))
    assert "62.5 [30.6, 86.3]" in line
    assert "75.0 50.0" in line
    assert "2 seeds an arm are no evidence" in text
    assert "+12.5" in next(line for line in sentences(summary) if line.startswith("The A/A row"))
    assert [len(row) for _, rows in tables(summary) for row in rows] == [
        len(head) for head, r in tables(summary) for _ in r
    ]


def test_the_page_is_self_contained_and_complete(runs, tmp_path):
    pytest.importorskip("matplotlib")
    summary = summarize(runs, "python -m benchmarks.recovery demo --seeds 0 1")
    _, png, page = write_report(summary, tmp_path / "report")
    assert png.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    for needed in ("python -m benchmarks.recovery demo --seeds 0 1", "abc", "torch 2.13.0", "data:image/png;base64,"):
        assert needed in text
    for name in ("clip_ratio_high", "sigma_start", "lora_rank"):
        assert name in text


def test_the_figure_is_drawn_from_one_seed_and_one_arm_too(runs):
    pytest.importorskip("matplotlib")
    assert draw(summarize(runs[:1], "command")).startswith(b"\x89PNG")


def test_names_are_escaped(runs):
    assert "<script>" not in to_html(summarize(runs, "<script>"), None)


def test_without_matplotlib_there_is_a_page_that_says_so(runs, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    paths = write_report(summarize(runs, "command"), tmp_path / "report")
    assert [path.suffix for path in paths] == [".json", ".html"]
    assert "matplotlib is not installed" in paths[1].read_text()


def test_a_result_file_is_rendered_again_with_the_same_text(runs, tmp_path, capsys):
    summary = summarize(runs, "command")
    write_report(summary, tmp_path / "first")
    assert main(["report", str(tmp_path / "first" / "demo.json"), "--out", str(tmp_path / "second")]) == 0
    assert to_text(summary) in capsys.readouterr().out
    assert (tmp_path / "second" / "demo.json").read_bytes() == (tmp_path / "first" / "demo.json").read_bytes()
    (tmp_path / "cut.json").write_text('{"rows": [\n')
    assert main(["report", str(tmp_path / "cut.json")]) == 2
    assert "cut.json, line 2: not JSON" in capsys.readouterr().err
