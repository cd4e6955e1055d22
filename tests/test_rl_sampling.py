import pytest
import torch

from qnoise.rl.sampling import behaviour_log_probs, draw, uniforms

LOGITS = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05], [0.05, 0.1, 0.2, 0.15, 0.5]]).log()


def test_temperature():
    got = behaviour_log_probs(LOGITS, 0.5, 1.0, 0).exp()
    torch.testing.assert_close(got, LOGITS.exp() ** 2 / (LOGITS.exp() ** 2).sum(-1, keepdim=True))


@pytest.mark.parametrize(
    ("top_p", "top_k", "kept"),
    [
        (1.0, 0, 5),
        (1.0, 5, 5),
        (1.0, 9, 5),
        (1.0, 2, 2),
        (0.69, 0, 2),
        (0.71, 0, 3),
        (1e-9, 0, 1),
        (0.99, 0, 5),
        (0.72, 2, 2),
    ],
)
def test_truncation(top_p, top_k, kept):
    """The most likely tokens stay, renormalized; the 0.69 and 0.71 stand on both sides of 0.5 + 0.2."""
    got = behaviour_log_probs(LOGITS, 1.0, top_p, top_k).exp()
    p = LOGITS.exp()
    least = p.sort(-1, descending=True).values[:, kept - 1 : kept]
    want = torch.where(p >= least - 1e-6, p, 0.0)
    torch.testing.assert_close(got, want / want.sum(-1, keepdim=True))


def test_top_k_before_top_p():
    """top-p looks at the distribution top-k leaves: 0.5/0.7 already reaches 0.71."""
    assert (behaviour_log_probs(LOGITS, 1.0, 0.71, 2).exp() > 0).sum(-1).tolist() == [1, 1]


def test_same_sets_as_transformers():
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = 2 * torch.randn(200, 40, generator=torch.Generator().manual_seed(0))
    scores = TopPLogitsWarper(0.8)(None, TopKLogitsWarper(12)(None, TemperatureLogitsWarper(0.7)(None, logits)))
    torch.testing.assert_close(behaviour_log_probs(logits, 0.7, 0.8, 12), torch.log_softmax(scores, -1))


def test_uniforms_belong_to_the_sample():
    table = uniforms(3, range(0, 6), 10)
    assert table.shape == (6, 10)
    assert table.min() >= 0
    assert table.max() < 1
    assert torch.equal(uniforms(3, range(4, 6), 7), table[4:6, :7])
    assert len(torch.unique(table)) == 60
    assert not torch.isin(uniforms(4, range(0, 6), 10), table).any()
    assert uniforms(2**64 - 1, range(1), 1).shape == (1, 1)


def test_draws_follow_the_distribution():
    """χ² of 20,000 draws from a truncated distribution; a token outside it never comes."""
    log_p = behaviour_log_probs(LOGITS[:1], 1.0, 0.9, 0).expand(20_000, -1)
    counts = torch.bincount(draw(log_p, uniforms(0, range(20_000), 1)[:, 0]), minlength=5).double()
    p = log_p[0].exp().double()
    assert (counts[p == 0] == 0).all()
    assert (p == 0).any()
    expected = 20_000 * p[p > 0]
    assert ((counts[p > 0] - expected) ** 2 / expected).sum() < 16.3  # 99.9 % with 3 degrees of freedom


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-53])
def test_draw_at_the_edges_stays_possible(u):
    log_p = torch.tensor([[-torch.inf, 0.7, -torch.inf, 0.3, -torch.inf]])
    log_p = torch.where(log_p.isinf(), log_p, log_p.log())
    token = draw(log_p, torch.tensor([u], dtype=torch.float64)).item()
    assert token == (1 if u < 0.7 else 3)
