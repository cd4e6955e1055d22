import copy

import pytest
import torch
from torch import nn

from qnoise.rl import token_log_probs


def naive(logits, ids, temperature=1.0):
    log_p = torch.log_softmax(logits.double() / temperature, -1)
    log_prob = log_p.gather(-1, ids[..., None])[..., 0]
    return log_prob, torch.special.entr(log_p.exp()).sum(-1)


def example(dtype=torch.float64, rows=(3, 5), vocab=17, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(*rows, vocab, generator=generator, dtype=torch.float64)
    return logits.to(dtype), torch.randint(vocab, rows, generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk_rows", [None, 1, 4])
@pytest.mark.parametrize("use", ["log_prob", "entropy", "both"])
def test_values_and_gradients_in_fp64(temperature, chunk_rows, use):
    logits, ids = example()

    def total(function, **kwargs):
        leaf = logits.clone().requires_grad_()
        log_prob, entropy = function(leaf, ids, temperature, **kwargs)
        weight = torch.linspace(-1, 2, ids.numel(), dtype=torch.float64).view(ids.shape)
        loss = (log_prob * weight).sum() * (use != "entropy") + (entropy * weight.flip(0)).sum() * (use != "log_prob")
        return log_prob, entropy, torch.autograd.grad(loss, leaf)[0]

    for got, want in zip(total(token_log_probs, chunk_rows=chunk_rows), total(naive), strict=True):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp32_inside(dtype):
    """16-bit logits give the log-probabilities of those logits to fp32 precision, not to 16-bit precision."""
    logits, ids = example(dtype, rows=(64,), vocab=4000)
    logits = logits.requires_grad_()
    log_prob, entropy = token_log_probs(logits, ids)
    want_log_prob, want_entropy = naive(logits.detach(), ids)
    assert log_prob.dtype == entropy.dtype == torch.float32
    # Log-probabilities here reach −18, where neighbouring fp32 numbers are 1.9e-6 apart.
    torch.testing.assert_close(log_prob.double(), want_log_prob, rtol=2**-23, atol=1e-6)
    torch.testing.assert_close(entropy.double(), want_entropy, rtol=2**-23, atol=1e-6)
    rounded = torch.log_softmax(logits.detach(), -1).gather(-1, ids[:, None])[:, 0]
    if dtype != torch.float32:
        assert (rounded.double() - want_log_prob).abs().max() > 1e-3
    (gradient,) = torch.autograd.grad(log_prob.sum() + entropy.sum(), logits)
    assert gradient.dtype == dtype


def test_accuracy_at_large_logits():
    logits, ids = example(torch.float32, rows=(32,), vocab=1000)
    shifted = logits + 5e4
    got = token_log_probs(shifted, ids)[0]
    torch.testing.assert_close(got.double(), naive(shifted, ids)[0], rtol=2**-23, atol=1e-6)


def test_impossible_tokens():
    """Logits of −inf: probability 0, no NaN in entropy or gradient; a chosen one has log-probability −inf."""
    logits, ids = example()
    logits[..., 3] = -torch.inf
    ids = torch.where(ids == 3, 4, ids)
    leaf = logits.clone().requires_grad_()
    log_prob, entropy = token_log_probs(leaf, ids)
    want, want_entropy = naive(logits, ids)
    torch.testing.assert_close(log_prob, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(entropy, want_entropy, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(log_prob.sum() + entropy.sum(), leaf)
    assert gradient.isfinite().all()
    assert (gradient[..., 3] == 0).all()
    assert (token_log_probs(logits, torch.full_like(ids, 3))[0] == -torch.inf).all()


def test_the_logits_are_left_alone():
    logits, ids = example(torch.float32)
    before = logits.clone()
    leaf = logits.requires_grad_()
    log_prob, entropy = token_log_probs(leaf, ids)
    (log_prob.sum() + entropy.sum()).backward()
    assert torch.equal(leaf.detach(), before)


class Scaled(nn.Linear):
    """A head whose forward is not its weight: what a fake-quantized or LoRA head is."""

    def forward(self, x):
        return 0.5 * super().forward(x)


@pytest.mark.parametrize("chunk_rows", [None, 1, 4])
@pytest.mark.parametrize("head_class", [nn.Linear, Scaled])
def test_from_hidden_states(chunk_rows, head_class):
    torch.manual_seed(0)
    head = head_class(8, 17).double()
    _, ids = example()
    hidden = torch.randn(3, 5, 8, dtype=torch.float64)

    def run(module, function):
        leaf = hidden.clone().requires_grad_()
        log_prob, entropy = function(leaf, module)
        (log_prob.sum() + 0.3 * entropy.square().sum()).backward()
        return log_prob, entropy, leaf.grad, module.weight.grad, module.bias.grad

    got = run(copy.deepcopy(head), lambda h, m: token_log_probs(h, ids, 0.7, lm_head=m, chunk_rows=chunk_rows))
    want = run(copy.deepcopy(head), lambda h, m: naive(m(h), ids, 0.7))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_head_is_recomputed_in_chunks():
    """No call of the head sees more than chunk_rows rows, and the backward calls it again."""
    head, sizes = nn.Linear(8, 17), []
    head.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    hidden, ids = torch.randn(10, 8, requires_grad=True), torch.zeros(10, dtype=torch.long)
    log_prob, _ = token_log_probs(hidden, ids, lm_head=head, chunk_rows=4)
    assert sizes == [4, 4, 2]
    log_prob.sum().backward()
    assert sorted(sizes[3:]) == [2, 4, 4]
    with torch.no_grad():
        assert torch.equal(token_log_probs(hidden, ids, lm_head=head, chunk_rows=4)[0], log_prob)
    assert len(sizes) == 9


def test_frozen_head_and_frozen_hidden():
    head = nn.Linear(8, 17).requires_grad_(False)
    hidden, ids = torch.randn(4, 8), torch.zeros(4, dtype=torch.long)
    assert not token_log_probs(hidden, ids, lm_head=head)[0].requires_grad
    head.requires_grad_(True)
    token_log_probs(hidden, ids, lm_head=head)[0].sum().backward()
    assert head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("lm_head", [None, nn.Linear(4, 6)])
def test_no_rows(lm_head):
    log_prob, entropy = token_log_probs(torch.zeros(0, 3, 4), torch.zeros(0, 3, dtype=torch.long), lm_head=lm_head)
    assert log_prob.shape == entropy.shape == (0, 3)


def test_bad_input():
    logits, ids = example()
    with pytest.raises(ValueError, match=r"ids has shape \(3, 4\) but logits has shape \(3, 5, 17\)"):
        token_log_probs(logits, ids[:, 1:])
    with pytest.raises(ValueError, match=r"ids has shape \(3, 4\) but hidden has shape \(3, 5, 17\)"):
        token_log_probs(logits, ids[:, 1:], lm_head=nn.Linear(17, 5))
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature must be positive"):
            token_log_probs(logits, ids, temperature)
    with pytest.raises(ValueError, match="chunk_rows must be at least 1, got 0"):
        token_log_probs(logits, ids, chunk_rows=0)
    with pytest.raises(TypeError, match=r"logits must be floating point, got torch\.int64"):
        token_log_probs(ids[..., None], ids)
    with pytest.raises(TypeError, match=r"ids must be integers, got torch\.float64"):
        token_log_probs(logits, ids.double())
