"""Scale folding: the pairs it proves and those it does not, the bits that stay, the error that falls, undo."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import qnoise
from patching import logits
from qnoise.repairs.fold_scales import fold_scales
from test_repairs_distill import loud, text
from tiny_models import ARCHITECTURES, tiny_model, with_lora

QKV, GATED = {"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}
COMMON = {"input_layernorm": QKV, "v_proj": {"o_proj"}, "up_proj": {"down_proj"}}
LLAMA = {**COMMON, "post_attention_layernorm": GATED}
GEMMA = {**COMMON, "pre_feedforward_layernorm": GATED}
PAIRS = {
    **dict.fromkeys(("qwen2", "qwen3", "llama", "mistral"), LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), GEMMA),
    "phi3": {"input_layernorm": {"qkv_proj"}, "post_attention_layernorm": {"gate_up_proj"}},
    "gpt_neox": {"input_layernorm": {"query_key_value"}, "post_attention_layernorm": {"dense_h_to_4h"}},
}
READ_NORMS = set.union(*(readers for pairs in PAIRS.values() for name, readers in pairs.items() if "norm" in name))


def with_outliers(model, factor: float = 16.0):
    """Some channels of every norm that a linear reads are large, and their columns small."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in READ_NORMS:
                module.weight[:, 5:9] /= factor
            elif "layernorm" in name:
                one = 1.0 if "Gemma" in type(module).__name__ else 0.0
                module.weight[5:9] = (module.weight[5:9] + one) * factor - one
    return model


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_pairs_of_an_architecture_and_the_function(model_type) -> None:
    model = tiny_model(model_type)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    with_outliers(model)
    stock, values = logits(model, text()["input_ids"]), copy.deepcopy(model.state_dict())
    report = fold_scales(model, text()["input_ids"], fmt="mxfp4", alphas=(0.5, 1.0))
    found = {row.name.rpartition(".")[2]: {r.rpartition(".")[2] for r in row.readers} for row in report.rows}
    assert found == PAIRS[model_type], report.skipped
    assert len(report.rows) == 2 * len(found)
    assert all(row.rule for row in report.rows if "norm" in row.name)
    folded = logits(model, text()["input_ids"])
    if model_type.startswith("gemma"):
        torch.testing.assert_close(folded, stock, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(folded, stock)
        assert report.changed == 0.0
    assert any(not torch.equal(v, values[k]) for k, v in model.state_dict().items())
    report.undo()
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("act_fmt", [None, "mxfp4"])
def test_it_undoes_outliers(fmt, act_fmt) -> None:
    """The planted outliers come off, and the report's errors are those of the patched linears."""
    model = with_outliers(loud(tiny_model()))
    batch = {k: v for k, v in text(rows=8).items() if k != "labels"}
    stock = logits(model, batch["input_ids"])
    qnoise.patch_model(model, fmt, act_fmt=act_fmt)
    unmeasured = fold_scales(model, batch, max_tokens=10**6, measure=False)
    unmeasured.undo()
    report = fold_scales(model, batch, max_tokens=10**6)
    with qnoise.full_precision(model):
        assert torch.equal(logits(model, batch["input_ids"]), stock)
    assert report.kl[1] < 0.7 * report.kl[0]
    assert unmeasured.kl is None
    assert unmeasured.rows == report.rows
    for row in report.rows:
        assert row.after <= row.before
        if row.name.endswith("layernorm"):
            assert row.rule
            assert row.exponents[1] >= 2
            assert row.after < 0.9 * row.before


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_reported_error_is_that_of_the_patched_linears(fmt) -> None:
    """Siblings under one scale, inputs quantized too. Only one kind of pair: another may divide these rows later."""
    model = with_outliers(tiny_model())
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[7] = 0.0  # its reader has a column that stays zero
    qnoise.patch_model(model, fmt, act_fmt=fmt, include=["gate_proj", "up_proj"])
    readers = {n: m for n, m in model.named_modules() if n.endswith(("layers.0.mlp.gate_proj", "layers.0.mlp.up_proj"))}
    batch, seen = text()["input_ids"], {}

    def error() -> float:
        handles = [m.register_forward_pre_hook(lambda _, a, n=n: seen.__setitem__(n, a[0])) for n, m in readers.items()]
        with torch.no_grad(), qnoise.full_precision(model):
            model(batch)
            exact = {n: m(seen[n]) for n, m in readers.items()}
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            relative = [((m(seen[n]) - exact[n]).norm() / exact[n].norm()).square() for n, m in readers.items()]
        return (sum(relative) / len(relative)).sqrt().item()

    before = error()
    report = fold_scales(model, batch)
    assert {row.name.rpartition(".")[2] for row in report.rows} == {"post_attention_layernorm"}
    row = report.rows[0]
    assert row.rule
    assert row.before == pytest.approx(before, rel=1e-4)
    assert row.after == pytest.approx(error(), rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_adapters_keep_doing_what_they_did(options, ids) -> None:
    """LoRA is scaled along, under disable_adapter too; undo takes the factors out of one that was trained since."""
    model = qnoise.patch_model(with_lora(with_outliers(tiny_model()), **options), "mxfp4")
    values = copy.deepcopy(model.state_dict())

    def stock():
        with qnoise.full_precision(model):
            both = [logits(model, ids)]
            with model.disable_adapter():
                return [*both, logits(model, ids)]

    before = stock()
    report = fold_scales(model, ids)
    assert all(torch.equal(a, b) for a, b in zip(before, stock(), strict=True))
    if options:
        assert not report.rows
        assert all("no plain LoRA" in why for why in report.skipped.values())
        return
    assert len(report.rows) == 8
    assert any(row.rule for row in report.rows)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.01)
    trained = stock()
    report.undo()
    assert all(torch.equal(a, b) for a, b in zip(trained, stock(), strict=True))
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items() if "lora_" not in k)


