from __future__ import annotations

import numpy as np
import pytest

from qnoise.noise import unit_normal

# Computed once on numpy 2.4; they hold on every machine, and a change of the generator must not go unnoticed.
VECTORS = {
    (0, 0, "model.norm"): [0.22361387312412262, -0.6106318831443787, -0.5411233305931091, -1.2842118740081787],
    (1, 0, "model.norm"): [0.3527247905731201, -0.4264741837978363, -0.15353107452392578, 0.27684485912323],
    (2**40, 123, "model.layers.0.input_layernorm"): [
        0.32154664397239685,
        0.2600081264972687,
        1.5333765745162964,
        -1.5438333749771118,
    ],
}


@pytest.mark.parametrize("key", VECTORS)
def test_fixed_vectors(key) -> None:
    assert unit_normal(*key, (4,)).tolist() == VECTORS[key]


def test_a_function_of_its_arguments_alone() -> None:
    np.random.seed(0)
    first = unit_normal(3, 4, "a", (5, 7))
    np.random.seed(99)
    assert first.dtype == np.float32
    assert first.shape == (5, 7)
    assert np.array_equal(first, unit_normal(3, 4, "a", (5, 7)))


def test_statistics() -> None:
    """Mean, deviation and tails of a standard normal; independent across names, steps and seeds."""
    n = 20_000
    draws = np.stack([unit_normal(seed, step, name, (n,)) for seed in (0, 1) for step in (0, 1) for name in "ab"])
    se = 1 / np.sqrt(n)
    assert np.all(np.abs(draws.mean(1)) < 5 * se)
    assert np.all(np.abs(draws.std(1) - 1) < 5 * se / np.sqrt(2))
    assert np.abs((draws**4).mean() - 3) < 5 * np.sqrt(96 / draws.size)
    correlation = np.corrcoef(draws)
    assert np.abs(correlation[~np.eye(len(draws), dtype=bool)]).max() < 5 * se
    assert np.abs((draws[:, 1:] * draws[:, :-1]).mean()) < 5 / np.sqrt(draws.size)
