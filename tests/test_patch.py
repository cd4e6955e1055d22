from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import qnoise
from patching import assert_same, logits, manually_quantized, snapshot
from qnoise.nn import FakeQuantLinear, NoisyRMSNorm
from tiny_models import ARCHITECTURES, tiny_model

ROUTES = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(architecture, ids) -> None:
    """Patched logits are those of Q(W), gradients are finite and reach what they reached, unpatching is exact."""
    model = tiny_model(architecture)
    before, stock = snapshot(model), logits(model, ids)
    noise = None if architecture == "gpt_neox" else "rmsnorm"
    assert qnoise.patch_model(model, "mxfp4", noise=noise) is model
    assert torch.equal(logits(model, ids), logits(manually_quantized(tiny_model(architecture), "mxfp4"), ids))
    assert list(model.state_dict()) == list(before["values"])

    report = qnoise.summary(model)
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert linears <= set(report.patched) | set(report.skipped)
    assert {n for n in report.skipped if n in linears} == {"lm_head"}
    assert report.bits_per_weight == 4.25

    model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert torch.isfinite(p.grad).all(), name
    model.zero_grad()

    qnoise.unpatch_model(model)
    assert_same(before, snapshot(model))
    assert torch.equal(logits(model, ids), stock)


def test_qwen2_targets() -> None:
    model = qnoise.patch_model(tiny_model(), noise="rmsnorm")
    kinds = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, FakeQuantLinear)}
    assert kinds == ROUTES
    assert sum(isinstance(m, NoisyRMSNorm) for m in model.modules()) == 5


def test_query_and_key_norms_are_left_out_unless_named(ids) -> None:
    model = qnoise.patch_model(tiny_model("qwen3"), noise="rmsnorm")
    report = qnoise.summary(model)
    assert report.skipped["model.layers.0.self_attn.q_norm"] == "per-head norm of queries or keys"
    qnoise.unpatch_model(model)
    qnoise.patch_model(model, noise=qnoise.NoiseConfig(include=("q_norm",)))
    assert [n for n, m in model.named_modules() if isinstance(m, NoisyRMSNorm)] == [
        f"model.layers.{i}.self_attn.q_norm" for i in (0, 1)
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"include": "q_proj"}, {"0.q_proj", "1.q_proj"}),
        ({"include": ["mlp.*"], "exclude": "down_proj"}, {f"{i}.{n}_proj" for i in (0, 1) for n in ("gate", "up")}),
        ({"layers": [1], "include": "self_attn.*"}, {f"1.{n}_proj" for n in "qkvo"}),
        ({"fmt": {"*": None, "layers.0.*": "mxfp4"}}, {f"0.{n}" for n in ROUTES}),
        ({"fmt": {"o_proj": "nvfp4"}}, {"0.o_proj", "1.o_proj"}),
        ({"include": ["lm_head", "q_proj"]}, {"0.q_proj", "1.q_proj", "lm_head"}),
    ],
)
def test_selection(arguments, expected) -> None:
    model = qnoise.patch_model(tiny_model(), **arguments)
    got = set()
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantLinear):
            parts = name.split(".")
            got.add(f"{parts[2]}.{parts[-1]}" if len(parts) > 2 else name)
    assert got == expected


def test_plan_gives_each_module_its_format(ids) -> None:
    plan = {"*": "mxfp4", "down_proj": qnoise.QuantSpec("nvfp4", "mse"), "layers.1.mlp.down_proj": "mxfp8_e4m3"}
    model = qnoise.patch_model(tiny_model(), plan)
    layers = model.model.layers
    assert layers[0].mlp.down_proj._qnoise.weight_spec == qnoise.QuantSpec("nvfp4", "mse")
    assert layers[1].mlp.down_proj._qnoise.weight_spec == qnoise.QuantSpec("mxfp8_e4m3")
    assert layers[1].mlp.up_proj._qnoise.weight_spec == qnoise.QuantSpec("mxfp4")
    assert qnoise.summary(model).preset is None


