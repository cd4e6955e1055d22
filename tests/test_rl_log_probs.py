import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qnoise.rl import token_log_probs, token_softmax
from tiny_models import tiny_model


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


def half_ulp(x):
    """Half the distance from an fp32 number to the next one away from zero."""
    x = x.float()
    return ((x.nextafter(x.sign() * torch.inf) - x).abs() / 2).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp32_inside(dtype):
    """16-bit logits give the log-probabilities of those logits to fp32 precision, not to 16-bit precision."""
    logits, ids = example(dtype, rows=(64,), vocab=4000)
    logits = logits.requires_grad_()
    log_prob, entropy = token_log_probs(logits, ids)
    want_log_prob, want_entropy = naive(logits.detach(), ids)
    assert log_prob.dtype == entropy.dtype == torch.float32
    assert ((log_prob.double() - want_log_prob).abs() <= 5e-7 + half_ulp(want_log_prob)).all()
    assert ((entropy.double() - want_entropy).abs() <= 1e-6 + half_ulp(want_entropy)).all()
    rounded = torch.log_softmax(logits.detach(), -1).gather(-1, ids[:, None])[:, 0]
    if dtype != torch.float32:
        assert (rounded.double() - want_log_prob).abs().max() > 1e-3
    (gradient,) = torch.autograd.grad(log_prob.sum() + entropy.sum(), logits)
    assert gradient.dtype == dtype


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.3])
@pytest.mark.parametrize("vocab", [1000, 151_936])
@pytest.mark.parametrize("offset", [0.0, -3000.0])
def test_accuracy(temperature, vocab, offset):
    """1e-6 down to −16, whatever the vocabulary, the size of the logits and the temperature; softmax in fp32 is not."""
    plain = []
    for scale in (0.01, 1.0, 4.0):
        generator = torch.Generator().manual_seed(0)
        logits = scale * torch.randn(8, vocab, generator=generator) + offset
        ids = torch.randint(vocab, (8,), generator=generator)
        ids[:4] = logits[:4].argmax(-1)
        want, want_entropy = naive(logits, ids, temperature)
        log_prob, entropy = token_log_probs(logits, ids, temperature)
        error = (log_prob.double() - want).abs()
        assert (error <= 5e-7 + half_ulp(want)).all()
        assert (error[want > -16] <= 1e-6).all()
        assert ((entropy.double() - want_entropy).abs() <= 1e-6 + half_ulp(want_entropy)).all()
        fp32 = torch.log_softmax(logits / temperature, -1).gather(-1, ids[:, None])[:, 0]
        plain.append((fp32.double() - want).abs().max())
    if vocab > 1000:
        assert max(plain) > 2e-6


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
    big = token_log_probs(leaf.float(), ids)[1].sum() * 1e6
    assert torch.autograd.grad(big, leaf)[0].isfinite().all()
    assert (token_log_probs(logits.float(), torch.full_like(ids, 3))[0] == -torch.inf).all()
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
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("use", ["log_prob", "entropy", "both"])
def test_from_hidden_states(chunk_rows, head_class, trained, use):
    torch.manual_seed(0)
    head = head_class(8, 17).double().requires_grad_(trained)
    _, ids = example()
    hidden = torch.randn(3, 5, 8, dtype=torch.float64)
    weight = torch.linspace(-1, 2, ids.numel(), dtype=torch.float64).view(ids.shape)

    def run(module, function):
        leaf = hidden.clone().requires_grad_()
        log_prob, entropy = function(leaf, module)
        parts = {"log_prob": (weight * log_prob).sum(), "entropy": 0.3 * entropy.square().sum()}
        (parts[use] if use in parts else sum(parts.values())).backward()
        return log_prob, entropy, leaf.grad, *((module.weight.grad, module.bias.grad) if trained else ())

    got = run(copy.deepcopy(head), lambda h, m: token_log_probs(h, ids, 0.7, lm_head=m, chunk_rows=chunk_rows))
    want = run(copy.deepcopy(head), lambda h, m: naive(m(h), ids, 0.7))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def counted(head):
    """The head, and the number of rows of each of its calls."""
    sizes = []
    head.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    return head, sizes


class Softcapped(nn.Module):
    """A head and what Gemma 2 does behind it."""

    def __init__(self, head, cap):
        super().__init__()
        self.head, self.cap = head, cap

    def forward(self, hidden):
        return self.cap * torch.tanh(self.head(hidden) / self.cap)


