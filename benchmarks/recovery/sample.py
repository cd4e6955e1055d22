"""One batch of experience: groups sampled, rewarded, compared within the group, and the uninformative ones dropped."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

import qnoise
from benchmarks.recovery.arms import Arm
from benchmarks.recovery.batch import Batch
from benchmarks.recovery.data import Example, prompt_ids
from benchmarks.recovery.presets import Preset
from qnoise import rl

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


def sample(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    training: list[Example],
    preset: Preset,
    arm: Arm,
    seed: int,
    step: int,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> tuple[Batch | None, dict[str, float]]:
    """Generate groups until `prompts_per_step` of them are informative, or the rounds are used up.

    Each round samples as many prompts as informative groups are lacking, inside the context that `around` makes.
    Sampling depends on (seed, sampling stream, step, round) alone, prompts on (seed, step, round): two arms of a seed
    see the same prompts, and a resumed run continues as if it had never stopped.
    """
    parts, seen = [], []
    kept_groups = 0
    for turn in range(preset.generation_rounds):
        first = (step * preset.generation_rounds + turn) * preset.prompts_per_step
        chosen = training[first : first + preset.prompts_per_step - kept_groups]
        with qnoise.phase(model, "rollout"), around():
            rollout = rl.generate_groups(
                model,
                tokenizer,
                [prompt_ids(tokenizer, example, preset.instruction) for example in chosen],
                preset.num_generations,
                max_new_tokens=preset.max_new_tokens,
                temperature=preset.temperature,
                seed=random.Random(f"{seed} {arm.sampling_stream} {step} {turn}").getrandbits(48),
                batch_size=preset.generation_batch,
            )
        answers = [example.answer for example in chosen for _ in range(preset.num_generations)]
        right = {mode: rl.gsm8k_reward(rollout.texts, answers, mode=mode) for mode in ("strict", "flexible")}
        lengths = rollout.lengths.cpu()
        punishment = rl.soft_overlong_punishment(
            lengths, preset.max_new_tokens, preset.overlong_buffer, preset.overlong_penalty
        )
        reward = right[preset.reward] + punishment
        advantages = rl.group_advantages(reward, preset.num_generations)
        keep = rl.informative_groups(right[preset.reward], preset.num_generations)
        index = keep.nonzero().flatten()
        kept_groups += len(index) // preset.num_generations
        parts.append(Batch.of(rollout, advantages).rows(index.to(rollout.response_ids.device)))
        seen.append(
            {
                "strict": right["strict"],
                "flexible": right["flexible"],
                "reward": reward,
                "response_length": lengths.float(),
                "surprise": -rollout.rollout_log_probs.sum(1).cpu(),
                "truncated": rollout.truncated.cpu().float(),
                "informative": keep.float(),
            }
        )
        if kept_groups == preset.prompts_per_step:
            break
    metrics = {name: torch.cat([turn[name] for turn in seen]).mean().item() for name in seen[0]}
    # The mean of -log p over sampled tokens estimates the entropy of the policy that sampled them.
    metrics["entropy"] = metrics.pop("surprise") / metrics["response_length"]
    metrics["samples"] = float(sum(len(turn["reward"]) for turn in seen))
    batch = Batch.join(parts, tokenizer.pad_token_id)
    return (batch if len(batch) else None), metrics
