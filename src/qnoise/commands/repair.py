"""`qnoise repair`: measure the repairs on a model, and on request write down the best of them, applied.

qnoise repair PATH_OR_HUB_ID --fmt nvfp4                     ranks the candidates on text the model writes itself
qnoise repair PATH --inputs texts.jsonl --out ranking.json   on given text
qnoise repair PATH --json | jq .rows[0].recipe               for a script
qnoise repair PATH --apply FOLDER                            also saves the model with the best repair in its weights
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from qnoise.commands.format_argument import format_name
from qnoise.commands.model_argument import add_model, device, load_model, load_tokenizer, model_folder
from qnoise.commands.output_argument import check_files, check_new_folder
from qnoise.commands.texts_argument import add_texts, check_texts, encoded, read_texts

_EPILOG = """\
example: qnoise repair ./model --fmt nvfp4 --inputs texts.jsonl --out ranking.json

exit status: 0 done; 2 not done: a mistake in the arguments, or a model that cannot be loaded or measured;
130 interrupted.
"""


def add_repair(commands: Any) -> None:
    """Add the command to those of a parser (what `add_subparsers` returned). It sets `run`, which takes the options."""
    parser = commands.add_parser(
        "repair",
        help="which repair wins back most on a model",
        description="Measure formats, scale modes and repairs on a language model by KL divergence to full precision. "
        "Nothing is applied without --apply.",
        epilog=_EPILOG,
    )
    add_model(parser, "folder of a causal language model of transformers, with its tokenizer")
    parser.add_argument(
        "--fmt", nargs="+", type=format_name, metavar="FORMAT", help="names of `qnoise formats` (all in the budget)"
    )
    parser.add_argument("--budget", type=float, default=4.5, metavar="BITS", help="most bits per weight (4.5)")
    add_texts(parser, "without it the model writes its own")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the text the model writes (0)")
    parser.add_argument("--device", type=device, default="cpu", help="where to measure, such as cuda (cpu)")
    parser.add_argument(
        "--out", nargs="+", type=Path, default=[], metavar="FILE", help="write the ranking: .md or .json, or both"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--apply", type=Path, metavar="FOLDER", help="save the model with the best repair applied")
    parser.set_defaults(run=run_repair)


def run_repair(options: argparse.Namespace) -> int:
    """Do what the options say; returns the exit status, 0.

    Raises:
        ValueError, OSError, ImportError: a mistake in the options, or in the model.
    """
    _repair(options)
    return 0


def _repair(options: argparse.Namespace) -> None:
    from qnoise.patch import bake
    from qnoise.repairs.rank import rank
    from qnoise.repairs.text import self_generated

    check_texts(options)
    check_files(options.out, (".md", ".json"))
    if options.apply is not None:
        check_new_folder("--apply", options.apply)
    texts = None if options.inputs is None else read_texts(options.inputs)[: options.texts]
    folder = model_folder(options.model, options.revision)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds an adapter; repairs are measured on a whole model: give its base")
    model = load_model(folder).to(options.device).requires_grad_(False)
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        raise FileNotFoundError(f"{folder} has no tokenizer, which the texts need; save it there: save_pretrained")
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
        inputs = encoded(tokenizer, texts, options.tokens, size, options.device)
    ranking = rank(model, inputs, fmt=options.fmt, budget=options.budget, progress=shown)
    print(ranking.to_json(indent=1) if options.json else ranking.to_markdown())
    for path in options.out:
        text = ranking.to_json(indent=1) if path.suffix == ".json" else ranking.to_markdown()
        path.write_text(text + "\n", encoding="utf-8")
    if not options.json:
        print(f"\nbest: {ranking.best.recipe}")
    if options.apply is not None:
        ranking.apply(model)
        bake(model).save_pretrained(options.apply)
        tokenizer.save_pretrained(options.apply)
        recipe = json.dumps(ranking.best.recipe.to_dict(), indent=1)
        (options.apply / "qnoise_recipe.json").write_text(recipe + "\n", encoding="utf-8")
        if not options.json:
            print(f"saved: {options.apply} (stock weights that hold the quantized values)")
