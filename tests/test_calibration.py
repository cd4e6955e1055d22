"""Second moments of the inputs of linears."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qnoise
from qnoise.nn import FakeQuantLinear
from qnoise.nn.tokens import quantize_tokens
from qnoise.repairs.calibration import SecondMoments, by_layer, second_moments
from tiny_models import tiny_model


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 99, (4, 9), generator=torch.Generator().manual_seed(3))


def inputs_of(model: nn.Module, batch, wanted: str) -> Tensor:
    """What the linear is given, (batch, tokens, features), seen without the code under test."""
    seen = []
    handle = model.get_submodule(wanted).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(**batch) if isinstance(batch, dict) else model(batch)
    handle.remove()
    return seen[0].double()


def test_moments_are_those_of_the_inputs_without_padding(ids) -> None:
    model = qnoise.patch_model(tiny_model().requires_grad_(False))
    model.train()
    mask = torch.ones_like(ids)
    mask[1, 5:] = mask[3, 2:] = 0
    whole, padded = {"input_ids": ids[:2]}, {"input_ids": ids, "attention_mask": mask}
    moments = second_moments(model, [whole, padded])
    assert set(moments.of) == {m._qnoise.name for m in model.modules() if isinstance(m, FakeQuantLinear)}
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        x = torch.cat([inputs_of(model, whole, name).flatten(0, 1), inputs_of(model, padded, name)[mask.bool()]])
        assert moments.tokens[name] == len(x) == 18 + int(mask.sum())
        torch.testing.assert_close(moments.of[name], x.T @ x / len(x), rtol=0, atol=1e-6 * x.square().mean().item())
    # Siblings that are given one tensor have one matrix; others have not.
    layer = "model.layers.0.self_attn"
    assert moments.of[f"{layer}.q_proj"] is moments.of[f"{layer}.v_proj"]
    assert len({id(m) for m in moments.of.values()}) == 8
    assert model.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_quantized_inputs_count_as_the_product_sees_them(ids) -> None:
    model = qnoise.patch_model(tiny_model().requires_grad_(False), "nvfp4", act_fmt="nvfp4")
    name = "model.layers.1.mlp.up_proj"
    x = quantize_tokens(inputs_of(model, ids, name).float(), qnoise.QuantSpec("nvfp4"), None).double().flatten(0, 1)
    torch.testing.assert_close(
        second_moments(model, ids).of[name], x.T @ x / len(x), rtol=0, atol=1e-6 * x.square().mean().item()
    )


def test_layer_by_layer_sees_what_the_layers_before_have_become(ids) -> None:
    model = qnoise.patch_model(tiny_model(tie_word_embeddings=False).requires_grad_(False), include=["*", "lm_head"])
    calls = []
    model.model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    steps = by_layer(model, iter([ids]))
    name, first = next(steps)
    assert name == "model.layers.0"
    assert not calls  # the forward stopped there
    assert len(first.of) == 7
    before = second_moments(model, ids)
    torch.testing.assert_close(first.of["model.layers.0.mlp.down_proj"], before.of["model.layers.0.mlp.down_proj"])
    linear = model.model.layers[0].mlp.down_proj
    linear.pin(qnoise.quantize(linear.weight * 1.5, "mxfp4"))
    (name, second), (rest, outside) = steps
    assert (name, rest, list(outside.of)) == ("model.layers.1", "", ["lm_head"])
    after = second_moments(model, ids).of["model.layers.1.mlp.up_proj"]
    assert torch.equal(second.of["model.layers.1.mlp.up_proj"], after)
    assert not torch.allclose(before.of["model.layers.1.mlp.up_proj"], after, rtol=1e-3)


def test_file(tmp_path, ids) -> None:
    model = qnoise.patch_model(tiny_model().requires_grad_(False))
    moments = second_moments(model, ids)
    path = tmp_path / "moments.safetensors"
    moments.save(path)
    assert path.stat().st_size < 4 * (6 * 64**2 + 2 * 96**2) + 8000
    loaded = SecondMoments.load(path)
    assert dict(loaded.tokens) == dict(moments.tokens)
    assert {name: m.float().double().tolist() for name, m in moments.of.items()} == {
        name: m.tolist() for name, m in loaded.of.items()
    }
    layer = "model.layers.0.self_attn"
    assert loaded.of[f"{layer}.q_proj"] is loaded.of[f"{layer}.k_proj"]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="no file of second moments"):
        SecondMoments.load(path)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="schema is None"):
        SecondMoments.load(tmp_path / "model" / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="second moments"):
        SecondMoments.load(tmp_path / "none")


class Attention(nn.Module):
    """Self-attention as long as it gets no context."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(64, 32), nn.Linear(64, 32)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.query(x) * self.key(x if context is None else context)


def test_what_cannot_be_collected_says_why() -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    x = torch.randn(3, 64)
    with pytest.raises(ValueError, match="no quantized linear"):
        second_moments(model, x)
    qnoise.patch_model(model.requires_grad_(False))
    with pytest.raises(ValueError, match="holds no batch"):
        second_moments(model, [])
    with pytest.raises(ValueError, match="0: NaN or Inf in its input"):
        second_moments(model, x.masked_fill(x > 2, torch.nan))
    assert not model[0]._forward_pre_hooks
    attention = qnoise.patch_model(Attention().requires_grad_(False))
    apart = second_moments(attention, [{"x": x, "context": x + 1}, {"x": x, "context": x}])
    assert not torch.equal(apart.of["key"], apart.of["query"])
    with pytest.raises(ValueError, match=r"same tensor as .* in one batch and another one in a later"):
        second_moments(attention, [{"x": x}, {"x": x, "context": x + 1}])


def test_a_module_that_is_called_twice_counts_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.linear(x))

    model = qnoise.patch_model(Twice().requires_grad_(False))
    x = torch.randn(5, 64)
    with torch.no_grad():
        both = torch.cat([x, model.linear(x)]).double()
    moments = second_moments(model, [x])
    assert moments.tokens["linear"] == 10
    torch.testing.assert_close(moments.of["linear"], both.T @ both / 10, rtol=1e-5, atol=1e-6)
