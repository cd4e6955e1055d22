import warnings

import pytest
import torch
from torch import nn

import qnoise
from patching import assert_same, logits, snapshot
from qnoise.nn import weight_cache
from qnoise.rl import rollout_weights
from ranks import run_ranks
from tiny_models import tiny_model, with_lora

KINDS = [("qwen2", True), ("qwen2", False), ("gemma2", True), ("phi3", False), ("gpt_neox", False)]


@pytest.fixture(autouse=True)
def no_unexpected_warnings():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="qnoise|test_rl_weights")
        yield


def noisy(model, sigma=0.05, target="rmsnorm", fmt="mxfp4", **arguments):
    model = qnoise.patch_model(model, fmt, noise=target, **arguments)
    qnoise.NoiseScheduler(model, qnoise.schedules.Constant(sigma), total_steps=10, seed=4).step()
    return model


def received(weights, architecture="qwen2", missing=(), **overrides):
    """A stock model, other weights at first, after it has loaded what was sent."""
    receiver = tiny_model(architecture, seed=5, **overrides)
    outcome = receiver.load_state_dict(dict(weights), strict=False)
    assert outcome.unexpected_keys == []
    assert tuple(outcome.missing_keys) == tuple(missing)
    return receiver


def trained(model):
    """Every adapter matrix and every copy moved away from where it started."""
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens")):
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model.eval()


@pytest.mark.parametrize(("architecture", "tied"), KINDS)
@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_a_stock_model_becomes_the_policy_bit_for_bit(architecture, tied, fmt, ids):
    stock = tiny_model(architecture, tie_word_embeddings=tied)
    clean = logits(stock, ids)
    model = qnoise.patch_model(stock, fmt) if architecture == "gpt_neox" else noisy(stock, fmt=fmt)
    with qnoise.phase(model, "rollout"):
        weights = list(rollout_weights(model))
        want = logits(model, ids)
    left_out = ("lm_head.weight",) if tied else ()
    receiver = received(weights, architecture, left_out, tie_word_embeddings=tied)
    assert torch.equal(logits(receiver, ids), want)
    assert (want - clean).abs().max() > 1e-2, "the policy is not the stock model"
    assert [name for name, _ in weights] == [name for name in receiver.state_dict() if name not in left_out]


def test_what_acts_now(ids):
    """Noise only where the phase has it, quantization only where it is on."""
    stock = tiny_model()
    raw = {name: p.clone() for name, p in stock.named_parameters()}
    model = noisy(stock)
    with qnoise.phase(model, "evaluation"):
        still = dict(rollout_weights(model))
        assert torch.equal(logits(received(still.items()), ids), logits(model, ids))
    with qnoise.full_precision(model):
        assert all(torch.equal(tensor, raw[name]) for name, tensor in rollout_weights(model))
    shaken = dict(rollout_weights(model))
    changed = {name for name in raw if not torch.equal(shaken[name], still[name])}
    assert changed == {name for name in raw if "norm" in name}
    quantized = {name for name in raw if not torch.equal(still[name], raw[name])}
    assert quantized == {name for name in raw if "_proj.weight" in name}


def test_noise_on_linear_weights(ids):
    model = noisy(tiny_model(), target="linear")
    want = logits(model, ids)
    assert torch.equal(logits(received(rollout_weights(model)), ids), want)
    with qnoise.quiet(model):
        assert not torch.equal(logits(model, ids), want)


def lora(model, *, second=None, **first):
    from peft import LoraConfig

    model = with_lora(model, **first)
    if second is not None:
        arguments = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        model.add_adapter("second", LoraConfig(**{**arguments, **second}))
        model.base_model.set_adapter(["default", "second"])
    return trained(model)


