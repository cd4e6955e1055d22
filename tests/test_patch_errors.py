"""Bad requests: the message names what is wrong, and the model is as it was."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

import qnoise
from patching import assert_same, logits, manually_quantized, snapshot
from qnoise.nn import FakeQuantLinear
from tiny_models import tiny_model, with_lora


def _foreign_forward(model: nn.Module) -> None:
    up = model.model.layers[1].mlp.up_proj
    up.forward = types.MethodType(lambda self, x: nn.functional.linear(x, self.weight), up)


CONFIGS = {
    "act_amax of a format without a per-tensor scale": {"act_fmt": "mxfp4", "act_amax": 3.0},
    "negative act_amax": {"act_fmt": "nvfp4", "act_amax": {"q_proj": -1.0}},
    "act_amax of nothing": {"act_fmt": "nvfp4", "act_amax": {"q_prj": 1.0}},
}


def patch(model: nn.Module, arguments: dict) -> None:
    if arguments.get("config") in CONFIGS:
        arguments = {"config": qnoise.PatchConfig(**CONFIGS[arguments["config"]])}
    qnoise.patch_model(model, **arguments)


BAD = [
    ({"fmt": "mxfp44"}, ValueError, r"'mxfp44'.*mxfp4, .*Did you mean 'mxfp4'"),
    ({"fmt": 4}, TypeError, "fmt is 4"),
    ({"fmt": {}}, ValueError, "empty plan"),
    ({"fmt": {"q_prj": "mxfp4"}}, ValueError, "fmt names 'q_prj', which matches no linear"),
    ({"act_fmt": "nvfp5"}, ValueError, "'nvfp5'.*nvfp4"),
    ({"storage": "packt"}, ValueError, "'packt'"),
    ({"noise": "rms"}, ValueError, "'rms'.*'rmsnorm', 'linear'.*Did you mean 'rmsnorm'"),
    ({"noise": 0.1}, TypeError, "noise is 0.1"),
    (
        {"include": "q_prj"},
        ValueError,
        "include names 'q_prj', which matches no linear or norm.*Did you mean 'q_proj'.*model.layers.0",
    ),
    ({"exclude": ["o_prj"]}, ValueError, "exclude names 'o_prj'"),
    (
        {"layers": [7]},
        ValueError,
        "layers names 7, and there is no such layer in Qwen2ForCausalLM: it has layers 0 to 1",
    ),
    ({"noise": qnoise.NoiseConfig(layers=2)}, ValueError, "noise layers names 2.*it has layers 0 to 1"),
    ({"layers": ["1"]}, ValueError, "layer indices"),
    ({"exclude": "*"}, ValueError, "no linear of Qwen2ForCausalLM would be quantized.*excluded"),
    ({"fmt": None}, ValueError, "nothing to patch"),
    ({"config": "act_amax of a format without a per-tensor scale"}, ValueError, "no per-tensor scale to fix"),
    ({"config": "negative act_amax"}, ValueError, "act_amax of 'q_proj' is -1.0; it must be a positive number"),
    ({"config": "act_amax of nothing"}, ValueError, "act_amax names 'q_prj'.*Did you mean 'q_proj'"),
    ({"storage": "cached", "config": qnoise.PatchConfig()}, ValueError, "config= and other arguments"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=lambda v: str(v)[:40])
def test_bad_arguments(arguments, error, message) -> None:
    model = tiny_model()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        patch(model, arguments)
    assert_same(before, snapshot(model))


def test_noise_on_a_model_without_rms_norms() -> None:
    model = tiny_model("gpt_neox")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"noise on 'rmsnorm'.*GPTNeoXForCausalLM.*LayerNorm.*noise='linear'"):
        qnoise.patch_model(model, noise="rmsnorm")
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("phases", [(), ("evaluation",), ("rolout",)])
def test_noise_phases(phases) -> None:
    with pytest.raises(ValueError, match="during"):
        qnoise.NoiseConfig(during=phases)


def test_not_a_module() -> None:
    with pytest.raises(TypeError, match=r"model is a str; patch_model takes a torch\.nn\.Module"):
        qnoise.patch_model("Qwen/Qwen2.5-1.5B")


def test_a_model_without_linears() -> None:
    with pytest.raises(ValueError, match="It has no linears and no norms"):
        qnoise.patch_model(nn.Conv1d(1, 1, 1))


def test_a_foreign_bound_forward_is_refused_by_name(ids) -> None:
    model = tiny_model()
    _foreign_forward(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: its forward was replaced.*exclude="):
        qnoise.patch_model(model)
    assert_same(before, snapshot(model))
    qnoise.patch_model(model, exclude="layers.1.mlp.up_proj")
    logits(model, ids)


def test_a_failure_half_way_leaves_the_model_as_it_was(monkeypatch) -> None:
    model = tiny_model()
    before = snapshot(model)
    real, calls = qnoise.patch.convert, []

    def fails(module, *args):
        calls.append(module)
        if len(calls) == 6:
            raise RuntimeError("half way")
        real(module, *args)

    monkeypatch.setattr("qnoise.patch.convert", fails)
    with pytest.raises(RuntimeError, match="half way"):
        qnoise.patch_model(model, noise="rmsnorm")
    assert len(calls) == 6
    assert_same(before, snapshot(model))


def test_a_sharded_weight_is_refused_by_name(tmp_path) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = tiny_model()
        fully_shard(model)
        with pytest.raises(ValueError, match=r"q_proj\.weight is sharded already.*patch_model -> PEFT -> fully_shard"):
            qnoise.patch_model(model)
        assert not any(isinstance(m, FakeQuantLinear) for m in model.modules())
    finally:
        dist.destroy_process_group()


def test_summary_of_an_unpatched_model() -> None:
    with pytest.raises(ValueError, match="Qwen2ForCausalLM is not patched"):
        qnoise.summary(tiny_model())


class Linear4bit(nn.Linear):
    """Stands in for bitsandbytes' class of the same name."""


