"""`scan`: what formats do to a model or a checkpoint, tensor by tensor."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO, cast

from torch import nn

from qnoise.formats import QuantSpec, as_spec
from qnoise.sensitivity.activations import scan_activations
from qnoise.sensitivity.batches import batches
from qnoise.sensitivity.checkpoint import Checkpoint, open_checkpoint
from qnoise.sensitivity.localise import localise as find_faults
from qnoise.sensitivity.plain_json import dumps, loads
from qnoise.sensitivity.report import ScanReport
from qnoise.sensitivity.rows import Finding, ScanRow
from qnoise.sensitivity.thresholds import THRESHOLDS
from qnoise.sensitivity.weights import Matrix, Peaks, checkpoint_matrices, model_matrices, scan_matrix
from qnoise.spelling import check_choice

_RESUME_SCHEMA = "qnoise-scan-part-1"


def scan(
    model_or_checkpoint: nn.Module | str | Path,
    fmts: str | QuantSpec | Sequence[str | QuantSpec] = "mxfp4",
    *,
    inputs: Any = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] = (),
    thresholds: str = "gaussian",
    resume: str | Path | None = None,
    progress: bool | None = None,
    localise: bool = False,
) -> ScanReport:
    """What each format does to each weight, and to activations when inputs are given.

    Of a model, the weights that `patch_model` would quantize are scanned; with PEFT adapters the stored weight, the
    weight with the active adapters added, and what they add are separate rows. Of a checkpoint the two-dimensional
    tensors that are weights of linears by their names; files are read a chunk at a time, so that the memory needed does
    not grow with the model. What is left out is listed in the findings, with the reason. The model stays as it was, bit
    for bit; nothing is quantized in it. An NVFP4 tensor has the per-tensor scale that `patch_model`
    gives it: the siblings that engines fuse share one, and the row names them.

    Args:
        model_or_checkpoint: a model, patched or not, wrapped by PEFT or not; or the path of a safetensors file, of a
            directory of them, or of a shard index.
        fmts: format name or spec, or several.
        inputs: batches to run a model on: a tensor, a mapping of keyword arguments, or an iterable of these and of
            tuples of positional arguments. Gives rows for the inputs of the linears and the outputs of the layers, and
            the output error of each linear. Where the batch has an attention_mask, padding is left out.
        include, exclude: globs on canonical names.
        thresholds: "gaussian": what is worse than the format is on a gaussian tensor of the same rms and row length is
            an issue; "classic": the limits of published scans, which flag gaussian data.
        resume: a file to keep finished tensors of a checkpoint in. A scan that was interrupted goes on from there; the
            file must be of the same checkpoint, formats and thresholds.
        progress: show a progress bar on stderr; None: if it is a terminal.
        localise: also find the layers that carry a hardware fault, by the inputs: `report.localisation`, and a serious
            finding for each. Runs the model three times more for each batch.

    Returns:
        The report.

    Raises:
        ValueError: unknown format or thresholds; a pattern that matches nothing; nothing to scan; a checkpoint that
            contradicts itself (file and tensor are named); a `resume` file of another scan, or for a model; inputs
            for a path; localise without inputs, or for a model without repeated layers.
        TypeError: neither a model nor a path.
        FileNotFoundError: no such path.
    """
    specs = _specs(fmts)
    check_choice("thresholds", thresholds, THRESHOLDS)
    include = (include,) if isinstance(include, str) else include
    exclude = (exclude,) if isinstance(exclude, str) else exclude
    if localise and inputs is None:
        raise ValueError("localise=True looks at the model while it runs: give inputs=")
    inputs = list(batches(inputs)) if localise else inputs
    findings: list[Finding] = []
    identity = ""
    if isinstance(model_or_checkpoint, nn.Module):
        if resume is not None:
            raise ValueError(
                "resume is for checkpoints: a file cannot tell whether a model in memory is the same still"
            )
        source = type(model_or_checkpoint).__name__
        matrices, more = model_matrices(model_or_checkpoint, include, exclude)
    elif isinstance(model_or_checkpoint, str | Path):
        if inputs is not None:
            raise ValueError("inputs need a model to run: load the checkpoint and scan the model")
        checkpoint: Checkpoint = open_checkpoint(model_or_checkpoint)
        source, identity = str(checkpoint.path), checkpoint.fingerprint()
        findings += checkpoint.findings
        matrices, more = checkpoint_matrices(checkpoint.tensors, include, exclude)
    else:
        raise TypeError(f"scan takes a model or the path of a checkpoint, not {type(model_or_checkpoint).__name__}")
    findings += more
    if not matrices:
        why = "; ".join(f"{f.name}: {f.what}" for f in findings[:6]) or "it has no linears"
        raise ValueError(f"there is no weight to scan in {source}. {why}")
    rows: list[ScanRow] = []
    peaks = Peaks(matrices, specs)
    part = _Part(resume, source, identity, specs, thresholds)
    with part:
        for matrix in _with_progress(matrices, progress):
            kept = part.of(matrix)
            if kept is None:
                kept = scan_matrix(matrix, specs, thresholds, peaks)
                part.keep(matrix, *kept)
            rows += kept[0]
            findings += kept[1]
    if inputs is not None:
        model = cast(nn.Module, model_or_checkpoint)
        seen, more, output_errors = scan_activations(model, inputs, specs, thresholds, include, exclude)
        findings += more
        rows = [_with_output_error(row, output_errors) for row in rows] + seen
    found = find_faults(cast(nn.Module, model_or_checkpoint), inputs) if localise else None
    findings += [Finding(each.name, str(each), serious=True) for each in found.suspicions] if found else []
    return ScanReport(source, thresholds, tuple(rows), tuple(findings), found)


def _specs(fmts: str | QuantSpec | Sequence[str | QuantSpec]) -> list[QuantSpec]:
    given = [fmts] if isinstance(fmts, str | QuantSpec) else list(fmts)
    if not given:
        raise ValueError("fmts is empty; name at least one format, such as 'mxfp4'")
    return list(dict.fromkeys(as_spec(each) for each in given))


def _with_output_error(row: ScanRow, errors: dict[tuple[str, QuantSpec], float]) -> ScanRow:
    error = errors.get((row.name, row.spec))
    if row.kind != "weight" or error is None:
        return row
    return replace(row, figures={**row.figures, "output_relative_rms": error})


def _with_progress(matrices: list[Matrix], progress: bool | None) -> Iterator[Matrix]:
    if progress is None:
        progress = sys.stderr.isatty()
    if not progress:
        yield from matrices
        return
    from tqdm.auto import tqdm

    with tqdm(total=sum(m.numel for m in matrices), unit="w", unit_scale=True, desc="scan") as bar:
        for matrix in matrices:
            bar.set_postfix_str(matrix.name[-40:], refresh=False)
            yield matrix
            bar.update(matrix.numel)


class _Part:
    """The file of finished tensors: a line that says of which scan, then a line for each tensor."""

    def __init__(
        self, path: str | Path | None, source: str, identity: str, specs: Sequence[QuantSpec], thresholds: str
    ) -> None:
        self._path = None if path is None else Path(path)
        self._file: TextIO | None = None
        self._header = {
            "schema": _RESUME_SCHEMA,
            "source": source,
            "identity": identity,
            "specs": [spec.to_dict() for spec in specs],
            "thresholds": thresholds,
        }
        self._kept: dict[tuple[str, str], tuple[list[ScanRow], list[Finding]]] = {}

    def __enter__(self) -> _Part:
        if self._path is None:
            return self
        complete = self._read(self._path) if self._path.exists() else ""
        # Without a line that was cut off when the scan was interrupted.
        self._path.write_text(complete or dumps(self._header) + "\n", encoding="utf-8")
        self._file = self._path.open("a", encoding="utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def _read(self, path: Path) -> str:
        text = path.read_text(encoding="utf-8")
        lines = text[: text.rfind("\n") + 1].splitlines()
        if not lines:
            return ""
        try:
            header, entries = loads(lines[0]), [loads(line) for line in lines[1:]]
            for entry in entries:
                rows = [ScanRow.from_dict(row) for row in entry["rows"]]
                self._kept[entry["name"], entry["kind"]] = rows, [Finding(**f) for f in entry["findings"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no file of a scan's finished tensors ({error}); name another") from None
        if header != json.loads(dumps(self._header)):
            differs = [
                key for key in self._header if not isinstance(header, dict) or header.get(key) != self._header[key]
            ]
            raise ValueError(f"{path} is of another scan ({', '.join(differs)} differ); delete it or name another file")
        return "\n".join(lines) + "\n"

    def of(self, matrix: Matrix) -> tuple[list[ScanRow], list[Finding]] | None:
        """What an earlier scan has found of this tensor."""
        return self._kept.get((matrix.name, matrix.kind))

    def keep(self, matrix: Matrix, rows: Iterable[ScanRow], findings: Iterable[Finding]) -> None:
        if self._file is None:
            return
        entry = {
            "name": matrix.name,
            "kind": matrix.kind,
            "rows": [row.to_dict() for row in rows],
            "findings": [asdict(f) for f in findings],
        }
        self._file.write(dumps(entry) + "\n")
        self._file.flush()
