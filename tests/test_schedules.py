from __future__ import annotations

import math
from fractions import Fraction

import pytest

from qnoise import schedules as s

DECAYS = [
    s.Constant(1e-2),
    s.Linear(1e-2, 1e-4),
    s.Cosine(1e-2, 1e-4),
    s.Logarithmic(1e-2, 1e-4),
    s.Exponential(1e-2, 1e-4),
    s.StagedExponential(1e-2, 1e-4, 10),
    s.PerEpoch(1e-2, 1e-4, num_epochs=3, stages_per_epoch=5),
]


@pytest.mark.parametrize("schedule", DECAYS, ids=lambda x: type(x).__name__)
def test_contract(schedule) -> None:
    """A float >= 0 for every progress in [0, 1], never above the start, no hidden state, equal by value."""
    grid = [i / 997 for i in range(998)]
    values = [schedule(u) for u in grid]
    assert all(isinstance(v, float) and 0 <= v <= 1e-2 for v in values)
    assert values == [schedule(u) for u in grid]
    assert values == [type(schedule)(**schedule.__dict__)(u) for u in grid]
    assert schedule == type(schedule)(**schedule.__dict__)
    audible = [v for v in values if v > 0]
    if not isinstance(schedule, s.PerEpoch | s.Constant):
        assert audible == sorted(audible, reverse=True)
        assert audible[0] == pytest.approx(1e-2, rel=1e-12)
    if not isinstance(schedule, s.Constant):
        assert schedule(1.0) == 1e-4, "the end is met exactly"
    for bad in (-1e-9, 1 + 1e-9, math.nan):
        with pytest.raises(ValueError, match=r"progress is .* in \[0, 1\]"):
            schedule(bad)


@pytest.mark.parametrize("cls", [s.Linear, s.Cosine, s.Logarithmic, s.Exponential])
def test_closed_forms_at_the_middle(cls) -> None:
    expected = {
        s.Linear: 0.00505,
        s.Cosine: 0.00505,
        s.Exponential: 1e-3,
        s.Logarithmic: 1e-2 - 0.0099 * math.log((math.e + 1) / 2),
    }
    assert cls(1e-2, 1e-4)(0.5) == pytest.approx(expected[cls], rel=1e-12)


def test_staged_exponential_is_the_released_staircase() -> None:
    schedule = s.StagedExponential(1e-2, 1e-4, 10)
    table = [0, 1e-2, 5.62e-3, 3.16e-3, 1.78e-3, 1e-3, 5.62e-4, 3.16e-4, 1.78e-4, 1e-4]
    for stage, sigma in enumerate(table):
        for u in (stage / 10, (stage + 0.5) / 10, (stage + 0.999) / 10):
            assert schedule(u) == pytest.approx(sigma, rel=2e-3, abs=0)


@pytest.mark.parametrize("num_stages", [3, 7, 10, 100])
def test_stage_boundaries_are_exact(num_stages: int) -> None:
    """Stage = floor(K k / T) in integers, though k / T arrives as a float."""
    schedule = s.StagedExponential(1e-2, 1e-4, num_stages)
    levels = [0.0] + [schedule((i + 0.5) / num_stages) for i in range(1, num_stages)]
    assert len(set(levels)) == num_stages
    for total in range(1, 301):
        for k in range(total):
            assert schedule(k / total) == levels[math.floor(Fraction(k * num_stages, total))], (k, total)


def test_per_epoch_boundaries() -> None:
    schedule = s.PerEpoch(1e-2, 1e-4, num_epochs=2, stages_per_epoch=3)
    # Two epochs of four intervals: silent, then from b_e to b_(e+1) in three geometric levels; b = 1e-2, 1e-3, 1e-4.
    levels = [schedule((i + 0.5) / 8) for i in range(8)]
    expected = [0, 1e-2, 10**-2.5, 1e-3, 0, 1e-3, 10**-3.5, 1e-4]
    assert levels == pytest.approx(expected, rel=1e-12)
    assert [s.PerEpoch(1e-2, 1e-4, 2, 1)((i + 0.5) / 4) for i in range(4)] == pytest.approx([0, 1e-2, 0, 1e-3])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: s.StagedExponential(1e-2, 1e-4, 2), "num_stages is 2.*>= 3.*divide by zero"),
        (lambda: s.StagedExponential(1e-2, 0.0), "sigma_end is 0.0.*positive"),
        (lambda: s.Exponential(-1e-2, 1e-4), "sigma_start is -0.01"),
        (lambda: s.Constant(math.nan), "sigma is nan"),
        (lambda: s.PerEpoch(1e-2, 1e-4, 0), "num_epochs is 0"),
        (lambda: s.PerEpoch(1e-2, 1e-4, 1, 2.5), "stages_per_epoch is 2.5"),
    ],
)
def test_bad_arguments_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_entropy_target_moves_sigma_by_the_ratio_of_entropies() -> None:
    rule = s.EntropyTarget(target=0.2, sigma_start=0.01, sigma_min=1e-3, sigma_max=0.04, gain=2.0)
    assert [rule(u) for u in (0.0, 0.5, 1.0)] == [0.01] * 3
    assert rule.after(0.01, 0.2) == pytest.approx(0.01)
    assert rule.after(0.01, 0.1) == pytest.approx(0.04)  # (0.2 / 0.1)^2 = 4
    assert rule.after(0.01, 0.4) == pytest.approx(0.0025)
    assert rule.after(0.01, 4.0) == 1e-3  # never so low that it cannot rise again
    assert rule.after(0.01, 0.0) == rule.after(0.01, 1e-300) == 0.04


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"target": 0.0, "sigma_start": 0.01}, "target is 0.0"),
        ({"target": 0.2, "sigma_start": 0.2}, "sigma_start is 0.2; it must be between sigma_min"),
        ({"target": 0.2, "sigma_start": 0.01, "gain": -1.0}, "gain is -1.0"),
    ],
)
def test_an_entropy_target_that_makes_no_sense_is_refused(values, message) -> None:
    with pytest.raises(ValueError, match=message):
        s.EntropyTarget(**values)
    with pytest.raises(ValueError, match="entropy is nan"):
        s.EntropyTarget(0.2, 0.01).after(0.01, float("nan"))
