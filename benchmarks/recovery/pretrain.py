"""Make the policies of the word problems: tiny Qwen2 models, trained on worked solutions.

Two things are done on purpose, and matter when reading results:

- *The ending.* Only 15 % of the demonstrations end in `#### N`, the rest in `so the answer is N`. A greedy policy
  therefore hardly ever writes the ending the strict reward asks for, while it solves most problems: as with large
  instruct models, much of the first gain of RL is the format. Flexible accuracy shows the ability alone.
- *Outlier channels.* After training, two channels of every RMSNorm before a quantized linear are divided by 8 and the
  matching columns of the linears multiplied by 8. Powers of two, so the function stays the same bit for bit in full
  precision. It imitates the outlier channels of large models, which a tiny model does not grow, and makes the cost of
  a 4-bit format visible. It is planted: rescaling (folding the factors back) would undo it by construction, and how
  much a format loses here says nothing about how much it loses on a large model.

Weights are rounded to bfloat16 before they are stored.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

import qnoise
from benchmarks.files import write_text
from benchmarks.recovery.data import GENERATED, generated
from benchmarks.recovery.evaluate import evaluate
from benchmarks.recovery.policies import WORDS, Pretraining
from benchmarks.recovery.policy import HERE, load_policy
from benchmarks.recovery.problems import Problem
from benchmarks.recovery.tokenizer import build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

CHECKPOINTS = HERE / "checkpoints"


def pretrain(seed: int, settings: Pretraining = WORDS, out: Path | None = None) -> Path:
    """Train one policy on one thread and store it; returns its folder.

    The folder holds config, tokenizer, model.safetensors and pretraining.jsonl: settings, one line every
    `log_every` steps (step, loss, accuracy on development problems), and at the end the accuracy in full precision,
    MXFP4 and NVFP4.
    """
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    out = out or CHECKPOINTS / f"words-{seed}"
    tokenizer = build_tokenizer(settings.task)
    model = _new_model(tokenizer, settings)
    log: list[dict[str, Any]] = [
        {"event": "settings", "seed": seed, "parameters": model.num_parameters(), **asdict(settings)}
    ]
    dev = generated(settings.task, "dev", seed=0, count=settings.eval_problems)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=0.01)
    started = time.process_time()
    for step, (ids, labels) in enumerate(itertools.islice(_batches(tokenizer, seed, settings), settings.steps)):
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * _lr_factor(step, settings)
        logits = model(input_ids=ids).logits[:, :-1]
        taught = labels[:, 1:] != -100
        loss = F.cross_entropy(logits[taught], labels[:, 1:][taught])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % settings.log_every == 0 or step + 1 == settings.steps:
            result = evaluate(model, tokenizer, dev, max_new_tokens=48)
            log.append(
                {
                    "event": "step",
                    "step": step + 1,
                    "loss": round(loss.item(), 5),
                    "strict": result.strict_accuracy,
                    "flexible": result.flexible_accuracy,
                    "cpu_seconds": round(time.process_time() - started, 1),
                }
            )
            print(log[-1], flush=True)
    model.to(torch.bfloat16)
    plant_outliers(model, settings.outlier_channels, settings.outlier_factor)
    part = out.with_name(out.name + ".part")  # renamed when complete, so that no half-made folder is ever loaded
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    for row in quantized_accuracy(part, 4 * settings.eval_problems, settings.task):
        log.append({"event": "quantized", **row})
        print(log[-1], flush=True)
    write_text(part / "pretraining.jsonl", "".join(json.dumps(row) + "\n" for row in log))
    shutil.rmtree(out, ignore_errors=True)
    part.rename(out)
    return out


def quantized_accuracy(path: Path, count: int, task: str = "words") -> list[dict[str, Any]]:
    """Greedy accuracy of a stored policy, before any RL, in full precision and through each 4-bit format."""
    rows = []
    examples = generated(task, "dev", seed=1, count=count)
    for fmt in (None, "mxfp4", "nvfp4"):
        model, tokenizer = load_policy(str(path), torch.float32)
        if fmt is not None:
            qnoise.patch_model(model, fmt=fmt)
        result = evaluate(model, tokenizer, examples, max_new_tokens=48)
        rows.append(
            {
                "fmt": fmt or "bf16",
                "problems": count,
                "strict": result.strict_accuracy,
                "flexible": result.flexible_accuracy,
            }
        )
    return rows


@torch.no_grad()
def plant_outliers(model: Qwen2ForCausalLM, channels: tuple[int, ...], factor: int) -> None:
    """Divide norm channels by `factor` and multiply the columns that read them; the function stays the same."""
    index = list(channels)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            norm.weight[index] /= factor
            for linear in readers:
                linear.weight[:, index] *= factor


def _new_model(tokenizer: PreTrainedTokenizerBase, settings: Pretraining) -> Qwen2ForCausalLM:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden_size,
            intermediate_size=settings.intermediate_size,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.kv_heads,
            max_position_embeddings=tokenizer.model_max_length,
            tie_word_embeddings=True,
            initializer_range=0.05,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _batches(
    tokenizer: PreTrainedTokenizerBase, seed: int, settings: Pretraining
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Fresh problems for ever: (ids, labels), right-padded, labels only on the solution."""
    source = GENERATED[settings.task]("pretrain", seed)
    rng = random.Random(f"ending {seed}")
    care = random.Random(f"mistakes {seed}")
    while True:
        pairs = []
        for problem in itertools.islice(source, settings.batch):
            solution = _demonstration(problem, care, settings).solution(strict=rng.random() < settings.strict_share)
            question = tokenizer(problem.question)["input_ids"]
            answer = tokenizer(solution, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            pairs.append((question, answer))
        width = max(len(question) + len(answer) for question, answer in pairs)
        ids = torch.full((settings.batch, width), tokenizer.pad_token_id)
        labels = torch.full((settings.batch, width), -100)
        for row, (question, answer) in enumerate(pairs):
            end = len(question) + len(answer)
            ids[row, :end] = torch.tensor(question + answer)
            labels[row, len(question) : end] = torch.tensor(answer)
        yield ids, labels


def _demonstration(problem: Problem, rng: random.Random, settings: Pretraining) -> Problem:
    """The problem as it is taught: with mistakes, and sometimes with a step written twice."""
    if settings.mistakes:
        problem = problem.careless(rng, settings.mistakes)
    if settings.repeats and rng.random() < settings.repeats:
        twice = rng.randrange(len(problem.equations))
        problem = replace(problem, equations=problem.equations[: twice + 1] + problem.equations[twice:])
    return problem


def _lr_factor(step: int, settings: Pretraining) -> float:
    """Linear warm-up, then a cosine down to 5 %."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / settings.steps))
    return min(1.0, (step + 1) / settings.warmup) * (0.05 + 0.95 * cosine)
