"""The statistics of the recovery study on made-up results whose truth is known."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.recovery import stages
from benchmarks.recovery.study import bootstrap, claims, figures, hours, page, power, student, tables
from benchmarks.recovery.study.bootstrap import Bootstrap, Difference, pooled
from benchmarks.recovery.study.chance import Chance, chance, holm
from benchmarks.recovery.study.rows import HOWS, STAGES, TASKS, config_hash, stage, with_baselines
from recovery_results import policies, row, write

ROOT = Path(__file__).parents[1]
CORE = {
    "bf16": 0.70, "mxfp4": 0.60, "nvfp4": 0.67, "mxfp4-aa": 0.60, "nvfp4-aa": 0.67, "mxfp4+aqn": 0.60,
    "nvfp4+aqn": 0.67, "mxfp4+recipe": 0.71, "nvfp4+recipe": 0.66, "bf16+mxfp4-cost": 0.70, "bf16+nvfp4-cost": 0.70,
    "nvfp4+recipe-2": 0.69, "bf16-aa": 0.70,
}  # fmt: skip


def core(task, seeds=range(6), problems=400, accuracies=CORE, **fields):
    made = policies(accuracies, seeds, problems, stream=TASKS.index(task))
    return [row(task, name, seed, right, task=task, **fields) for (name, seed), right in made.items()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Both tasks with the core arms, and a cell with some of the others, on one checkpoint."""
    path = tmp_path_factory.mktemp("results")
    others = {"bf16-full": 0.70, "mxfp4-full": 0.66, "mxfp4+aqn-0.05": 0.3, "mxfp4+aqn-targeted": 0.6}
    made = policies(others, (0, 3), 400, stream=7)
    lines = [*core("words"), *core("walks"), *(row("arms", name, seed, right) for (name, seed), right in made.items())]
    for rate in (1e-3, 2e-3):
        lines += [row("tuning", "bf16", 100 + seed, [0, 1, 1, 1], preset={"lr": rate}) for seed in (0, 1)]
    write(path, lines)
    return path


def rehashed(line, **changes):
    """The line with another configuration, and the hash that belongs to it."""
    config = json.loads(json.dumps(line["config"]))
    for path, value in changes.items():
        place, _, name = path.rpartition("__")
        (config[place] if place else config)[name] = value
    return {**line, "config": config, "config_hash": config_hash(config)}


RIGHT = [1, 0, 1, 1]
REFUSED = {
    "a schema of another time": (lambda a, b: [a, b | {"schema": "qnoise-recovery-0"}], "line 2, arm 'mxfp4': schema"),
    "a field that is not there": (
        lambda a, b: [a, {name: value for name, value in b.items() if name != "cost"}],
        "line 2, arm 'mxfp4': the field 'cost' is missing",
    ),
    "a field of another type": (lambda a, b: [a, b | {"seed": True}], "line 2, arm 'mxfp4': seed is True"),
    "the same run twice": (lambda a, b: [a, b, b], "line 3, arm 'mxfp4': seed 0 stands in words.jsonl, line 2"),
    "settings changed by hand": (
        lambda a, b: [a, b | {"config": {**b["config"], "seed": 0, "preset": {**b["config"]["preset"], "lr": 1.0}}}],
        "line 2, arm 'mxfp4': config_hash is",
    ),
    "other code": (lambda a, b: [a, b | {"code_hash": "beef"}], "line 2, arm 'mxfp4': made by the code beef"),
    "an arm with two settings": (
        lambda a, b: [a, b, rehashed(row("words", "mxfp4", 1, RIGHT), preset__lr=2e-3)],
        "line 3, arm 'mxfp4': other settings than words.jsonl, line 2, arm 'mxfp4': preset.lr is 0.002 instead",
    ),
    "another preset for one arm": (
        lambda a, b: [a, rehashed(b, preset__lr=2e-3)],
        "line 2, arm 'mxfp4': cannot be paired with words.jsonl, line 1, arm 'bf16': lr is 0.002",
    ),
    "another task for one arm, as its own setting": (
        lambda a, b: [a, rehashed(b, preset__task="walks", arm__preset={"task": "walks"})],
        "cannot be paired with words.jsonl, line 1, arm 'bf16': task is 'walks'",
    ),
    "problems for choosing settings": (
        lambda a, b: [a, rehashed(b, preset__split="dev")],
        "line 2, arm 'mxfp4': measured on the stream 'dev'",
    ),
    "another stage": (lambda a, b: [a, b | {"stage": "walks"}], "line 2, arm 'mxfp4': a run of the stage 'walks'"),
    "more problems": (lambda a, b: [a, row("words", "mxfp4", 0, RIGHT * 2)], r"evaluated on \[8, 8, 8, 8\] problems"),
    "other weights": (
        lambda a, b: [a, rehashed(b, weights="of another")],
        "another checkpoint than words.jsonl, line 1",
    ),
    "another seed than its settings": (lambda a, b: [a, b | {"seed": 3}], "seed is 3, but its config has 0"),
    "outcomes that are cut off": (
        lambda a, b: [a, b | {"final": {"greedy": {**b["final"]["greedy"], "strict": ""}}}],
        "final greedy strict has 0 digits for 4 problems",
    ),
    "outcomes that are no digits": (
        lambda a, b: [a, b | {"final": {"greedy": {**b["final"]["greedy"], "strict": "x"}}}],
        "final greedy strict is not hexadecimal",
    ),
    "no greedy evaluation": (
        lambda a, b: [a, b | {"final": {"sampled": b["final"]["sampled"]}}],
        "there is no final greedy evaluation",
    ),
    "a curve with a hole": (
        lambda a, b: [a, b | {"curves": {**b["curves"], "entropy": [1.0, float("nan"), 1.0, 1.0]}}],
        r"curves.entropy\[1\] is nan; a step that trained nothing is written as null",
    ),
    "curves of different lengths": (
        lambda a, b: [a, b | {"curves": {**b["curves"], "entropy": [1.0]}}],
        "curves of different lengths",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_belong_together_is_refused_by_name(change, message, tmp_path):
    pair = [row("words", "bf16", 0, RIGHT), row("words", "mxfp4", 0, RIGHT)]
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in change(*pair)))
    with pytest.raises(ValueError, match=message):
        stage("words", tmp_path)
    path.write_text("".join(json.dumps(line) + "\n" for line in pair))
    assert [each.arm for each in stage("words", tmp_path).rows] == ["bf16", "mxfp4"]


