import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qnoise import rl
from qnoise.rl import mismatch_metrics, rollout_is_weights
from qnoise.rl.losses import LOSS_AGG_MODES


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


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_metrics_by_hand(level):
    train, rollout, mask = batch()
    got = mismatch_metrics(train, rollout, mask, level=level, upper=1.4, lower=0.6)
    rows = [row for row in range(8) if mask[row].any()]
    by_row = [(train - rollout).double()[row][mask[row]].numpy() for row in rows]
    if level == "token":
        ratio_by_row = [np.exp(d) for d in by_row]
    else:
        ratio_by_row = [np.full_like(d, np.exp(d.sum())) for d in by_row]
    d, w = np.concatenate(by_row), np.concatenate(ratio_by_row)
    bounded, seq = w.clip(0.6, 1.4), np.array([ratio.mean() for ratio in ratio_by_row])
    log_ppl = {
        name: np.array([-x.double()[row][mask[row]].mean().item() for row in rows])
        for name, x in (("train", train), ("rollout", rollout))
    }
    diff = log_ppl["train"] - log_ppl["rollout"]
    want = {
        "k1": -d.mean(),
        "k2": (d**2).mean() / 2,
        "k3": (np.exp(d) - 1 - d).mean(),
        "log_ratio_abs_mean": np.abs(d).mean(),
        "log_ratio_abs_max": np.abs(d).max(),
        "chi2_token": np.exp(2 * d).mean() - 1,
        "ratio_mean": w.mean(),
        "ratio_min": w.min(),
        "ratio_max": w.max(),
        "ratio_p01": np.percentile(w, 1),
        "ratio_p50": np.percentile(w, 50),
        "ratio_p99": np.percentile(w, 99),
        "above": (w > 1.4).mean(),
        "below": (w < 0.6).mean(),
        "truncated": ((w > 1.4) | (w < 0.6)).mean(),
        "ess": w.sum() ** 2 / (len(w) * (w**2).sum()),
        "weight_mean": bounded.mean(),
        "weight_std": bounded.std(),
        "weight_ess": bounded.sum() ** 2 / (len(w) * (bounded**2).sum()),
        "chi2_seq": np.exp([2 * d.sum() for d in by_row]).mean() - 1,
        "seq_ratio_mean": seq.mean(),
        "seq_ratio_std": seq.std(ddof=1),
        "seq_ratio_min": seq.min(),
        "seq_ratio_max": seq.max(),
        "seq_above": (seq > 1.4).mean(),
        "seq_below": (seq < 0.6).mean(),
        "train_log_ppl": log_ppl["train"].mean(),
        "rollout_log_ppl": log_ppl["rollout"].mean(),
        "train_ppl": np.exp(log_ppl["train"]).mean(),
        "rollout_ppl": np.exp(log_ppl["rollout"]).mean(),
        "log_ppl_diff_mean": diff.mean(),
        "log_ppl_diff_abs_mean": np.abs(diff).mean(),
        "log_ppl_diff_min": diff.min(),
        "log_ppl_diff_max": diff.max(),
        "ppl_ratio": np.exp(diff).mean(),
    }
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].item() == pytest.approx(value, rel=1e-5), name
        assert got[name].shape == ()
        assert not got[name].requires_grad


def test_the_weights_of_the_metrics_are_those_of_the_loss():
    train, rollout, mask = batch()
    for level in ("token", "sequence"):
        for bounds in ({"upper": 1.4}, {"upper": None}, {"upper": 1.2, "lower": 0.9}):
            weights = rollout_is_weights(train, rollout, mask, level=level, **bounds)[mask]
            got = mismatch_metrics(train, rollout, mask, level=level, **bounds)
            assert got["weight_mean"].item() == pytest.approx(weights.mean().item(), rel=1e-6)
            assert got["weight_std"].item() == pytest.approx(weights.std(correction=0).item(), rel=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 50, 101, 1000])
def test_percentiles_of_any_number_of_tokens(count):
    ratio = torch.rand(1, count, dtype=torch.float64, generator=torch.Generator().manual_seed(count)) + 0.5
    got = mismatch_metrics(ratio.log(), torch.zeros(1, count, dtype=torch.float64), torch.ones(1, count))
    for name, percent in (("ratio_p01", 1), ("ratio_p50", 50), ("ratio_p99", 99)):
        assert got[name].item() == pytest.approx(np.percentile(ratio.numpy(), percent), rel=1e-12)


def test_equal_policies():
    train, _, mask = batch()
    got = mismatch_metrics(train, train, mask)
    ones = {"ess", "weight_ess", "weight_mean", "ratio_mean", "ratio_min", "ratio_max", "ratio_p01", "ratio_p50"}
    ones |= {"ratio_p99", "seq_ratio_mean", "seq_ratio_min", "seq_ratio_max", "ppl_ratio"}
    for name, value in got.items():
        if "train_" not in name and "rollout_" not in name:
            assert value.item() == pytest.approx(float(name in ones), abs=1e-6), name


