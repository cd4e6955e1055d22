"""torch.compile of patched models: one graph, the numbers of eager, and writes that are seen."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import qnoise
from tiny_models import tiny_model, with_lora


class Block(nn.Module):
    """Fused siblings, biases, a norm and a gate: what a decoder layer has, small."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(64, 32), nn.Linear(64, 32), nn.Linear(64, 32)
        self.o_proj = nn.Linear(32, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.o_proj(F.scaled_dot_product_attention(self.q_proj(h), self.k_proj(h), self.v_proj(h)))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(1))


def block(trained: bool = False, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return qnoise.patch_model(Block().requires_grad_(trained), **kwargs)


def compiled(model: nn.Module, backend: str = "aot_eager"):
    return torch.compile(model, backend=backend, fullgraph=True)


def outcome(function, model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradient of the input, gradients of the parameters."""
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    y.float().square().sum().backward()
    gradients = [leaf.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    model.zero_grad()
    return [y.detach(), *gradients]


def assert_equal(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


CASES = [("mxfp4", "auto", False), ("nvfp4", "auto", True), ("nvfp4", "cached", True), ("nvfp4", "packed", False)]


@pytest.mark.parametrize(("fmt", "storage", "trained"), CASES)
def test_same_numbers_as_eager(fmt, storage, trained, x) -> None:
    model = block(trained, fmt=fmt, act_fmt="mxfp8_e4m3" if trained else None, storage=storage, noise="rmsnorm")
    qnoise.NoiseScheduler(model, qnoise.schedules.Constant(0.1), 4).step()
    fast = compiled(model)
    assert_equal(outcome(fast, model, x), outcome(model, model, x))
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))


@pytest.mark.parametrize("storage", ["cached", "packed"])
def test_under_autocast(storage, x) -> None:
    model = block(storage=storage)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(outcome(compiled(model), model, x), outcome(model, model, x))


def _in_place(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(1.7)


def _through_data(weight: nn.Parameter) -> None:
    weight.data.mul_(1.7)


def _new_data(weight: nn.Parameter) -> None:
    weight.data = weight.data * 1.7


@pytest.mark.parametrize("write", [_in_place, _through_data, _new_data])
@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_kept_weights_are_served_and_writes_are_seen(fmt, write, x, monkeypatch) -> None:
    """A compiled frozen model quantizes each weight once, and again, siblings included, when it changes."""
    calls = []
    real = qnoise.nn.effective.fake_quantize
    monkeypatch.setattr("qnoise.nn.effective.fake_quantize", lambda *a, **k: calls.append(1) or real(*a, **k))
    model = block(fmt=fmt)
    fast = compiled(model)
    outcome(fast, model, x)
    outcome(fast, model, x)
    assert len(calls) == 4
    write(model.k_proj.weight)
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = outcome(fast, model, x)
    assert len(calls) == 4 + (3 if fmt == "nvfp4" else 1)
    qnoise.refresh(model)
    assert_equal(got, outcome(model, model, x))


def test_a_weight_that_changes_before_the_backward_is_an_error(x) -> None:
    """As for nn.Linear: never the gradient of another weight."""
    model = block()
    y = compiled(model)(x.clone().requires_grad_())
    _in_place(model.v_proj._parameters["weight"])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("target", ["rmsnorm", "linear"])
def test_new_noise_needs_no_new_code(target, x) -> None:
    model = block(noise=qnoise.NoiseConfig(target, during="rollout"))
    scheduler = qnoise.NoiseScheduler(model, qnoise.schedules.Linear(0.1, 0.3), 20, seed=5)
    fast = compiled(model)

    def check() -> Tensor:
        with qnoise.phase(model, "rollout"):
            got = outcome(fast, model, x)
            assert_equal(got, outcome(model, model, x))
        return got[0]

    silent = outcome(fast, model, x)
    scheduler.step()
    seen = [check()]
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            scheduler.step()
            seen.append(check())
        assert_equal(outcome(fast, model, x), silent)
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))


class Counting:
    """A backend that counts the graphs it is given."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


@pytest.mark.parametrize(
    ("target", "checkpointing"), [("rmsnorm", True), pytest.param("linear", False, marks=pytest.mark.slow)]
)
def test_a_schedule_takes_one_recompilation(target, checkpointing, x) -> None:
    """From its silent first stage to its end, through all phases: one graph without noise and one with it."""
    from peft import LoraConfig, get_peft_model

    model = block(noise=target)
    if checkpointing:
        stock = model.forward
        model.forward = lambda x: checkpoint(stock, x, use_reentrant=False)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    scheduler = qnoise.NoiseScheduler(model, qnoise.schedules.StagedExponential(0.3, 0.1, 4), 4)
    counting = Counting()
    fast = torch.compile(model, backend=counting, fullgraph=True)
    sigmas = []
    for _ in range(4):
        sigmas.append(scheduler.step())
        for phase in ("rollout", "evaluation"):
            with qnoise.phase(model, phase):
                assert_equal(outcome(fast, model, x), outcome(model, model, x))
    assert sigmas[0] == 0.0
    assert len(set(sigmas)) == 4
    assert counting.graphs == 2


def test_matrices_inside_of_checkpointing(x) -> None:
    """A module that keeps its own forward, which reads its matrix from an attribute."""
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = qnoise.patch_model(nn.Sequential(Conv1D(96, 64)))
    fast = torch.compile(lambda x: checkpoint(model, x, use_reentrant=False), backend="aot_eager", fullgraph=True)
    assert_equal(outcome(fast, model, x), outcome(model, model, x))
    assert not torch.equal(fast(x), qnoise.unpatch_model(model)(x))


def test_the_backward_has_the_noise_of_its_forward(x) -> None:
    """Wherever it runs: the phase is over, or the next step has begun."""
    model = block(noise=qnoise.NoiseConfig("linear", during="rollout"))
    scheduler = qnoise.NoiseScheduler(model, qnoise.schedules.Constant(0.3), 20)
    gradients = []
    for function in (model, compiled(model)):
        scheduler.load_state_dict({**scheduler.state_dict(), "steps_taken": 1})
        leaf = x.clone().requires_grad_()
        with qnoise.phase(model, "rollout"):
            y = function(leaf)
        scheduler.step()
        y.square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_a_copy_has_noise_and_weights_of_its_own(x) -> None:
    model = block(noise="rmsnorm")
    scheduler = qnoise.NoiseScheduler(model, qnoise.schedules.Constant(0.1), 4)
    scheduler.step()
    twin = copy.deepcopy(model)
    fast, fast_twin = compiled(model), compiled(twin)
    expected = outcome(twin, twin, x)
    scheduler.step()
    _in_place(model.o_proj._parameters["weight"])
    assert_equal(outcome(fast_twin, twin, x), expected)
    assert_equal(outcome(fast, model, x), outcome(model, model, x))


def test_switching_quantization_off(x) -> None:
    model = block(act_fmt="mxfp8_e4m3")
    fast = compiled(model)
    quantized = outcome(fast, model, x)
    with qnoise.full_precision(model):
        stock = outcome(fast, model, x)
        assert_equal(stock, outcome(model, model, x))
    assert not torch.equal(stock[0], quantized[0])
    assert_equal(outcome(fast, model, x), quantized)


def test_a_trained_group_follows_its_weights(x) -> None:
    """The scale that siblings share comes from the weights of now, not of when they were patched."""
    model = block(trained=True, fmt="nvfp4")
    fast = compiled(model)
    outcome(fast, model, x)
    _in_place(model.q_proj._parameters["weight"])
    assert_equal(outcome(fast, model, x), outcome(model, model, x))


def test_operators() -> None:
    """Schema, fake implementation, autograd registration."""
    model = block(fmt="nvfp4", noise="rmsnorm")
    qnoise.NoiseScheduler(model, qnoise.schedules.Constant(0.1), 4).step()
    q, peers = model.q_proj, [m._parameters["weight"] for m in (model.q_proj, model.k_proj, model.v_proj)]
    handle = q._qnoise.handle
    ops = torch.ops.qnoise
    x, g = torch.randn(2, 3, 64, requires_grad=True), torch.randn(2, 3, 32)
    torch.library.opcheck(ops.kept_linear.default, (x, peers[0], q.bias, peers, handle))
    torch.library.opcheck(ops.kept_linear_backward.default, (g, peers[0], peers, handle))
    torch.library.opcheck(ops.noise.default, (model.norm.weight.detach(), model.norm._qnoise.handle))


def with_adapters(storage: str, backend: str, ids: Tensor) -> list[list[Tensor]]:
    """Loss and adapter gradients of a small language model, compiled and not."""
    model = qnoise.patch_model(with_lora(tiny_model(num_hidden_layers=1)), "nvfp4", noise="rmsnorm", storage=storage)
    qnoise.NoiseScheduler(model, qnoise.schedules.Constant(0.1), 4).step()
    results = []
    for function in (compiled(model, backend), model):
        loss = function(ids, labels=ids, use_cache=False).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
        model.zero_grad()
    return results


def test_a_language_model_with_adapters(ids) -> None:
    assert_equal(*with_adapters("auto", "aot_eager", ids))


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["auto", "dynamic", "packed"])
def test_inductor(storage, ids) -> None:
    """The compiler's own kernels: what is quantized is the same, sums may round differently."""
    for got, expected in zip(*with_adapters(storage, "inductor", ids), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
