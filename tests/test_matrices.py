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


def expert_by_expert(
    module: torch.nn.Module,
    matrices: dict[str, torch.Tensor],
    x: torch.Tensor,
    chosen: torch.Tensor,
    shares: torch.Tensor,
) -> torch.Tensor:
    """Token by token and expert by expert: a gated MLP, in GPT-OSS's way or in everybody else's."""
    rows = []
    for token in range(len(x)):
        row = torch.zeros_like(x[token])
        for expert, share in zip(chosen[token].tolist(), shares[token], strict=True):
            first, second = matrices["gate_up_proj"][expert], matrices["down_proj"][expert]
            if hasattr(module, "limit"):
                both = x[token] @ first + module.gate_up_proj_bias[expert]
                gate, up = both[::2].clamp(max=module.limit), both[1::2].clamp(-module.limit, module.limit)
                inner = (up + 1) * gate * torch.sigmoid(module.alpha * gate)
                row = row + share * (inner @ second + module.down_proj_bias[expert])
            else:
                gate, up = (first @ x[token]).chunk(2)
                row = row + share * (second @ (torch.nn.functional.silu(gate) * up))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("kernel", ["eager", "grouped_mm"])
@pytest.mark.parametrize(("model_type", "axis"), [("mixtral", 2), ("qwen3_moe", 2), ("deepseek_v3", 2), ("gpt_oss", 1)])
def test_experts_against_a_reference_with_gradients(model_type: str, axis: int, kernel: str) -> None:
    model = tiny(model_type)
    routers = {name: p.clone() for name, p in model.named_parameters() if ".gate." in name or ".router." in name}
    assert routers
    qnoise.patch_model(model, "nvfp4")
    model.set_experts_implementation(kernel)
    module = next(iter(experts_of(model).values()))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():  # biases too, and weights large enough to see the clamping of GPT-OSS
        for parameter in module.parameters():
            parameter.normal_(0.0, 1.0, generator=generator)
    x = torch.randn(6, 64, generator=generator, requires_grad=True)
    chosen = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(6)])
    shares = torch.rand(6, 2, generator=generator)
    out = module(x, chosen, shares)
    out.square().sum().backward()
    matrices = {
        name: by_hand(module._parameters[name], "nvfp4", axis).requires_grad_() for name in module.effective_names
    }
    y = x.detach().requires_grad_()
    expected = expert_by_expert(module, matrices, y, chosen, shares)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    expected.square().sum().backward()
    # Straight through: the gradient of the quantized matrix is that of the raw one.
    for mine, theirs in ((x, y), *((module._parameters[name], matrices[name]) for name in matrices)):
        scale = theirs.grad.abs().max().item()
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5 * scale)
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in routers.items())
    skipped = qnoise.summary(model).skipped
    assert all(name.rpartition(".")[0] in skipped for name in routers)


@pytest.mark.parametrize(
    ("model_type", "kind", "axes"),
    [
        ("jetmoe", "JetMoeParallelExperts", {"weight": 2}),
        ("inkling_text", "InklingSharedExperts", {"gate_proj": 2, "up_proj": 2, "down_proj": 2}),
        ("deepseek_v4", "DeepseekV4GroupedLinear", {"weight": 1}),
    ],
)
def test_matrices_known_by_their_class(model_type: str, kind: str, axes: dict[str, int]) -> None:
    model = qnoise.patch_model(tiny(model_type), "nvfp4")
    found = [m for m in model.modules() if type(m).__name__ == f"FakeQuant{kind}"]
    assert found
    for module in found:
        for name, axis in axes.items():
            raw = module._parameters[name]
            expected = by_hand(raw, "nvfp4", axis) if raw.dim() == 3 else qnoise.fake_quantize(raw, "nvfp4", axis=axis)
            assert torch.equal(module.effective_weight(name), expected)
    if kind == "DeepseekV4GroupedLinear":  # independent of the code: each group's output, by itself
        module = found[0]
        x = torch.randn(3, module.n_groups, module.in_features, generator=torch.Generator().manual_seed(0))
        groups = module.effective_weight().chunk(module.n_groups)
        torch.testing.assert_close(module(x), torch.stack([x[:, i] @ w.T for i, w in enumerate(groups)], 1))


def test_the_summary_says_that_inputs_of_experts_are_left_out() -> None:
    model = qnoise.patch_model(tiny("mixtral"), "mxfp4", act_fmt="mxfp8_e4m3", noise="linear")
    patched = qnoise.summary(model).patched
    experts = patched["model.layers.0.mlp.experts"]
    assert experts == "mxfp4; in gate_up_proj, down_proj; inputs in full precision"
    assert patched["model.layers.0.self_attn.q_proj"] == "mxfp4; input mxfp8_e4m3; noise in rollout, training"


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
