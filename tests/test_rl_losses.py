"""The DAPO loss against a plain transcription of the formula, and the laws golden vectors do not cover."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qnoise.rl import agg_loss, dapo_loss, kl_penalty
from qnoise.rl.losses import LOSS_AGG_MODES


def batch(rows=6, tokens=9, seed=0, dtype=torch.float64):
    """log_prob, old_log_prob, advantages (rows,), mask; ratios on both sides of the clip range."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, tokens, generator=generator, dtype=torch.float64) * 3 - 0.1
    new = old + 0.4 * torch.randn(rows, tokens, generator=generator, dtype=torch.float64)
    advantages = torch.randn(rows, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, tokens + 1, (rows,), generator=generator)
    mask = torch.arange(tokens) < lengths[:, None]
    return new.to(dtype).requires_grad_(), old.to(dtype), advantages.to(dtype), mask


def by_hand(new, old, advantages, mask, low, high, c):
    """Token costs one at a time, in Python floats."""
    costs = []
    for row in range(new.shape[0]):
        for token in range(new.shape[1]):
            if mask[row, token]:
                a = advantages[row].item()
                r = math.exp(new[row, token].item() - old[row, token].item())
                cost = max(-r * a, -min(max(r, 1 - low), 1 + high) * a)
                costs.append(min(cost, -c * a) if c is not None and a < 0 else cost)
    return costs


@pytest.mark.parametrize("c", [None, 1.5])
def test_formula(c):
    new, old, advantages, mask = batch(rows=40)
    loss, metrics = dapo_loss(new, old, advantages, mask, clip_ratio_low=0.2, clip_ratio_high=0.25, clip_ratio_c=c)
    costs = by_hand(new, old, advantages, mask, 0.2, 0.25, c)
    assert loss.item() == pytest.approx(sum(costs) / len(costs), rel=1e-12)
    ratio, a = (new - old).exp(), advantages[:, None].expand_as(new)
    share = {
        "clip_ratio/low_mean": ((ratio < 0.8) & (a < 0))[mask].double().mean(),
        "clip_ratio/high_mean": ((ratio > 1.25) & (a > 0))[mask].double().mean(),
        "actor/ppo_kl": (old - new)[mask].mean(),
        "actor/pg_clipfrac_lower": ((ratio > 1.5) & (a < 0))[mask].double().mean() if c else torch.tensor(0.0),
    }
    share["actor/pg_clipfrac"] = share["clip_ratio/low_mean"] + share["clip_ratio/high_mean"]
    share["clip_ratio/region_mean"] = share["actor/pg_clipfrac"]
    by_row = [
        (((r < 0.8) & (b < 0))[m].double().mean(), ((r > 1.25) & (b > 0))[m].double().mean())
        for r, b, m in zip(ratio, a, mask, strict=True)
    ]
    share["clip_ratio/low_min"] = min(low for low, _ in by_row)
    share["clip_ratio/high_max"] = max(high for _, high in by_row)
    assert metrics.keys() == share.keys()
    for name, value in share.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-6), name
        assert metrics[name].shape == ()
        assert not metrics[name].requires_grad
        assert value != 0 or c is None or name == "clip_ratio/low_min", f"{name} is 0: this batch tests nothing"


