"""Presets: task, model and recipe of a run, as values."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from benchmarks.recovery.choices import find, hint, refuse


@dataclass(frozen=True)
class Preset:
    """Task, model and recipe of a run. The defaults are the report's: DAPO with LoRA, noise in ten stages."""

    name: str
    task: str  # "words" or "walks" (generated), or "gsm8k" (a data set)
    model: str  # folder or hub name; "{checkpoint}" stands for seed modulo `checkpoints`
    checkpoints: int = 1
    data: str = ""  # folder with train.jsonl and test.jsonl, one JSONL file, or a hub name
    split: str = "test"  # stream that accuracy is measured on: "test", or "dev" while choosing settings
    eval_problems: int = 1000
    initial_problems: int = 0  # evaluated before RL; 0: as many as after it
    sampled_evaluation: bool = False  # also one sample a problem at temperature 1
    instruction: str = ""  # appended to every question

    steps: int = 29
    prompts_per_step: int = 128
    num_generations: int = 8
    generation_rounds: int = 1  # turns of sampling, each of as many prompts as informative groups are lacking
    max_new_tokens: int = 1024
    temperature: float = 1.0
    reward: str = "strict"  # "strict" asks for `#### N`, "flexible" for the last number
    overlong_buffer: int = 256
    overlong_penalty: float = 0.5

    clip_ratio_low: float = 0.2
    clip_ratio_high: float = 0.25
    loss_agg_mode: str = "token-mean"
    mini_batches: int = 1  # optimizer steps per rollout
    micro_batch: int = 16  # sequences per forward and backward
    generation_batch: int = 256  # sequences generated at a time

    lora_rank: int = 32
    lora_alpha: int = 16
    lr: float = 1e-5
    lr_decay: str = "constant"  # after the warm-up: "constant" or "linear" to zero
    warmup: int = 10  # steps
    max_grad_norm: float = 1.0

    sigma_start: float = 0.01
    sigma_end: float = 0.0001
    noise_stages: int = 10
    entropy_target: float = 0.2  # of the arms whose sigma follows the entropy, nats per token
    sigma_max: float = 0.1

    dtype: str = "float32"  # of the frozen base
    gradient_checkpointing: bool = False
    threads: int = 1  # of the CPU; part of the settings, because sums depend on it
    save_every: int = 1  # steps between checkpoints of a run

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            refuse(f"preset {self.name!r}", name, getattr(self, name), allowed)
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"preset {self.name!r}: {name} is {getattr(self, name)!r}; it must be at least 1")

    def lr_at(self, step: int) -> float:
        """Linear warm-up over `warmup` steps, then constant, or linear to zero at the end."""
        if step < self.warmup:
            return self.lr * ((step + 1) / self.warmup)
        if self.lr_decay == "constant":
            return self.lr
        return self.lr * ((self.steps - step) / max(1, self.steps - self.warmup))

    def changed(self, **fields: Any) -> Preset:
        """A copy with other values; unknown names and values of the wrong type raise ValueError."""
        known = {field.name: type(getattr(self, field.name)) for field in dataclasses.fields(self)}
        for name, value in fields.items():
            if name not in known:
                raise ValueError(
                    f"a preset has no field {name!r}{hint(name, known)}; the fields are {', '.join(known)}"
                )
            fields[name] = _convert(name, value, known[name])
        return dataclasses.replace(self, **fields)


_CHOICES = {
    "task": ("words", "walks", "gsm8k"),
    "split": ("test", "dev"),
    "reward": ("strict", "flexible"),
    "lr_decay": ("constant", "linear"),
    "loss_agg_mode": ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"),
    "dtype": ("float32", "bfloat16"),
}
_AT_LEAST_ONE = (
    "checkpoints", "eval_problems", "steps", "prompts_per_step", "num_generations", "generation_rounds",
    "max_new_tokens", "mini_batches", "micro_batch", "generation_batch", "lora_rank", "threads", "save_every",
)  # fmt: skip

TINY_WORDS = Preset(
    name="tiny-words",
    task="words",
    model="checkpoints/words-{checkpoint}",
    checkpoints=3,
    eval_problems=1000,
    steps=20,
    prompts_per_step=32,
    max_new_tokens=44,
    overlong_buffer=6,
    mini_batches=2,
    micro_batch=64,
    lora_rank=8,
    lora_alpha=16,
    lr=1e-3,
    lr_decay="linear",
    warmup=2,
)
GSM8K = Preset(
    name="gsm8k-qwen2.5-1.5b",
    task="gsm8k",
    model="Qwen/Qwen2.5-1.5B-Instruct",
    data="openai/gsm8k",
    instruction='Let\'s think step by step and output the final answer after "####".',
    eval_problems=1319,
    generation_rounds=2,
    dtype="bfloat16",
    gradient_checkpointing=True,
    save_every=5,
)
PRESETS = {preset.name: preset for preset in (TINY_WORDS, GSM8K)}


def preset(name: str) -> Preset:
    return find("preset", name, PRESETS)


def _convert(name: str, value: Any, kind: type) -> Any:
    """Text from a command line, or a value, as `kind`."""
    if kind is bool and isinstance(value, str):
        if value.lower() not in ("true", "false"):
            raise ValueError(f"{name} is {value!r}; it must be true or false")
        return value.lower() == "true"
    if isinstance(value, str) or (kind is float and type(value) is int):
        try:
            return kind(value)
        except ValueError:
            raise ValueError(f"{name} is {value!r}; it must be of type {kind.__name__}") from None
    if type(value) is not kind:
        raise ValueError(f"{name} is {value!r}; it must be of type {kind.__name__}")
    return value
