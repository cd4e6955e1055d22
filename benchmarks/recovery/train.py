"""The trainer: DAPO on a patched, LoRA-adapted language model, composed of the library's parts.

One step: the scheduler sets the noise, groups of responses are sampled, rewarded and compared with their group,
uninformative groups are dropped, and a few optimizer steps are taken on the rest. The same code runs the tiny preset
on a CPU core and the real one on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import qnoise
from benchmarks.environment import peak_memory_mb
from benchmarks.recovery.arms import Arm
from benchmarks.recovery.batch import Batch
from benchmarks.recovery.build import build_model
from benchmarks.recovery.data import load_examples
from benchmarks.recovery.evaluate import evaluate
from benchmarks.recovery.noises import Accumulating, noise_of
from benchmarks.recovery.presets import Preset
from benchmarks.recovery.runs import Run
from benchmarks.recovery.sample import sample
from qnoise import rl
from qnoise.repairs.cost import stored_bits

if TYPE_CHECKING:
    from peft import PeftModel

ADAM_BETAS = (0.9, 0.99)


def train(run: Run, *, resume: bool = False, on_step: Callable[[int], None] = lambda step: None) -> dict[str, Any]:
    """Do one run from step 0, or from its last checkpoint, and return its result line.

    Log lines go to `run.log_path` as they come. Accuracy is measured at step 0 and at the end.
    """
    preset, arm, seed = run.preset, run.arm, run.seed
    began = time.process_time()
    torch.set_num_threads(preset.threads)
    training, held_out = load_examples(preset, seed)
    model, tokenizer, preparation = build_model(run)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=preset.lr, betas=ADAM_BETAS, weight_decay=0.0)
    noise = noise_of(model, preset, arm, seed)
    around = noise.applied if isinstance(noise, Accumulating) else nullcontext

    def measure(step: int) -> None:
        problems = held_out[: preset.initial_problems or None] if step == 0 else held_out
        for temperature in (0.0, 1.0) if preset.sampled_evaluation else (0.0,):
            with around():
                result = evaluate(
                    model,
                    tokenizer,
                    problems,
                    max_new_tokens=preset.max_new_tokens,
                    instruction=preset.instruction,
                    batch_size=preset.generation_batch,
                    temperature=temperature,
                    seed=seed,
                )
            run.log_evaluation(step, result, sampled=temperature > 0)

    start = run.begin(model, optimizer, noise, resume=resume)
    on_step(start)
    if start == 0:
        measure(0)
    for step in range(start, preset.steps):
        clock = time.perf_counter(), time.process_time()
        if noise is not None:
            noise.step(entropy=_last_entropy(run) if arm.noise == "entropy" else None)
        batch, metrics = sample(model, tokenizer, training, preset, arm, seed, step, around)
        metrics |= update(model, optimizer, batch, preset, seed, step, arm)
        metrics["sigma"] = noise.sigma if noise is not None else 0.0
        metrics["seconds"] = time.perf_counter() - clock[0]
        metrics["cpu_seconds"] = time.process_time() - clock[1]
        run.log_step(step + 1, metrics)
        if (step + 1) % preset.save_every == 0 or step + 1 == preset.steps:
            run.save(step + 1, model, optimizer, noise)
        on_step(step + 1)
    measure(preset.steps)
    return run.finish(
        trainable_parameters=sum(parameter.numel() for parameter in trainable),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        peak_memory_mb=peak_memory_mb(),
        bits_per_weight=stored_bits(model) if arm.fmt else 16.0,
        prepare_seconds=preparation.seconds,
        prepare_tokens=preparation.tokens,
        cpu_seconds=time.process_time() - began,
    )


def _last_entropy(run: Run) -> float | None:
    """Of the last step in the log, where a resumed run finds it too."""
    steps = [row for row in run.rows() if row["event"] == "step"]
    return steps[-1]["entropy"] if steps else None


def update(
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    batch: Batch | None,
    preset: Preset,
    seed: int,
    step: int,
    arm: Arm,
) -> dict[str, float]:
    """`mini_batches` optimizer steps on one batch; the log-probabilities before them are the old ones."""
    lr = preset.lr_at(step)
    for group in optimizer.param_groups:
        group["lr"] = lr
    if batch is None:  # every group was all right or all wrong: nothing to learn from
        return {"lr": lr, "trained_samples": 0.0}
    metrics = {"lr": lr, "trained_samples": float(len(batch)), "clip_fraction": 0.0, "ppo_kl": 0.0, "grad_norm": 0.0}
    everything = torch.arange(len(batch), device=batch.ids.device)
    with qnoise.phase(model, "training"):
        with torch.no_grad():
            for rows in batch.pieces(everything, preset.micro_batch):
                log_prob = _log_probs(model, batch.rows(rows), preset)[0]
                batch.old_log_prob[rows, : log_prob.shape[1]] = log_prob
        mismatch = rl.mismatch_metrics(batch.old_log_prob, batch.rollout_log_prob, batch.response_mask)
        metrics["mismatch_kl"] = mismatch["k3"].item()
        metrics["mismatch_abs"] = mismatch["log_ratio_abs_mean"].item()

        order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(1_000_003 * seed + step))
        for mini in order.to(batch.ids.device).tensor_split(preset.mini_batches):
            tokens = batch.response_mask[mini].sum()
            for rows in batch.pieces(mini, preset.micro_batch):
                piece = batch.rows(rows)
                log_prob, logits = _log_probs(model, piece, preset)
                weights = None
                if arm.importance_weights:
                    weights = rl.rollout_is_weights(piece.old_log_prob, piece.rollout_log_prob, piece.response_mask)
                loss, loss_metrics = rl.dapo_loss(
                    log_prob,
                    piece.old_log_prob,
                    piece.advantages,
                    piece.response_mask,
                    clip_ratio_low=preset.clip_ratio_low,
                    clip_ratio_high=preset.clip_ratio_high,
                    loss_agg_mode=preset.loss_agg_mode,
                    rollout_is_weights=weights,
                    num_items_in_batch=tokens if preset.loss_agg_mode == "token-mean" else len(mini),
                )
                if arm.keep_distilling:
                    loss = loss + arm.keep_distilling * _divergence(model, piece, logits) / tokens
                loss.backward()
                share = (piece.response_mask.sum() / batch.response_mask.sum()).item()
                metrics["clip_fraction"] += share * loss_metrics["actor/pg_clipfrac"].item()
                metrics["ppo_kl"] += share * loss_metrics["actor/ppo_kl"].item()
            trainable = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            norm = torch.nn.utils.clip_grad_norm_(trainable, preset.max_grad_norm)
            metrics["grad_norm"] = max(metrics["grad_norm"], norm.item())
            optimizer.step()
            optimizer.zero_grad()
    return metrics


def _log_probs(model: Any, batch: Batch, preset: Preset) -> tuple[Tensor, Tensor]:
    """(N, T) log-probabilities of the response tokens under the model as it is now, and the (N, T, V) logits."""
    logits = _logits(model, batch)
    return rl.token_log_probs(logits, batch.ids[:, -batch.response_mask.shape[1] :], preset.temperature)[0], logits


def _logits(model: Any, batch: Batch) -> Tensor:
    return model(
        input_ids=batch.ids,
        attention_mask=batch.mask.long(),
        position_ids=batch.position_ids,
        logits_to_keep=batch.response_mask.shape[1] + 1,
        use_cache=False,
    ).logits[:, :-1]


def _divergence(model: Any, batch: Batch, logits: Tensor) -> Tensor:
    """KL(full-precision base || policy), summed over the response tokens."""
    with torch.no_grad(), qnoise.full_precision(model), qnoise.quiet(model), model.disable_adapter():
        teacher = _logits(model, batch)
    kept = batch.response_mask.bool()
    log_q, log_p = (each[kept].float().log_softmax(-1) for each in (logits, teacher))
    return (log_p.exp() * (log_p - log_q)).sum()
