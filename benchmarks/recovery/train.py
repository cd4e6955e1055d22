"""The trainer: DAPO on a patched, LoRA-adapted language model, composed of the library's parts.

One step: the scheduler sets the noise, groups of responses are sampled, rewarded and compared with their group,
uninformative groups are dropped, and a few optimizer steps are taken on the rest. The same code runs the tiny preset
on a CPU core and the real one on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import qnoise
from benchmarks.environment import peak_memory_mb
from benchmarks.recovery.batch import Batch
from benchmarks.recovery.data import load_examples
from benchmarks.recovery.evaluate import evaluate
from benchmarks.recovery.policy import build_model
from benchmarks.recovery.presets import Preset
from benchmarks.recovery.runs import Run
from benchmarks.recovery.sample import sample
from qnoise import rl

if TYPE_CHECKING:
    from peft import PeftModel

ADAM_BETAS = (0.9, 0.99)


def train(run: Run, *, resume: bool = False, on_step: Callable[[int], None] = lambda step: None) -> dict[str, Any]:
    """Do one run from step 0, or from its last checkpoint, and return its result line.

    Log lines go to `run.log_path` as they come. Accuracy is measured at step 0 and at the end.
    """
    preset, arm, seed = run.preset, run.arm, run.seed
    torch.set_num_threads(preset.threads)
    training, held_out = load_examples(preset, seed)
    model, tokenizer = build_model(run)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=preset.lr, betas=ADAM_BETAS, weight_decay=0.0)
    noise = None
    if arm.noise_during:
        schedule = qnoise.schedules.StagedExponential(preset.sigma_start, preset.sigma_end, preset.noise_stages)
        noise = qnoise.NoiseScheduler(model, schedule, preset.steps, seed=seed)

    def measure(step: int) -> None:
        result = evaluate(
            model,
            tokenizer,
            held_out,
            max_new_tokens=preset.max_new_tokens,
            instruction=preset.instruction,
            batch_size=preset.generation_batch,
        )
        run.log_evaluation(step, result)

    start = run.begin(model, optimizer, noise, resume=resume)
    on_step(start)
    if start == 0:
        measure(0)
    for step in range(start, preset.steps):
        clock = time.perf_counter(), time.process_time()
        if noise is not None:
            noise.step()
        batch, metrics = sample(model, tokenizer, training, preset, arm, seed, step)
        metrics |= update(model, optimizer, batch, preset, seed, step)
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
    )


def update(
    model: PeftModel, optimizer: torch.optim.Optimizer, batch: Batch | None, preset: Preset, seed: int, step: int
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
                log_prob = _log_probs(model, batch.rows(rows), preset)
                batch.old_log_prob[rows, : log_prob.shape[1]] = log_prob
        mismatch = rl.mismatch_metrics(batch.old_log_prob, batch.rollout_log_prob, batch.response_mask)
        metrics["mismatch_kl"] = mismatch["k3"].item()
        metrics["mismatch_abs"] = mismatch["log_ratio_abs_mean"].item()

        order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(1_000_003 * seed + step))
        for mini in order.to(batch.ids.device).tensor_split(preset.mini_batches):
            tokens = batch.response_mask[mini].sum()
            for rows in batch.pieces(mini, preset.micro_batch):
                piece = batch.rows(rows)
                loss, loss_metrics = rl.dapo_loss(
                    _log_probs(model, piece, preset),
                    piece.old_log_prob,
                    piece.advantages,
                    piece.response_mask,
                    clip_ratio_low=preset.clip_ratio_low,
                    clip_ratio_high=preset.clip_ratio_high,
                    loss_agg_mode=preset.loss_agg_mode,
                    num_items_in_batch=tokens if preset.loss_agg_mode == "token-mean" else len(mini),
                )
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


def _log_probs(model: PeftModel, batch: Batch, preset: Preset) -> Tensor:
    """(N, T) log-probabilities of the response tokens under the model as it is now."""
    width = batch.response_mask.shape[1]
    logits = model(
        input_ids=batch.ids,
        attention_mask=batch.mask.long(),
        position_ids=batch.position_ids,
        logits_to_keep=width + 1,
        use_cache=False,
    ).logits[:, :-1]
    return rl.token_log_probs(logits, batch.ids[:, -width:], preset.temperature)[0]
