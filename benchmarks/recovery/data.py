"""Prompts with verifiable answers: generated word problems, or GSM8K from a JSONL file or the hub."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.files import read_jsonl
from benchmarks.recovery.policy import check_hub
from benchmarks.recovery.presets import Preset
from benchmarks.recovery.problems import problems
from benchmarks.recovery.walks import walks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


GENERATED = {"words": problems, "walks": walks}
"""Task -> its problems: (stream, seed) -> an endless iterator."""

_WANTED = 'a folder with train.jsonl and test.jsonl, or one JSONL file, of lines {"question": ..., "answer": ...}'


@dataclass(frozen=True)
class Example:
    """A question and its worked solution, which ends in `#### N`."""

    question: str
    answer: str


def generated(task: str, stream: str, seed: int, count: int) -> list[Example]:
    """The first `count` problems of a generated task's stream and seed."""
    return [Example(p.question, p.solution()) for p in itertools.islice(GENERATED[task](stream, seed), count)]


def word_examples(stream: str, seed: int, count: int) -> list[Example]:
    """The first `count` word problems of a stream and seed."""
    return generated("words", stream, seed, count)


def load_examples(preset: Preset, seed: int) -> tuple[list[Example], list[Example]]:
    """(training prompts in the order they are used, evaluation problems) of a run.

    The evaluation problems are the same for every seed; training prompts depend on the seed and nothing else, so
    that all arms of a seed see the same ones.

    Raises:
        FileNotFoundError: the data set is neither on this machine nor within reach.
        ValueError: a JSONL file is damaged or lacks the fields; file and line are named.
    """
    needed = preset.steps * preset.generation_rounds * preset.prompts_per_step
    if preset.task in GENERATED:
        training = generated(preset.task, "rl", seed, needed)
        return training, generated(preset.task, preset.split, 0, preset.eval_problems)
    train, test = _gsm8k(preset)
    dev = [example for example in train if _tenth(example) == 0]
    train = [example for example in train if _tenth(example) != 0] if preset.split == "dev" else train
    evaluation = (dev if preset.split == "dev" else test)[: preset.eval_problems]
    if not train or not evaluation:
        raise ValueError(
            f"{preset.data}: {len(train)} training and {len(evaluation)} evaluation problems; both need at least one"
        )
    epochs = -(-needed // len(train))
    order = [example for epoch in range(epochs) for example in _shuffled(train, f"{seed} {epoch}")]
    return order[:needed], evaluation


def check_data(preset: Preset) -> None:
    """Raises FileNotFoundError if the preset's data set is neither on this machine nor within reach."""
    path = Path(preset.data)
    if preset.task in GENERATED or path.is_dir() or path.is_file():
        return
    if path.suffix == ".jsonl":
        raise FileNotFoundError(f"--data {path}: there is no such file")
    check_hub(preset.data, "--data PATH", _WANTED, kind="datasets")
    if find_spec("datasets") is None:
        raise FileNotFoundError(
            f"{preset.data!r} can be read from the hub only with the `datasets` package, which is not installed. "
            f"Install it, or pass --data PATH: {_WANTED}."
        )


def _gsm8k(preset: Preset) -> tuple[list[Example], list[Example]]:
    """(train, test): of a folder with two files, of one file (a tenth of it held out), or of the hub."""
    check_data(preset)
    path = Path(preset.data)
    if path.is_dir():
        return _read(path / "train.jsonl"), _read(path / "test.jsonl")
    if path.is_file():
        examples = _read(path)
        return [e for e in examples if _tenth(e) != 9], [e for e in examples if _tenth(e) == 9]
    from datasets import load_dataset

    both = load_dataset(preset.data, "main")
    train, test = ([Example(row["question"], row["answer"]) for row in both[part]] for part in ("train", "test"))
    return train, test


def _read(path: Path) -> list[Example]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file; --data needs train.jsonl and test.jsonl in the folder")
    examples = []
    for number, row in enumerate(read_jsonl(path), start=1):
        for field in ("question", "answer"):
            if not isinstance(row.get(field), str):
                raise ValueError(f"{path}, record {number}: no text in the field {field!r}; it holds {sorted(row)}")
        examples.append(Example(row["question"], row["answer"]))
    return examples


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _tenth(example: Example) -> int:
    return _hash(example.question)[0] * 10 // 256


def _shuffled(examples: list[Example], salt: str) -> list[Example]:
    """An order that depends on the salt and the questions alone, on every Python."""
    return sorted(examples, key=lambda example: _hash(salt + example.question))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, example: Example, instruction: str = "") -> list[int]:
    """The token ids of a prompt: through the tokenizer's chat template where it has one."""
    text = f"{example.question} {instruction}".strip()
    if not tokenizer.chat_template:
        return tokenizer(text)["input_ids"]
    message = [{"role": "user", "content": text}]
    chat = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    return tokenizer(chat, add_special_tokens=False)["input_ids"]
