import numpy as np
import pytest
import torch

from qnoise.rl import mismatch_metrics, rollout_is_weights


def batch(rows=8, tokens=11, seed=0, scale=0.5):
    generator = torch.Generator().manual_seed(seed)
    rollout = -torch.rand(rows, tokens, generator=generator) * 3
    train = rollout + scale * torch.randn(rows, tokens, generator=generator)
    mask = torch.rand(rows, tokens, generator=generator) < 0.7
    mask[0] = False
    return train, rollout, mask


def test_ratio_is_train_over_rollout():
    train, rollout, mask = torch.tensor([[-1.0]]), torch.tensor([[-2.0]]), torch.ones(1, 1)
    assert rollout_is_weights(train, rollout, mask, upper=None).item() == pytest.approx(np.e)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize(("lower", "upper"), [(None, 1.3), (0.8, 1.3), (0.8, None), (None, None)])
def test_weights_by_hand(level, mode, lower, upper):
    train, rollout, mask = batch(scale=0.2)
    d = torch.where(mask, train - rollout, 0.0).double()
    ratio = (d if level == "token" else d.sum(-1, keepdim=True).expand_as(d)).exp()
    low, high = lower if lower is not None else 0.0, upper if upper is not None else float("inf")
    want = ratio.clamp(low, high) if mode == "truncate" else torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)
    want = torch.where(mask, want, 0.0)
    got = rollout_is_weights(train.requires_grad_(), rollout, mask, level=level, mode=mode, lower=lower, upper=upper)
    assert not got.requires_grad
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=0)
    assert (want[mask] != ratio[mask]).any() or (lower is None and upper is None)


@pytest.mark.parametrize("garbage", [float("nan"), float("-inf"), float("inf")])
def test_padding_holds_anything(garbage):
    train, rollout, mask = batch()
    dirty = torch.where(mask, train, garbage), torch.where(mask, rollout, garbage), mask
    for level in ("token", "sequence"):
        want = rollout_is_weights(train, rollout, mask, level=level)
        assert torch.equal(rollout_is_weights(*dirty, level=level), want)
    want = mismatch_metrics(train, rollout, mask)
    got = mismatch_metrics(*dirty)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_far_apart_is_finite():
    train, rollout = torch.tensor([[0.0, -500.0]]), torch.tensor([[-500.0, 0.0]])
    got = rollout_is_weights(train, rollout, torch.ones(1, 2), upper=None)
    torch.testing.assert_close(got, torch.tensor([[20.0, -20.0]]).exp())
    metrics = mismatch_metrics(train, rollout, torch.ones(1, 2))
    assert metrics["train_ppl"] == torch.inf  # e^250 is beyond fp32
    assert all(value.isfinite() for name, value in metrics.items() if name not in ("train_ppl", "rollout_ppl"))


def test_metrics_by_hand():
    train, rollout, mask = batch()
    got = mismatch_metrics(train, rollout, mask, upper=1.4)
    d = (train - rollout).double()[mask].numpy()
    w = np.exp(d)
    rows = [row for row in range(8) if mask[row].any()]
    sequence_d = np.array([(train - rollout).double()[row][mask[row]].sum() for row in rows])
    ppl = {
        name: np.array([np.exp(-x.double()[row][mask[row]].mean().item()) for row in rows])
        for name, x in (("train", train), ("rollout", rollout))
    }
    want = {
        "k1": -d.mean(),
        "k3": (w - 1 - d).mean(),
        "log_ratio_abs_mean": np.abs(d).mean(),
        "log_ratio_abs_max": np.abs(d).max(),
        "ratio_p01": np.percentile(w, 1),
        "ratio_p50": np.percentile(w, 50),
        "ratio_p99": np.percentile(w, 99),
        "ess": w.sum() ** 2 / (len(w) * (w**2).sum()),
        "truncated": (w > 1.4).mean(),
        "chi2_token": (w**2).mean() - 1,
        "chi2_seq": np.exp(2 * sequence_d).mean() - 1,
        "train_ppl": ppl["train"].mean(),
        "rollout_ppl": ppl["rollout"].mean(),
        "ppl_ratio": (ppl["train"] / ppl["rollout"]).mean(),
    }
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].item() == pytest.approx(value, rel=1e-5), name
        assert got[name].shape == ()
        assert not got[name].requires_grad


def test_equal_policies():
    train, _, mask = batch()
    got = mismatch_metrics(train, train, mask)
    for name in ("k1", "k3", "log_ratio_abs_mean", "log_ratio_abs_max", "truncated", "chi2_token", "chi2_seq"):
        assert got[name] == 0, name
    for name in ("ratio_p01", "ratio_p50", "ratio_p99", "ess", "ppl_ratio"):
        assert got[name].item() == pytest.approx(1), name


def test_nothing_kept():
    train, _rollout, mask = batch()
    nan = torch.full_like(train, float("nan"))
    assert all(value == 0 for value in mismatch_metrics(nan, nan, torch.zeros_like(mask)).values())
    assert (rollout_is_weights(nan, nan, torch.zeros_like(mask)) == 0).all()
    empty = torch.zeros(0, 4)
    assert all(value == 0 for value in mismatch_metrics(empty, empty, empty).values())


def test_a_nan_that_counts_is_not_hidden():
    train, rollout, mask = batch()
    row, token = mask.nonzero()[0].tolist()
    rollout[row, token] = float("nan")
    assert rollout_is_weights(train, rollout, mask).isnan().sum() == 1
    assert rollout_is_weights(train, rollout, mask, mode="mask", lower=0.5).isnan().sum() == 1


def test_unbiased_without_truncation():
    """Σ over all tokens of a small policy: E_rollout[w·f] = E_train[f], exactly."""
    generator = torch.Generator().manual_seed(0)
    train, rollout = (torch.log_softmax(torch.randn(7, generator=generator, dtype=torch.float64), 0) for _ in range(2))
    weights = rollout_is_weights(train[None], rollout[None], torch.ones(1, 7), upper=None)[0]
    values = torch.randn(7, generator=generator, dtype=torch.float64)
    assert (rollout.exp() * weights * values).sum().item() == pytest.approx(
        (train.exp() * values).sum().item(), rel=1e-12
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"log_prob_rollout": torch.zeros(2, 4)},
            r"log_prob_rollout has shape \(2, 4\) but log_prob_train has shape \(2, 3\)",
        ),
        (
            {"response_mask": torch.zeros(3, 2)},
            r"response_mask has shape \(3, 2\) but log_prob_train has shape \(2, 3\)",
        ),
        ({"level": "seq"}, "level='seq' does not exist; allowed: 'token', 'sequence'"),
        ({"mode": "clip"}, "mode='clip' does not exist"),
        ({"upper": 0.0}, "upper must be positive or None, got 0.0"),
        ({"lower": 3.0}, "lower must be between 0 and upper=2.0, or None, got 3.0"),
        ({"lower": -0.5}, "lower must be between 0 and upper=2.0"),
    ],
)
def test_bad_input(change, message):
    good = {
        "log_prob_train": torch.zeros(2, 3),
        "log_prob_rollout": torch.zeros(2, 3),
        "response_mask": torch.ones(2, 3),
    }
    with pytest.raises(ValueError, match=message):
        rollout_is_weights(**{**good, **change})
