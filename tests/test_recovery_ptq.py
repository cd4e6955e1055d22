"""The table of repairs: what is kept on disk, what is compared with what, and who is chosen by what."""

from __future__ import annotations

import json
import random

import pytest

from benchmarks.recovery import ptq
from benchmarks.recovery.__main__ import main
from benchmarks.recovery.arms import Adapter
from benchmarks.recovery.data import word_examples
from benchmarks.recovery.outcomes import pack, unpack
from benchmarks.recovery.ptq_table import grid, judged, results

COUNT = 400
SETTINGS = ptq.Settings(policies=(0, 1), problems=COUNT)


def line(name, policy, right, kl=0.01, **more):
    row = {"spec": {"fmt": name.split()[0]}, "steps": [], "adapter": None, **more}
    figures = {"bits_per_weight": 4.25, "adapter_bits_per_weight": 0.0, "seconds": 1.0, "kl": kl, "weight_error": 0.1}
    return {
        "row": name,
        "policy": policy,
        "recipe": row,
        "flexible": sum(right) / COUNT,
        "outcomes": pack(right),
        "commit": "0" * 40,
        **figures,
    }


def measured():
    """Full precision is right on 9 of 10, plain MXFP4 on 5 of 10, and a repair makes good 3 of the 4 lost."""
    lines = [{"settings": {"policies": [0, 1], "problems": COUNT}}]
    for policy in (0, 1):
        tenth = [(index + policy) % 10 for index in range(COUNT)]
        lines += [
            line("full precision", policy, [t < 9 for t in tenth], kl=0.0, spec=None),
            line("mxfp4", policy, [t < 5 for t in tenth], kl=0.08),
            line("nvfp4", policy, [t < 7 for t in tenth], kl=0.02),
            line("nvfp4 better", policy, [t < 8 for t in tenth], kl=0.005, steps=["gptq"]),
            line("nvfp4 lucky", policy, [t < 9 for t in tenth], kl=0.006, steps=["fold_scales"]),
            line("mxfp4 tuned", policy, [t < 9 for t in tenth], kl=0.001, adapter={"start": "zero"}),
        ]
    return lines


def test_outcomes_survive_the_file():
    random.seed(0)
    for count in (1, 4, 7, 2000):
        right = [random.random() < 0.5 for _ in range(count)]
        assert unpack(pack(right), count).tolist() == [int(each) for each in right]
    assert pack([True, False, False, False, True]) == "88"


def test_shares_of_the_loss_and_their_intervals():
    rows = {row.name: row for row in results(measured())}
    assert rows["mxfp4"].won_back == (0, 0, 0)
    assert rows["nvfp4 lucky"].won_back == (1, 1, 1)  # the same problems on both sides, so chance cancels
    better = rows["nvfp4 better"]
    assert better.accuracy == pytest.approx(0.8)
    assert better.won_back[0] == pytest.approx(0.75)
    assert better.won_back_of_format == pytest.approx(0.5)
    assert better.difference[0] == pytest.approx(-0.1)
    # A problem's mean over two policies is lost by half in two of ten: the standard error of that mean.
    error = 1.96 * (0.2 * 0.25 - 0.1**2) ** 0.5 / COUNT**0.5
    assert better.difference[1] == pytest.approx(-0.1 - error, abs=0.15 * error)
    assert better.difference[2] == pytest.approx(-0.1 + error, abs=0.15 * error)
    header, cells = grid(list(rows.values()))
    assert all(len(row) == len(header) for row in cells)
    assert cells[3][:3] == ["`nvfp4 better`", "4.25", "80.00"]


