"""`qnoise repair`: measure the repairs on a model, and on request write down the best of them, applied.

qnoise repair PATH_OR_HUB_ID --fmt nvfp4                     ranks the candidates on text the model writes itself
qnoise repair PATH --inputs texts.jsonl --out ranking.json   on given text
qnoise repair PATH --apply FOLDER                            also saves the model with the best repair in its weights
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qnoise.formats import FORMATS

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_EXAMPLE = "example: qnoise repair Qwen/Qwen2.5-0.5B --fmt nvfp4 --inputs texts.jsonl --out ranking.json"


def add_repair(commands: Any) -> None:
    """Add the command to those of a parser (what `add_subparsers` returned). It sets `run`, which takes the options."""
    parser = commands.add_parser(
        "repair",
        help="which repair wins back most on a model",
        description="Measure formats, scale modes and repairs on a language model by KL divergence to full precision. "
        "Nothing is applied without --apply.",
        epilog=_EXAMPLE,
    )
    parser.add_argument("model", metavar="PATH_OR_HUB_ID", help="local folder of a model, or its name on the hub")
    parser.add_argument(
        "--fmt", nargs="+", metavar="FORMAT", choices=sorted(FORMATS), help="default: all in the budget"
    )
    parser.add_argument("--budget", type=float, default=4.5, metavar="BITS", help="most bits per weight (4.5)")
    parser.add_argument(
        "--inputs",
        type=Path,
        metavar="FILE",
        help='a text a line: .txt, or .jsonl with the field "text"; without it the model writes its own',
    )
    parser.add_argument("--texts", type=int, default=64, metavar="N", help="number of texts, at most (64)")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="length of a text, at most (128)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="texts in a batch (8)")
    parser.add_argument("--seed", type=int, default=0, help="of the text the model writes")
    parser.add_argument("--device", default="cpu", help="where to measure, such as cuda (cpu)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write the ranking: .json, or Markdown for other names"
    )
    parser.add_argument("--apply", type=Path, metavar="FOLDER", help="save the model with the best repair applied")
    parser.set_defaults(run=run_repair)


def run_repair(options: argparse.Namespace) -> int:
    """Do what the options say; the exit status: 0, or 2 for a mistake in them."""
    try:
        _repair(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"qnoise repair: {error}", file=sys.stderr)
        return 2
    return 0


def _repair(options: argparse.Namespace) -> None:
    from qnoise.patch import bake
    from qnoise.repairs.rank import rank
    from qnoise.repairs.text import self_generated

    for name in ("texts", "tokens", "batch"):
        if getattr(options, name) < 2 - (name == "batch"):
            raise ValueError(f"--{name} is {getattr(options, name)}; it must be at least {2 - (name == 'batch')}")
    if options.apply is not None and options.apply.is_dir() and any(options.apply.iterdir()):
        raise ValueError(f"--apply {options.apply}: the folder is not empty; name another")
    texts = None if options.inputs is None else read_texts(options.inputs)[: options.texts]
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError:
        raise ImportError("transformers is not installed, and loads the model; install it") from None
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto", use_safetensors=True)
    model.eval().to(options.device)
    model.requires_grad_(False)
    # Small batches, so that there are several: half of them calibrate, the others measure.
    size = min(options.batch, -(-(options.texts if texts is None else len(texts)) // 2))
    shown = sys.stderr.isatty()
    if texts is None:
        inputs = self_generated(
            model,
            tokenizer,
            count=options.texts,
            max_new_tokens=options.tokens,
            batch_size=size,
            seed=options.seed,
            progress=shown,
        )
    else:
        inputs = _encoded(tokenizer, texts, options.tokens, size, options.device)
    ranking = rank(model, inputs, fmt=options.fmt, budget=options.budget, progress=shown)
    print(ranking.to_markdown())
    print(f"\nbest: {ranking.best.recipe}")
    if options.out is not None:
        text = ranking.to_json(indent=1) if options.out.suffix == ".json" else ranking.to_markdown()
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text + "\n", encoding="utf-8")
    if options.apply is not None:
        ranking.apply(model)
        bake(model).save_pretrained(options.apply)
        tokenizer.save_pretrained(options.apply)
        recipe = json.dumps(ranking.best.recipe.to_dict(), indent=1)
        (options.apply / "qnoise_recipe.json").write_text(recipe + "\n", encoding="utf-8")
        print(f"saved: {options.apply} (stock weights that hold the quantized values)")


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
        raise ValueError(f"{path} holds {len(texts)} texts; repairs calibrate on one part and are measured on another")
    return texts


def _encoded(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], tokens: int, size: int, device: str
) -> list[dict[str, Tensor]]:
    """Batches of token ids, padded on the right and masked there."""
    import torch

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