def test_an_arm_may_have_settings_of_its_own(tmp_path):
    other = rehashed(row("words", "mxfp4", 0, RIGHT), preset__lr=5e-4, arm__preset={"lr": 5e-4})
    write(tmp_path, [row("words", "bf16", 0, RIGHT), other])
    assert len(stage("words", tmp_path).rows) == 2


def test_a_stage_that_was_not_run_is_empty_and_one_that_is_none_is_refused(tmp_path):
    assert stage("large", tmp_path).rows == ()
    with pytest.raises(ValueError, match="no stage 'word', did you mean 'words'"):
        stage("word", tmp_path)


@pytest.mark.parametrize("name", ["tuning", "finalists"])
def test_settings_are_chosen_on_problems_that_no_table_uses(name, tmp_path):
    write(tmp_path, [row(name, "bf16", 100, RIGHT, split="dev")])
    assert len(stage(name, tmp_path).rows) == 1
    write(tmp_path, [row(name, "bf16", 100, RIGHT, split="test")])
    with pytest.raises(ValueError, match=r"settings are chosen on 'dev' \(stages tuning, finalists\)"):
        stage(name, tmp_path)


def test_tuning_may_try_settings_and_code_but_no_run_twice(tmp_path):
    first, second = (row("tuning", "bf16", 100, RIGHT, preset={"lr": rate}) for rate in (1e-3, 2e-3))
    write(tmp_path, [first, second | {"code_hash": "beef"}])
    assert len(stage("tuning", tmp_path).rows) == 2
    write(tmp_path, [first, second, second])
    with pytest.raises(ValueError, match="line 3, arm 'bf16': seed 100 stands in"):
        stage("tuning", tmp_path)


def test_student_has_the_values_of_the_tables():
    for share, freedom, value in (
        (0.975, 1, 12.7062), (0.975, 2, 4.30265), (0.975, 5, 2.57058), (0.8, 15, 0.866245), (0.95, 30, 1.69726),
    ):  # fmt: skip
        assert student.quantile(share, freedom) == pytest.approx(value, rel=1e-5)
        assert student.cdf(-value, freedom) == pytest.approx(1 - share, rel=1e-4)
    assert student.quantile(0.1, 4) == -student.quantile(0.9, 4)
    with pytest.raises(ValueError, match="at least 1"):
        student.cdf(1.0, 0)


def made(differences, checkpoints=None, how="greedy"):
    """A stage of two arms with these differences (runs, problems) of -1, 0 and 1; "a" - "b"."""
    lines = []
    for seed, values in enumerate(differences):
        fields = {"checkpoint": checkpoints[seed]} if checkpoints else {}
        for name, right in (("mxfp4", np.asarray(values) > 0), ("bf16", np.asarray(values) < 0)):
            lines.append(row("words", name, seed, right.astype(int).tolist(), **fields))
    return lines


