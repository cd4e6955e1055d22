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


def test_empty_and_gradient():
    assert group_advantages(torch.zeros(0), 4).shape == (0,)
    assert informative_groups(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)
    rewards = torch.tensor([0.0, 1.0], requires_grad=True)
    assert not group_advantages(rewards, 2).requires_grad
    assert group_advantages(rewards.bfloat16(), 2).dtype == torch.float32
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
    ],
)
def test_bad_input(function, rewards, groups, error, message):
    with pytest.raises(error, match=message):
        function(rewards, groups)


def test_bad_options():
    with pytest.raises(ValueError, match="norm_by_std must be True, False or 'batch', got 'group'"):
        group_advantages(torch.zeros(2), 2, norm_by_std="group")
    with pytest.raises(ValueError, match="singleton must be 'zero' or 'reward', got 'one'"):
        group_advantages(torch.zeros(2), 2, singleton="one")