def test_clip_metrics_of_sequences():
    """Means over the sequences that have a token; the fully masked one takes no part, in the least share either."""
    log_ratio = torch.tensor([[-1.0, -1.0, 9.0], [0.5, 0.5, 0.5], [-1.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]])
    arguments = (log_ratio, torch.zeros_like(log_ratio), torch.tensor([-1.0, 1.0, -1.0, 1.0]), mask)

    def clip_ratios(rows, level):
        metrics = dapo_loss(*(x[rows] for x in arguments), ratio_level=level)[1]
        names = ("low_mean", "high_mean", "region_mean", "low_min", "high_max")
        return [metrics[f"clip_ratio/{name}"].item() for name in names]

    everything = slice(None)
    assert clip_ratios(everything, "token") == pytest.approx([3 / 6, 3 / 6, 1, 0, 1])
    assert clip_ratios(everything, "sequence") == pytest.approx([2 / 3, 1 / 3, 1, 0, 1])
    assert clip_ratios([0, 2, 3], "sequence") == pytest.approx([1, 0, 1, 1, 0])


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gradient_matches_finite_differences(mode, level):
    """The slope is written down, not traced; with weights, dual clip and every divisor it is the derivative."""
    new, old, advantages, mask = batch(rows=8)
    weights = torch.rand(8, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.5
    if level == "sequence":  # one weight a sequence: with one a token, GSPO's slope is not that of its loss
        weights = weights[:, 0]

    def loss(x):
        arguments = {"clip_ratio_c": 1.3, "loss_agg_mode": mode, "ratio_level": level, "num_items_in_batch": 5}
        return dapo_loss(x, old, advantages, mask, rollout_is_weights=weights, **arguments)[0]

    torch.autograd.gradcheck(loss, (new,), eps=1e-7, atol=1e-6)
    (gradient,) = torch.autograd.grad(7 * loss(new), new)
    torch.testing.assert_close(gradient, 7 * torch.autograd.grad(loss(new), new)[0], rtol=1e-12, atol=0)
    kept = gradient[mask]
    assert (kept == 0).any()
    assert (kept != 0).any()


def test_on_policy_gradient_is_the_policy_gradient():
    new, _, advantages, mask = batch()
    loss, metrics = dapo_loss(new, None, advantages, mask)
    (gradient,) = torch.autograd.grad(loss, new)
    want = torch.where(mask, -advantages[:, None], 0.0) / mask.sum()
    torch.testing.assert_close(gradient, want, rtol=1e-12, atol=0)
    assert metrics["actor/ppo_kl"] == 0
    assert metrics["actor/pg_clipfrac"] == 0


def test_advantages_may_be_per_token():
    new, old, advantages, mask = batch()
    whole = dapo_loss(new, old, advantages, mask)[0]
    per_token = dapo_loss(new, old, advantages[:, None].expand_as(new), mask)[0]
    assert whole == per_token


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_padding_holds_anything(mode, level, garbage):
    """The same bits as with zeros there, in the loss, in every metric and in the gradient, which is 0 there."""
    new, old, advantages, mask = batch()
    weights = torch.full_like(old, 0.7)
    arguments = {"loss_agg_mode": mode, "clip_ratio_c": 3.0, "ratio_level": level}

    def run(fill):
        leaf = torch.where(mask, new.detach(), fill).requires_grad_()
        tensors = [torch.where(mask, x, fill) for x in (old, advantages[:, None].expand_as(old), weights)]
        loss, metrics = dapo_loss(leaf, tensors[0], tensors[1], mask, rollout_is_weights=tensors[2], **arguments)
        return loss, torch.autograd.grad(loss, leaf)[0], metrics

    loss, gradient, metrics = run(garbage)
    clean_loss, clean_gradient, clean_metrics = run(0.0)
    assert torch.equal(loss, clean_loss)
    assert loss.isfinite()
    assert torch.equal(gradient, clean_gradient)
    assert (gradient[~mask] == 0).all()
    assert (gradient[mask] != 0).any()
    assert all(torch.equal(metrics[name], clean_metrics[name]) for name in metrics)


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_all_masked(mode):
    new, old, advantages, _ = batch()
    new = torch.full_like(new, float("nan")).requires_grad_()
    loss, metrics = dapo_loss(new, old, advantages, torch.zeros_like(old), loss_agg_mode=mode)
    assert loss == 0
    assert (torch.autograd.grad(loss, new)[0] == 0).all()
    assert all(value == 0 for value in metrics.values())
    assert dapo_loss(new, old, advantages, torch.zeros_like(old), num_items_in_batch=0)[0] == 0


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_batch(mode, level, shape):
    new = torch.zeros(shape, requires_grad=True)
    old, advantages = torch.zeros(shape), torch.ones(shape[0])
    loss, metrics = dapo_loss(new, old, advantages, torch.ones(shape), loss_agg_mode=mode, ratio_level=level)
    assert loss == 0
    assert torch.autograd.grad(loss, new)[0].shape == shape
    assert all(value == 0 for value in metrics.values())
    assert agg_loss(old, torch.ones(shape), mode) == 0
    assert kl_penalty(new, old, torch.ones(shape)).shape == shape


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_gradient_accumulation_is_exact(mode, parts, as_tensor):
    """Micro-batches of unequal token counts, one of them fully masked, give the batch's loss and gradient."""
    new, old, advantages, mask = batch(rows=8, tokens=11, seed=3)
    mask = mask.clone()
    mask[2:4] = False
    items = mask.sum() if mode == "token-mean" else mask.any(-1).sum()
    items = items if as_tensor else items.item()
    whole = dapo_loss(new, old, advantages, mask, loss_agg_mode=mode)[0]
    (want,) = torch.autograd.grad(whole, new)

    leaf = new.detach().clone().requires_grad_()
    total = 0.0
    for rows in torch.arange(8).tensor_split(parts):
        loss, _ = dapo_loss(
            leaf[rows], old[rows], advantages[rows], mask[rows], loss_agg_mode=mode, num_items_in_batch=items
        )
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close(leaf.grad, want, rtol=1e-12, atol=1e-15)
    if parts == 4 and mode == "token-mean":  # what it is for: without the global count the mean is another one
        naive = sum(
            dapo_loss(leaf[r], old[r], advantages[r], mask[r])[0].item() / 4 for r in torch.arange(8).tensor_split(4)
        )
        assert naive != pytest.approx(whole.item(), rel=1e-3)


def test_data_parallel_split_is_exact():
    """Ranks that average gradients pass items / world_size; an odd split leaves a fraction below one."""
    new, old, advantages, mask = batch(rows=3, tokens=1)
    whole = dapo_loss(new, old, advantages, mask)[0]
    ranks = [
        dapo_loss(new[r], old[r], advantages[r], mask[r], num_items_in_batch=3 / 4)[0] for r in ([0], [1], [2], [])
    ]
    assert sum(rank.item() for rank in ranks) / 4 == pytest.approx(whole.item(), rel=1e-12)


def test_far_off_policy_is_finite():
    new = torch.tensor([[-1.0, -400.0, -1.0]], requires_grad=True)
    old = torch.tensor([[-400.0, -1.0, -2.0]])
    loss, _ = dapo_loss(new, old, torch.tensor([-1.0]), torch.ones(1, 3))
    (gradient,) = torch.autograd.grad(loss, new)
    assert loss.item() == pytest.approx((math.exp(20) + 0.8 + math.e) / 3, rel=1e-5)
    assert gradient[0, 0] == 0
    assert gradient[0, 1] == 0
    assert gradient[0, 2] > 0


def test_without_clamp_no_ratio_overflows():
    new = torch.tensor([[-1.0, -1.0, -60.0]], requires_grad=True)
    old = torch.tensor([[-400.0, -400.0, -1.0]])
    for advantages in ([[-2.0, 0.0, -1.0]], [[2.0, 0.0, 0.0]]):
        for c in (None, 3.0):
            loss, _ = dapo_loss(
                new, old, torch.tensor(advantages), torch.ones(1, 3), clip_ratio_c=c, max_log_ratio=math.inf
            )
            assert loss.isfinite()
            assert torch.autograd.grad(loss, new)[0].isfinite().all()
    at_50 = dapo_loss(torch.zeros(1, 1), torch.full((1, 1), -50.0), -torch.ones(1), torch.ones(1, 1))
    assert at_50[0].item() == pytest.approx(math.exp(20), rel=1e-5)
    beyond = dapo_loss(
        torch.zeros(1, 1), torch.full((1, 1), -50.0), -torch.ones(1), torch.ones(1, 1), max_log_ratio=math.inf
    )
    assert beyond[0].item() == pytest.approx(math.exp(50), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_computed_in_fp32(dtype):
    new, old, advantages, mask = batch(dtype=dtype)
    loss, metrics = dapo_loss(new, old, advantages, mask)
    (gradient,) = torch.autograd.grad(loss, new)
    same = new.detach().float().requires_grad_()
    want, _ = dapo_loss(same, old.float(), advantages.float(), mask)
    assert loss.dtype == torch.float32
    assert gradient.dtype == dtype
    assert torch.equal(loss, want)
    assert torch.equal(gradient, torch.autograd.grad(want, same)[0].to(dtype))
    assert all(value.dtype == torch.float32 for value in metrics.values())


def test_weights_get_no_gradient_and_scale_tokens():
    new, old, advantages, mask = batch()
    weights = torch.full_like(old, 0.5).requires_grad_()
    loss, _ = dapo_loss(new, old, advantages, mask, rollout_is_weights=weights)
    assert torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)[0] is None
    assert loss.item() == pytest.approx(0.5 * dapo_loss(new, old, advantages, mask)[0].item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.bfloat16])