@pytest.mark.parametrize("frozen", [True, False])
def test_what_a_model_does_behind_its_head(frozen):
    """Hidden states and the head alone are another policy; with a module that does both they are the model's."""
    model = tiny_model("gemma2", final_logit_softcapping=0.1)
    ids = torch.randint(3, 99, (2, 7))
    hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state.detach().requires_grad_()
    head = Softcapped(model.get_output_embeddings(), 0.1).requires_grad_(not frozen)
    want = token_log_probs(model(ids, use_cache=False).logits, ids)[0]
    got = token_log_probs(hidden, ids, lm_head=head, chunk_rows=4)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert (token_log_probs(hidden, ids, lm_head=head.head)[0] - want).abs().max() > 1e-3
    expected = naive(head(hidden), ids)[0]
    for a, b in zip(*(torch.autograd.grad(x.sum(), hidden) for x in (got, expected)), strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-5)


def test_trained_head_is_recomputed_in_chunks():
    """No call of the head sees more than chunk_rows rows, and the backward calls it again."""
    head, sizes = counted(nn.Linear(8, 17))
    hidden, ids = torch.randn(10, 8, requires_grad=True), torch.zeros(10, dtype=torch.long)
    log_prob, _ = token_log_probs(hidden, ids, lm_head=head, chunk_rows=4)
    assert sizes == [4, 4, 2]
    log_prob.sum().backward()
    assert sorted(sizes[3:]) == [2, 4, 4]
    with torch.no_grad():
        assert torch.equal(token_log_probs(hidden, ids, lm_head=head, chunk_rows=4)[0], log_prob)
    assert len(sizes) == 9


def test_frozen_head_is_called_once():
    """Its gradient is formed in the forward; a gradient through the entropy alone needs it again."""
    head, sizes = counted(nn.Linear(8, 17).requires_grad_(False))
    hidden, ids = torch.randn(10, 8, requires_grad=True), torch.zeros(10, dtype=torch.long)
    log_prob, entropy = token_log_probs(hidden, ids, lm_head=head, chunk_rows=4)
    first = torch.autograd.grad(log_prob.sum(), hidden, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(log_prob.sum(), hidden, retain_graph=True)[0], first)
    assert sizes == [4, 4, 2]
    entropy.sum().backward()
    assert sizes == [4, 4, 2, 4, 4, 2]
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