class Odd(nn.Module):
    """A norm whose output something else reads, a linear whose channels its reader mixes, one that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 32)
        self.norms = nn.ModuleList([nn.LayerNorm(32) for _ in range(4)])
        self.read, self.mixed, self.after, self.twice, self.lone = (nn.Linear(32, 32) for _ in range(5))
        self.factor = nn.Linear(32, 32)

    def forward(self, ids):
        x = self.norms[0](self.embed(ids))
        x = x + self.read(x)  # the residual stream is the norm's output: post-norm
        x = x + self.after(self.mixed(self.norms[1](x)).cumsum(-1))
        y = self.norms[2](x)
        x = self.twice(self.twice(y)) + x
        gate = self.norms[3](x)
        return self.lone(torch.relu(self.factor(gate)).flip(-1))


def test_what_cannot_be_proven_is_left_alone() -> None:
    model, ids = Odd().eval(), torch.arange(20)[None]
    values = copy.deepcopy(model.state_dict())
    report = fold_scales(model, ids, fmt="mxfp4")
    assert "something else reads its output besides read" in report.skipped["norms.0"]
    assert "mixes its channels" in report.skipped["mixed"]
    assert "runs 2 times" in report.skipped["norms.2"]
    assert {row.name for row in report.rows} == {"norms.1", "norms.3", "factor"}, (
        "relu passes factors on, flip moves them"
    )
    assert torch.equal(model.read.weight, values["read.weight"])
    flipped = fold_scales(model, ids, fmt="mxfp4")._folds
    assert all(torch.equal(f.pair.columns, torch.arange(31, -1, -1)) for f in flipped if f.pair.name == "factor")


def test_refusals(ids) -> None:
    model = qnoise.patch_model(tiny_model().requires_grad_(False), "mxfp4")
    for arguments, match in (
        ({"fmt": "mxfp4"}, "leave fmt and act_fmt out"),
        ({"alphas": (0.0,)}, "alpha is 0.0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
    ):
        with pytest.raises(ValueError, match=match):
            fold_scales(model, ids, **arguments)
    with pytest.raises(ValueError, match="inputs holds no batch"):
        fold_scales(model, [])
    with pytest.raises(ValueError, match="give fmt="):
        fold_scales(tiny_model(), ids)
    linear = model.model.layers[0].mlp.down_proj
    linear.pin(linear.quantized())
    with pytest.raises(ValueError, match=r"down_proj: its codes are pinned .*Fold first"):
        fold_scales(model, ids)
    linear.pin(None)
    report = fold_scales(model, ids)
    linear.pin(linear.quantized())
    with pytest.raises(ValueError, match="pinned"):
        report.undo()
    static = qnoise.PatchConfig("nvfp4", "nvfp4", act_amax=8.0)
    report = fold_scales(qnoise.patch_model(tiny_model(), config=static), ids)
    assert not report.rows
    assert all("static" in why for why in report.skipped.values())
