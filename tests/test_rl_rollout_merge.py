"""LoRA merged for the length of a rollout: the same samples, from one product a linear, and nothing left behind."""

import pytest
import torch
from peft import LoraConfig

import qnoise
from qnoise.rl import generate_groups, rollout_merge
from qnoise.rl.rollout_merge import adapters_merged
from tiny_models import tiny_model, with_lora

PROMPTS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14, 15, 16, 17]]


class Tokenizer:
    pad_token_id, eos_token_id = 0, 2

    def batch_decode(self, rows, skip_special_tokens):
        return ["" for _ in rows]


def sample(model, **arguments):
    return generate_groups(model, Tokenizer(), PROMPTS, 4, max_new_tokens=10, seed=3, **arguments)


def adapted(fmt=None, dtype=torch.float32, lora=None, **patching):
    model = tiny_model().to(dtype)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(8.0)
    if fmt:
        qnoise.patch_model(model, fmt=fmt, **patching)
    return with_lora(model, **(lora or {}))


def layers_of(model):
    return [module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "base_layer")]


def merged_layers(model, wanted=True):
    """How many layers compute with a merged weight inside."""
    with torch.no_grad(), adapters_merged(model, wanted):
        inside = sum("forward" in layer.__dict__ for layer in layers_of(model))
    assert not any("forward" in module.__dict__ for module in model.modules())
    return inside


@pytest.mark.parametrize("fmt", [None, "mxfp4", "nvfp4"])
@pytest.mark.parametrize("engine", ["generate", "continuous"])
def test_the_samples_are_those_of_the_adapter_beside_the_base(fmt, engine):
    model = adapted(fmt)
    apart, merged, chosen = (sample(model, engine=engine, merge_adapters=wanted) for wanted in (False, True, None))
    assert torch.equal(apart.response_ids, merged.response_ids)
    assert torch.equal(chosen.rollout_log_probs, merged.rollout_log_probs)
    torch.testing.assert_close(apart.rollout_log_probs, merged.rollout_log_probs, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():  # the adapter does say something
        assert not torch.equal(sample(model).response_ids, merged.response_ids)


def test_decoding_calls_no_adapter_and_no_base_and_leaves_no_trace():
    model = adapted("mxfp4")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = next(layer for layer in layers_of(model))
    calls = []
    plain = type(first.base_layer).forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(first.base_layer), "forward", lambda self, x: calls.append(self) or plain(self, x))
        sample(model, merge_adapters=True)
        assert not calls
        sample(model, merge_adapters=False)
        assert calls
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert merged_layers(model) == len(layers_of(model)) == 14
    input = torch.randn(2, first.in_features)
    first(input).sum().backward()  # training goes on through the adapter
    assert first.lora_A["default"].weight.grad.abs().sum() > 0


def test_the_weight_of_now_is_merged_and_all_is_as_before_after_an_error():
    model = adapted("nvfp4")
    first = layers_of(model)[0]
    with pytest.raises(KeyboardInterrupt), torch.no_grad(), adapters_merged(model, True):
        raise KeyboardInterrupt
    assert not any("forward" in module.__dict__ for module in model.modules())
    input = torch.randn(3, first.in_features)
    with torch.no_grad():
        for change in (lambda: None, lambda: first.lora_B["default"].weight.mul_(-3), lambda: model.set_adapter("two")):
            if "two" not in model.peft_config:
                model.add_adapter("two", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
            change()
            want = first(input)
            with adapters_merged(model, True):
                torch.testing.assert_close(first(input), want, rtol=1e-5, atol=1e-5)


def test_noise_on_the_weights_is_in_the_merged_weight():
    model = adapted("mxfp4", noise=qnoise.NoiseConfig("linear", during="rollout"))
    qnoise.NoiseScheduler(model, qnoise.schedules.Constant(0.1), total_steps=4).step()
    with qnoise.phase(model, "rollout"):
        apart, merged = (sample(model, merge_adapters=wanted) for wanted in (False, True))
    assert torch.equal(apart.response_ids, merged.response_ids)
    torch.testing.assert_close(apart.rollout_log_probs, merged.rollout_log_probs, rtol=1e-5, atol=1e-5)


def test_sixteen_bits_and_large_copies_are_merged_on_request_only(monkeypatch):
    half = adapted("mxfp4", torch.bfloat16)
    assert (merged_layers(half, None), merged_layers(half, True)) == (0, 14)
    model = adapted("mxfp4")
    assert (merged_layers(model, None), merged_layers(model, False)) == (14, 0)
    monkeypatch.setattr(rollout_merge, "SMALL", 1000)
    assert (merged_layers(model, None), merged_layers(model, True)) == (0, 14)


def hooked(model):
    layers_of(model)[0].base_layer.register_forward_hook(lambda *_: None)
    return model


def disabled(model):
    model.base_model.disable_adapter_layers()
    return model


@pytest.mark.parametrize(
    ("make", "left"),
    [
        (lambda: adapted("mxfp4", act_fmt="mxfp4"), 14),
        (lambda: adapted("mxfp4", lora={"use_dora": True}), 14),
        (lambda: adapted(lora={"lora_bias": True, "target_modules": ["q_proj"]}), 2),
        (lambda: disabled(adapted("nvfp4")), 14),
        (lambda: hooked(adapted("mxfp4")), 1),
    ],
    ids=["quantized inputs", "DoRA", "bias", "disabled", "a hook"],
)
def test_what_computes_more_is_left_as_it_is(make, left):
    model = make()
    assert merged_layers(model) == len(layers_of(model)) - left
    apart, merged = (sample(model, merge_adapters=wanted) for wanted in (False, True))
    assert torch.equal(apart.response_ids, merged.response_ids)


def test_under_autocast_and_compiled_nothing_is_merged():
    model = adapted("mxfp4")
    with torch.autocast("cpu", torch.bfloat16):
        assert merged_layers(model) == 0
    with torch.no_grad(), adapters_merged(torch.compile(model, backend="eager"), True):
        assert not any("forward" in layer.__dict__ for layer in layers_of(model))


def test_a_model_without_adapters_is_left_alone():
    model = tiny_model()
    with adapters_merged(model, True):
        assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("value", ["yes", 1, 0.5])
def test_anything_but_a_bool_or_none_is_refused(value):
    with pytest.raises(TypeError, match="merge_adapters is .*; it must be True, False or None"):
        sample(adapted(), merge_adapters=value)
