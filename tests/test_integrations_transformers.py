"""`NoiseCallback` in real runs of `transformers.Trainer` and TRL's `GRPOTrainer`, and the file beside a checkpoint."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import qnoise
from qnoise.config import NoiseConfig, PatchConfig
from qnoise.config_file import FILE_NAME, config_from_dict, config_to_dict, read_config, write_config
from qnoise.integrations.transformers import LOG_KEY, NoiseCallback
from qnoise.schedules import Linear, StagedExponential
from tests.tiny_models import tiny_model, with_lora

SCHEDULE = Linear(0.5, 0.1)


def batches(count: int = 16) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(3, 99, (count, 8), generator=torch.Generator().manual_seed(3))
    return [{"input_ids": row, "labels": row} for row in ids]


def patched(noise: str | NoiseConfig = "rmsnorm", **overrides):
    model = qnoise.patch_model(tiny_model("qwen2"), fmt="mxfp4", noise=noise, **overrides)
    return model.requires_grad_(False)


def arguments(directory: Path, **overrides) -> TrainingArguments:
    given = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 5,
    }
    return TrainingArguments(output_dir=str(directory), **{**given, **overrides})


class Recorder(TrainerCallback):
    """What acts in each forward, and what a reporting integration is told."""

    def __init__(self, model) -> None:
        self.forwards: list[tuple[bool, str, float, int]] = []
        self.reported: list[dict] = []
        norm = next(m for m in model.modules() if hasattr(m, "noise_state"))
        while not norm._qnoise.noise_during:
            norm = next(m for m in model.modules() if hasattr(m, "noise_state") and m._qnoise.noise_during)
        norm.register_forward_pre_hook(lambda module, _: self.note(module))

    def note(self, module) -> None:
        record = module._qnoise
        self.forwards.append((module.training, record.phase, record.sigma, record.noise.step))

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.reported.append(dict(logs))


def trained(model, tmp_path, callback, *more, **overrides) -> Trainer:
    resume = overrides.pop("resume", None)
    trainer = Trainer(
        model,
        arguments(tmp_path, **overrides),
        train_dataset=batches(),
        eval_dataset=batches(4),
        callbacks=[*more, callback],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_step_of_the_trainer_is_a_generation(tmp_path) -> None:
    model = with_lora(patched())
    callback, recorder = NoiseCallback(SCHEDULE, seed=3), Recorder(model)
    trainer = trained(model, tmp_path, callback, recorder, gradient_accumulation_steps=2, max_steps=4)
    assert [(phase, step) for _, phase, _, step in recorder.forwards] == [
        ("training", k) for k in (0, 0, 1, 1, 2, 2, 3, 3)
    ]
    assert [sigma for _, _, sigma, _ in recorder.forwards[::2]] == [SCHEDULE(k / 4) for k in range(4)]
    # Reporters stand before a user's callbacks, and are told all the same.
    told = [logs[LOG_KEY] for logs in recorder.reported if "loss" in logs]
    assert told == [SCHEDULE(k / 4) for k in range(4)]
    assert [logs[LOG_KEY] for logs in trainer.state.log_history if "loss" in logs] == told
    # The trainer's own methods are back, and so is the phase.
    assert not {"train", "generate", "_qnoise_phases"} & set(model.get_base_model().__dict__)
    assert qnoise.state(model)["phase"] == "training"


def test_evaluation_is_quantized_and_free_of_noise(tmp_path) -> None:
    model = with_lora(patched())
    recorder = Recorder(model)
    trained(model, tmp_path, NoiseCallback(SCHEDULE), recorder, eval_strategy="steps", eval_steps=2, max_steps=4)
    evaluating = [each for each in recorder.forwards if not each[0]]
    assert len(evaluating) >= 2
    assert {(phase, sigma) for _, phase, sigma, _ in evaluating} == {("evaluation", 0.0)}
    assert all(phase == "training" and sigma > 0 for mode, phase, sigma, _ in recorder.forwards if mode)
    assert qnoise.state(model)["formats"] == {"mxfp4": 14}


@pytest.mark.parametrize("restore", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, restore: bool) -> None:
    whole, parts = with_lora(patched()), with_lora(patched())
    saving = {"save_strategy": "steps", "save_steps": 3, "restore_callback_states_from_checkpoint": restore}
    trained(whole, tmp_path / "whole", NoiseCallback(SCHEDULE, seed=9), **saving)
    trained(parts, tmp_path / "parts", NoiseCallback(SCHEDULE, seed=9), **saving)
    again = with_lora(patched())
    recorder = Recorder(again)
    trained(
        again, tmp_path / "parts", NoiseCallback(SCHEDULE, seed=9), recorder,
        resume=str(tmp_path / "parts" / "checkpoint-3"), **saving,
    )  # fmt: skip
    assert [step for *_, step in recorder.forwards] == [3, 4, 5]
    for (name, a), (_, b) in zip(whole.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_another_schedule_cannot_take_over(tmp_path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    trained(with_lora(patched()), tmp_path, NoiseCallback(SCHEDULE), **saving)
    with pytest.raises(ValueError, match="the state was saved with schedule="):
        trained(
            with_lora(patched()),
            tmp_path,
            NoiseCallback(Linear(0.2, 0.1)),
            resume=str(tmp_path / "checkpoint-3"),
            **saving,
        )
    own = NoiseCallback(lambda progress: 0.1)
    with pytest.raises(ValueError, match="restore_callback_states_from_checkpoint=False"):
        NoiseCallback(**own.state()["args"])


def test_checkpoints_are_clean_and_say_how_they_were_patched(tmp_path) -> None:
    model = patched()
    model.requires_grad_(True)
    trained(model, tmp_path, NoiseCallback(SCHEDULE), save_strategy="steps", save_steps=6)
    directory = tmp_path / "checkpoint-6"
    plain = AutoModelForCausalLM.from_pretrained(directory)
    assert type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear
    weights = dict(model.named_parameters())
    assert all(torch.equal(value, weights[name]) for name, value in plain.named_parameters())
    again = qnoise.patch_model(plain, config=directory)
    ids = torch.arange(3, 20)[None]
    with qnoise.phase(model.eval(), "evaluation"), torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model(ids).logits)


def test_a_model_without_noise_is_refused(tmp_path) -> None:
    model = with_lora(qnoise.patch_model(tiny_model("qwen2").requires_grad_(False), fmt="mxfp4"))
    with pytest.raises(ValueError, match="no module of the model is noisy"):
        trained(model, tmp_path, NoiseCallback(SCHEDULE))


# TRL ------------------------------------------------------------------------------------------------------------------


def grpo(model, tmp_path, *callbacks, **overrides):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(99)}, unk_token="w3"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2")
    given = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    return trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [
            sum(int(word[1:]) for word in text.split()) / 99 for text in completions
        ],
        args=trl.GRPOConfig(output_dir=str(tmp_path), **{**given, **overrides}),
        train_dataset=Dataset.from_dict({"prompt": ["w5 w6", "w7 w8 w9"] * 8}),
        processing_class=tokenizer,
        callbacks=list(callbacks),
    )


@pytest.mark.slow
@pytest.mark.parametrize("during", [("rollout", "training"), ("rollout",)])
def test_a_rollout_of_grpo_keeps_its_noise(tmp_path, during) -> None:
    model = with_lora(patched(NoiseConfig(during=during)))
    callback, recorder = NoiseCallback(SCHEDULE), Recorder(model)
    # Two optimizer steps, each twice over the same rollout.
    trainer = grpo(model, tmp_path, recorder, callback, num_iterations=2)
    before = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
    trainer.train()
    phases = [(phase, step) for _, phase, _, step in recorder.forwards]
    assert {step for _, step in phases} == {0, 1}
    order = list(dict.fromkeys(phases))
    assert order == [("rollout", 0), ("training", 0), ("rollout", 1), ("training", 1)]
    for _, phase, sigma, step in recorder.forwards:
        assert sigma == (SCHEDULE(step / 2) if phase in during else 0.0)
    assert any(not torch.equal(value, before[name]) for name, value in model.named_parameters() if name in before)
    assert [logs[LOG_KEY] for logs in recorder.reported if "loss" in logs] == [SCHEDULE(k / 2) for k in (0, 0, 1, 1)]


@pytest.mark.slow
def test_a_quantized_head_that_trl_bypasses_is_refused(tmp_path) -> None:
    model = patched(include=("*_proj", "lm_head"))
    assert "mxfp4" in str(model.lm_head)
    trainer = grpo(with_lora(model, target_modules=["q_proj"]), tmp_path, NoiseCallback(SCHEDULE))
    with pytest.raises(
        ValueError, match="lm_head is quantized, but this trainer computes its loss from lm_head.weight"
    ):
        trainer.train()


# The file beside a checkpoint -----------------------------------------------------------------------------------------

CONFIGS = [
    PatchConfig(),
    PatchConfig({"*": "nvfp4", "*.down_proj": None}, act_fmt="nvfp4", act_amax={"*": 3.0}, layers=(0, 1)),
    PatchConfig(qnoise.QuantSpec("mxfp4", "even", "stochastic"), noise=NoiseConfig("linear", during=("rollout",))),
    PatchConfig(None, noise="rmsnorm", exclude=("lm_head",), share_scales=False),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_config_survives_json(config: PatchConfig) -> None:
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_saving_and_unpatching(tmp_path) -> None:
    model = tiny_model("qwen2")
    stock = set(model.__dict__)
    qnoise.patch_model(model, fmt="nvfp4", noise="rmsnorm")
    model.save_pretrained(tmp_path / "a")
    assert read_config(tmp_path / "a") == PatchConfig("nvfp4", noise="rmsnorm")
    # Copies write of themselves.
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.__dict__["save_pretrained"].model is twin
    wrapped = with_lora(model)
    write_config(wrapped, tmp_path / "adapter")
    assert (tmp_path / "adapter" / FILE_NAME).read_text() == (tmp_path / "a" / FILE_NAME).read_text()
    plain = qnoise.unpatch_model(wrapped.unload())
    assert set(plain.__dict__) == stock
    with pytest.raises(ValueError, match="the model is not patched"):
        write_config(plain, tmp_path)


def test_a_damaged_file_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="save_pretrained of a patched model"):
        qnoise.patch_model(tiny_model(), config=tmp_path)
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "holds a list"),
        ('{"schema": 9}', "reads schema 1"),
        ('{"fmtt": null}', "Did you mean 'fmt'"),
        ('{"noise": {"durin": []}}', "Did you mean 'during'"),
    ):
        (tmp_path / FILE_NAME).write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            read_config(tmp_path)
        assert FILE_NAME in str(caught.value)


def test_staged_decay_is_rebuilt_from_plain_values() -> None:
    callback = NoiseCallback(StagedExponential(1e-2, 1e-4, 10), seed=4, multipliers={0: 0.5, "model.norm": 2.0})
    twin = NoiseCallback(**json.loads(json.dumps(callback.state()["args"])))
    assert (twin.schedule, twin.seed, twin.multipliers) == (callback.schedule, 4, callback.multipliers)
