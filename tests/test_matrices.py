"""Modules with matrices of their own: `Conv1D` and fused experts, against references that go matrix by matrix."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import qnoise
from qnoise.nn.matrices import FakeQuantMatrices, matrix_axes
from tests.tiny_models import tiny_model, with_lora
from tests.zoo import logits, tiny


def experts_of(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, FakeQuantMatrices)}


def by_hand(stack: torch.Tensor, fmt: str, axis: int) -> torch.Tensor:
    """Each expert by itself, turned so that what is summed over is the last axis."""
    matrices = [m if axis == 2 else m.T.contiguous() for m in stack.detach()]
    quantized = [qnoise.fake_quantize(m, fmt) for m in matrices]
    return torch.stack([q if axis == 2 else q.T for q in quantized])


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize(
    ("model_type", "axis"), [("mixtral", 2), ("qwen3_moe", 2), ("deepseek_v3", 2), ("gpt_oss", 1), ("llama4_text", 1)]
)
def test_experts_are_quantized_along_what_is_summed_over(model_type: str, axis: int, fmt: str) -> None:
    model = qnoise.patch_model(tiny(model_type), fmt=fmt)
    found = experts_of(model)
    assert found
    for name, module in found.items():
        assert set(module.effective_names) == {"gate_up_proj", "down_proj"}, name
        hidden = model.config.hidden_size
        # Independent of the code: the gates read the hidden state, so its size is the contracted one.
        assert module.gate_up_proj.shape[axis] == hidden
        for key in module.effective_names:
            raw = module._parameters[key]
            assert torch.equal(module.effective_weight(key), by_hand(raw, fmt, axis))
            assert module.effective_weight(key).dtype == raw.dtype
    assert qnoise.state(model)["formats"][fmt] >= 2 * len(found)
    text = str(qnoise.summary(model))
    assert "experts" in text
    assert f"{fmt}; in gate_up_proj, down_proj" in text


@pytest.mark.parametrize("kernel", ["eager", "grouped_mm", "batched_mm"])
def test_every_kernel_sees_the_quantized_experts(kernel: str) -> None:
    written, stock = tiny("mixtral"), tiny("mixtral")
    model = qnoise.patch_model(tiny("mixtral"), fmt="mxfp4", include=("*experts*",))
    for each in (model, written, stock):
        each.set_experts_implementation(kernel)
    with torch.no_grad():
        for name, module in experts_of(model).items():
            for key in module.effective_names:
                written.get_submodule(name)._parameters[key].copy_(module.effective_weight(key))
    assert torch.equal(logits(model), logits(written))
    with qnoise.full_precision(model):
        assert torch.equal(logits(model), logits(stock))
    gradients = []
    for each in (model, written):
        logits(each).float().square().mean().backward()
        gradients.append({name: p.grad for name, p in each.named_parameters() if "experts" in name})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient)


def test_frozen_experts_are_quantized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from qnoise.nn import matrices

    calls = []
    stock = matrices.quantize_matrices
    monkeypatch.setattr(matrices, "quantize_matrices", lambda *a: calls.append(1) or stock(*a))
    model = qnoise.patch_model(tiny("mixtral").requires_grad_(False), fmt="mxfp4")
    for _ in range(3):
        logits(model)
    assert len(calls) == 4  # two matrices in each of two layers
    # What torch does not see is found when somebody asked for the weight, or by a sample.
    module = next(iter(experts_of(model).values()))
    before = logits(model)
    module.down_proj.data.mul_(1.5)
    assert not torch.equal(logits(model), before)
    qnoise.refresh(model)
    model.requires_grad_(True)
    calls.clear()
    logits(model)
    assert len(calls) == 4


def test_a_copy_and_a_pickle_are_patched_and_come_off() -> None:
    stock = tiny("mixtral")
    model = qnoise.patch_model(copy.deepcopy(stock), fmt="nvfp4")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), logits(model))
        qnoise.unpatch_model(twin)
        assert torch.equal(logits(twin), logits(stock))
        assert {type(m) for m in twin.modules()} == {type(m) for m in stock.modules()}
    baked = qnoise.bake(copy.deepcopy(model))
    assert torch.equal(logits(baked), logits(model))
    assert {type(m) for m in baked.modules()} == {type(m) for m in stock.modules()}
    names = dict(stock.named_parameters())
    loaded = copy.deepcopy(stock)
    loaded.load_state_dict(dict(qnoise.rl.rollout_weights(model)), strict=False)
    assert torch.equal(logits(loaded), logits(model))
    assert set(dict(qnoise.rl.rollout_weights(model))) == set(names)


def test_a_plan_names_one_matrix_of_the_experts() -> None:
    plan = {"*": None, "*.experts.down_proj": "mxfp8_e4m3", "*layers.0*.experts.gate_up_proj": "mxfp4"}
    model = qnoise.patch_model(tiny("mixtral"), fmt=plan)
    specs = {name: {k: str(v) for k, v in m._qnoise.specs.items()} for name, m in experts_of(model).items()}
    assert list(specs.values()) == [{"gate_up_proj": "mxfp4", "down_proj": "mxfp8_e4m3"}, {"down_proj": "mxfp8_e4m3"}]


def test_conv1d_under_peft() -> None:
    stock = tiny("gpt2")
    model = qnoise.patch_model(copy.deepcopy(stock).requires_grad_(False), fmt="mxfp4", act_fmt="mxfp8_e4m3")
    conv = model.transformer.h[0].mlp.c_fc
    assert torch.equal(
        conv.effective_weight(), qnoise.fake_quantize(stock.transformer.h[0].mlp.c_fc.weight.T, "mxfp4").T
    )
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    by_hand = torch.nn.functional.linear(qnoise.fake_quantize(x, "mxfp8_e4m3"), conv.effective_weight().T, conv.bias)
    torch.testing.assert_close(conv(x), by_hand)
    wrapped = with_lora(model, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True)
    logits(wrapped).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in wrapped.parameters() if p.requires_grad)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), logits(model))


def test_packing_leaves_them_as_they_are() -> None:
    model = qnoise.patch_model(tiny("mixtral").requires_grad_(False), fmt="mxfp4", storage="packed")
    assert len(experts_of(model)) == 2
    assert torch.equal(logits(model), logits(qnoise.patch_model(tiny("mixtral"), fmt="mxfp4")))


def test_what_is_not_known_is_not_touched() -> None:
    class Experts(torch.nn.Module):
        def __init__(self, first, second) -> None:
            super().__init__()
            self.up_proj, self.down_proj = (torch.nn.Parameter(torch.zeros(2, *shape)) for shape in (first, second))

    # (experts, out, in) and (experts, in, out) look alike without a gate: only `is_transposed` could tell.
    for first, second in (((8, 4), (4, 8)), ((4, 4), (4, 4))):
        assert matrix_axes(Experts(first, second)) == {}
    told = Experts((8, 4), (4, 8))
    told.is_transposed = True
    assert matrix_axes(told) == {"up_proj": 1, "down_proj": 1}
    assert matrix_axes(torch.nn.Linear(4, 4)) == {}
    assert matrix_axes(tiny_model("qwen2").model.embed_tokens) == {}