def test_the_row_of_a_goal_is_chosen_by_kl_and_judged_by_accuracy():
    sentences = judged(results(measured()))
    assert len(sentences) == 4
    assert "without an adapter: `nvfp4 better`, 75.0 %" in sentences[0]
    assert "(goal 85 %: **missed**)" in sentences[0]
    assert "nothing folded: `nvfp4 better`" in sentences[1]
    assert "with a rank-8 adapter: `mxfp4 tuned`, 100.0 %" in sentences[2]
    assert "(goal 98 %: met)" in sentences[2]
    with pytest.raises(ValueError, match="the row 'mxfp4' is not measured on every policy"):
        results([each for each in measured() if each.get("row") != "mxfp4" or each.get("policy") != 1])


def test_a_stopped_run_goes_on_and_one_of_other_settings_is_refused(tmp_path, monkeypatch):
    asked = []

    def measure(self, row):
        asked.append((row.name, self.policy))
        if row.name == "nvfp4" and self.policy == 1:
            raise ValueError("no such luck")
        return line(row.name, self.policy, [True] * COUNT)

    monkeypatch.setattr(ptq.Bench, "measure", measure)
    path, said = tmp_path / "ptq.jsonl", []
    rows = ptq.chosen(["mxfp4", "nvfp4"])
    ptq.run(path, rows, SETTINGS, "the command", said.append)
    assert asked == [("mxfp4", 0), ("mxfp4", 1), ("nvfp4", 0), ("nvfp4", 1)]
    assert said[-1] == "failed: nvfp4, policy 1: ValueError: no such luck"
    whole = path.read_text()
    path.write_text(whole + '{"row": "cut o')
    asked.clear()
    done = ptq.run(path, rows, SETTINGS, "another command", said.append)
    assert asked == [("nvfp4", 1)]
    assert path.read_text() == whole
    assert len(done) == 3
    assert json.loads(whole.splitlines()[0])["command"] == "the command"
    with pytest.raises(ValueError, match="measured with other settings"):
        ptq.run(path, rows, ptq.Settings(policies=(0, 1), problems=99), "the command")


def test_what_is_measured_is_not_what_was_calibrated_on():
    """Three streams of the problems, which share no chain of equations."""
    bench = ptq.Bench(0, ptq.Settings(policies=(0,), problems=16, kl_texts=4, calibration_texts=4))
    assert bench.problems == word_examples("test", 0, 16)
    drawn = []
    bench._texts = lambda examples, size: drawn.append({e.question for e in examples}) or [{}]
    bench.calibration, bench.distillation(Adapter("zero", steps=2, batch=3))
    dev = {e.question for e in word_examples("dev", 1000, 4)}
    assert [len(each) for each in drawn] == [4, 6]
    assert not (drawn[0] | drawn[1]) & (dev | {e.question for e in bench.problems})


def test_a_row_is_measured_with_all_its_bits():
    bench = ptq.Bench(0, ptq.Settings(policies=(0,), problems=16, kl_texts=4, calibration_texts=4))
    plain, adapted = (bench.measure(row) for row in ptq.chosen(["nvfp4", "nvfp4 mse + lora weighted"]))
    weights = 3 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 192)
    assert plain["bits_per_weight"] == pytest.approx(4.5 + 32 * 21 / weights)
    assert plain["adapter_bits_per_weight"] == 0
    rank = 3 * 8 * (2 * (64 + 64) + 2 * (32 + 64) + 3 * (64 + 192))
    assert adapted["adapter_bits_per_weight"] == pytest.approx(16 * rank / weights)
    assert 0 < adapted["kl"] < plain["kl"]
    assert len(unpack(plain["outcomes"], 16)) == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["ptq", "--rows", "nvfp4 + gtpq"], "did you mean 'nvfp4 + gptq'?; see ptq --list")],
)
def test_mistakes_are_named(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_every_row_has_a_name_of_its_own(capsys):
    assert main(["ptq", "--list"]) == 0
    names = capsys.readouterr().out.splitlines()
    assert len(set(names)) == len(names) == len(ptq.ROWS)
    assert {"full precision", "mxfp4", "nvfp4 mse + gptq"} <= set(names)
