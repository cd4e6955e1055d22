from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import qnoise
from qnoise.nn import FakeQuantLinear, weight_cache
from qnoise.noise import Noise

FMTS = ("mxfp4", "nvfp4", "mxfp8_e4m3", "mxint8")


def make(fmt="mxfp4", storage="auto", dtype=torch.float32, in_features=96, **kwargs) -> FakeQuantLinear:
    torch.manual_seed(0)
    return FakeQuantLinear(in_features, 48, dtype=dtype, fmt=fmt, storage=storage, **kwargs)


def q(linear: FakeQuantLinear, fmt="mxfp4") -> torch.Tensor:
    """Q(W), computed anew."""
    return qnoise.fake_quantize(linear._parameters["weight"].detach(), fmt)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(3, 5, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("fmt", FMTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_forward_is_the_linear_of_the_dequantized_operands(fmt, dtype, x) -> None:
    linear = make(fmt, dtype=dtype)
    x = x.to(dtype)
    assert torch.equal(linear(x), F.linear(x, q(linear, fmt), linear.bias))
    assert linear(x).dtype == dtype


@pytest.mark.parametrize("storage", ["auto", "dynamic", "cached"])
@pytest.mark.parametrize("act_fmt", [None, "mxfp8_e4m3"])
def test_backward_uses_the_dequantized_operands(storage, act_fmt, x) -> None:
    """Straight through: grad_x = g Q(W), grad_W = g^T Q(x), grad_b = sum g."""
    linear = make(storage=storage, act_fmt=act_fmt)
    x.requires_grad_()
    g = torch.randn(3, 5, 48)
    linear(x).backward(g)
    xq = x.detach() if act_fmt is None else qnoise.fake_quantize(x.detach(), act_fmt)
    assert torch.equal(x.grad, g @ q(linear))
    torch.testing.assert_close(linear.weight.grad, g.flatten(0, 1).T @ xq.flatten(0, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear.bias.grad, g.sum((0, 1)))


def test_backward_keeps_the_operands_of_its_forward(x) -> None:
    """The weight changes between forward and backward: grad_x is still that of the forward."""
    linear = make()
    linear.weight.requires_grad_(False)
    x.requires_grad_()
    before = q(linear)
    y = linear(x)
    with torch.no_grad():
        linear.weight.mul_(-3)
    linear(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad[0, 0], before.sum(0))


def test_frozen_weight_is_quantized_once(x, monkeypatch) -> None:
    calls = []
    real = qnoise.nn.effective.fake_quantize
    monkeypatch.setattr("qnoise.nn.effective.fake_quantize", lambda *a, **k: calls.append(1) or real(*a, **k))
    for storage, frozen, grad, expected in [
        ("auto", True, True, 1),
        ("auto", False, True, 3),  # trained: quantized in each forward
        ("auto", False, False, 1),  # a rollout in full fine-tuning does not requantize for each token
        ("cached", False, True, 1),
        ("dynamic", True, False, 3),
    ]:
        linear = make(storage=storage)
        linear.weight.requires_grad_(not frozen)
        calls.clear()
        with torch.set_grad_enabled(grad):
            for _ in range(3):
                linear(x)
        assert len(calls) == expected, (storage, frozen, grad)


def _in_place(linear):
    with torch.no_grad():
        linear._parameters["weight"].mul_(1.7)


def _data_in_place(linear):
    linear.weight.data.mul_(1.7)


def _data_swap(linear):
    linear.weight.data = linear.weight.data * 1.7


def _swap_twice(linear):
    # The allocator likes to hand the first storage out again: address and version are then those of the cache.
    weight = linear._parameters["weight"]
    for factor in (1.3, 1.4):
        new = weight.data * factor
        weight.data = new
        del new
        gc.collect()


def _load_state_dict(linear):
    linear.load_state_dict({k: v * 1.7 for k, v in linear.state_dict().items()})


def _load_assign(linear):
    linear.load_state_dict({k: v * 1.7 for k, v in linear.state_dict().items()}, assign=True)


def _new_parameter(linear):
    linear.weight = nn.Parameter(linear.weight.detach() * 1.7, requires_grad=False)


def _optimizer(linear):
    weight = linear._parameters["weight"]
    weight.grad = torch.randn_like(weight)
    torch.optim.SGD([weight], lr=1.0).step()


def _permute_data(linear):
    # Same multiset of bits in every row: a hash that ignores places would not see it.
    linear.weight.data.copy_(linear.weight.data.flip(1))


WRITES = [
    _in_place, _data_in_place, _data_swap, _swap_twice, _load_state_dict, _load_assign, _new_parameter, _optimizer,
    _permute_data,
]  # fmt: skip


@pytest.mark.parametrize("first", ["no_grad", "inference_mode", "grad"])
@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_never_a_stale_weight(write, first, fmt, x) -> None:
    linear = make(fmt, storage="cached")
    linear.weight.requires_grad_(False)
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "grad": torch.enable_grad}[first]
    with context():
        linear(x)
        stale = linear.effective_weight().clone()
    write(linear)
    assert torch.equal(linear.effective_weight(), q(linear, fmt))
    assert not torch.equal(linear.effective_weight(), stale)


def test_never_a_stale_layout() -> None:
    """The same memory read in another order, and as another dtype."""
    linear = FakeQuantLinear(64, 64, dtype=torch.bfloat16, storage="cached").requires_grad_(False)
    linear.effective_weight()
    for change in (torch.t, lambda w: w.view(torch.float16)):
        weight = linear._parameters["weight"]
        weight.data = change(weight.data)
        assert torch.equal(linear.effective_weight(), q(linear))


def test_to_and_deepcopy_and_pickle(x) -> None:
    linear = make(storage="cached")
    linear(x)
    twin = copy.deepcopy(linear)
    with torch.no_grad():
        twin._parameters["weight"].mul_(2)
    assert torch.equal(twin.effective_weight(), q(twin))
    assert torch.equal(linear.effective_weight(), q(linear))
    again = pickle.loads(pickle.dumps(twin))
    assert torch.equal(again(x), twin(x))
    linear.to(torch.bfloat16)
    assert linear.effective_weight().dtype == torch.bfloat16
    assert torch.equal(linear.effective_weight(), q(linear))


def test_cache_filled_in_inference_mode_serves_training(x) -> None:
    linear = make(storage="auto")
    linear.weight.requires_grad_(False)
    with torch.inference_mode():
        linear(x)
    x.requires_grad_()
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad[0, 0], q(linear).sum(0))


def test_inference_tensors_are_quantized_each_time(x) -> None:
    with torch.inference_mode():
        linear = make(storage="cached")
        linear(x)
        linear._parameters["weight"].mul_(1.7)  # inference tensors have no version counter
        assert torch.equal(linear.effective_weight(), q(linear))


def test_unseen_write_through_a_held_reference(x) -> None:
    """The one write nobody can see: `refresh` is for it, and train()/eval() catch it."""
    for remedy in (qnoise.refresh, nn.Module.train, nn.Module.eval):
        model = nn.Sequential(make(storage="cached"))
        held = model[0]._parameters["weight"].data
        model(x)
        held.mul_(1.7)
        remedy(model)
        assert torch.equal(model[0].effective_weight(), q(model[0])), remedy


def test_tied_modules_share_one_cache(x) -> None:
    a, b = make(storage="cached"), make(storage="cached")
    b.weight = a.weight
    with torch.no_grad():
        a(x), b(x)
        assert a.effective_weight() is b.effective_weight()
    assert weight_cache.cached_nbytes(a._parameters["weight"]) == a._parameters["weight"].nbytes


def test_tied_modules_of_different_formats_do_not_mix(x) -> None:
    a, b = make("mxfp4", storage="cached"), make("mxint8", storage="cached")
    b.weight = a.weight
    for _ in range(2):
        assert torch.equal(a.effective_weight(), q(a, "mxfp4"))
        assert torch.equal(b.effective_weight(), q(a, "mxint8"))


def test_nothing_is_kept_of_a_dead_weight(x) -> None:
    gc.collect()
    before = len(weight_cache._ENTRIES)
    linear = make(storage="cached")
    linear(x)
    assert len(weight_cache._ENTRIES) == before + 1
    del linear
    gc.collect()
    assert len(weight_cache._ENTRIES) == before


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_activation_of_a_token_depends_on_that_token_alone(fmt, x) -> None:
    linear = make(fmt, act_fmt=fmt)
    together = linear(torch.cat([x, 1e4 * torch.randn_like(x)]))[:3]
    assert torch.equal(together, linear(x))
    alone = torch.stack([torch.stack([linear(token) for token in row]) for row in x])
    torch.testing.assert_close(alone, linear(x), rtol=1e-5, atol=1e-6)
    each = torch.stack([qnoise.fake_quantize(token, fmt) for token in x.flatten(0, 1)]).view_as(x)
    assert torch.equal(linear(x), F.linear(each, q(linear, fmt), linear.bias))


def test_autocast_quantizes_the_stored_weight(x) -> None:
    linear = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear(x)
    expected = F.linear(x.bfloat16(), q(linear).bfloat16(), linear.bias.bfloat16())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)