@pytest.mark.parametrize(
    "adapters",
    [
        {},
        {"use_rslora": True, "r": 8},
        {"use_dora": True},
        {"lora_bias": True},
        {"second": {}},
        {"use_dora": True, "second": {}},
        {"lora_bias": True, "second": {"use_dora": True}},
        {"lora_bias": True, "bias": "lora_only"},
        {"target_modules": ["query_key_value", "embed_in"]},
        {"target_modules": ["query_key_value"], "modules_to_save": ["embed_out", "input_layernorm"]},
        {"target_modules": ["query_key_value"], "trainable_token_indices": {"embed_in": [3, 4, 5, 6, 7, 50]}},
    ],
    ids=str,
)
def test_adapters_are_merged_as_trained(adapters, ids):
    """gpt_neox: its linears have biases to add to."""
    model = lora(qnoise.patch_model(tiny_model("gpt_neox"), "mxfp4"), **adapters)
    want = logits(model, ids)
    got = logits(received(rollout_weights(model), "gpt_neox"), ids)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    with model.disable_adapter():
        assert (logits(model, ids) - want).abs().max() > 1e-2


def test_a_transposed_weight(ids):
    """GPT-2 stores (in, out)."""
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    model = lora(tiny_model("gpt2", **sizes), target_modules=["c_attn", "c_proj"], use_dora=True, fan_in_fan_out=True)
    receiver = received(rollout_weights(model), "gpt2", ("lm_head.weight",), **sizes)
    torch.testing.assert_close(logits(receiver, ids), logits(model, ids), rtol=0, atol=1e-5)


def test_noise_and_adapter_together(ids):
    model = lora(noisy(tiny_model()))
    with qnoise.phase(model, "rollout"):
        want = logits(model, ids)
        got = logits(received(rollout_weights(model)), ids)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_adapters_left_to_the_engine(ids):
    model = lora(qnoise.patch_model(tiny_model(), "mxfp4"))
    base = received(rollout_weights(model, merge_adapters=False))
    with model.disable_adapter():
        want = logits(model, ids)
        assert torch.equal(logits(base, ids), want)
        assert torch.equal(logits(received(rollout_weights(model)), ids), want), "disabled adapters are not added"
    model.merge_adapter()
    merged = received(rollout_weights(model))
    assert torch.equal(logits(merged, ids), logits(model, ids)), "what is merged already is not added again"
    with pytest.raises(ValueError, match=r"q_proj: merge_adapters=False asks for the base alone, but .* is merged"):
        rollout_weights(model, merge_adapters=False)
    with (
        model.disable_adapter(),
        pytest.raises(ValueError, match=r"q_proj: the adapters are disabled, but .* is merged"),
    ):
        rollout_weights(model)


