"""`NoiseCallback` in real runs of `transformers.Trainer` and TRL's `GRPOTrainer`, and the file beside a checkpoint."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from types import MethodType, SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import qnoise
from qnoise.config import NoiseConfig, PatchConfig
from qnoise.config_file import FILE_NAME, config_from_dict, config_to_dict, read_config, write_config
from qnoise.integrations.transformers import LOG_KEY, NoiseCallback
from qnoise.schedules import EntropyTarget, Linear, StagedExponential
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


def test_the_last_step_of_an_epoch_may_be_shorter(tmp_path) -> None:
    model = with_lora(patched())
    recorder = Recorder(model)
    # 8 batches an epoch in steps of 3: 3, 3 and 2
    accumulating = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 3}
    trained(model, tmp_path, NoiseCallback(SCHEDULE), recorder, **accumulating)
    assert [step for *_, step in recorder.forwards] == [0] * 3 + [1] * 3 + [2] * 2 + [3] * 3 + [4] * 3 + [5] * 2
    assert recorder.forwards[-1][2] == SCHEDULE(5 / 6)


def test_evaluation_is_quantized_and_free_of_noise(tmp_path) -> None:
    model = with_lora(patched())
    recorder = Recorder(model)
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    trainer = trained(model, tmp_path, NoiseCallback(SCHEDULE), recorder, **evaluated)
    during = len(recorder.forwards)
    last = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line][-1]
    assert trainer.evaluate()["eval_loss"] == last
    assert {sigma for _, _, sigma, _ in recorder.forwards[during:]} == {0.0}
    del recorder.forwards[during:]
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


def test_the_best_checkpoint_is_loaded_into_the_patched_model(tmp_path) -> None:
    model = patched()
    model.requires_grad_(True)
    often = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 3}
    trainer = trained(
        model,
        tmp_path,
        NoiseCallback(SCHEDULE),
        load_best_model_at_end=True,
        learning_rate=0.3,
        lr_scheduler_type="constant",
        **often,
    )
    losses = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    assert trainer.state.best_metric == min(losses) != losses[-1]
    # Q(W) of the weights that were loaded, not of those that were trained last
    assert trainer.evaluate()["eval_loss"] == min(losses)


def test_a_saved_adapter_says_how_its_base_was_patched(tmp_path) -> None:
    from peft import PeftModel

    model = with_lora(patched())
    trainer = trained(model, tmp_path / "run", NoiseCallback(SCHEDULE), max_steps=2)
    trainer.save_model(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    base = qnoise.patch_model(tiny_model("qwen2"), config=tmp_path / "adapter")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)


class Averaged(TrainerCallback):
    """An exponential moving average of the weights in a copy of the model, as users write it."""

    def __init__(self) -> None:
        self.twin = None

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
        self.twin = self.twin or torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)
        self.twin.update_parameters(model)


def test_an_averaged_copy_is_clean_and_checkpointing_sees_the_same_noise(tmp_path) -> None:
    ids = torch.arange(3, 20)[None]
    results = []
    for checkpointing in (False, True):
        model, averaged = patched(), Averaged()
        model.requires_grad_(True)
        trained(model, tmp_path, NoiseCallback(SCHEDULE), averaged, max_steps=3, gradient_checkpointing=checkpointing)
        twin = averaged.twin.module
        clean = tiny_model("qwen2")
        clean.load_state_dict(twin.state_dict())
        qnoise.patch_model(clean, fmt="mxfp4")
        with torch.no_grad():
            # Copied in the middle of the run, it follows its own mode.
            assert torch.equal(twin.eval()(ids).logits, clean(ids).logits)
            assert not torch.equal(twin.train()(ids).logits, clean(ids).logits)
        results.append([*model.parameters(), *twin.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_sampling_in_continuous_batches_is_a_rollout(tmp_path, monkeypatch) -> None:
    model = with_lora(patched())
    inner, seen = model.get_base_model(), []

    def generate_batch(self, ids):
        # As transformers does: into eval mode, and the caller puts it back.
        self.eval()
        return self(ids)

    class Samples(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            for training in (True, False):
                inner.train(training)
                start = len(recorder.forwards)
                inner.generate_batch(torch.arange(3, 9)[None])
                seen.append({(phase, sigma > 0) for _, phase, sigma, _ in recorder.forwards[start:]})
            inner.train()

    monkeypatch.setattr(type(inner), "generate_batch", generate_batch)
    recorder = Recorder(model)
    trained(model, tmp_path, NoiseCallback(SCHEDULE), Samples(), max_steps=1)
    assert seen == [{("rollout", True)}, {("evaluation", False)}]


def test_what_cannot_work_is_refused_when_training_begins(tmp_path) -> None:
    quiet = with_lora(qnoise.patch_model(tiny_model("qwen2").requires_grad_(False), fmt="mxfp4"))
    for model in (quiet, with_lora(tiny_model("qwen2").requires_grad_(False))):
        with pytest.raises(ValueError, match="no module of the model is noisy; patch it with qnoise.patch_model"):
            trained(model, tmp_path, NoiseCallback(SCHEDULE))
    with pytest.raises(ValueError, match="more than one NoiseCallback"):
        trained(with_lora(patched()), tmp_path, NoiseCallback(SCHEDULE), NoiseCallback(SCHEDULE))
    with pytest.raises(ValueError, match="EntropyTarget needs the entropy, and this trainer logs none"):
        trained(with_lora(patched()), tmp_path, NoiseCallback(EntropyTarget(2.0, 0.01)))


def test_kernels_that_go_round_a_patch_are_refused() -> None:
    head = patched(include=("*_proj", "lm_head"))
    state = SimpleNamespace(max_steps=3, global_step=0)

    def begin(model, **given) -> None:
        args = SimpleNamespace(gradient_accumulation_steps=1, **given)
        NoiseCallback(SCHEDULE).on_train_begin(args, state, None, model=model)

    with pytest.raises(ValueError, match="fused_linear_cross_entropy"):
        begin(head, use_liger_kernel=True)
    begin(head, use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": False})
    begin(head, use_liger_kernel=False)

    class LigerRMSNorm(torch.nn.Module):
        def forward(self, x):
            return x

    model = patched()
    begin(model, use_liger_kernel=True)
    norm = model.model.layers[1].input_layernorm
    norm.forward = MethodType(LigerRMSNorm.forward, norm)
    with pytest.raises(ValueError, match=r"model.layers.1.input_layernorm: after patching.*LigerRMSNorm.*rms_norm"):
        begin(model, use_liger_kernel=True)


@pytest.mark.slow
def test_compiled_training(tmp_path) -> None:
    results = []
    for compiled in (False, True):
        model = with_lora(patched())
        recorder = Recorder(model) if not compiled else None
        trainer = trained(
            model,
            tmp_path,
            NoiseCallback(SCHEDULE),
            *[recorder][: not compiled],
            torch_compile=compiled,
            torch_compile_backend="aot_eager" if compiled else None,
            max_steps=4,
        )
        results.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert results[0] == pytest.approx(results[1], abs=1e-5)


# TRL ------------------------------------------------------------------------------------------------------------------


TRL_ARGUMENTS = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}


def dataset(**columns):
    from datasets import Dataset

    return Dataset.from_dict(columns)


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(99)}, unk_token="w3"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2")


def grpo(model, tmp_path, *callbacks, **overrides):
    trl = pytest.importorskip("trl")
    given = {
        **TRL_ARGUMENTS,
        "max_steps": 4,
        "num_generations": 4,
        "max_completion_length": 4,
        "learning_rate": 1e-3,
    }
    return trl.GRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [
            sum(int(word[1:]) for word in text.split()) / 99 for text in completions
        ],
        args=trl.GRPOConfig(output_dir=str(tmp_path), **{**given, **overrides}),
        train_dataset=dataset(prompt=["w5 w6", "w7 w8 w9"] * 8),
        eval_dataset=dataset(prompt=["w5 w6"] * 4),
        processing_class=tokenizer(),
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
def test_steps_that_share_a_rollout_and_batches_that_share_a_step(tmp_path) -> None:
    model = with_lora(patched())
    callback, recorder = NoiseCallback(SCHEDULE), Recorder(model)
    # 4 batches from a rollout, gone through twice, 2 of them to an optimizer step: 4 steps a generation; evaluation
    # samples in between.
    counts = {"steps_per_generation": 4, "num_iterations": 2, "gradient_accumulation_steps": 2}
    evaluating = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}
    trainer = grpo(model, tmp_path, recorder, callback, max_steps=6, **counts, **evaluating)
    trainer.train()
    training = [(phase, step) for mode, phase, _, step in recorder.forwards if mode]
    assert list(dict.fromkeys(training)) == [("rollout", 0), ("training", 0), ("rollout", 1), ("training", 1)]
    assert [logs[LOG_KEY] for logs in recorder.reported if "loss" in logs] == [SCHEDULE(0)] * 4 + [SCHEDULE(0.5)] * 2
    evaluated = [(phase, sigma) for mode, phase, sigma, _ in recorder.forwards if not mode]
    assert set(evaluated) == {("evaluation", 0.0)}
    assert len(evaluated) > 3


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [SCHEDULE, EntropyTarget(4.0, 0.1, sigma_max=0.5)], ids=["linear", "entropy"])
def test_a_resumed_run_of_grpo_ends_with_the_same_bits(tmp_path, schedule) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "num_iterations": 2, "max_steps": 6}
    runs = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model = with_lora(patched())
        recorder = Recorder(model)
        grpo(model, tmp_path, recorder, NoiseCallback(schedule, seed=4), **saving).train(resume_from_checkpoint=resume)
        runs.append((model, [(logs[LOG_KEY], logs["entropy"]) for logs in recorder.reported if "loss" in logs]))
    (whole, logged), (again, continued) = runs
    assert continued == logged[2:]
    for (name, a), (_, b) in zip(whole.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    if schedule is not SCHEDULE:
        # Two steps share a generation; the entropy of the one before was logged last.
        first, entropy = logged[0][0], logged[1][1]
        assert logged[2][0] == schedule.after(first, entropy) != first


@pytest.mark.slow
def test_a_run_resumed_in_the_middle_of_a_generation_samples_with_new_noise(tmp_path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "num_iterations": 2, "max_steps": 4}
    with pytest.warns(UserWarning, match="checkpoint-1 was saved in the middle of a generation"):
        grpo(with_lora(patched()), tmp_path, NoiseCallback(SCHEDULE), **saving).train()
    model = with_lora(patched())
    recorder = Recorder(model)
    trainer = grpo(model, tmp_path, recorder, NoiseCallback(SCHEDULE), **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    order = list(dict.fromkeys((phase, step) for _, phase, _, step in recorder.forwards))
    assert order == [("rollout", 1), ("training", 1), ("rollout", 2), ("training", 2)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SFT", "DPO", "KTO", "RLOO"])
def test_other_trainers_of_trl(tmp_path, kind: str) -> None:
    trl = pytest.importorskip("trl")
    columns = {
        "SFT": {"text": ["w5 w6 w7 w8"] * 8},
        "DPO": {"prompt": ["w5 w6"] * 8, "chosen": ["w9 w10"] * 8, "rejected": ["w12 w13"] * 8},
        "KTO": {"prompt": ["w5 w6"] * 8, "completion": ["w9 w10"] * 8, "label": [True, False] * 4},
        "RLOO": {"prompt": ["w5 w6", "w7 w8 w9"] * 4},
    }[kind]
    more = {"num_generations": 4, "max_completion_length": 4} if kind == "RLOO" else {}
    model = with_lora(patched())
    before = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
    recorder = Recorder(model)
    trainer = getattr(trl, f"{kind}Trainer")(
        model=model,
        args=getattr(trl, f"{kind}Config")(output_dir=str(tmp_path), **TRL_ARGUMENTS, **more),
        train_dataset=dataset(**columns),
        processing_class=tokenizer(),
        callbacks=[recorder, NoiseCallback(SCHEDULE)],
        **({"reward_funcs": lambda completions, **_: [len(text) / 9 for text in completions]} if more else {}),
    )
    trainer.train()
    phases = ["rollout", "training"] if kind == "RLOO" else ["training"]
    steps = [(phase, SCHEDULE(k / 2), k) for k in (0, 1) for phase in phases]
    assert list(dict.fromkeys(each[1:] for each in recorder.forwards)) == steps
    assert [logs[LOG_KEY] for logs in recorder.reported if "loss" in logs] == [SCHEDULE(0), SCHEDULE(0.5)]
    assert any(not torch.equal(value, before[name]) for name, value in model.named_parameters() if name in before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["GRPO", "Distillation"])
def test_a_quantized_head_that_trl_bypasses_is_refused(tmp_path, kind: str) -> None:
    trl = pytest.importorskip("trl")
    model = patched(include=("*_proj", "lm_head"))
    assert "mxfp4" in str(model.lm_head)
    model = with_lora(model, target_modules=["q_proj"])
    message = "lm_head is quantized, but this trainer computes its loss from lm_head.weight"
    if kind == "Distillation":
        # It reads the weight without putting a forward on the model; known by its configuration.
        args = trl.DistillationConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[])
        with pytest.raises(ValueError, match=message):
            NoiseCallback(SCHEDULE).on_train_begin(args, SimpleNamespace(max_steps=1), None, model=model)
        return
    trainer = grpo(model, tmp_path, NoiseCallback(SCHEDULE))
    with pytest.raises(ValueError, match=message):
        trainer.train()
    # What is refused: the loss does not see the head that sampling uses.
    inner, ids = model.get_base_model(), torch.arange(3, 20)[None]
    with torch.no_grad():
        fused = inner(ids, labels=ids, fused_lm_head=True).log_probs[0]
        seen = inner(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        with qnoise.full_precision(model.lm_head):
            raw = inner(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    assert torch.allclose(fused, raw, atol=1e-5)
    assert not torch.allclose(fused, seen, atol=1e-3)


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
    plain.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / FILE_NAME).exists()
    with pytest.raises(ValueError, match="the model is not patched"):
        write_config(plain, tmp_path)


def test_saving_a_peft_model_that_was_patched(tmp_path) -> None:
    model = qnoise.patch_model(with_lora(tiny_model("qwen2")), fmt="nvfp4")
    # The third argument of PEFT's own save_pretrained is another one than that of transformers.
    model.save_pretrained(tmp_path / "a", True, None)
    assert read_config(tmp_path / "a") == PatchConfig("nvfp4")
    model.save_pretrained(tmp_path / "b", is_main_process=False)
    assert not (tmp_path / "b" / FILE_NAME).exists()
    # Unpatched from inside, the wrapper does not know of it.
    qnoise.unpatch_model(model.get_base_model())
    model.__dict__.pop("_qnoise_config")
    model.save_pretrained(tmp_path / "c")
    assert (tmp_path / "c" / "adapter_config.json").exists()
    assert not (tmp_path / "c" / FILE_NAME).exists()


def test_a_model_pushed_to_the_hub_has_the_file_beside_the_plain_checkpoint(tmp_path, monkeypatch) -> None:
    from transformers.utils import hub

    model = qnoise.patch_model(tiny_model("qwen2"), fmt="mxfp4")
    pushed: dict[str, str] = {}

    def upload(self, directory, repo_id, **kwargs) -> None:
        shutil.copytree(directory, tmp_path / "pushed")
        pushed["to"] = repo_id

    card = SimpleNamespace(save=lambda path: None)
    monkeypatch.setattr(hub.PushToHubMixin, "_upload_modified_files", upload)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: card)
    monkeypatch.setattr(
        hub,
        "hf_api",
        lambda: SimpleNamespace(create_repo=lambda *a, **k: SimpleNamespace(repo_id="me/it")),
        raising=False,
    )
    model.push_to_hub("me/it")
    assert pushed == {"to": "me/it"}
    assert read_config(tmp_path / "pushed") == PatchConfig("mxfp4")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "pushed")
    assert type(plain.model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_a_damaged_file_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="save_pretrained of a patched model"):
        qnoise.patch_model(tiny_model(), config=tmp_path)
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "holds a list"),
        ('{"schema": 9}', "reads schema 1; a newer version wrote it"),
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