def test_relative_weight_noise(x) -> None:
    linear = make()
    linear._qnoise.noise_during = ("training",)
    linear._qnoise.noise = Noise(0.3, seed=1, step=2)
    z = torch.from_numpy(qnoise.noise.unit_normal(1, 2, "", (48, 96)))
    noisy = qnoise.fake_quantize(linear.weight.detach() * (1 + 0.3 * z), "mxfp4")
    assert torch.equal(linear.effective_weight(), noisy)
    with torch.no_grad():
        assert torch.equal(linear.effective_weight(), noisy)
        linear._qnoise.noise = Noise(0.3, seed=1, step=3)
        assert not torch.equal(linear.effective_weight(), noisy), "a new step is new noise, also from the cache"
        linear._qnoise.phase = "evaluation"
        assert torch.equal(linear.effective_weight(), q(linear))


def test_from_linear_and_back(x) -> None:
    stock = nn.Linear(96, 48)
    linear = FakeQuantLinear.from_linear(stock, "nvfp4")
    assert type(stock) is nn.Linear
    assert "_qnoise" not in stock.__dict__
    assert linear._parameters["weight"] is stock.weight
    assert torch.equal(linear(x), F.linear(x, qnoise.fake_quantize(stock.weight, "nvfp4"), stock.bias))
    back = linear.to_linear()
    assert type(back) is nn.Linear
    assert back.weight is stock.weight
    assert torch.equal(back(x), stock(x))
    assert isinstance(linear, FakeQuantLinear)
    with pytest.raises(TypeError, match=r"nn\.Linear, not Conv1d"):
        FakeQuantLinear.from_linear(nn.Conv1d(1, 1, 1))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="'cashed'.*'auto', 'dynamic', 'cached'"):
        make(storage="cashed")
    with pytest.raises(ValueError, match=r"mxfp5.*mxfp4"):
        make("mxfp5")
    with pytest.raises(TypeError, match="weight"):
        make().weight = 3


