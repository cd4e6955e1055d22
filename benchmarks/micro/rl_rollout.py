"""Groups of samples from a shipped policy through MXFP4 with a LoRA, against `generate` of transformers.

`generate` is called as users do: every prompt repeated for each of its samples, padded on the left, sampled at
temperature 1. Ours gives the log-probabilities of the tokens as well. What the shared prompt, the responses that leave
the batch and the merged LoRA save depends on sizes and lengths; the parameters of a case say them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

import qnoise
from benchmarks.micro.measure import Case, Contender
from benchmarks.recovery.data import generated
from benchmarks.recovery.policy import HERE, load_policy
from qnoise.rl import generate_groups

TITLE = "groups of samples through MXFP4 and LoRA, against generate of transformers"
TOKENS, ROUNDS = 40, 12


def cases(quick: bool) -> Iterator[Case]:
    for prompts, samples in ((2, 2),) if quick else ((32, 8), (256, 1)):
        yield rollout(prompts, samples)


def rollout(count: int, samples: int) -> Case:
    from peft import LoraConfig, get_peft_model

    base, tokenizer = load_policy(str(HERE / "checkpoints/study-words-0"), torch.float32)
    qnoise.patch_model(base.requires_grad_(False), fmt="mxfp4")
    torch.manual_seed(0)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    model: Any = get_peft_model(base, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.01)  # an adapter as RL makes it, and not one that drowns the policy
    model.eval()
    prompts = [tokenizer(example.question)["input_ids"] for example in generated("words", "rl", 0, count)]
    tokenizer.padding_side = "left"
    padded = tokenizer.pad({"input_ids": [row for row in prompts for _ in range(samples)]}, return_tensors="pt")

    def theirs() -> Callable[[], object]:
        def call() -> object:
            torch.manual_seed(0)
            return model.generate(
                **padded, do_sample=True, max_new_tokens=TOKENS, top_k=0, pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip

        return call

    def ours(merge: bool) -> qnoise.rl.Rollout:
        return generate_groups(model, tokenizer, prompts, samples, max_new_tokens=TOKENS, merge_adapters=merge)

    def check() -> None:
        apart, merged = ours(False), ours(True)
        assert torch.equal(apart.response_ids, merged.response_ids), "merging the adapter changed a token"
        torch.testing.assert_close(apart.rollout_log_probs, merged.rollout_log_probs, rtol=1e-4, atol=1e-4)

    return Case(
        "rl_rollout",
        {"prompts": count, "samples a prompt": samples, "at most": f"{TOKENS} tokens", "lora": 8, "dtype": "float32"},
        [
            Contender("transformers generate", theirs()),
            Contender("qnoise, LoRA apart", lambda: ours(False)),
            Contender("qnoise", lambda: ours(True), figures={"tokens": int(ours(True).lengths.sum())}),
        ],
        check,
        rounds=ROUNDS,
    )