def spread(differences, checkpoints, resamples=4000):
    """Variance of the replicates, in points squared, computed by the functions that `Bootstrap` uses."""
    differences = np.asarray(differences, np.float32)
    problems = bootstrap.problem_draws(differences.shape[1], resamples, 5)
    runs = bootstrap.run_draws(tuple(checkpoints), resamples, 5)
    assert problems.sum(0).tolist() == [differences.shape[1]] * resamples
    means = (runs * (differences @ problems)).sum(0) / runs.sum(0) / differences.shape[1]
    return float(np.var(100 * means))


def test_each_level_of_the_bootstrap_has_its_variance():
    rng = np.random.default_rng(1)
    one = rng.choice([-1, 0, 1], size=200)
    assert spread([one] * 6, "aabbcc") == pytest.approx(1e4 * one.var() / 200, rel=0.12)  # problems alone
    run = np.array([0.0, 1, 0, 1, 1, 0, 0, 1])[:, None] * np.ones((1, 40))
    assert spread(run, "a" * 8) == pytest.approx(1e4 * 0.25 / 8, rel=0.12)  # seeds alone
    assert spread(run, "abcdefgh") == pytest.approx(1e4 * 0.25 / 8, rel=0.12)  # checkpoints alone
    pairs = np.repeat([0.0, 1, 0, 1], 2)[:, None] * np.ones((1, 40))
    assert spread(pairs, "aabbccdd") == pytest.approx(1e4 * 0.25 / 4, rel=0.12)  # checkpoints that differ, seeds not
    both = np.array([0.0, 1, 0, 1])[:, None] * np.ones((1, 40))
    assert spread(both, "aabb") == pytest.approx(1e4 * 0.25 / 4, rel=0.12)  # seeds that differ, checkpoints not
    assert spread(run[:3], "aab") == pytest.approx(spread(run[:3], "aab"), abs=0)


@pytest.mark.parametrize(
    ("between_checkpoints", "bootstrap_covers", "t_covers"),
    [(0.0, (0.97, 1.0), (0.91, 0.99)), (0.03, (0.93, 0.99), (0.75, 0.9)), (0.06, (0.85, 0.93), (0.5, 0.8))],
)
def test_how_far_the_intervals_cover_the_truth(between_checkpoints, bootstrap_covers, t_covers):
    """Of 300 made-up studies: 3 checkpoints with 4 seeds each, 200 problems, seeds that differ by 3 points.

    The bootstrap covers too much where checkpoints do not differ, what it says where they differ as seeds do, and too
    little where they differ twice as much: three are few. The t interval knows nothing of other checkpoints.
    """
    rng, studies, resamples = np.random.default_rng(2), 300, 500
    checkpoints = tuple("aaaabbbbcccc")
    problems = bootstrap.problem_draws(200, resamples, 1)
    runs = bootstrap.run_draws(checkpoints, resamples, 1)
    covered = {"bootstrap": 0, "t": 0, "outer": 0}
    for _ in range(studies):
        effect = np.repeat(rng.normal(0, between_checkpoints, 3), 4) + rng.normal(0, 0.03, 12)
        chance_of_one = np.clip(0.1 + effect / 2, 0, 1)[:, None]
        draw = rng.random((12, 200))
        found = np.where(draw < chance_of_one, 1, np.where(draw > 1 - (0.2 - chance_of_one), -1, 0)).astype(np.float32)
        replicates = 100 * (runs * (found @ problems)).sum(0) / runs.sum(0) / 200
        by_run = 100 * found.mean(1)
        error = by_run.std(ddof=1) / math.sqrt(12)
        difference = Difference(float(by_run.mean()), by_run, replicates, float(error), 11)
        for name, (low, high) in zip(
            covered, (difference.interval, difference.t_interval, difference.outer), strict=True
        ):
            covered[name] += low <= 0 <= high
    assert bootstrap_covers[0] <= covered["bootstrap"] / studies <= bootstrap_covers[1]
    assert t_covers[0] <= covered["t"] / studies <= t_covers[1]
    assert covered["outer"] >= max(covered["bootstrap"], covered["t"])