def test_repr_and_state_dict_are_readable() -> None:
    linear = make("nvfp4", act_fmt="mxfp8_e4m3")
    assert "nvfp4" in repr(linear)
    assert "mxfp8_e4m3" in repr(linear)
    assert list(linear.state_dict()) == ["weight", "bias"]


class Count(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations.append(str(func))
        return func(*args, **(kwargs or {}))


def operations(module: nn.Module, x: torch.Tensor) -> list[str]:
    with Count() as count:
        module(x)
    return count.operations


def test_a_frozen_cached_layer_runs_the_operations_of_nn_linear(x) -> None:
    linear = make("nvfp4")
    linear.requires_grad_(False)
    linear(x)
    assert operations(linear, x) == operations(linear.to_linear(), x)


@pytest.mark.parametrize("fmt", FMTS)
def test_a_dynamic_layer_runs_one_operation_more(fmt, x) -> None:
    linear = make(fmt, storage="dynamic")
    extra = operations(linear, x)
    for name in operations(linear.to_linear(), x):
        extra.remove(name)
    assert extra == ["qnoise.fake_quantize.default"]


def test_siblings_find_their_amax_once_for_each_change(x, monkeypatch) -> None:
    """Three trained siblings under one scale, quantized in every forward: three reductions a step, not nine."""
    calls = []
    real = qnoise.nn.shared_scale.weight_amax
    monkeypatch.setattr("qnoise.nn.shared_scale.weight_amax", lambda w: calls.append(w) or real(w))
    group = tuple(make("nvfp4", storage="dynamic") for _ in range(3))
    for linear in group:
        linear._qnoise.scale_group = group
    for step in (1, 2):
        for linear in group:
            linear(x)
        assert len(calls) == 3 * step
        for linear in group:
            _in_place(linear)


def test_meta(x) -> None:
    """Shapes without memory, in every storage."""
    for storage in ("auto", "dynamic", "cached", "packed"):
        stock = nn.Linear(90, 48, device="meta").requires_grad_(False)
        linear = FakeQuantLinear.from_linear(stock, "nvfp4", "mxfp8_e4m3", storage=storage)
        y = linear(torch.empty(3, 90, device="meta", requires_grad=True))
        assert (y.shape, y.device.type, y.requires_grad) == ((3, 48), "meta", True)
        y.sum().backward()
        assert linear.effective_weight().device.type == "meta"


def test_a_meta_model_with_noise() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.RMSNorm(64), nn.Linear(64, 32))
    qnoise.patch_model(model, noise="rmsnorm")
    qnoise.NoiseScheduler(model, qnoise.schedules.Constant(0.1), 2).step()
    assert model(torch.empty(3, 64, device="meta")).shape == (3, 32)
