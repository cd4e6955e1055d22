"""`qnoise export`: a model, or an adapter on one, as a compressed-tensors checkpoint that engines load.

qnoise export PATH --fmt nvfp4 --out FOLDER                      a model
qnoise export RUN/checkpoint-10 --out FOLDER                     what Trainer saved of a patched PEFT model
qnoise export PATH --fmt nvfp4 --act-fmt nvfp4 --inputs texts.txt --out FOLDER
qnoise export PATH --plan report.json --bits 8 --out FOLDER      only what a scan says can bear it
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qnoise.calibrate import calibrate_activations
from qnoise.commands.format_argument import SPELLING, format_spec
from qnoise.commands.model_argument import add_model, load_model, load_tokenizer, model_folder
from qnoise.commands.output_argument import check_new_folder
from qnoise.commands.texts_argument import add_texts, check_texts, encoded, read_texts
from qnoise.config import PatchConfig
from qnoise.config_file import FILE_NAME, read_config
from qnoise.integrations.export import export
from qnoise.patch import patch_model, unpatch_model
from qnoise.requirements import require
from qnoise.sensitivity import Plan, ScanReport

if TYPE_CHECKING:
    from qnoise.integrations.export import ExportReport

_EPILOG = f"""\
example: qnoise export ./model --fmt nvfp4 --out ./model-nvfp4

What is quantized, and how, says --fmt, or --plan, or the {FILE_NAME} that save_pretrained of a patched model
left in the folder. A folder with an adapter (adapter_config.json) stands for the adapter and its base model.

{SPELLING}