def test_differences_are_paired_over_the_runs_that_both_have(tmp_path):
    lines = made([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, -1]])
    lines += [row("words", "mxfp4", 3, [1, 1, 1, 1])]  # no bf16 with this seed
    write(tmp_path, lines)
    source = Bootstrap(stage("words", tmp_path))
    found = source.difference({"mxfp4": 1, "bf16": -1})
    assert found.by_run.tolist() == [50, 25, -25]
    assert found.mean == pytest.approx(50 / 3)
    assert found.sd == pytest.approx(38.188131)
    assert found.t_interval == pytest.approx((50 / 3 - 94.865, 50 / 3 + 94.865), abs=0.01)
    assert source.difference({"mxfp4": 1, "nvfp4": -1}) is None
    assert source.difference({"bf16": 1, "mxfp4": -1}).interval == tuple(-end for end in found.interval[::-1])
    assert Bootstrap(stage("words", tmp_path)).difference({"mxfp4": 1, "bf16": -1}).interval == found.interval


def test_greedy_and_sampled_strict_and_flexible_are_kept_apart(tmp_path):
    lines = [row("words", name, 0, [1, 1, 1, 1], sampled=right) for name, right in
             (("bf16", [1, 1, 1, 0]), ("mxfp4", [1, 0, 0, 0]))]  # fmt: skip
    lines[0]["final"]["greedy"]["strict"] = "0"
    write(tmp_path, lines)
    source = Bootstrap(stage("words", tmp_path))
    weights = {"bf16": 1, "mxfp4": -1}
    assert [source.difference(weights, how).mean for how in HOWS] == [0, 50]
    assert source.difference(weights, "greedy", "strict").mean == -100
    assert source.difference(weights).outer == (-math.inf, math.inf)  # one run shows no spread
    assert tables.points(source.difference(weights, "sampled")) == "+50.00 (one run)"


def test_the_share_of_the_loss_is_given_where_there_is_a_loss(folder):
    source = Bootstrap(stage("words", folder))
    found = source.share("mxfp4+recipe", "mxfp4", "bf16")
    won, lost = (source.difference({name: 1, "mxfp4": -1}).mean for name in ("mxfp4+recipe", "bf16"))
    assert found.mean == pytest.approx(won / lost)
    assert found.gap == pytest.approx(lost)
    assert found.interval[0] < found.mean < found.interval[1]
    assert source.share("bf16", "mxfp4", "bf16").interval == (1, 1)  # chance cancels on both sides
    small = source.share("nvfp4+recipe", "nvfp4", "bf16")
    assert small.gap < bootstrap.GAP
    assert tables.share_text(small) == f"gap of {small.gap:.1f} too small"


def test_stages_are_averaged_as_independent():
    def difference(mean, error, freedom, stream):
        replicates = np.random.default_rng(stream).normal(mean, error, 2000)
        return Difference(mean, np.full(freedom + 1, mean), replicates, error, freedom)

    both = pooled([difference(2.0, 0.3, 15, 0), difference(4.0, 0.4, 15, 1)])
    assert (both.mean, both.standard_error) == pytest.approx((3.0, 0.25))
    assert both.freedom == 27  # (0.3^2 + 0.4^2)^2 / (0.3^4 + 0.4^4) * 15, rounded down
    assert both.interval == pytest.approx((3 - 0.49, 3 + 0.49), abs=0.04)


def test_power_is_what_a_simulation_finds():
    pilot = power.Pilot(1.6)
    assert pilot.sd_with(pilot.problems) == pytest.approx(1.6)
    assert pilot.run_sd == pytest.approx(math.sqrt(1.6**2 - 1.0))
    runs = power.runs_needed(pilot, 6000)
    assert power.power(pilot, runs - 1, 6000) < 0.8 <= power.power(pilot, runs, 6000)
    found = np.random.default_rng(0).normal(0, pilot.sd_with(6000), (20_000, runs))
    half = student.quantile(0.975, runs - 1) * found.std(1, ddof=1) / math.sqrt(runs)
    assert (found.mean(1) - half >= -1).mean() == pytest.approx(0.8, abs=0.03)
    with pytest.raises(ValueError, match="less than 1500 problems of discordance"):
        _ = power.Pilot(0.9).run_sd
    with pytest.raises(ValueError, match="below the margin"):
        power.runs_needed(pilot, 6000, true=-1.0)


def test_the_plan_of_the_study_has_the_power_it_needs():
    """As many runs as the stages of both tasks have, at the problems they have, for the middle of the prototypes."""
    for name in TASKS:
        planned = stages.STAGES[name]
        middle = power.Pilot(1.45)
        sizes = {"checkpoints": planned.preset.checkpoints}
        assert power.power(middle, len(planned.seeds), planned.preset.eval_problems, **sizes) >= 0.8


