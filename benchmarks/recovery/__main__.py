"""Command line of the recovery benchmark: `python -m benchmarks.recovery COMMAND`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.recovery.arms import ARMS, DEMO_ARMS, arm
from benchmarks.recovery.policies import POLICIES
from benchmarks.recovery.presets import PRESETS, TINY_WORDS, Preset, preset
from benchmarks.recovery.stages import STAGES

if TYPE_CHECKING:
    from benchmarks.recovery.runs import Run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(arguments)
    options.command_line = shlex.join(["python", "-m", "benchmarks.recovery", *arguments])
    try:
        return options.run(options)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="four arms of the tiny preset with two seeds; table, picture, report")
    demo.add_argument("--seeds", type=int, nargs="+", default=[0, 1], metavar="N")
    demo.add_argument("--arms", nargs="+", default=list(DEMO_ARMS), metavar="ARM")
    demo.add_argument("--workers", type=int, default=0, metavar="N", help="processes; default: one a core")
    demo.add_argument("--resume", action="store_true", help="continue what an earlier call left")
    _add_common(demo)
    demo.set_defaults(run=_demo, out="out/demo")

    train = commands.add_parser("train", help="one run")
    train.add_argument("--preset", required=True, metavar="NAME")
    train.add_argument("--arm", required=True, metavar="NAME")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--resume", action="store_true", help="continue from the run's last checkpoint")
    train.add_argument("--model", metavar="DIR", help="local folder with the model, instead of the preset's")
    train.add_argument("--data", metavar="PATH", help="folder with train.jsonl and test.jsonl, or one JSONL file")
    _add_common(train)
    train.set_defaults(run=_train, out="out/runs")

    report = commands.add_parser("report", help="render a result file again")
    report.add_argument("result", type=Path, metavar="RESULT.json")
    report.add_argument("--out", default="out/report", metavar="DIR")
    report.set_defaults(run=_report)

    ptq = commands.add_parser("ptq", help="formats and repairs without RL, on the shipped policies")
    ptq.add_argument("--rows", nargs="+", default=[], metavar="NAME", help="these rows only; see --list")
    ptq.add_argument("--list", action="store_true", help="print the names of the rows, and stop")
    ptq.add_argument("--quick", action="store_true", help="one policy, few problems; writes only with --out")
    ptq.add_argument("--out", type=Path, metavar="FILE", help="file of JSON lines; what is in it is not measured again")
    ptq.set_defaults(run=_ptq)

    study = commands.add_parser("study", help="the study: every stage, or those named; what is done is not done again")
    study.add_argument("--stages", nargs="+", default=list(STAGES), metavar="NAME", help=f"of {', '.join(STAGES)}")
    study.add_argument("--arms", nargs="+", default=[], metavar="ARM", help="these arms only")
    study.add_argument("--seeds", type=int, nargs="+", default=[], metavar="N", help="these seeds only")
    study.add_argument("--workers", type=int, default=0, metavar="N", help="processes; default: one a core")
    study.add_argument("--quick", action="store_true", help="a seed, few steps and problems: shows that it runs")
    study.add_argument("--out", default="out/recovery", metavar="DIR", help="folder of logs and checkpoints")
    study.set_defaults(run=_study)

    pretrain = commands.add_parser("pretrain", help="make the shipped checkpoints again")
    pretrain.add_argument("--only", nargs="+", default=[], metavar="NAME", help=f"of {', '.join(POLICIES)}")
    pretrain.add_argument("--out", metavar="DIR", help="parent folder; default: where they are shipped")
    pretrain.set_defaults(run=_pretrain)

    presets = commands.add_parser("presets", help="list presets and arms")
    presets.set_defaults(run=_presets)
    return parser


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", help="folder of logs and checkpoints")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE", help="change fields of the preset (see `presets`)"
    )


def _demo(options: argparse.Namespace) -> int:
    from benchmarks.recovery.report import to_text, write_report
    from benchmarks.recovery.runner import run_all
    from benchmarks.recovery.runs import Run
    from benchmarks.recovery.summary import summarize

    settings = _changed(TINY_WORDS, options.set)
    arms = [arm(name) for name in dict.fromkeys(options.arms)]
    folder = Path(options.out)
    runs = [Run(settings, each, seed, folder) for seed in dict.fromkeys(options.seeds) for each in arms]
    workers = options.workers or _cores()
    if workers < 1:
        raise ValueError(f"--workers is {workers}; it must be at least 1")
    if not options.resume:
        _set_aside(folder)
    print(f"{len(runs)} runs of {settings.steps} steps, {min(workers, len(runs))} at a time; logs in {folder / 'runs'}")
    outcome = run_all(runs, workers=workers, resume=options.resume)
    command = options.command_line.replace(" --resume", "")
    summary = summarize(runs, command)
    paths = write_report(summary, folder)
    print("\n" + to_text(summary) + "\n")
    if not any(path.suffix == ".png" for path in paths) and summary["rows"]:
        print("No picture: matplotlib is not installed (pip install matplotlib).")
    print("Written:", ", ".join(map(str, paths)))
    for name, fault in outcome.failed.items():
        print(f"\nfailed: {name}\n{fault}", file=sys.stderr)
    if outcome.interrupted or outcome.failed or summary["unfinished"]:
        print(f"\n{len(summary['unfinished'])} of {len(runs)} runs are unfinished. To continue: {command} --resume")
        return 130 if outcome.interrupted else 1
    return 0


def _train(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from benchmarks.recovery.policy import quiet_transformers
    from benchmarks.recovery.report import to_text
    from benchmarks.recovery.runs import Run
    from benchmarks.recovery.summary import summarize
    from benchmarks.recovery.train import train

    quiet_transformers()
    given = {name: getattr(options, name) for name in ("model", "data") if getattr(options, name)}
    settings = _changed(preset(options.preset), options.set, **given)
    run = Run(settings, arm(options.arm), options.seed, Path(options.out))
    _check_inputs(run)
    if options.resume and run.finished():
        print(f"{run.name} is finished.")
    else:
        try:
            with tqdm(total=settings.steps, unit="step") as bar:
                train(run, resume=options.resume, on_step=lambda step: bar.update(step - bar.n))
        except KeyboardInterrupt:
            print(f"\nStopped. To continue: {options.command_line.replace(' --resume', '')} --resume")
            return 130
    print(to_text(summarize([run], options.command_line)))
    print("Log:", run.log_path)
    return 0


def _report(options: argparse.Namespace) -> int:
    from benchmarks.files import read_json
    from benchmarks.recovery.report import to_text, write_report

    if not options.result.is_file():
        raise FileNotFoundError(f"{options.result}: there is no such result file")
    summary = read_json(options.result)
    print(to_text(summary))
    print("Written:", ", ".join(map(str, write_report(summary, Path(options.out), options.result.stem))))
    return 0


def _pretrain(options: argparse.Namespace) -> int:
    from benchmarks.recovery.choices import find
    from benchmarks.recovery.policy import quiet_transformers
    from benchmarks.recovery.pretrain import CHECKPOINTS, pretrain

    quiet_transformers()
    for name in options.only or POLICIES:
        seed, settings = find("policy", name, POLICIES)
        print("Written:", pretrain(seed, settings, (Path(options.out) if options.out else CHECKPOINTS) / name))
    return 0


def _study(options: argparse.Namespace) -> int:
    from benchmarks.files import RESULTS
    from benchmarks.recovery.choices import find
    from benchmarks.recovery.study_runs import do, runs_of

    folder = Path(options.out)
    results = folder / "quick" if options.quick else RESULTS / "recovery"
    command = options.command_line
    left = 0
    for name in options.stages:
        stage = find("stage", name, STAGES)
        arms = {each.name: each for each in stage.arms}
        for wanted in options.arms:
            find("arm", wanted, arms)
        runs = [
            run
            for run in runs_of(stage, folder / name, quick=options.quick)
            if (not options.arms or run.arm.name in options.arms) and (not options.seeds or run.seed in options.seeds)
        ]
        for run in runs:
            _check_inputs(run)
        print(f"stage {name}: {len(runs)} runs", flush=True)
        outcome = do(stage, runs, results / f"{name}.jsonl", workers=options.workers or _cores(), command=command)
        for failed, fault in outcome.failed.items():
            print(f"\nfailed: {failed}\n{fault}", file=sys.stderr)
        left += len(outcome.failed)
        if outcome.interrupted:
            print(f"\nStopped; what is done is kept. To continue: {command}")
            return 130
    return int(left > 0)


def _ptq(options: argparse.Namespace) -> int:
    import torch

    from benchmarks.files import RESULTS
    from benchmarks.recovery import ptq
    from benchmarks.recovery.policy import quiet_transformers

    if options.list:
        print("\n".join(row.name for row in ptq.ROWS))
        return 0
    rows = ptq.chosen(options.rows)
    quiet_transformers()
    torch.set_num_threads(1)  # sums depend on it
    path = options.out or (None if options.quick else RESULTS / "ptq.jsonl")
    settings = ptq.QUICK if options.quick else ptq.Settings()
    done = ptq.run(path, rows, settings, options.command_line)
    return int(len(done) < len(rows) * len(settings.policies))


def _presets(options: argparse.Namespace) -> int:
    for each in PRESETS.values():
        print(f"preset {each.name}")
        for field in dataclasses.fields(Preset)[1:]:
            print(f"  {field.name} = {getattr(each, field.name)}")
    width = max(map(len, ARMS))
    for choice in ARMS.values():
        print(f"arm {choice.name:{width}}  {choice.label}: {choice.note}")
    return 0


def _changed(base: Preset, assignments: Sequence[str], **fields: str) -> Preset:
    """The preset with FIELD=VALUE assignments applied."""
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set {assignment}: it must read FIELD=VALUE")
        fields[name] = value
    return base.changed(**fields)


def _check_inputs(run: Run) -> None:
    """Say at once everything that is missing, before anything is loaded."""
    from benchmarks.recovery.data import check_data
    from benchmarks.recovery.policy import check_model

    missing = []
    for check in (lambda: check_model(run.model_path), lambda: check_data(run.preset)):
        try:
            check()
        except FileNotFoundError as error:
            missing.append(str(error))
    if missing:
        raise FileNotFoundError(f"preset {run.preset.name!r} lacks what it needs.\n" + "\n".join(missing))


def _set_aside(folder: Path) -> None:
    """Move the files of an earlier demo into `previous`, so that a new one never destroys measurements unasked."""
    present = [path for path in (folder / "runs", folder / "checkpoints") if path.exists()]
    if present:
        previous = folder / "previous"
        shutil.rmtree(previous, ignore_errors=True)
        previous.mkdir(parents=True)
        for path in present:
            path.rename(previous / path.name)
        print(f"Runs of an earlier call were moved to {previous} (--resume would have continued them).")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
