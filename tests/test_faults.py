"""Injected faults: what they compute, where they act, and that they come off again."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qnoise
from patching import assert_same, logits, snapshot
from qnoise.faults import Bias, Deadzone, GaussianError, inject
from tiny_models import tiny_model, with_lora

IDS = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(0))


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def hooks_of(model: nn.Module) -> list[int]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs",
             "_forward_hooks_always_called")  # fmt: skip
    return [len(getattr(module, kind)) for module in model.modules() for kind in kinds]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_each_fault_computes(dtype) -> None:
    x = normal(50, 400, dtype=dtype)
    x[0, :3] = torch.tensor([0.0, 0.03, -0.03]).to(dtype)
    dead = Deadzone(0.01).apply(x)
    limit = 0.01 * x.abs().max().double()
    assert torch.equal(dead == 0, x.double().abs() < limit)
    assert torch.equal(dead[dead != 0], x[dead != 0])
    assert 0.01 < (dead == 0).double().mean() < 0.1
    biased = Bias(0.5).apply(x)
    assert torch.equal(biased, (x.double() + 0.5 * x.double().sign()).to(dtype))
    assert torch.equal(Bias(-0.25, relative=True).apply(x), (x.double() * 0.75).to(dtype))
    for relative in (True, False):
        wide = x.to(torch.promote_types(dtype, torch.float32))
        z = (GaussianError(0.1, relative).apply(wide, key=5) - wide) / 0.1 / (wide.abs() if relative else 1.0)
        z = z[x != 0].double()
        assert z.mean().abs() < 0.03
        assert (z.std() - 1).abs() < 0.02
        assert (z**4).mean().sub(3).abs() < 0.2
        assert GaussianError(0.1, relative).apply(x, key=5).dtype == dtype
    assert torch.equal(GaussianError(0.1).apply(x)[0, 0], x[0, 0])


def test_a_deadzone_knows_the_largest_finite_value_of_the_whole_tensor() -> None:
    x = torch.tensor([[0.5, 2.0], [100.0, float("inf")], [float("nan"), -0.9]])
    expected = torch.tensor([[0.0, 2.0], [100.0, float("inf")], [float("nan"), 0.0]])
    assert torch.equal(Deadzone(0.01).apply(x).nan_to_num(7.0), expected.nan_to_num(7.0))
    assert Deadzone(0.01).apply(torch.empty(0, 4)).shape == (0, 4)


def test_the_error_is_a_function_of_the_vector_and_the_key() -> None:
    x = normal(6, 32)
    x[4] = x[1]
    error = GaussianError(1.0, relative=False).apply(x, key=1) - x
    assert torch.equal(error[4], error[1])
    alone = GaussianError(1.0, relative=False).apply(x[2:3].clone(), key=1) - x[2:3]
    assert torch.equal(alone[0], error[2])
    others = [error[0], error[1], error[2], (GaussianError(1.0, relative=False).apply(x, key=2) - x)[0]]
    swapped = x[0].roll(1)
    others.append((GaussianError(1.0, relative=False).apply(swapped, key=1) - swapped).roll(-1))
    for i, a in enumerate(others):
        for b in others[:i]:
            assert torch.corrcoef(torch.stack([a, b]))[0, 1].abs() < 0.6


@pytest.mark.parametrize("at", ["input", "output", "weight"])
@pytest.mark.parametrize("patched", [False, True])
def test_a_fault_acts_where_it_is_and_comes_off(at, patched) -> None:
    model = tiny_model()
    if patched:
        qnoise.patch_model(model, "mxfp4")
    before, hooks, clean = snapshot(model), hooks_of(model), logits(model, IDS)
    seen = {}
    module = model.model.layers[1].mlp.down_proj
    with inject(model, Deadzone(0.2), "down_proj", layers=1, at=at) as injection:
        assert injection.names == ("model.layers.1.mlp.down_proj",)
        handle = module.register_forward_hook(lambda m, a, y: seen.update(x=a[0], y=y))
        faulty = logits(model, IDS)
        handle.remove()
        weight = module.effective_weight() if patched else module.weight
        if at == "weight":
            weight = Deadzone(0.2).apply(weight)
        y = F.linear(seen["x"], weight)
        if at == "output":
            y = Deadzone(0.2).apply(y)
        assert torch.equal(seen["y"], y)
        assert ((seen["x"] == 0).double().mean() > 0.1) == (at == "input")
        assert not torch.equal(faulty, clean)
    assert torch.equal(logits(model, IDS), clean)
    assert hooks_of(model) == hooks
    assert_same(before, snapshot(model))
    injection.remove()


def test_a_weight_fault_reaches_norms_noise_and_full_precision_and_lets_go_after_an_error() -> None:
    model = qnoise.patch_model(tiny_model(), "mxfp4", noise="rmsnorm")
    norm, linear = model.model.layers[0].input_layernorm, model.model.layers[0].mlp.up_proj
    x = normal(3, 64)
    qnoise.NoiseScheduler(model, qnoise.schedules.Constant(0.1), 10).step()
    plain = norm._qnoise.stock_class(64, eps=norm.variance_epsilon)
    with inject(model, Bias(0.5, relative=True), ("input_layernorm", "up_proj"), layers=0, at="weight"):
        plain.weight = nn.Parameter(norm.effective_weight() * 1.5)
        assert torch.allclose(norm(x), plain(x), atol=1e-6)
        with qnoise.quiet(model):
            plain.weight = nn.Parameter(norm.effective_weight() * 1.5)
            assert torch.allclose(norm(x), plain(x), atol=1e-6)
        with qnoise.full_precision(model):
            assert torch.equal(linear(x), F.linear(x, linear.weight * 1.5))
        with pytest.raises(RuntimeError):
            linear(normal(3, 5))
        assert "effective_weight" not in linear.__dict__
        assert torch.equal(linear.effective_weight(), qnoise.fake_quantize(linear.weight, "mxfp4"))


def test_in_a_peft_model_the_base_linear_errs_and_gradient_passes_straight_through() -> None:
    model = with_lora(qnoise.patch_model(tiny_model(), "mxfp4"))
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    x = normal(3, 64).requires_grad_()
    clean = layer(x)
    clean.sum().backward()
    gradient, x.grad = x.grad.clone(), None
    with inject(model, Deadzone(0.3), "*.up_proj") as injection:
        assert injection.names == ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")
        base = layer.base_layer(x)
        adapter = layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"]
        assert (base == 0).double().mean() > 0.1
        y = layer(x)
        assert torch.allclose(y, base + adapter, atol=1e-6)
        y.sum().backward()
    assert torch.allclose(x.grad, gradient, atol=1e-5)
    assert torch.equal(layer(x), clean)


def test_steps_seeds_names_and_recomputation() -> None:
    def error(**given) -> torch.Tensor:
        step = given.pop("step", 0)
        with inject(net, GaussianError(0.1, relative=False), "*", **given) as injection:
            injection.step = step
            return torch.cat([net[0](x) - clean[0], net[1](x) - clean[1]])

    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    net[1].load_state_dict(net[0].state_dict())
    x = normal(4, 32)
    clean = [net[0](x), net[1](x)]
    first = error()
    assert torch.equal(first, error())
    assert not torch.allclose(first[:4], first[4:])
    assert not torch.allclose(first, error(seed=1))
    assert not torch.allclose(first, error(step=1))
    from torch.utils.checkpoint import checkpoint

    x.requires_grad_()
    with inject(net, GaussianError(0.1), ("0", "1"), at="input"):
        net(x).square().sum().backward()
        plain, x.grad = x.grad.clone(), None
        checkpoint(net, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, plain)


def test_faults_know_the_phase_of_a_patched_model() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="nothing knows the phase"):
        inject(model, Deadzone(), during="rollout")
    qnoise.patch_model(model, "mxfp4")
    clean = logits(model, IDS)
    with inject(model, Deadzone(0.1), during="rollout"):
        assert torch.equal(logits(model, IDS), clean)
        with qnoise.phase(model, "rollout"):
            assert not torch.equal(logits(model, IDS), clean)
        qnoise.unpatch_model(model)
        with pytest.raises(ValueError, match="unpatched since"):
            logits(model, IDS)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"include": "down_porj"}, ValueError, "include names 'down_porj'.*Did you mean 'down_proj'"),
        ({"exclude": "nothing"}, ValueError, "exclude names 'nothing'"),
        ({"layers": 7}, ValueError, "layers names 7.*layers 0 to 1"),
        ({"include": "lm_head", "layers": 0}, ValueError, "together leave no module"),
        ({"at": "outptu"}, ValueError, "at is 'outptu'.*Did you mean 'output'"),
        ({"during": "rolout"}, ValueError, "phase in during is 'rolout'"),
        ({"at": "weight"}, ValueError, "model.layers.0: .* has no weight parameter"),
        ({"fault": Deadzone}, TypeError, "fault is"),
        ({"fault": "deadzone"}, TypeError, "fault is 'deadzone'"),
        ({"model": None}, TypeError, "model is a NoneType"),
    ],
)
def test_mistakes_are_named(arguments, error, says) -> None:
    model = tiny_model()
    hooks = hooks_of(model)
    given = {"model": model, "fault": Deadzone(), **arguments}
    with pytest.raises(error, match=says):
        inject(given.pop("model"), given.pop("fault"), **given)
    assert hooks_of(model) == hooks


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Deadzone(0.0), "threshold is 0.0"),
        (lambda: Deadzone(1.5), "at most 1"),
        (lambda: GaussianError(float("nan")), "sigma is nan"),
        (lambda: Bias(0), "magnitude is 0"),
    ],
)
def test_values_out_of_range(make, says) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_places_where_no_fault_can_act() -> None:
    model = tiny_model()
    with inject(model, Deadzone(), "embed_tokens", at="input"), pytest.raises(TypeError, match="embed_tokens: there"):
        model(IDS)
    packed = qnoise.patch_model(tiny_model().requires_grad_(False), "mxfp4", storage="packed")
    with pytest.raises(ValueError, match="its weight is packed"):
        inject(packed, Deadzone(), "up_proj", at="weight")


def test_faults_are_values() -> None:
    for fault in (Deadzone(0.1), GaussianError(0.1, False), Bias(0.1)):
        assert pickle.loads(pickle.dumps(fault)) == fault