class QuantLinear(nn.Module):
    """Stands in for GPTQ's: packed integers, no `weight`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(in_features // 8, out_features, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(*x.shape[:-1], self.qweight.shape[1])


Linear4bit.__module__ = "bitsandbytes.nn.modules"
QuantLinear.__module__ = "gptqmodel.nn_modules.qlinear.torch"


class OwnLinear(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


def test_linears_of_other_libraries_are_skipped_with_the_reason(ids) -> None:
    model = tiny_model()
    mlp = model.model.layers[0].mlp
    mlp.up_proj, mlp.gate_proj = Linear4bit(64, 96, bias=False), OwnLinear(64, 96, bias=False)
    model.model.layers[1].mlp.up_proj = QuantLinear(64, 96)
    uint8 = nn.Linear(96, 64, bias=False)
    uint8.weight = nn.Parameter(torch.zeros(64, 96, dtype=torch.uint8), requires_grad=False)
    mlp.down_proj = uint8
    qnoise.patch_model(model)
    skipped = qnoise.summary(model).skipped
    assert skipped["model.layers.0.mlp.up_proj"] == "already quantized by bitsandbytes (Linear4bit)"
    assert skipped["model.layers.1.mlp.up_proj"] == "already quantized by gptqmodel (QuantLinear)"
    assert "no exact nn.Linear" in skipped["model.layers.0.mlp.gate_proj"]
    assert "torch.uint8" in skipped["model.layers.0.mlp.down_proj"]
    assert sum(isinstance(m, FakeQuantLinear) for m in model.modules()) == 10


def test_what_is_no_known_kind_of_linear_is_listed() -> None:
    class ScaledLinear(torch.nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = torch.nn.Sequential(ScaledLinear(32, 32))
    with pytest.raises(ValueError, match=r"no linear of Sequential.*ScaledLinear is no exact nn.Linear"):
        qnoise.patch_model(model)


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("hooks_first", [True, False])
def test_accelerate_offloading(fmt, hooks_first, ids) -> None:
    """Weights live outside the modules between forwards, and the hooks keep bound forwards: both orders run right."""
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    model = tiny_model()
    stock = logits(model, ids)
    expected = logits(qnoise.patch_model(tiny_model(), fmt, noise="rmsnorm"), ids)
    if hooks_first:
        cpu_offload(model, execution_device=torch.device("cpu"))
    qnoise.patch_model(model, fmt, noise="rmsnorm")
    if not hooks_first:
        cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(logits(model, ids), expected)
    assert not torch.equal(expected, stock)
    qnoise.NoiseScheduler(model, qnoise.schedules.Constant(0.1), 10).step()
    assert not torch.equal(logits(model, ids), expected)
    qnoise.unpatch_model(model)
    assert torch.equal(logits(model, ids), stock)
    qnoise.patch_model(model, fmt)
    remove_hook_from_module(model, recurse=True)
    assert torch.equal(logits(model, ids), expected)
    qnoise.unpatch_model(model)
    assert torch.equal(logits(model, ids), stock)


@pytest.mark.parametrize("way", ["disk_offload", "dispatch_model"])
@pytest.mark.parametrize(("storage", "hooks_first"), [("auto", True), ("auto", False), ("packed", False)])
def test_weights_on_disk(way, storage, hooks_first, ids, tmp_path) -> None:
    from accelerate import disk_offload, dispatch_model

    def frozen():
        return tiny_model(num_hidden_layers=1).requires_grad_(False)

    def offload(model) -> None:
        if way == "disk_offload":
            disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
        else:
            places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
            places["model.layers.0"] = "disk"
            dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)

    expected = logits(qnoise.patch_model(frozen(), "nvfp4", storage=storage), ids)
    model = frozen()
    if hooks_first:
        offload(model)
    qnoise.patch_model(model, "nvfp4", storage=storage)
    if not hooks_first:
        offload(model)
    for _ in range(2):
        assert torch.equal(logits(model, ids), expected)
    if storage == "auto":
        assert torch.equal(logits(qnoise.unpatch_model(model), ids), logits(frozen(), ids))


def test_device_map(ids, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    tiny_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto").eval()
    qnoise.patch_model(model)
    assert torch.equal(logits(model, ids), logits(manually_quantized(tiny_model(), "mxfp4"), ids))


def test_offloaded_peft_model(ids) -> None:
    from accelerate import cpu_offload

    expected = logits(qnoise.patch_model(with_lora(tiny_model()), "nvfp4"), ids)
    model = with_lora(tiny_model())
    cpu_offload(model, execution_device=torch.device("cpu"))
    qnoise.patch_model(model, "nvfp4")
    assert torch.equal(logits(model, ids), expected)