def test_chance_judges_by_the_spread_of_the_aa_runs(folder):
    by_run = np.array([1.0, -1.0, 1.0, -1.0])
    aa = Chance(Difference(0.0, by_run, np.zeros(3), 0.5, 3))
    assert aa.size == 1
    assert aa.half_width(4) == pytest.approx(student.quantile(0.975, 4) / 2)
    at_the_edge = Difference(aa.half_width(4), by_run, np.zeros(3), 0.5, 3)
    assert aa.p(at_the_edge) == pytest.approx(0.05)
    assert chance(Bootstrap(stage("arms", folder)), "mxfp4") is None


def test_corrected_p_values_are_those_of_holm():
    assert holm([0.01, 0.04, math.nan, 0.03]) == pytest.approx([0.03, 0.06, math.nan, 0.06], nan_ok=True)
    assert holm([0.5, 0.9]) == [1.0, 1.0]


def test_a_noise_arm_that_does_nothing_lies_within_chance_and_one_that_hurts_does_not(folder):
    _, cells = tables.by_chance(Bootstrap(stage("words", folder)), page.sources(folder)["arms"])
    found = {(line[0], line[1]): line for line in cells}
    assert float(found["`mxfp4+aqn`", "greedy"][-1]) > 0.05
    assert found["`mxfp4+aqn-0.05`", "greedy"][-1] == "< 0.001"
    assert found["`mxfp4-aa`", "greedy"][-2:] == ["–", "–"]
    assert ("`mxfp4-full`", "greedy") not in found


def one_claim(text):
    return next(claim for claim in claims.CLAIMS if claim.sentence.startswith(text))


def judged(folder, text, how="greedy"):
    return claims.judge(one_claim(text), page.sources(folder), how)


def test_verdicts(folder):
    cost = judged(folder, "MXFP4 costs")
    assert (cost.word, cost.remark) == ("reproduced", "but more than 5.39")
    assert re.match(r"words \+\d.*; walks \+\d.*; mean of words and walks \+\d", cost.found)
    assert judged(folder, "NVFP4 is worse").word == "opposite"
    none = judged(folder, "Noise (AQN")
    assert none.word == "not distinguishable"
    assert re.match(r"the runs could have seen \d\.\d\d points", none.remark)
    assert judged(folder, "With more noise").word == "not measured"  # two paired runs are too few
    assert judged(folder, "... and a faulty").found == "–"


def test_an_effect_has_to_be_seen_by_both_intervals(tmp_path):
    """Checkpoints of opposite sign: the runs agree on a mean above 0, other checkpoints might not."""
    differences = [[1] * 9 + [0] * 31, [1] * 8 + [0] * 32, [-1, *[0] * 39]] * 4
    write(tmp_path, made([[-v for v in values] for values in differences]))
    found = page.sources(tmp_path)["words"].difference({"bf16": 1, "mxfp4": -1})
    assert found.t_interval[0] > 0 > found.interval[0]
    assert judged(tmp_path, "MXFP4 costs").word == "not distinguishable"


def test_speed_is_judged_by_paired_ratios(tmp_path):
    claim = one_claim("Targeted noise makes")
    for factor, word in ((1.7, "reproduced"), (0.8, "opposite"), (1.0, "not distinguishable")):
        lines = []
        for seed in range(4):
            for name, seconds in (("mxfp4+aqn", 2.0 * factor), ("mxfp4+aqn-targeted", 2.0)):
                line = row("arms", name, seed, RIGHT)
                line["cost"]["step_seconds"] = seconds * (1 + 0.01 * (seed % 2) * (name == "mxfp4+aqn"))
                lines.append(line)
        if factor == 1.0:
            lines[0]["cost"]["step_seconds"] /= 1.1
        (tmp_path / word).mkdir()
        write(tmp_path / word, lines)
        assert claims.judge(claim, page.sources(tmp_path / word)).word == word


def difference(mean, half, runs=16):
    replicates = np.linspace(mean - half / 0.95, mean + half / 0.95, 2001)
    return Difference(mean, np.full(runs, mean), replicates, 0.0, runs - 1)


def test_few_runs_are_judged_by_t():
    """One run of four made the mean: drawn again, none of the four lies below 0, and t does not trust them."""
    few = Difference(3.0, np.array([1.0, 1, 1, 9]), np.linspace(1, 7, 2001), 2.0, 3)
    assert few.interval[0] > 0 > few.t_interval[0]
    assert few.outer == few.t_interval
    assert not claims.not_inferior(few)


@pytest.mark.parametrize(
    ("mean", "half", "runs", "holds"),
    [
        (0.0, 0.99, 16, True),
        (0.0, 1.01, 16, False),
        (-0.01, 0.5, 16, False),
        (0.5, 1.4, 16, True),
        (0.0, 0.5, 3, False),
    ],
)
def test_not_inferior_is_an_interval_above_the_margin_and_a_mean_above_zero(mean, half, runs, holds):
    assert claims.not_inferior(difference(mean, half, runs)) is holds


