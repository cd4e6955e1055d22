import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qnoise.rl import group_advantages, informative_groups


def by_hand(rewards, ids, epsilon=1e-6):
    result = []
    for reward, group in zip(rewards, ids, strict=True):
        mates = torch.tensor([r for r, g in zip(rewards, ids, strict=True) if g == group], dtype=torch.float64)
        spread = mates.std().item() if len(mates) > 1 else 0.0
        result.append(0.0 if mates.max() == mates.min() else (reward - mates.mean().item()) / (spread + epsilon))
    return torch.tensor(result)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), st.sampled_from([7, 3, -2])), min_size=1, max_size=20)
)
def test_any_ids_in_any_order(samples):
    rewards, ids = zip(*samples, strict=True)
    got = group_advantages(torch.tensor(rewards), torch.tensor(ids))
    torch.testing.assert_close(got, by_hand(rewards, ids), rtol=1e-5, atol=1e-6)


def test_consecutive_groups_are_ids():
    rewards = torch.randn(24, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(24) // 8
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    want = group_advantages(rewards, 8)
    assert torch.equal(group_advantages(rewards, ids), want)
    torch.testing.assert_close(group_advantages(rewards[order], ids[order]), want[order], rtol=1e-5, atol=1e-6)


def test_binary_group():
    """1 of 8 right: (1 − 1/8) / sqrt(1/8) with the unbiased deviation."""
    got = group_advantages(torch.tensor([1.0] + [0.0] * 7), 8)
    assert got[0].item() == pytest.approx(2.47487, abs=1e-5)
    assert got.sum().item() == pytest.approx(0, abs=1e-5)
    assert group_advantages(torch.tensor([1.0] + [0.0] * 7), 8, epsilon=1e-4)[0].item() == pytest.approx(
        2.47417, abs=1e-5
    )


@pytest.mark.parametrize("value", [0.7, 0.1, 1 / 3, -1e-20, 1e20])
@pytest.mark.parametrize("norm", [True, False, "batch"])
def test_equal_rewards_have_advantage_exactly_zero(value, norm):
    rewards = torch.cat([torch.full((8,), value), torch.tensor([1.0, 0.0])])
    got = group_advantages(rewards, torch.tensor([0] * 8 + [1] * 2), norm)
    assert (got[:8] == 0).all()
    assert (got[8:] != 0).all()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(2, 70), min_size=1, max_size=5),
    st.integers(0, 10_000),
    st.sampled_from([-3, 0, 3]),
    st.sampled_from([True, False]),
    st.sampled_from([1e-6, 1e-4]),
)
def test_rounding_of_equal_rewards(sizes, seed, exponent, norm, epsilon):
    """What torch.mean and torch.std leave of each group of equal rewards, whatever its size, in any order."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(sizes), generator=generator) * 10.0**exponent
    ids = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    order = torch.randperm(len(ids), generator=generator)
    rewards, ids = values[ids[order]], ids[order]
    want = torch.empty_like(rewards)
    for group in range(len(sizes)):
        mates = rewards[ids == group]
        want[ids == group] = (mates - mates.mean()) / (mates.std() + epsilon if norm else 1.0)
    got = group_advantages(rewards, ids, norm, epsilon, constant="rounding")
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert (group_advantages(rewards, ids, norm, epsilon) == 0).all()


def test_rounding_is_there_to_be_seen():
    rewards = torch.full((8,), 0.7)
    assert group_advantages(rewards, 8, constant="rounding")[0].item() == pytest.approx(0.0560341, abs=1e-6)
    assert group_advantages(rewards, 8, epsilon=1e-4, constant="rounding")[0].item() == pytest.approx(
        5.957e-4, abs=1e-6
    )
    exact = torch.full((8,), 0.5)
    assert (group_advantages(exact, 8, constant="rounding") == 0).all()


def test_groups_of_any_size_are_the_groups_one_by_one():
    generator = torch.Generator().manual_seed(4)
    sizes = torch.tensor([3, 1, 5, 3, 2, 1, 8])
    ids = torch.arange(7).repeat_interleave(sizes)[torch.randperm(23, generator=generator)] * 10 - 30
    rewards = torch.randn(23, generator=generator)
    for norm in (True, False):
        got = group_advantages(rewards, ids, norm, singleton="reward")
        for group in ids.unique():
            mates = ids == group
            want = group_advantages(rewards[mates], int(mates.sum()), norm, singleton="reward")
            assert torch.equal(got[mates], want)


def test_norm_by_std():
    rewards = torch.tensor([1.0, 3.0, 10.0, 20.0])
    assert group_advantages(rewards, 2, norm_by_std=False).tolist() == [-1, 1, -5, 5]
    torch.testing.assert_close(
        group_advantages(rewards, 2, norm_by_std="batch"),
        torch.tensor([-1.0, 1, -5, 5]) / rewards.std(),
        rtol=1e-5,
        atol=0,
    )


def test_singletons():
    rewards, ids = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([0, 1, 1])
    assert group_advantages(rewards, ids)[0] == 0
    assert group_advantages(rewards, ids, singleton="reward")[0].item() == pytest.approx(2.0)


def test_informative_groups():
    rewards = torch.tensor([0.7, 0.7, 0.7, 1.0, 0.0, 0.0])
    ids = torch.tensor([5, 5, 5, 1, 1, 9])
    assert informative_groups(rewards, ids).tolist() == [False, False, False, True, True, False]
    assert informative_groups(rewards, 3).tolist() == [False] * 3 + [True] * 3
    assert not informative_groups(torch.zeros(4), 2).any()


@pytest.mark.parametrize("norm", [True, False, "batch"])
@pytest.mark.parametrize("groups", [4, torch.zeros(0, dtype=torch.long)])
def test_no_samples(norm, groups):
    for constant in ("zero", "rounding"):
        assert group_advantages(torch.zeros(0), groups, norm, constant=constant).shape == (0,)
    keep = informative_groups(torch.zeros(0), groups)
    assert keep.shape == (0,)
    assert keep.dtype == torch.bool


@pytest.mark.parametrize("norm", [True, False, "batch"])
def test_never_nan(norm):
    """One sample, one group, all alike, or all of them alone in their group: numbers, and 0 where nothing differs."""
    for rewards, groups in (([3.0], 1), ([3.0], torch.tensor([5])), ([0.7] * 6, 6), ([1.0, 2.0, 3.0], 1)):
        for constant in ("zero", "rounding"):
            got = group_advantages(torch.tensor(rewards), groups, norm, constant=constant)
            assert got.isfinite().all()
            assert (got.abs() < 0.1).all()
        assert not informative_groups(torch.tensor(rewards), groups).any()


def test_gradient_and_dtype():
    rewards = torch.tensor([0.0, 1.0], requires_grad=True)
    assert not group_advantages(rewards, 2).requires_grad
    assert group_advantages(rewards.bfloat16(), 2).dtype == torch.float32
    assert group_advantages(torch.tensor([0, 1]), 2).dtype == torch.float32
    assert group_advantages(rewards.double(), 2).dtype == torch.float64


@pytest.mark.parametrize("function", [group_advantages, informative_groups])
@pytest.mark.parametrize(
    ("rewards", "groups", "error", "message"),
    [
        (torch.zeros(10), 4, ValueError, "10 rewards cannot be cut into consecutive groups of 4; pass group ids"),
        (torch.zeros(4), 0, ValueError, "groups of 0"),
        (
            torch.zeros(4),
            torch.zeros(3, dtype=torch.long),
            ValueError,
            r"group ids have shape \(3,\) but rewards have shape \(4,\)",
        ),
        (torch.zeros(2, 2), 2, ValueError, r"rewards must have shape \(samples,\), got \(2, 2\)"),
        (torch.tensor([0.0, float("nan")]), 2, ValueError, "rewards must be finite; sample 1 has nan"),
        (torch.tensor([float("inf"), 0.0]), 2, ValueError, "sample 0 has inf"),
        (torch.zeros(4), torch.zeros(4), TypeError, r"group ids must be integers, got torch\.float32"),
        (torch.zeros(4), "2", TypeError, "groups must be a tensor of ids or a number of generations, got str"),
        (torch.zeros(4), True, TypeError, "got bool"),
        ([0.0, 1.0], 2, TypeError, r"rewards must be a tensor, got list; torch\.tensor\(rewards\) makes one"),
    ],
)
def test_bad_input(function, rewards, groups, error, message):
    with pytest.raises(error, match=message):
        function(rewards, groups)


def test_bad_options():
    with pytest.raises(ValueError, match="norm_by_std must be True, False or 'batch', got 'group'"):
        group_advantages(torch.zeros(2), 2, norm_by_std="group")
    for epsilon in (-1e-6, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"epsilon must be at least 0 and finite, got {epsilon}"):
            group_advantages(torch.zeros(2), 2, epsilon=epsilon)
    with pytest.raises(ValueError, match="constant='rounding' divides what is left by a deviation that may be 0"):
        group_advantages(torch.full((4,), 0.5), 4, epsilon=0.0, constant="rounding")
    with pytest.raises(ValueError, match="singleton.*'one'.*'zero', 'reward'"):
        group_advantages(torch.zeros(2), 2, singleton="one")
    with pytest.raises(ValueError, match="constant.*'noise'.*'zero', 'rounding'"):
        group_advantages(torch.zeros(2), 2, constant="noise")