class Times(nn.Module):
    """A head whose weight is a tensor that no ``parameters()`` lists."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return x @ self.weight.T


def test_a_tensor_that_is_no_parameter_gets_its_gradient():
    weight = torch.randn(17, 8, requires_grad=True)
    hidden, ids = torch.randn(6, 8, requires_grad=True), torch.arange(6)
    got = token_log_probs(hidden, ids, lm_head=Times(weight * 2), chunk_rows=4)[0]
    want = naive(hidden @ weight.T * 2, ids)[0]
    for a, b in zip(*(torch.autograd.grad(x.sum(), (hidden, weight)) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_dropout_in_the_head(frozen):
    """What the forward dropped is what the gradients are of, that of the entropy too."""
    head = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 17)).requires_grad_(not frozen).double()
    hidden, ids = torch.randn(6, 8, dtype=torch.float64, requires_grad=True), torch.arange(6)
    gradients = []
    for function in (lambda h: token_log_probs(h, ids, lm_head=head), lambda h: naive(head(h), ids)):
        torch.manual_seed(3)
        log_prob, entropy = function(hidden)
        torch.manual_seed(4)
        gradients.append(torch.autograd.grad(log_prob.sum() + entropy.sum(), hidden)[0])
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("frozen", [True, False])
def test_autocast(frozen):
    """The head computes in bf16 both times, the softmax in fp32."""
    head, dtypes = nn.Linear(8, 17).requires_grad_(not frozen), []
    head.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    hidden, ids = torch.randn(6, 8, requires_grad=True), torch.arange(6)
    with torch.autocast("cpu", torch.bfloat16):
        log_prob, entropy = token_log_probs(hidden, ids, lm_head=head)
        want = naive(head(hidden), ids)
    torch.testing.assert_close(log_prob, want[0].float(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy, want[1].float(), rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(log_prob.sum() + entropy.sum(), hidden)
    assert gradient.dtype == torch.float32
    assert gradient.isfinite().all()
    assert dtypes == [torch.bfloat16] * 3


def test_fp32_input_needs_no_fp64():
    """Some devices have none."""

    class NoDoubles(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            made = out if isinstance(out, (tuple, list)) else [out]
            assert not any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in made), func
            return out

    logits, ids = example(torch.float32)
    hidden = torch.randn(3, 5, 8, requires_grad=True)
    with NoDoubles():
        sum(token_log_probs(logits.clone().requires_grad_(), ids, 0.7)).sum().backward()
        for frozen in (True, False):
            head = nn.Linear(8, 17).requires_grad_(not frozen)
            sum(token_log_probs(hidden, ids, 0.7, lm_head=head)).sum().backward()


@pytest.mark.parametrize("lm_head", [None, nn.Linear(4, 6), nn.Linear(4, 6).requires_grad_(False)])
def test_no_rows(lm_head):
    hidden = torch.zeros(0, 3, 4, requires_grad=True)
    log_prob, entropy = token_log_probs(hidden, torch.zeros(0, 3, dtype=torch.long), lm_head=lm_head)
    assert log_prob.shape == entropy.shape == (0, 3)
    assert torch.autograd.grad(log_prob.sum() + entropy.sum(), hidden)[0].shape == (0, 3, 4)


def test_bad_input():
    logits, ids = example()
    with pytest.raises(ValueError, match=r"ids has shape \(3, 4\) but logits has shape \(3, 5, 17\)"):
        token_log_probs(logits, ids[:, 1:])
    with pytest.raises(ValueError, match=r"ids has shape \(3, 4\) but hidden has shape \(3, 5, 17\)"):
        token_log_probs(logits, ids[:, 1:], lm_head=nn.Linear(17, 5))
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature must be positive"):
            token_log_probs(logits, ids, temperature)
    with pytest.raises(ValueError, match="temperature must be positive and finite, got inf"):
        token_log_probs(logits, ids, float("inf"))
    for head in (None, nn.Linear(17, 17).double(), nn.Linear(17, 17).double().requires_grad_(False)):
        for wrong in (-100, 17):
            with pytest.raises(ValueError, match=f"ids must be 0 to 16, got {wrong}; where the mask is 0 any valid id"):
                token_log_probs(logits.requires_grad_(), ids.where(ids != 2, wrong), lm_head=head)
    logits = logits.detach()
    with pytest.raises(ValueError, match="chunk_rows must be at least 1, got 0"):
        token_log_probs(logits, ids, chunk_rows=0)
    with pytest.raises(TypeError, match=r"logits must be floating point, got torch\.int64"):
        token_log_probs(ids[..., None], ids)
    with pytest.raises(TypeError, match=r"ids must be integers, got torch\.float64"):
        token_log_probs(logits, ids.double())
    with pytest.raises(TypeError, match=r"lm_head must be the head as a module \(model.get_output_.*, got Parameter"):
        token_log_probs(logits, ids, lm_head=nn.Linear(17, 17).weight)


class StandInKernels:
    """What the GPU kernels are called with, computed by the path that runs here."""

    def __init__(self):
        self.calls = []

    def log_prob_forward(self, logits, ids, temperature):
        self.calls.append("forward")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(token_softmax, "_kernels", lambda logits: None)
            return token_softmax.statistics(logits, ids, temperature)

    def log_prob_backward(self, logits, ids, temperature, stats, grads, out):
        self.calls.append("backward")
        assert out.is_contiguous()
        assert (out.shape, out.dtype) == (logits.shape, logits.dtype)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(token_softmax, "_kernels", lambda logits: None)
            token_softmax.write_logit_gradient(out.fill_(torch.nan), logits, ids, temperature, stats, grads)


@pytest.mark.parametrize("frozen", [True, False, None], ids=["frozen head", "trained head", "logits"])
def test_kernels_do_the_rows_where_they_serve(monkeypatch, frozen):
    """A GPU's kernels are given what they ask for, and what they give reaches values and gradients."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (3, 7), generator=generator)
    x = torch.randn(3, 7, 50 if frozen is None else 8, generator=generator)
    head = None if frozen is None else nn.Linear(8, 50).requires_grad_(not frozen)

    def run():
        leaf = x.clone().requires_grad_()
        log_prob, entropy = token_log_probs(leaf, ids, 0.7, lm_head=head, chunk_rows=4)
        wanted = [leaf, *(p for p in (head.parameters() if head else ()) if p.requires_grad)]
        gradient = torch.autograd.grad((log_prob * 2 + entropy).sum(), wanted, retain_graph=True)
        return [log_prob, entropy, *gradient, *torch.autograd.grad(log_prob.sum(), wanted)]

    want, kernels = run(), StandInKernels()
    monkeypatch.setattr(token_softmax, "_kernels", lambda logits: kernels)
    for got, expected in zip(run(), want, strict=True):
        torch.testing.assert_close(got, expected)
    assert {"forward", "backward"} <= set(kernels.calls)


def test_no_kernels_on_a_cpu():
    assert token_softmax._kernels(torch.zeros(2, 3)) is None