def test_recipes_are_judged_against_the_bf16_of_their_cost(folder):
    known = page.sources(folder)
    assert claims.goal("nvfp4+recipe", known).startswith("`nvfp4+recipe`: **missed** (words, greedy -")
    header, cells = claims.recipes(known)
    assert [line[3] for line in cells if line[0] == "`mxfp4+recipe`" and line[1] == "words"] == [
        "`bf16+mxfp4-cost`", "`bf16`", "`bf16-aa`",
    ]  # fmt: skip
    assert all(len(line) == len(header) for line in cells)
    only_words = {"words": known["words"]}
    assert "walks, greedy; walks, sampled" in claims.goal("mxfp4+recipe", only_words)


def test_the_chance_of_full_precision_is_told_where_it_was_run(folder):
    known = page.sources(folder)
    told = claims.chance_of_full_precision(known)
    difference = known["words"].difference({"bf16-aa": 1, "bf16": -1})
    assert f"words, greedy {difference.mean:+.2f} (" in told
    assert "walks, sampled" in told
    assert "arms" not in told
    assert claims.chance_of_full_precision({"arms": known["arms"]}).endswith("not measured.")


def test_the_goal_is_met_where_every_task_and_accuracy_meets_it(tmp_path):
    better = {"mxfp4+recipe": 0.80, "bf16+mxfp4-cost": 0.70}
    write(tmp_path, core("words", accuracies=better) + core("walks", accuracies=better))
    assert claims.goal("mxfp4+recipe", page.sources(tmp_path)) == "`mxfp4+recipe`: met."


def test_lora_has_the_parameters_that_arithmetic_gives():
    assert claims.adapter_parameters() == 32 * 28 * (3072 + 1792 + 1792 + 3072 + 3 * 10496)


def test_every_arm_of_a_claim_is_an_arm_of_the_study():
    known = {name: {arm.name for arm in each.arms} for name, each in stages.STAGES.items()}
    assert set(known) <= set(STAGES)
    borrowed = set(page.BASELINES) & known["words"]
    for claim in claims.CLAIMS:
        for name in claim.stages:
            assert set(claim.contrast) <= known[name] | (borrowed if name == "arms" else set()), claim.sentence
    assert set(page.CORE) == known["words"] == known["walks"]


def test_baselines_come_from_runs_of_the_same_seeds_and_code(folder):
    cell = page.sources(folder)["arms"].stage
    assert sorted(cell.arms["mxfp4"]) == [("words-a", 0), ("words-a", 3)]
    assert {arm for arm in cell.arms if "recipe" in arm or "-aa" in arm} == set()
    words, arms = stage("words", folder), stage("arms", folder)
    other = type(words)("words", tuple(type(r)(r.place, r.data | {"code_hash": "beef"}) for r in words.rows))
    alone = with_baselines(arms, other, ["mxfp4"])
    assert "mxfp4" not in alone.arms
    assert alone.notes == ("Not compared with `mxfp4` of the stage words: those runs were made by other code.",)


def test_the_arms_an_arm_is_compared_with(folder):
    cell = page.sources(folder)["arms"].stage
    assert tables.plain(cell, "mxfp4+aqn-0.05") == "mxfp4"
    assert tables.plain(cell, "mxfp4-full") is None
    assert tables.reference(cell, "mxfp4-full") == "bf16-full"
    assert tables.reference(cell, "bf16-full") is None
    words = stage("words", folder)
    assert tables.matched(words, "mxfp4+recipe") == "bf16+mxfp4-cost"
    assert tables.matched(words, "nvfp4+recipe-2") == "bf16+nvfp4-cost"
    assert tables.matched(words, "mxfp4") is None
    assert tables.plain(words, "bf16+mxfp4-cost") is None


def test_tables_hold_what_the_rows_say(tmp_path):
    lines = []
    for seed, (before, after) in enumerate((([1, 0, 0, 0], [1, 1, 1, 0]), ([1, 1, 0, 0], [1, 1, 1, 1]))):
        lines += [row("words", "bf16", seed, after, initial=before), row("words", "mxfp4+aqn", seed, before)]
    write(tmp_path, lines)
    found = stage("words", tmp_path)
    _, cells = tables.accuracy(found)
    assert cells[0][:5] == ["`bf16`", "2", "16", "37.50 ± 17.68", "87.50 ± 17.68"]
    _, cells = tables.training(found)
    assert cells[1] == ["`mxfp4+aqn`", "0.150", "0.3500", "2.0e-04", "20.0", "1.00 %", "2.50 %", "0.01 → 0.001"]
    _, cells = tables.cost(found)
    assert cells[0][1:4] == ["2.00", "100", "0"]
    _, cells = tables.benchmark([Bootstrap(found)])
    assert cells[0][3:5] == ["37.5 → 87.5", "+50.0 (enough)"]
    assert cells[0][9] == "256 … 384"


