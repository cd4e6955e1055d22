"""`--inputs`: a file of texts, as batches of token ids that a model calibrates on or is measured on."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def add_texts(parser: argparse.ArgumentParser, without: str) -> None:
    """The option, and those that say how much of it is used. `without`: what happens when it is not given."""
    parser.add_argument(
        "--inputs", type=Path, metavar="FILE", help=f'a text a line: .txt, or .jsonl with the field "text"; {without}'
    )
    parser.add_argument("--texts", type=int, default=64, metavar="N", help="number of texts, at most (64)")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="length of a text, at most (128)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="texts in a batch (8)")


def check_texts(options: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: a number that is too small.
    """
    for name in ("texts", "tokens", "batch"):
        if getattr(options, name) < 2 - (name == "batch"):
            raise ValueError(f"--{name} is {getattr(options, name)}; it must be at least {2 - (name == 'batch')}")


def read_texts(path: Path) -> list[str]:
    """The texts of a file, one a line; empty lines are skipped.

    Raises:
        FileNotFoundError: no such file.
        ValueError: fewer than two texts; a line of a .jsonl that is no object with a "text"; the line is named.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of texts")
    texts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        if path.suffix == ".jsonl":
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                raise ValueError(f'{path}, line {number}: no object with a string in the field "text"')
            line = row["text"]
        texts.append(line)
    if len(texts) < 2:
        raise ValueError(
            f"{path} holds {len(texts)} texts; two are the least: repairs calibrate on one and measure on another"
        )
    return texts


def encoded(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], tokens: int, size: int, device: torch.device | str
) -> list[dict[str, Tensor]]:
    """Batches of token ids, padded on the right and masked there."""
    batches = []
    for first in range(0, len(texts), size):
        rows = [ids[:tokens] for ids in tokenizer(texts[first : first + size])["input_ids"]]
        width = max(2, *map(len, rows))
        ids = torch.zeros(len(rows), width, dtype=torch.long, device=device)
        mask = torch.zeros_like(ids)
        for row, each in enumerate(rows):
            ids[row, : len(each)] = torch.tensor(each, dtype=torch.long)
            mask[row, : len(each)] = 1
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches
