"""Settings: the report's are the defaults, and nothing misspelt passes."""

import pytest

from benchmarks.recovery.arms import ARMS, DEMO_ARMS, arm
from benchmarks.recovery.presets import GSM8K, TINY_WORDS, preset


def test_the_real_preset_has_the_settings_of_the_report():
    assert (GSM8K.clip_ratio_low, GSM8K.clip_ratio_high, GSM8K.loss_agg_mode) == (0.2, 0.25, "token-mean")
    assert (GSM8K.num_generations, GSM8K.prompts_per_step, GSM8K.steps) == (8, 128, 29)
    assert (GSM8K.lora_rank, GSM8K.lora_alpha, GSM8K.lr, GSM8K.warmup) == (32, 16, 1e-5, 10)
    assert (GSM8K.max_new_tokens, GSM8K.overlong_buffer, GSM8K.overlong_penalty) == (1024, 256, 0.5)
    assert (GSM8K.sigma_start, GSM8K.sigma_end, GSM8K.noise_stages) == (0.01, 0.0001, 10)
    for name in ("clip_ratio_low", "clip_ratio_high", "sigma_start", "sigma_end", "noise_stages", "num_generations"):
        assert getattr(TINY_WORDS, name) == getattr(GSM8K, name)


def test_noise_is_in_the_rollout_alone_in_the_demo():
    assert [ARMS[name].noise_during for name in DEMO_ARMS] == [(), (), (), ("rollout",)]
    assert [ARMS[name].sampling_stream for name in DEMO_ARMS] == [0, 0, 1, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: preset("tiny-word"),
            r"no preset 'tiny-word', did you mean 'tiny-words'\?; there are tiny-words, gsm8k",
        ),
        (lambda: arm("mxfp4+nose"), r"no arm 'mxfp4\+nose', did you mean 'mxfp4\+noise'\?; there are bf16, mxfp4"),
        (lambda: TINY_WORDS.changed(stepz=3), r"no field 'stepz', did you mean 'steps'\?; the fields are name, task"),
        (lambda: TINY_WORDS.changed(steps="many"), "steps is 'many'; it must be of type int"),
        (lambda: TINY_WORDS.changed(steps=1.5), "steps is 1.5; it must be of type int"),
        (lambda: TINY_WORDS.changed(steps=0), "steps is 0; it must be at least 1"),
        (
            lambda: TINY_WORDS.changed(gradient_checkpointing="yes"),
            "gradient_checkpointing is 'yes'; it must be true or",
        ),
        (
            lambda: TINY_WORDS.changed(reward="strikt"),
            "reward is 'strikt'; it must be one of strict, flexible, did you",
        ),
    ],
)
def test_errors_name_the_value_what_is_allowed_and_the_nearest(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_fields_are_changed_from_text_and_from_values():
    changed = TINY_WORDS.changed(steps="3", lr="0.5", gradient_checkpointing="true", sigma_start=1)
    assert (changed.steps, changed.lr, changed.gradient_checkpointing, changed.sigma_start) == (3, 0.5, True, 1.0)
    assert TINY_WORDS.steps != 3