def test_mask_of_any_dtype(dtype):
    new, old, advantages, mask = batch()
    assert dapo_loss(new, old, advantages, mask.to(dtype))[0] == dapo_loss(new, old, advantages, mask)[0]


@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_agg_loss_by_hand(mode):
    losses = torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    want = {
        "token-mean": 7 / 3,
        "seq-mean-token-mean": (1.5 + 4) / 2,
        "seq-mean-token-sum": 7 / 2,
        "seq-mean-token-sum-norm": 7 / 2 / 3,
    }[mode]
    assert agg_loss(losses, mask, mode).item() == pytest.approx(want)
    assert agg_loss(losses, mask, mode, num_items_in_batch=10).item() == pytest.approx(
        want * {"token-mean": 3}.get(mode, 2) / 10
    )


def test_loss_scale_factor():
    losses, mask = torch.ones(2, 3), torch.ones(2, 3)
    assert agg_loss(losses, mask, "seq-mean-token-sum-norm", loss_scale_factor=30).item() == pytest.approx(0.1)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs"])
def test_kl_penalty(kind):
    new, ref, _, mask = batch()
    got = kl_penalty(new, ref, kind=kind)
    d = new - ref
    want = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d, "abs": d.abs()}[kind]
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)

    dirty = torch.where(mask, new.detach(), float("-inf")).requires_grad_()
    value = agg_loss(kl_penalty(dirty, torch.where(mask, ref, float("-inf")), mask, kind=kind), mask)
    (gradient,) = torch.autograd.grad(value, dirty)
    assert value.item() == pytest.approx(want[mask].mean().item(), rel=1e-9)
    assert (gradient[~mask] == 0).all()
    assert gradient.isfinite().all()