def test_bits_of_the_one_level_format_are_not_those_of_the_plain_weights_it_is_written_into(tmp_path):
    faulty = row("words", "one-level", 0, RIGHT, bits_per_weight=16.0)
    faulty["config"]["arm"] |= {"fmt": None, "one_level": True}
    faulty["config_hash"] = config_hash(faulty["config"])
    write(tmp_path, [row("words", "bf16", 0, RIGHT), faulty])
    _, cells = tables.accuracy(stage("words", tmp_path))
    assert {line[0]: line[2] for line in cells} == {"`bf16`": "16", "`one-level`": "4.5"}


def test_hours_are_those_of_all_planned_runs(tmp_path):
    """Runs of a seed that is not planned are no part of it."""
    lines = [row("words", name, seed, RIGHT) for name in ("bf16", "mxfp4") for seed in (0, 8, 99)]
    write(tmp_path, [*lines, row("walks", "bf16", 2, RIGHT, task="walks")])
    _, cells = hours.table(stage(name, tmp_path) for name in ("words", "walks", "large"))
    runs = 18 * len(CORE)
    assert cells == [
        ["words", f"{runs}", "4", "104", f"{runs * 104 / 2 / 3600:.1f}"],
        ["walks", f"{runs}", "1", "102", f"{runs * 102 / 2 / 3600:.1f}"],
        ["all of these", f"{2 * runs}", "5", "", f"{runs * 206 / 2 / 3600:.1f}"],
    ]


def test_hours_go_by_the_runs_that_were_made_last(tmp_path, monkeypatch):
    monkeypatch.setattr(hours, "RECENT", 2)
    lines = [row("words", "bf16", seed, RIGHT) for seed in range(3)]
    for line, seconds in zip(lines, (900, 10, 20), strict=True):
        line["cost"] = {**line["cost"], "cpu_seconds": seconds}
    write(tmp_path, lines)
    _, cells = hours.table([stage("words", tmp_path)])
    assert cells[0][2:4] == ["3", "15"]


def test_what_else_was_tried_is_in_the_order_of_its_lower_end(tmp_path):
    made = policies({"bf16": 0.7, "mxfp4": 0.6, "mxfp4-gptq": 0.68, "mxfp4+aqn": 0.69}, range(3), 400)
    lines = [row("arms", name, seed, right) for (name, seed), right in made.items()]
    wide = [{**line, "arm": "mxfp4-residual", "bits_per_weight": 8.5} for line in lines if line["arm"] == "mxfp4-gptq"]
    write(tmp_path, [*lines, *wide])
    _, cells = claims.tried(page.sources(tmp_path)["arms"])
    assert [line[0] for line in cells] == ["`mxfp4-gptq`", "`mxfp4`"]
    assert float(cells[0][4]) > float(cells[1][4])


def test_each_checkpoint_is_told_apart(tmp_path):
    write(tmp_path, made([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, -1], [0, 0, 0, 0]], checkpoints="aabc"))
    header, cells = tables.by_checkpoint(Bootstrap(stage("words", tmp_path)))
    assert header == ["arm", "a: greedy − bf16", "b: greedy − bf16", "c: greedy − bf16"]
    assert cells == [["`mxfp4`", "+37.50 (-121.33 … +196.33)", "-25.00 (one run)", "+0.00 (one run)"]]


def test_tuning_says_what_was_tried(folder):
    _, cells = tables.tuning(stage("tuning", folder))
    assert [line[:3] for line in cells] == [["`bf16`", "lr 0.001", "2"], ["`bf16`", "lr 0.002", "2"]]


def tuned(name, seed, right, *, steps=24, seconds=0.0, lr=2e-3, **fields):
    """A run of the stage "tuning" with this share of 8 problems solved, and its cost at 2 seconds a step."""
    line = row("tuning", name, seed, [1] * right + [0] * (8 - right), preset={"lr": lr, "steps": steps}, **fields)
    return line | {"cost": line["cost"] | {"prepare_seconds": seconds}}