exit status: 0 done; 2 not done: a mistake in the arguments, or a model that the layout cannot hold; 130 interrupted.
FOLDER appears when it is complete.
"""


def add_export(commands: Any) -> None:
    """Add the command to those of a parser (what `add_subparsers` returned). It sets `run`, which takes the options."""
    parser = commands.add_parser(
        "export",
        help="a model as a compressed-tensors checkpoint",
        description="Quantize a causal language model, or take the quantized model that an adapter was trained on, and "
        "write codes and scales in the layout of compressed-tensors. Needs that package.",
        epilog=_EPILOG,
    )
    add_model(parser, "folder of a causal language model of transformers, or of a PEFT adapter")
    parser.add_argument("--fmt", type=format_spec, metavar="FORMAT", help="of the weights")
    parser.add_argument("--act-fmt", type=format_spec, metavar="FORMAT", help="of the linears' inputs (none)")
    parser.add_argument("--include", nargs="+", metavar="GLOB", help="only modules with these names")
    parser.add_argument("--exclude", nargs="+", default=[], metavar="GLOB", help="leave these modules out")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="a plan's JSON, or that of `qnoise scan` with --bits")
    parser.add_argument("--bits", type=float, metavar="BITS", help="most bits per weight of a plan from a scan")
    parser.add_argument("--base", metavar="PATH_OR_HUB_ID", help="the adapter's base model (what the adapter names)")
    add_texts(parser, "measures the input scales of --act-fmt nvfp4")
    parser.add_argument(
        "--adapters",
        choices=["separate", "merged"],
        default="separate",
        help="separate: FOLDER/adapter, to be used on top; merged: Q(W + BA), which is not what was trained (separate)",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to write; new, or empty")
    parser.add_argument("--json", action="store_true", help="print one JSON object: what was written")
    parser.set_defaults(run=run_export)


def run_export(options: argparse.Namespace) -> int:
    """Do what the options say; returns the exit status, 0.

    Raises:
        ValueError, OSError, ImportError: a mistake in the options, or in the model. Nothing is written.
    """
    require("compressed-tensors", "qnoise export")  # before a model is loaded
    check_new_folder("--out", options.out)
    check_texts(options)
    texts = None if options.inputs is None else read_texts(options.inputs)[: options.texts]
    folder = model_folder(options.model, options.revision)
    adapter = folder if (folder / "adapter_config.json").is_file() else None
    config = _config(options, folder)
    base = folder if adapter is None else _base(options.base, adapter)
    model: Any = load_model(base)
    stored = model.dtype
    if stored != torch.bfloat16:
        model = load_model(base, dtype=torch.bfloat16)  # `.to` would round rotary frequencies as well
    model = patch_model(model, config=config)
    if adapter is not None:
        model = _with_adapter(model, adapter)
    tokenizer = load_tokenizer(folder) or load_tokenizer(base)
    if texts is not None:
        if tokenizer is None:
            raise FileNotFoundError(f"{base} has no tokenizer, which --inputs needs; save it there: save_pretrained")
        batches = encoded(tokenizer, texts, options.tokens, options.batch, model.device)
        amaxes = calibrate_activations(model, batches)
        model = patch_model(unpatch_model(model), config=replace(config, act_amax=amaxes))
    report = _write(model, options.out, options.adapters)
    if tokenizer is not None:
        tokenizer.save_pretrained(report.path)
    _print(report, stored, as_json=options.json)
    return 0


def _config(options: argparse.Namespace, folder: Path) -> PatchConfig:
    """What to quantize, from the one of three places that was named."""
    given = [name for name in ("fmt", "plan") if getattr(options, name) is not None]
    if len(given) > 1:
        raise ValueError("--fmt and --plan both say what to quantize; give one")
    if options.bits is not None and options.plan is None:
        raise ValueError("--bits is the budget of a plan; give the scan's JSON with --plan")
    if not given:
        if not (folder / FILE_NAME).is_file():
            raise ValueError(f"{folder} has no {FILE_NAME} that says how it was trained; give --fmt, such as nvfp4")
        if options.include is not None or options.exclude or options.act_fmt is not None:
            raise ValueError(f"--include, --exclude and --act-fmt go with --fmt; here {folder / FILE_NAME} decides")
        # The checkpoint holds no noise, and storage is none of its business.
        return replace(read_config(folder), noise=None, storage="auto")
    fmt: Any = options.fmt if options.plan is None else dict(_plan(options.plan, options.bits))
    return PatchConfig(fmt, options.act_fmt, include=options.include, exclude=options.exclude)


def _plan(path: Path, bits: float | None) -> Plan:
    """The plan in a file, or the best one within the budget by the scan in it; a module may stay as it is stored."""
    if not path.is_file():
        raise FileNotFoundError(f"--plan {path}: there is no such file")
    text = path.read_text(encoding="utf-8")
    try:
        schema = str(json.loads(text)["schema"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"--plan {path} is neither a plan nor the JSON of `qnoise scan`") from None
    if schema.startswith("qnoise-plan"):
        if bits is not None:
            raise ValueError(f"--plan {path} is a plan already; --bits goes with the JSON of `qnoise scan`")
        return Plan.from_json(text)
    if bits is None:
        raise ValueError(f"--plan {path} is a scan; say with --bits how many bits per weight there are")
    report = ScanReport.from_json(text)
    return report.plan(bits, [*report.specs, None])


def _base(given: str | None, adapter: Path) -> Path:
    named = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    where = given or named
    if not where:
        raise ValueError(f"{adapter / 'adapter_config.json'} names no base model; give it with --base")
    try:
        found = model_folder(where)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the base model of {adapter}: {error}. Or name another place with --base") from None
    if not (found / "config.json").is_file():
        raise ValueError(f"the base model of {adapter}, {found}, is an adapter itself; give a whole model with --base")
    return found


def _with_adapter(model: Any, adapter: Path) -> Any:
    try:
        from peft import PeftModel
    except ImportError:
        raise ImportError(f"peft is not installed, and loads the adapter in {adapter}; pip install peft") from None
    return PeftModel.from_pretrained(model, str(adapter))


def _write(model: Any, out: Path, adapters: str) -> ExportReport:
    """Written beside, and moved when it is complete."""
    part = out.with_name(out.name + ".part")
    check_new_folder("what an export was interrupted at,", part)
    part.mkdir(parents=True, exist_ok=True)
    try:
        report = export(model, part, adapters=adapters)
        if out.exists():
            out.rmdir()
        part.rename(out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return replace(report, path=out, adapter=None if report.adapter is None else out / report.adapter.name)


def _print(report: ExportReport, stored: torch.dtype, *, as_json: bool) -> None:
    converted = None if stored == torch.bfloat16 else str(stored).removeprefix("torch.")
    if as_json:
        values = {
            "path": str(report.path),
            "preset": report.preset,
            "quantized": report.quantized,
            "ignored": report.ignored,
            "nbytes": report.nbytes,
            "adapter": None if report.adapter is None else str(report.adapter),
            "merge_error": dict(report.merge_error),
            "converted_from": converted,
        }
        print(json.dumps(values, indent=1))
        return
    print(f"{report.path}: {report.preset}, {report.nbytes / 1e6:.4g} MB")
    print(f"  quantized: {len(report.quantized)} linears")
    kept = ", ".join(report.ignored[-3:]) or "none"
    print(f"  as stored: {kept}" + (f" and {len(report.ignored) - 3} more" if len(report.ignored) > 3 else ""))
    if converted:
        print(f"  rounded from {converted} to bfloat16 first, which the layout decodes to")
    if report.adapter is not None:
        print(f"  adapter, to be used on top: {report.adapter}")
    if report.merge_error:
        name, worst = max(report.merge_error.items(), key=lambda pair: pair[1])
        print(f"  merged: Q(W + BA) is up to {100 * worst:.3g} % from the Q(W) + BA that was trained ({name})")
