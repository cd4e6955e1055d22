"""Does an exported checkpoint say in vLLM what it says in transformers?

    python scripts/check_vllm.py ./model-nvfp4 --device cuda

transformers writes an answer to each prompt greedily. vLLM is then asked for its own greedy answer, and how likely it
finds every token of the one from transformers. A row for each prompt:

    same      tokens that are equal before the two greedy answers part, of all
    |dlogp|   mean and largest difference of the log-probability of a token, in nats
    gap       the most by which vLLM prefers another token to the one from transformers, in nats

Kernels round differently, so answers may part where two tokens are almost as likely: that is no disagreement. A mean
|dlogp| above --tolerance, or a gap above --gap, is. Checkpoints with quantized inputs are held to the same bounds:
engines may compute the scales of inputs by a rule of their own, which this shows.

Exit status: 0 they agree; 1 they do not; 2 nothing was compared (vLLM is missing, or an argument is wrong).
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PROMPTS = (
    "The capital of France is",
    "Question: A train travels 60 miles in 1.5 hours. What is its average speed? Answer:",
    "def fibonacci(n):\n",
)


@dataclass(frozen=True)
class Answer:
    """Tokens that one side wrote greedily, and the log-probability it gave each."""

    tokens: list[int]
    log_probs: list[float]


@dataclass(frozen=True)
class Opinion:
    """What the engine makes of an answer from elsewhere: log-probability of each token, and of the best one there."""

    log_probs: list[float]
    best: list[float]


@dataclass(frozen=True)
class Row:
    """One prompt compared. See the top of this file."""

    same: int
    tokens: int
    mean: float
    largest: float
    gap: float

    def agrees(self, tolerance: float, gap: float) -> bool:
        """Written so that a NaN does not agree."""
        return self.mean <= tolerance and self.gap <= gap


def compare(reference: Answer, greedy: list[int], opinion: Opinion) -> Row:
    """A reference answer against the engine's own greedy tokens and its opinion of the reference.

    Raises:
        ValueError: the opinion is not of as many tokens as the answer has.
    """
    count = len(reference.tokens)
    if not count or len(opinion.log_probs) != count or len(opinion.best) != count:
        raise ValueError(f"the engine rated {len(opinion.log_probs)} tokens of an answer of {count}")
    pairs = zip(reference.tokens, greedy, strict=False)
    same = next((place for place, (a, b) in enumerate(pairs) if a != b), min(count, len(greedy)))
    apart = [abs(a - b) for a, b in zip(reference.log_probs, opinion.log_probs, strict=True)]
    gaps = [best - own for best, own in zip(opinion.best, opinion.log_probs, strict=True)]
    return Row(same, count, math.fsum(apart) / count, _largest(apart), _largest(gaps))


def _largest(values: list[float]) -> float:
    # max() drops a NaN or keeps it, by where it stands.
    return math.nan if any(map(math.isnan, values)) else max(values)


@torch.no_grad()
def reference_answer(model: Any, prompt: list[int], tokens: int) -> Answer:
    """Greedy tokens of a transformers model, fp32 log-probabilities; it stops after an end-of-sequence token."""
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    ids = torch.tensor([prompt], device=model.device)
    answer, log_probs, cache = [], [], None
    for _ in range(tokens):
        out = model(ids, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        scores = torch.log_softmax(out.logits[0, -1].float(), -1)
        token = int(scores.argmax())
        answer.append(token)
        log_probs.append(float(scores[token]))
        if token in ends:
            break
        ids = torch.tensor([[token]], device=model.device)
    return Answer(answer, log_probs)


def engine_answers(
    llm: Any, params: Any, prompts: list[list[int]], references: list[Answer]
) -> list[tuple[list[int], Opinion]]:
    """The greedy tokens of vLLM for each prompt, and its opinion of the reference answers.

    Args:
        llm: a `vllm.LLM`.
        params: the class `vllm.SamplingParams`.
        prompts, references: token ids, and the answers to them.
    """
    tokens = max(len(each.tokens) for each in references)
    written = llm.generate([{"prompt_token_ids": p} for p in prompts], params(temperature=0.0, max_tokens=tokens))
    whole = [p + each.tokens for p, each in zip(prompts, references, strict=True)]
    # Rating a prompt gives, for each of its tokens, that token and the likeliest one. One token has to be written.
    rated = llm.generate(
        [{"prompt_token_ids": ids} for ids in whole], params(temperature=0.0, max_tokens=1, prompt_logprobs=1)
    )
    results = []
    for own, rating, prompt, reference in zip(written, rated, prompts, references, strict=True):
        given = rating.prompt_logprobs[len(prompt) :]
        log_probs = [at[token].logprob for at, token in zip(given, reference.tokens, strict=True)]
        best = [max(each.logprob for each in at.values()) for at in given]
        results.append((list(own.outputs[0].token_ids), Opinion(log_probs, best)))
    return results


def table(rows: list[Row], tolerance: float, gap: float) -> str:
    """One line for each prompt."""
    lines = ["prompt        same  |dlogp| mean   largest       gap"]
    for number, row in enumerate(rows):
        verdict = "" if row.agrees(tolerance, gap) else "   DISAGREES"
        same = f"{row.same}/{row.tokens}"
        lines.append(f"{number:6}  {same:>10}  {row.mean:12.4f}  {row.largest:8.4f}  {row.gap:8.4f}{verdict}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="a folder that qnoise.export wrote")
    parser.add_argument("--tokenizer", help="folder or hub id of the tokenizer (that of the checkpoint)")
    parser.add_argument("--prompt", action="append", dest="prompts", metavar="TEXT", help="once for each (three texts)")
    parser.add_argument("--tokens", type=int, default=32, help="length of an answer (32)")
    parser.add_argument("--tolerance", type=float, default=0.1, help="largest mean |dlogp| that agrees, nats (0.1)")
    parser.add_argument("--gap", type=float, default=0.5, help="largest gap that agrees, nats (0.5)")
    parser.add_argument("--device", default="cpu", help="where transformers runs (cpu); vLLM takes what it finds")
    parser.add_argument("--tensor-parallel", type=int, default=1, help="GPUs that vLLM spreads the model over (1)")
    parser.add_argument("--memory", type=float, default=0.8, help="share of the GPU's memory that vLLM takes (0.8)")
    options = parser.parse_args(arguments)
    try:
        # First of all: a missing engine is told before a model is loaded.
        from vllm import LLM, SamplingParams
    except ImportError as error:
        print(f"vLLM cannot be imported ({error}); run this where it is installed: pip install vllm", file=sys.stderr)
        return 2
    if not (options.checkpoint / "config.json").is_file():
        print(f"{options.checkpoint} holds no config.json; give the folder qnoise.export wrote", file=sys.stderr)
        return 2
    if options.tokens < 1:
        print(f"--tokens is {options.tokens}; it must be at least 1", file=sys.stderr)
        return 2
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(options.tokenizer or options.checkpoint)
        prompts = [list(tokenizer(text)["input_ids"]) for text in options.prompts or PROMPTS]
    except (OSError, ValueError):
        prompts = [[]]
    if not all(prompts):  # transformers makes an empty tokenizer where there are no files of one
        print(
            f"no tokenizer in {options.tokenizer or options.checkpoint} that makes tokens of the prompts; save it "
            "there with tokenizer.save_pretrained(folder), or name one with --tokenizer",
            file=sys.stderr,
        )
        return 2
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype="auto").to(options.device).eval()
    references = [reference_answer(model, prompt, options.tokens) for prompt in prompts]
    del model  # vLLM wants its memory
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    llm = LLM(
        model=str(options.checkpoint),
        tokenizer=str(options.tokenizer or options.checkpoint),
        dtype="bfloat16",
        tensor_parallel_size=options.tensor_parallel,
        gpu_memory_utilization=options.memory,
        max_model_len=max(map(len, prompts)) + options.tokens + 1,
    )
    answers = engine_answers(llm, SamplingParams, prompts, references)
    rows = [compare(reference, *answer) for reference, answer in zip(references, answers, strict=True)]
    print(table(rows, options.tolerance, options.gap))
    agree = all(row.agrees(options.tolerance, options.gap) for row in rows)
    print("vLLM and transformers agree" if agree else "vLLM and transformers DISAGREE")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