def test_a_candidate_is_compared_with_bf16_of_equal_cost(tmp_path):
    lines = [
        tuned("bf16@0.002", 100, 4), tuned("bf16+2-steps", 100, 5, steps=26), tuned("bf16+6-steps", 100, 6, steps=30),
        tuned("bf16@0.002", 101, 2), tuned("bf16+2-steps", 101, 4, steps=26), tuned("bf16+6-steps", 101, 4, steps=30),
        tuned("bf16@0.001", 100, 8, lr=1e-3),  # of another learning rate: no part of the reference
        tuned("mxfp4+cheap", 100, 4, seconds=2.0), tuned("mxfp4+cheap", 101, 4, seconds=4.0),
        tuned("nvfp4+dear", 100, 6, seconds=80.0), tuned("mxfp4+alone", 102, 6, seconds=4.0),
        tuned("mxfp4-full", 100, 6), tuned("mxfp4", 100, 3),
    ]  # fmt: skip
    write(tmp_path, lines)
    _, cells = tables.tuning(stage("tuning", tmp_path))
    # One step more is worth half of 12.5 points to the first seed; two are worth 25 to the second.
    assert {line[0]: line[-1] for line in cells} == {
        "`bf16@0.001`": "–", "`bf16@0.002`": "–", "`bf16+2-steps`": "–", "`bf16+6-steps`": "–", "`mxfp4`": "-12.50",
        "`mxfp4+cheap`": "-3.12 ± 4.42", "`nvfp4+dear`": "below +0.00", "`mxfp4+alone`": "–", "`mxfp4-full`": "–",
    }  # fmt: skip


def text_of(folder):
    parts = [part for make in page.PARTS.values() for part in make(folder=folder)]
    for part in parts:
        if isinstance(part, tuple):
            assert all(len(line) == len(part[0]) for line in part[1])
    return "\n".join(part if isinstance(part, str) else json.dumps(part, ensure_ascii=False) for part in parts)


def test_the_page_is_made_from_nothing_from_a_part_and_from_all(folder, tmp_path):
    nothing = text_of(tmp_path)
    assert nothing.count("Not run yet") == 11
    write(tmp_path, [row("words", "bf16", 0, RIGHT), row("words", "mxfp4", 0, RIGHT)])
    part = text_of(tmp_path)
    assert "+0.00 (one run)" in part
    assert "Not run yet: `bf16-aa`, `nvfp4`, `mxfp4-aa`" in part
    assert "Not complete: 1 of 18 planned seeds in every arm." in part
    assert '["`mxfp4`", "4.25", "75.0", "+0.00 (one run)", "75.0", "+0.00 (one run)", "65.88"]' in part
    whole = text_of(folder)
    assert "Not run yet: `mxfp4+aqn-0.001`, `mxfp4+aqn-0.005`, `mxfp4+aqn-0.1`, `mxfp4+aqn-variable`" in whole
    assert "nan" not in whole.lower().split()
    assert "inf" not in whole
    assert "stays open at 1.5 B until somebody runs the preset `gsm8k-qwen2.5-1.5b`" in whole
    for given in (nothing, part):
        assert "`mxfp4+recipe`: not measured yet" in given
    assert "`mxfp4+recipe`: met." in whole


def test_every_part_stands_on_the_page_once():
    """And its summary in README."""
    files = {
        ROOT / "docs" / page.PAGE: set(page.PARTS) - {"recovery-summary"},
        ROOT / "README.md": {"recovery-summary"},
    }
    for file, parts in files.items():
        names = re.findall(r"<!-- generated: (recovery-\S+) -->", file.read_text(encoding="utf-8"))
        assert sorted(names) == sorted(parts)


def test_figures_are_drawn_where_they_are_out_of_date(tmp_path):
    pytest.importorskip("matplotlib")
    lines = [row("words", name, seed, right) for seed in (0, 1) for name, right in
             (("bf16", [1, 1, 1, seed]), ("mxfp4", [1, 0, seed, 0]), ("mxfp4-aa", [1, seed, 0, 0]))]  # fmt: skip
    write(tmp_path, lines)
    into = tmp_path / "figures"
    every = sorted(figures.name(kind, "words") for kind in figures.KINDS)
    assert sorted(page.draw(into, check=True, folder=tmp_path)) == every
    assert not into.exists()
    page.draw(into, check=False, folder=tmp_path)
    assert sorted(path.name for path in into.iterdir()) == every
    assert page.draw(into, check=True, folder=tmp_path) == []
    assert all("mxfp4-aa" in path.read_text(encoding="utf-8") for path in into.iterdir())
    before = (into / figures.name("cost", "words")).read_bytes()
    source = page.sources(tmp_path)["words"]
    assert figures.svg("cost", figures.data("cost", source, source), source.stage) == before
    lines[0]["cost"]["rollout_tokens"] = 50_000
    write(tmp_path, lines)
    assert page.draw(into, check=True, folder=tmp_path) == [figures.name("cost", "words")]