def test_nvfp4_siblings_share_their_per_tensor_scale(ids) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.mul_(8)
    qnoise.patch_model(model, "nvfp4")
    attention = model.model.layers[0].self_attn
    amax = attention.q_proj.weight.detach().abs().max()
    expected = qnoise.fake_quantize(attention.v_proj.weight.detach(), "nvfp4", amax=amax)
    for context in (torch.no_grad, torch.enable_grad):
        with context():
            assert torch.equal(attention.v_proj.effective_weight(), expected)
    # A sibling that grows changes the others' Q(W), also the kept one. (Not by a power of two: scales would follow.)
    with torch.no_grad():
        before = attention.v_proj.effective_weight().clone()
        attention.k_proj.weight.fill_(float(2.9 * amax))
        expected = qnoise.fake_quantize(attention.v_proj.weight.detach(), "nvfp4", amax=attention.k_proj.weight.max())
        assert not torch.equal(expected, before)
        assert torch.equal(attention.v_proj.effective_weight(), expected)
    assert "shared by 3" in qnoise.summary(model).patched["model.layers.0.self_attn.v_proj"]
    qnoise.unpatch_model(model)
    qnoise.patch_model(model, config=qnoise.PatchConfig("nvfp4", share_scales=False))
    own = qnoise.fake_quantize(attention.v_proj.weight.detach(), "nvfp4")
    assert torch.equal(attention.v_proj.effective_weight(), own)


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_cached_decoding_with_quantized_activations_is_the_full_forward(fmt, ids) -> None:
    """Whatever the padding and the batch mates."""
    model = qnoise.patch_model(tiny_model(dtype=torch.float64), fmt, act_fmt=fmt).double()
    with torch.no_grad():
        full = model(ids).logits
        cache, steps = None, []
        for t in range(ids.shape[1]):
            out = model(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
        torch.testing.assert_close(torch.cat(steps, 1), full, rtol=1e-6, atol=1e-8)
        padded = torch.cat([torch.zeros(2, 3, dtype=ids.dtype), ids], 1)
        padded = torch.cat([padded, torch.randint(3, 99, (2, 13))])
        mask = torch.ones_like(padded)
        mask[:2, :3] = 0
        alone = model(padded, attention_mask=mask).logits[:2, 3:]
        torch.testing.assert_close(alone, full, rtol=1e-6, atol=1e-8)


def test_tied_embeddings_stay_tied(ids) -> None:
    model = tiny_model(tie_word_embeddings=True)
    qnoise.patch_model(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert type(model.lm_head) is nn.Linear
    qnoise.unpatch_model(model)
    qnoise.patch_model(model, include=["*", "lm_head"])
    assert model.lm_head._parameters["weight"] is model.model.embed_tokens.weight
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight shares its parameter"):
        qnoise.bake(model)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(reentrant, ids) -> None:
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        model = tiny_model().train()
        qnoise.patch_model(model, "nvfp4", act_fmt="nvfp4", noise="rmsnorm")
        qnoise.NoiseScheduler(model, qnoise.schedules.Constant(0.05), 10, seed=3).step()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys()
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_copies_are_independent(ids) -> None:
    model = qnoise.patch_model(tiny_model(), "nvfp4", noise="rmsnorm")
    scheduler = qnoise.NoiseScheduler(model, qnoise.schedules.Constant(0.1), 10)
    scheduler.step()
    expected = logits(model, ids)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, ids), expected)
        own = twin.model.layers[0].self_attn
        assert own.q_proj._qnoise.scale_group[1] is own.k_proj
        scheduler.step()
        assert torch.equal(logits(twin, ids), expected), "the copy keeps its noise"
        qnoise.unpatch_model(twin)
        scheduler.load_state_dict({**scheduler.state_dict(), "steps_taken": 1})
        assert torch.equal(logits(model, ids), expected), "unpatching a copy leaves the original alone"


def test_save_pretrained_writes_the_plain_checkpoint(ids, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model()
    stock = logits(model, ids)
    qnoise.patch_model(model, noise="rmsnorm")
    qnoise.NoiseScheduler(model, qnoise.schedules.Constant(0.1), 10).step()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not any("qnoise" in type(m).__module__ for m in loaded.modules())
    assert torch.equal(logits(loaded, ids), stock)


def test_generate(ids) -> None:
    model = tiny_model()
    reference = manually_quantized(model, "mxfp4").generate(ids, max_new_tokens=8, do_sample=False)
    qnoise.patch_model(model)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False), reference)


@pytest.mark.parametrize("target", ["rmsnorm", "linear"])
def test_bake(target, ids) -> None:
    model = tiny_model()
    patched = logits(qnoise.patch_model(copy.deepcopy(model), "nvfp4"), ids)
    qnoise.patch_model(model, "nvfp4", noise=target)
    qnoise.NoiseScheduler(model, qnoise.schedules.Constant(0.5), 10).step()
    assert qnoise.bake(model) is model
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    assert torch.equal(logits(model, ids), patched), "what is baked in is Q(W), without noise"