def test_raw_weights_for_an_engine_that_quantizes(ids):
    stock = tiny_model()
    raw = {name: p.clone() for name, p in stock.named_parameters()}
    model = noisy(stock)
    for name, tensor in rollout_weights(model, quantized=False):
        assert torch.equal(tensor, raw[name]) != ("norm" in name), name
    model = lora(model)
    with qnoise.quiet(model):
        with pytest.warns(
            UserWarning, match=r"gives W \+ BA \(14 weights, model.layers.0.self_attn.q_proj.weight among"
        ):
            weights = rollout_weights(model, quantized=False)
        got = logits(received(weights), ids)
    with qnoise.full_precision(model):
        torch.testing.assert_close(got, logits(model, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_noise_that_16_bits_would_swallow_is_announced(dtype):
    """The share is that of channels whose noisy weight rounds back. The norms come in fp32: nothing is lost yet."""
    model = tiny_model() if dtype else tiny_model().bfloat16()
    model = noisy(model, sigma=1e-3)
    norms = {name for name, _ in model.named_parameters() if "norm" in name}
    with pytest.warns(UserWarning, match=r"stores norm weights in bfloat16 loses (\d+\.\d)% of the noise") as caught:
        weights = dict(rollout_weights(model, dtype=dtype))
    assert len(caught) == 1
    noise = torch.cat([weights[name] for name in norms])
    assert noise.dtype == torch.float32
    assert noise.unique().numel() > 300
    lost = (noise.bfloat16() == 1.0).float().mean().item()
    assert 0.9 < lost < 1.0
    assert f"{lost:.1%}" in str(caught[0].message)
    assert {weights[name].dtype for name in weights if name not in norms} == {torch.bfloat16}


def test_no_alarm_where_nothing_is_lost():
    dict(rollout_weights(noisy(tiny_model(), sigma=1e-3)))  # an fp32 receiver
    model = noisy(tiny_model().bfloat16())
    with qnoise.phase(model, "evaluation"):
        assert {tensor.dtype for _, tensor in rollout_weights(model)} == {torch.bfloat16}


def test_quantized_inputs_are_announced():
    model = qnoise.patch_model(tiny_model(), "mxfp4", act_fmt="mxfp8_e4m3")
    with pytest.warns(
        UserWarning, match=r"14 linears quantize their input .* model.layers.0.self_attn.q_proj among them"
    ):
        rollout_weights(model)
    with qnoise.full_precision(model):
        rollout_weights(model)
    rollout_weights(model, quantized=False)


@pytest.mark.parametrize("wrap", [lambda model: model, lora], ids=["plain", "peft"])
def test_nothing_in_the_model_changes(wrap, ids):
    model = wrap(noisy(tiny_model()))
    logits(model, ids)  # a noisy norm keeps its draw
    model.train()
    before = snapshot(model)
    for _, tensor in rollout_weights(model):
        assert not tensor.requires_grad
        assert torch.is_grad_enabled(), "the iteration leaves the caller's grad mode alone"
    assert_same(before, snapshot(model))


def test_no_second_copy_of_the_model_stays_behind():
    model = qnoise.patch_model(tiny_model(), "mxfp4")
    for _ in rollout_weights(model):
        pass
    assert sum(weight_cache.cached_nbytes(p) for p in model.parameters()) == 0


def test_wrapped_models(ids):
    model = noisy(tiny_model())
    want = dict(rollout_weights(model))
    parallel = nn.Module()
    parallel.module = model  # as DistributedDataParallel has it
    compiled = nn.Module()
    compiled._orig_mod = model  # as torch.compile has it
    for wrapped in (parallel, compiled, lora(model)):
        got = dict(rollout_weights(wrapped, merge_adapters=False))
        assert list(got) == list(want)
        assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize(
    "wrap", [lambda model: model, lora, lambda m: lora(m, use_dora=True)], ids=["", "lora", "dora"]
)
def test_packed_weights(wrap, ids):
    model = wrap(qnoise.patch_model(tiny_model().requires_grad_(False), "nvfp4", storage="packed"))
    want = logits(model, ids)
    torch.testing.assert_close(logits(received(rollout_weights(model)), ids), want, rtol=0, atol=1e-5)
    with pytest.raises(
        ValueError, match=r"q_proj\.weight: quantized=False asks for the raw weight, but the module keeps"
    ):
        rollout_weights(model, quantized=False)


class Packed(nn.Module):
    """Codes in a buffer, no weight."""

    def __init__(self, weight):
        super().__init__()
        self.register_parameter("weight", None)
        self.register_buffer("codes", weight.byte())
        self.bias = nn.Parameter(torch.ones(2))

    def effective_weight(self):
        return 2.0 * self.codes


def test_duck_typed_modules():
    packed = nn.Sequential(Packed(torch.eye(2)), nn.BatchNorm1d(2))
    weights = dict(rollout_weights(packed))
    assert list(weights) == ["0.weight", "0.bias", *(f"1.{key}" for key in nn.BatchNorm1d(2).state_dict())]
    assert torch.equal(weights["0.weight"], 2 * torch.eye(2))
    with pytest.raises(ValueError, match=r"0\.weight: quantized=False asks for the raw weight, but the module keeps"):
        rollout_weights(packed, quantized=False)
    packed[1].noise_state = dict
    with pytest.raises(ValueError, match=r"1: a BatchNorm1d has noise_state\(\) but no effective_weight\(\)"):
        rollout_weights(packed)


def test_the_noise_must_stay_until_the_end():
    model = noisy(tiny_model())
    with qnoise.phase(model, "rollout"):
        weights = rollout_weights(model)
        next(weights)
    dict(weights)  # training has the same noise
    weights = rollout_weights(model)
    with (
        qnoise.phase(model, "evaluation"),
        pytest.raises(
            RuntimeError, match=r"input_layernorm.weight: the noise of its module was .*'active': True.* now"
        ),
    ):
        dict(weights)


def tie_apart(kind):
    model = tiny_model(tie_word_embeddings=True)
    if kind == "quantized":
        return qnoise.patch_model(model, "mxfp4", include=["lm_head"])
    if kind == "adapter":
        return lora(model, target_modules=["embed_tokens"])
    return lora(model, target_modules=["q_proj"], modules_to_save=["embed_tokens"])


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("kind", ["quantized", "adapter", "copy"])
def test_tied_weights_that_differ(kind):
    with pytest.raises(
        ValueError, match=r"model.embed_tokens.weight and lm_head.weight are one parameter of the stock model"
    ):
        rollout_weights(tie_apart(kind))


def refused(kind):
    import peft

    model = tiny_model()
    if kind == "another tuner":
        return peft.get_peft_model(model, peft.LoHaConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    if kind == "prompt":
        return peft.get_peft_model(model, peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    if kind == "no bias":
        return lora(model, target_modules=["down_proj"], lora_bias=True)
    if kind == "embedding dora":
        return lora(model, target_modules=["embed_tokens"], use_dora=True)
    if kind == "meta":
        return model.to("meta")
    if kind == "codes":
        del model.lm_head.weight
        model.lm_head.weight = nn.Parameter(torch.zeros(4, 1, dtype=torch.uint8), requires_grad=False)
        return model
    return nn.ModuleDict({"_fsdp_wrapped_module": nn.ParameterDict({"_flat_param": torch.zeros(3)})})


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "another tuner",
            r"layers.0.self_attn.q_proj: adapter 'default' is a Linear of peft.tuners.loha.*merge_adapters=",
        ),
        ("embedding dora", r"embed_tokens: adapter 'default' is a DoraEmbeddingVariant of peft"),
        ("prompt", r"PeftModelForCausalLM holds a learned prompt"),
        (
            "no bias",
            r"layers.0.mlp.down_proj: adapter 'default' has a bias \(lora_bias=True\), but the stock module has none",
        ),
        ("meta", r"model.embed_tokens.weight: its values are not in memory \(meta device"),
        ("codes", r"lm_head.weight: it is stored as torch.uint8 by another quantization library \(Linear\)"),
        ("flat", r"_flat_param: FSDP1 keeps the weights in flat pieces"),
    ],
)
def test_bad_input(kind, message):
    with pytest.raises(ValueError, match=message):
        rollout_weights(refused(kind))


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8])
def test_dtype_that_cannot_hold_weights(dtype):
    with pytest.raises(TypeError, match=f"dtype must be a floating-point torch.dtype or None, got {dtype!r}"):
        rollout_weights(tiny_model(), dtype=dtype)


def test_noise_before_quantization_cannot_be_raw():
    model = noisy(tiny_model(), target="linear")
    with pytest.raises(
        ValueError, match=r"q_proj.weight: noise acts on it before it is quantized, and quantized=False"
    ):
        rollout_weights(model, quantized=False)
    with qnoise.quiet(model):
        rollout_weights(model, quantized=False)


def _sharded(rank: int, world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    model = lora(noisy(tiny_model(), fmt="nvfp4"))
    want = {name: tensor.clone() for name, tensor in rollout_weights(model)}
    inner = model.get_base_model()
    for block in inner.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for _ in range(2):  # before the first forward, and again
        got = dict(rollout_weights(model))
        assert list(got) == list(want)
        assert all(torch.equal(got[name], want[name]) for name in want)
    assert all(hasattr(p, "full_tensor") for p in model.parameters()), "sharded again"


@pytest.mark.slow
def test_fully_sharded(tmp_path):
    run_ranks(_sharded, 2, tmp_path / "meet", 2)