def test_k3_clamp_is_an_option():
    new, ref = torch.tensor([[-40.0]]), torch.tensor([[-1.0]])
    assert kl_penalty(new, ref) == 10
    assert kl_penalty(new, ref, clamped=False).item() == pytest.approx(math.exp(39) - 40, rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"old_log_prob": torch.zeros(2, 4)}, r"old_log_prob has shape \(2, 4\) but log_prob has shape \(2, 3\)"),
        ({"response_mask": torch.ones(2)}, r"response_mask has shape \(2,\) but log_prob has shape \(2, 3\)"),
        ({"advantages": torch.ones(3)}, r"advantages has shape \(3,\) but log_prob has shape \(2, 3\)"),
        ({"advantages": torch.tensor(1.0)}, r"advantages has shape \(\) but log_prob"),
        ({"rollout_is_weights": torch.ones(2, 2)}, r"rollout_is_weights has shape \(2, 2\) but log_prob"),
        ({"log_prob": torch.zeros(6)}, r"log_prob must have shape \(batch, tokens\), got \(6,\)"),
        ({"loss_agg_mode": "token-men"}, "loss_agg_mode is 'token-men'; it must be one of .*Did you mean 'token-mean'"),
        ({"ratio_level": "seq"}, "ratio_level is 'seq'; it must be one of 'token', 'sequence'"),
        ({"clip_ratio_low": -0.1}, "clip_ratio_low must be between 0 and 1, got -0.1"),
        ({"clip_ratio_high": -1.0}, "clip_ratio_high must be at least 0, got -1.0"),
        ({"clip_ratio_c": 1.0}, "clip_ratio_c must be greater than 1, or None for no dual clip, got 1.0"),
        ({"num_items_in_batch": -3}, "num_items_in_batch must be at least 0, got -3"),
        # The mask itself in place of its sum would divide every token by 1.
        ({"num_items_in_batch": torch.ones(2, 3)}, r"num_items_in_batch must be one number, got shape \(2, 3\)"),
        ({"max_log_ratio": 0.0}, "max_log_ratio must be positive"),
        (
            {"loss_agg_mode": "seq-mean-token-sum-norm", "loss_scale_factor": 0},
            "loss_scale_factor must be positive, got 0",
        ),
    ],
)
def test_bad_input(change, message):
    good = {
        "log_prob": torch.zeros(2, 3),
        "old_log_prob": torch.zeros(2, 3),
        "advantages": torch.ones(2),
        "response_mask": torch.ones(2, 3),
    }
    dapo_loss(**good)
    with pytest.raises(ValueError, match=message):
        dapo_loss(**{**good, **change})