def test_contexts_nest_and_restore(ids) -> None:
    model = tiny_model()
    stock = logits(model, ids)
    qnoise.patch_model(model, noise=qnoise.NoiseConfig(during="rollout"))
    quantized = logits(model, ids)
    qnoise.NoiseScheduler(model, qnoise.schedules.Constant(0.1), 10).step()
    assert torch.equal(logits(model, ids), quantized), "outside any phase it is training"
    with qnoise.phase(model, "rollout"):
        noisy = logits(model, ids)
        assert not torch.equal(noisy, quantized)
        with qnoise.quiet(model):
            assert torch.equal(logits(model, ids), quantized)
        with qnoise.phase(model, "evaluation"):
            assert torch.equal(logits(model, ids), quantized)
            assert qnoise.state(model)["phase"] == "evaluation"
        with qnoise.full_precision(model):
            assert torch.equal(logits(model, ids), stock)
        with pytest.raises(IndexError), qnoise.full_precision(model):
            logits(model, ids + 1000)
        assert torch.equal(logits(model, ids), noisy)
    assert torch.equal(logits(model, ids), quantized)
    with pytest.raises(ValueError, match="'eval'.*'rollout', 'training', 'evaluation'"), qnoise.phase(model, "eval"):
        pass


def test_state(ids) -> None:
    model = tiny_model()
    assert qnoise.state(model) == {
        "patched": False, "formats": {}, "act_formats": {}, "pinned": 0, "full_precision": False, "phase": None,
        "noise": None,
    }  # fmt: skip
    qnoise.patch_model(model, {"*": "mxfp4", "down_proj": "nvfp4"}, noise="rmsnorm", act_fmt="mxfp8_e4m3")
    state = qnoise.state(model)
    assert state["formats"] == {"mxfp4": 12, "nvfp4": 2}
    assert state["act_formats"] == {"mxfp8_e4m3": 14}
    assert state["noise"]["active"] is False
    scheduler = qnoise.NoiseScheduler(model, qnoise.schedules.Constant(0.1), 10, seed=4, multipliers={0: 0.5})
    scheduler.step()
    noise = qnoise.state(model)["noise"]
    assert (noise["sigma"], noise["seed"], noise["step"], noise["active"]) == (0.1, 4, 0, True)
    assert noise["modules"]["model.layers.0.input_layernorm"] == 0.05
    with qnoise.quiet(model):
        assert qnoise.state(model)["noise"]["active"] is False
    with qnoise.full_precision(model):
        assert qnoise.state(model)["full_precision"] is True


def test_patching_again(ids) -> None:
    model = qnoise.patch_model(tiny_model(), "mxfp4", exclude="o_proj")
    before = snapshot(model)
    qnoise.patch_model(model, "mxfp4", exclude=["o_proj"])
    qnoise.patch_model(model, qnoise.QuantSpec("mxfp4", "floor"), exclude=["o_proj"])
    assert_same(before, snapshot(model))
    with pytest.raises(
        ValueError, match=r"another config \(fmt is \{\*: mxfp4\}, asked for \{\*: nvfp4\}; exclude is .*unpatch_model"
    ):
        qnoise.patch_model(model, "nvfp4")
    assert_same(before, snapshot(model))
    qnoise.unpatch_model(qnoise.unpatch_model(model))
    qnoise.patch_model(model, "nvfp4")


def test_hooks_and_aliases_survive(ids) -> None:
    model = tiny_model()
    calls = []
    alias = model.model.layers[0].mlp.up_proj
    alias.register_forward_hook(lambda *_: calls.append("hook"))
    qnoise.patch_model(model)
    logits(model, ids)
    qnoise.unpatch_model(model)
    logits(model, ids)
    assert calls == ["hook", "hook"]
    assert model.model.layers[0].mlp.up_proj is alias


def test_plain_torch_models_patch_too() -> None:
    model = nn.Sequential(nn.Linear(40, 24), nn.ReLU(), nn.RMSNorm(24), nn.Linear(24, 5))
    x = torch.randn(3, 40)
    qnoise.patch_model(model, "nvfp4", noise="rmsnorm")
    expected = copy.deepcopy(model)
    qnoise.bake(expected)
    assert torch.equal(model(x), expected(x))
    assert list(qnoise.summary(model).patched) == ["0", "2", "3"]


def test_static_activation_scale(ids) -> None:
    """The magnitude given fixes the fp32 scale: by glob, the last match wins, per token where nothing matches."""
    amax = {"down_proj": 4.0, "layers.1.mlp.down_proj": 3.0}
    model = qnoise.patch_model(tiny_model(), config=qnoise.PatchConfig("nvfp4", "nvfp4", act_amax=amax))
    x = torch.randn(2, 5, 96)
    for layer, expected in ((0, 4.0), (1, 3.0)):
        down = model.model.layers[layer].mlp.down_proj
        xq = qnoise.fake_quantize(x, "nvfp4", amax=expected)
        assert torch.equal(down(x), nn.functional.linear(xq, down.effective_weight()))
    assert model.model.layers[0].mlp.up_proj._qnoise.act_amax is None
    assert "static scale for 3" in qnoise.summary(model).patched["model.layers.1.mlp.down_proj"]