def test_nothing_kept():
    train, _rollout, mask = batch()
    nan = torch.full_like(train, float("nan"))
    assert all(value == 0 for value in mismatch_metrics(nan, nan, torch.zeros_like(mask)).values())
    assert (rollout_is_weights(nan, nan, torch.zeros_like(mask)) == 0).all()
    empty = torch.zeros(0, 4)
    assert all(value == 0 for value in mismatch_metrics(empty, empty, empty).values())
    no_tokens = torch.zeros(4, 0)
    assert all(value == 0 for value in mismatch_metrics(no_tokens, no_tokens, no_tokens).values())
    one = mismatch_metrics(train[1:2], train[1:2] - 0.5, mask[1:2])
    assert one["seq_ratio_std"] == 0
    assert all(value.isfinite() for value in one.values())


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


class Refusing(TorchDispatchMode):
    """Raises where a device without fp64 would fail, and where the host would wait for the device."""

    HOST_READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "bincount", "_unique2", "unique_dim")

    def __init__(self, host_reads):
        super().__init__()
        self.refused = self.HOST_READS if host_reads else ()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.refused:
            raise AssertionError(f"{func} reads from the device")
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                raise AssertionError(f"{func} makes fp64")
        return result


def on_any_device():
    """Calls of the functions that work where the model is."""
    train, rollout, mask = batch()
    logits, ids = torch.randn(8, 11, 5), torch.zeros(8, 11, dtype=torch.long)
    log_prob, advantages, items = train.clone().requires_grad_(), torch.randn(8), torch.tensor(17)
    yield from (
        (mismatch_metrics, (train, rollout, mask), {"level": level, "lower": 0.5}) for level in ("token", "sequence")
    )
    for level in ("token", "sequence"):
        for mode in ("truncate", "mask"):
            yield rollout_is_weights, (train, rollout, mask), {"level": level, "mode": mode, "lower": 0.5}
        for agg in LOSS_AGG_MODES:
            options = {"loss_agg_mode": agg, "num_items_in_batch": items, "ratio_level": level, "clip_ratio_c": 3.0}
            yield rl.dapo_loss, (log_prob, rollout, advantages, mask), options
    for kind in ("k1", "k2", "k3", "abs"):
        yield rl.kl_penalty, (log_prob, rollout, mask), {"kind": kind}
    yield rl.token_log_probs, (logits.requires_grad_(), ids, 0.7), {}


@pytest.mark.parametrize("case", [*on_any_device()], ids=lambda case: f"{case[0].__name__} {list(case[2].values())}")
def test_neither_fp64_nor_a_wait_for_the_device(case):
    """token_log_probs looks at its ids, but on a CPU only."""
    function, arguments, options = case
    with Refusing(host_reads=function is not rl.token_log_probs):
        result = function(*arguments, **options)
        for tensor in result if isinstance(result, tuple) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.sum().backward(retain_graph=True)


def test_the_refusal_can_fail():
    train, rollout, mask = batch()
    for wrong in (lambda: train.double(), lambda: train.sum().item(), lambda: train.flatten()[mask.sum()]):
        with Refusing(host_reads=True), pytest.raises(AssertionError, match="fp64|reads"):
            wrong()
    with Refusing(host_reads=True), pytest.raises(AssertionError, match="fp64"):
        mismatch_metrics(train.double(), rollout.double(), mask)


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
        ({"level": "seq"}, "level.*'seq'.*'token', 'sequence'"),
        ({"upper": 0.0}, "upper must be positive or None, got 0.0"),
        ({"lower": 3.0}, "lower must be between 0 and upper=2.0, or None, got 3.0"),
        ({"lower": -0.5}, "lower must be between 0 and upper=2.0"),
    ],
)
@pytest.mark.parametrize("function", [rollout_is_weights, mismatch_metrics])
def test_bad_input(function, change, message):
    good = {
        "log_prob_train": torch.zeros(2, 3),
        "log_prob_rollout": torch.zeros(2, 3),
        "response_mask": torch.ones(2, 3),
    }
    with pytest.raises(ValueError, match=message):
        function(**{**good, **change})


@pytest.mark.parametrize("function", [rollout_is_weights, mismatch_metrics])
def test_ids_in_place_of_log_probs(function):
    with pytest.raises(TypeError, match=r"log_prob_rollout must be a floating-point tensor, got torch\.int64"):
        function(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3))


def test_unknown_mode():
    with pytest.raises(ValueError, match="mode.*'clip'.*'truncate', 'mask'"):
        rollout_is_weights(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(2, 3), mode="clip")