class NoDoubles(TorchDispatchMode):
    """Some devices have no fp64: an operation that gives such a tensor fails."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x.dtype for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)]
        if torch.float64 in made:
            raise RuntimeError(f"{func} makes an fp64 tensor")
        return out


def test_fp32_input_needs_no_fp64():
    new, old, advantages, mask = (x.detach() for x in batch(dtype=torch.float32))
    with pytest.raises(RuntimeError, match="makes an fp64 tensor"), NoDoubles():
        new.double()
    with NoDoubles():
        for mode in LOSS_AGG_MODES:
            leaf = new.clone().requires_grad_()
            loss, _ = dapo_loss(leaf, old, advantages, mask, loss_agg_mode=mode, num_items_in_batch=3, clip_ratio_c=3.0)
            (loss + agg_loss(kl_penalty(leaf, old, mask), mask, mode)).backward()


def test_compiles_without_a_graph_break():
    new, old, advantages, mask = (x.detach() for x in batch())
    results = []
    for function in (dapo_loss, torch.compile(dapo_loss, fullgraph=True, backend="aot_eager")):
        leaf = new.clone().requires_grad_()
        loss, metrics = function(leaf, old, advantages, mask, clip_ratio_c=3.0)
        results.append((loss, metrics, torch.autograd.grad(loss, leaf)[0]))
    torch.testing.assert_close(*results, rtol=1e-12, atol=0)


def test_integer_log_probs_are_refused():
    with pytest.raises(TypeError, match=r"log_prob must be a floating-point tensor, got torch\.int64"):
        dapo_loss(torch.zeros(2, 3, dtype=torch.long), None, torch.ones(2), torch.ones(2, 3))
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(TypeError, match=r"old_log_prob must be a floating-point tensor, got torch\.int64"):
        dapo_loss(torch.zeros(2, 3), ids, torch.ones(2), torch.ones(2, 3))
    with pytest.raises(TypeError, match=r"ref_log_prob must be a floating-point tensor, got torch\.int64"):
        kl_penalty(torch.zeros(2, 3), ids)


@pytest.mark.parametrize("mode", LOSS_AGG_MODES[:3])
def test_a_scale_is_not_ignored(mode):
    message = f"loss_scale_factor=30 has no place in loss_agg_mode='{mode}'; only 'seq-mean-token-sum-norm' takes it"
    with pytest.raises(ValueError, match=message):
        agg_loss(torch.zeros(2, 3), torch.ones(2, 3), mode, loss_scale_factor=30)
