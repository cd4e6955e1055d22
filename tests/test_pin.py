"""Pinned codes: what a linear uses in place of Q(W), until it is told otherwise."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import qnoise
from patching import assert_same, logits, snapshot
from qnoise.nn import FakeQuantLinear, weight_cache
from qnoise.nn.packed import PackedLinear
from qnoise.patch import pack_model
from tiny_models import tiny_model, with_lora

FORMATS = ("mxfp4", "nvfp4", "mxint8")


def other_codes(weight: Tensor, fmt: str = "mxfp4", **kwargs) -> qnoise.BlockQuantized:
    """Codes that are not those of Q(weight)."""
    moved = weight.detach() + 0.3 * weight.detach().std() * torch.randn(weight.shape, generator=seeded()).to(weight)
    return qnoise.quantize(moved, fmt, **kwargs)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def linear(fmt: str = "mxfp4", storage: str = "auto", dtype=torch.float32, **kwargs) -> FakeQuantLinear:
    torch.manual_seed(0)
    stock = nn.Linear(70, 24, dtype=dtype).requires_grad_(False)
    return FakeQuantLinear.from_linear(stock, fmt, storage=storage, **kwargs)


def pinned_linear(*args, **kwargs) -> tuple[FakeQuantLinear, qnoise.BlockQuantized]:
    module = linear(*args, **kwargs)
    codes = other_codes(module.weight, module._qnoise.weight_spec)
    module.pin(codes)
    return module, codes


def pinned_model(fmt: str = "mxfp4", model: nn.Module | None = None, **kwargs) -> nn.Module:
    model = tiny_model() if model is None else model
    qnoise.patch_model(model.requires_grad_(False), fmt, **kwargs)
    for module in linears(model):
        module.pin(other_codes(module.weight, fmt))
    return model


def linears(model: nn.Module) -> list[FakeQuantLinear]:
    return [m for m in model.modules() if isinstance(m, FakeQuantLinear)]


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 99, (2, 9), generator=seeded())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("storage", ["auto", "dynamic", "cached"])
def test_the_forward_uses_the_pinned_codes(fmt, dtype, storage) -> None:
    module, codes = pinned_linear(fmt, storage, dtype)
    raw, served = module.weight.clone(), codes.dequantize(dtype)
    module.pin(None)
    module.effective_weight()
    module.pin(codes)
    assert not torch.equal(served, qnoise.fake_quantize(raw, fmt))
    x = torch.randn(5, 70, generator=seeded()).to(dtype).requires_grad_()
    y = module(x)
    y.backward(torch.ones_like(y))
    assert torch.equal(y, nn.functional.linear(x, served, module.bias))
    assert torch.equal(x.grad, torch.ones_like(y) @ served)
    assert torch.equal(module.effective_weight(), served)
    assert torch.equal(module.quantized().dequantize(), served)
    assert torch.equal(module.weight, raw)
    with torch.inference_mode():
        assert torch.equal(module(x.detach()), y)
    assert weight_cache.cached_nbytes(module.weight) == raw.nbytes
    module.pin(None)
    assert torch.equal(module.effective_weight(), qnoise.fake_quantize(raw, fmt))
    assert torch.equal(module.to_linear().weight, raw)


@pytest.mark.parametrize("fmt", FORMATS)
def test_quantized_is_what_the_forward_uses(fmt) -> None:
    """Siblings of a fused matrix under their joint scale, and packed linears, too."""
    model = qnoise.patch_model(tiny_model().requires_grad_(False), fmt)
    packed = qnoise.patch_model(tiny_model().requires_grad_(False), fmt, storage="packed")
    for a, b in zip(linears(model), linears(packed), strict=True):
        codes = a.quantized()
        assert torch.equal(codes.dequantize(), a.effective_weight())
        assert torch.equal(codes.codes, b.quantized().codes)
        assert torch.equal(codes.scale_codes, b.quantized().scale_codes)
    with pytest.raises(ValueError, match="another draw"):
        linear(qnoise.QuantSpec("mxfp4", rounding="stochastic")).quantized()
    with pytest.raises(ValueError, match="fmt=None"):
        linear(None, act_fmt="mxfp4").quantized()


def test_it_comes_off_again_and_contexts_see_through_it(ids) -> None:
    model = tiny_model().requires_grad_(False)
    before, stock = snapshot(model), logits(model, ids)
    qnoise.patch_model(model, "nvfp4", noise="rmsnorm")
    plain = logits(model, ids)
    for module in linears(model):
        module.pin(other_codes(module.weight, "nvfp4"))
    pinned = logits(model, ids)
    assert not torch.equal(pinned, plain)
    qnoise.refresh(model)
    with qnoise.quiet(model):
        assert torch.equal(logits(model, ids), pinned)
    with qnoise.full_precision(model):
        assert torch.equal(logits(model, ids), stock)
    assert qnoise.state(model)["pinned"] == 14
    summary = qnoise.summary(model)
    assert all("pinned codes" in what for name, what in summary.patched.items() if name.endswith("_proj"))
    assert "pinned" in repr(model)
    qnoise.unpatch_model(model)
    assert_same(before, snapshot(model))
    assert torch.equal(logits(qnoise.patch_model(model, "nvfp4", noise="rmsnorm"), ids), plain)


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_bake_packed_storage_and_rollout_weights_hold_the_pinned_values(fmt, ids) -> None:
    model = pinned_model(fmt)
    expected, values = logits(model, ids), [m.effective_weight().clone() for m in linears(model)]
    rollout = dict(qnoise.rl.rollout_weights(model))
    baked = qnoise.bake(copy.deepcopy(model))
    assert torch.equal(logits(baked, ids), expected)
    names = [m._qnoise.name for m in linears(model)]
    for name, value in zip(names, values, strict=True):
        assert torch.equal(rollout[f"{name}.weight"], value)
        assert torch.equal(baked.get_submodule(name).weight, value)
    held = qnoise.summary(model).nbytes[0]
    pack_model(model)
    assert qnoise.state(model)["pinned"] == 0
    assert all(isinstance(m, PackedLinear) for m in linears(model))
    assert torch.equal(logits(model, ids), expected)
    assert qnoise.summary(model).nbytes[1] < held
    assert qnoise.patch_model(model, fmt, storage="packed") is model
    with pytest.raises(ValueError, match="q_proj.*pinned already"):
        linears(model)[0].pin(None)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_keep_the_pin_and_are_their_own(copied) -> None:
    module, codes = pinned_linear("nvfp4")
    twin = copied(module)
    assert torch.equal(twin.effective_weight(), codes.dequantize())
    twin.pin(None)
    assert torch.equal(module.effective_weight(), codes.dequantize())
    assert not torch.equal(twin.effective_weight(), codes.dequantize())


@pytest.mark.parametrize("warm", [True, False])
def test_casts_by_the_owner_keep_the_pin(warm) -> None:
    module, codes = pinned_linear("nvfp4")
    if warm:
        module.effective_weight()
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.float(), lambda m: m.double(), lambda m: m.cpu()):
        cast(module)
        assert torch.equal(module.effective_weight(), codes.dequantize(module.weight.dtype))
    values = module.state_dict()
    module.to("meta")
    assert module(torch.empty(2, 70, dtype=torch.float64, device="meta")).shape == (2, 24)
    module.to_empty(device="cpu").load_state_dict(values)
    assert torch.equal(module.effective_weight(), codes.dequantize(torch.float64))
    # As tools do that prepare a model for training, and sharding in mixed precision.
    module, codes = pinned_linear("nvfp4")
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        module.weight.data = module.weight.data.to(dtype)
        assert torch.equal(module.effective_weight(), codes.dequantize(dtype))


WRITES = {
    "in place": lambda w: w.mul_(2),
    "through .data": lambda w: w.data.mul_(2),
    "another tensor": lambda w: setattr(w, "data", w.data * 2),
    "two rows change places": lambda w: w.data.copy_(w.data.flip(0)),
    "rounded": lambda w: w.data.copy_(w.data.bfloat16()),
    "another shape": lambda w: setattr(w, "data", w.data[:, :64].clone()),
}


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("write", WRITES)
def test_a_changed_weight_is_never_served_stale_codes(write, warm) -> None:
    module, _ = pinned_linear()
    if warm:
        module(torch.ones(1, 70))
    WRITES[write](module.weight)
    for use in (module.effective_weight, module.quantized, lambda: module(torch.ones(1, 70)), module.double):
        with pytest.raises(ValueError, match=r"written to after quantized codes were pinned.*pin\(None\)"):
            use()
    module.pin(None)
    assert torch.equal(module.effective_weight(), qnoise.fake_quantize(module.weight, "mxfp4"))


def test_writing_the_same_values_changes_nothing() -> None:
    module, codes = pinned_linear()
    module.load_state_dict({key: value.clone() for key, value in module.state_dict().items()})
    assert torch.equal(module.effective_weight(), codes.dequantize())


def test_adapters_train_on_top_and_a_merge_is_seen(ids) -> None:
    from peft import LoraConfig, get_peft_model

    model = pinned_model()
    base = logits(model, ids)
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    assert torch.equal(logits(wrapped, ids), base)
    wrapped(ids, labels=ids).loss.backward()
    assert all(p.grad is not None for n, p in wrapped.named_parameters() if "lora_" in n)
    assert all(m.weight.grad is None for m in linears(wrapped))
    other = with_lora(tiny_model())
    pinned_model(model=other)
    assert not torch.equal(logits(other, ids), base)
    with other.disable_adapter():
        assert torch.equal(logits(other, ids), base)
    other.merge_adapter()
    with pytest.raises(ValueError, match="an adapter merged"):
        logits(other, ids)


@pytest.mark.parametrize("storage", ["auto", "dynamic"])
def test_compiled(storage) -> None:
    torch._dynamo.reset()
    module, codes = pinned_linear(storage=storage)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 70, generator=seeded()).requires_grad_()
    y = compiled(x)
    y.sum().backward()
    assert torch.equal(y, module(x))
    torch.testing.assert_close(x.grad, torch.ones(3, 24) @ codes.dequantize())
    module.pin(None)
    assert torch.equal(compiled(x), module(x))
    module.pin(codes)
    assert torch.equal(compiled(x), y)
    with torch.no_grad():
        module.weight.mul_(2)
    with pytest.raises(Exception, match="written to after"):
        compiled(x)
    torch._dynamo.reset()


def test_what_cannot_be_pinned_says_why() -> None:
    module, codes = pinned_linear()
    module.weight.requires_grad_()
    with pytest.raises(ValueError, match="needs gradient, and its quantized codes are pinned"):
        module(torch.ones(1, 70))
    with torch.no_grad():
        assert torch.equal(module.effective_weight(), codes.dequantize())
    with pytest.raises(ValueError, match="needs gradient"):
        module.pin(codes)
    module.weight.requires_grad_(False)
    w = module.weight
    for wrong, what in (
        (qnoise.quantize(w[:, :64].clone(), "mxfp4"), r"shape \(24, 64\)"),
        (qnoise.quantize(w, "mxfp4", axis=0), "along axis 0"),
        (qnoise.quantize(w, "nvfp4"), "codes are in nvfp4, and the linear was patched with mxfp4"),
    ):
        with pytest.raises(ValueError, match=what):
            module.pin(wrong)
    with pytest.raises(TypeError, match="not Tensor"):
        module.pin(w.data)
    assert torch.equal(module.effective_weight(), codes.dequantize())
    module.pin(qnoise.quantize(w, "mxfp4", "mse"))  # how scales were chosen is no matter of the layout
    with pytest.raises(ValueError, match="fmt=None"):
        linear(None, act_fmt="mxfp4").pin(codes)
    noisy = qnoise.patch_model(tiny_model().requires_grad_(False), noise="linear")
    first = linears(noisy)[0]
    with pytest.raises(ValueError, match=r"q_proj: noise acts on its weight"):
        first.pin(first.quantized())


def test_tied_linears_with_different_codes_are_not_baked() -> None:
    model = nn.ModuleDict({"a": nn.Linear(64, 8), "b": nn.Linear(64, 8)}).requires_grad_(False)
    model["b"].weight = model["a"].weight
    qnoise.patch_model(model)
    model["a"].pin(other_codes(model["a"].weight))
    with pytest.raises(ValueError, match="a and b share one parameter"):
        qnoise.bake(model)
    model["b"].pin(model["a"].quantized())
    values = model["a"].effective_weight()
    assert torch.equal(qnoise.bake(model)["a"].weight, values)
