"""Rows for weights: those of a model's linears, with and without adapters, and those of a checkpoint's matrices."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from qnoise.config import PatchConfig
from qnoise.formats import QuantSpec
from qnoise.names import canonical_name, matches
from qnoise.nn.matrices import FakeQuantMatrices, matrix_axes
from qnoise.nn.packed import PackedLinear
from qnoise.ops import tensor_amax
from qnoise.patch import SIBLINGS
from qnoise.rl.adapters import active_adapters, check_mergeable, is_adapted, merged_weight
from qnoise.sensitivity.checkpoint import StoredTensor
from qnoise.sensitivity.figures import SAMPLE, Figures, row_chunks
from qnoise.sensitivity.gaussian import gaussian_figures
from qnoise.sensitivity.rows import ACTIVATIONS, Finding, ScanRow
from qnoise.sensitivity.thresholds import issues
from qnoise.spelling import nearest
from qnoise.targets import decide, is_router, unmatched_patterns

# Names under which checkpoints keep tables and heads; a model tells by itself (`get_output_embeddings`).
_TABLE = re.compile(r"(embed|(^|\.)(wte|wpe)$)")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|score|output|classifier|qa_outputs|(v_head|value_head)(\.\w+)?)$")
_ADAPTER = re.compile(r"(^|\.)(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)(\.|$)")
_CONV1D = re.compile(r"(^|\.)(c_attn|c_fc|c_proj|q_attn)$")


@dataclass(frozen=True)
class Matrix:
    """A matrix to scan: what it is, and how to read it in chunks of rows, as often as needed.

    Attributes:
        name: canonical name of the module, or of the parameter where a module has several matrices.
        kind: one of `rows.KINDS`.
        shape: with the contraction axis last; of fused experts (experts, out, in).
        dtype: of the stored tensor.
        chunks: reads it.
        numel: its elements.
        stack: how many matrices of equal size it holds one after the other, each with a per-tensor scale of its own.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    chunks: Callable[[], Iterator[Tensor]]
    numel: int
    stack: int = 1


class Peaks:
    """What fixes the per-tensor scale of each matrix: the largest finite magnitude of what is quantized, of it and of
    the siblings that engines fuse with it, as `patch_model` has it. Read when first asked for, and kept.

    Args:
        matrices: all of the scan.
        specs: its formats.
    """

    def __init__(self, matrices: Sequence[Matrix], specs: Sequence[QuantSpec]) -> None:
        self._specs = {spec.rotation: spec for spec in specs if spec.per_tensor_scale}
        self._groups: dict[object, list[Matrix]] = {}
        self._found: dict[object, dict[str | None, Tensor]] = {}
        for matrix in matrices:
            self._groups.setdefault(_fused(matrix), []).append(matrix)

    def siblings(self, matrix: Matrix) -> tuple[str, ...]:
        """Names of the others that share its scale."""
        return tuple(sorted(each.name for each in self._groups.get(_fused(matrix), ()) if each.name != matrix.name))

    def of(self, matrix: Matrix) -> dict[str | None, Tensor]:
        """For each rotation among the specs that have such a scale: fp32, one number for each of the stack."""
        key = _fused(matrix)
        if key not in self._found:
            peaks = [self._own(each) for each in self._groups.get(key, [matrix])]
            self._found[key] = {
                rotation: torch.stack([each[rotation] for each in peaks]).amax(0) for rotation in self._specs
            }
        return self._found[key]

    def _own(self, matrix: Matrix) -> dict[str | None, Tensor]:
        found = {rotation: torch.zeros(matrix.stack) for rotation in self._specs}
        seen = 0
        for chunk in matrix.chunks() if found and matrix.numel else ():
            first, last = (at * matrix.stack // matrix.numel for at in (seen, seen + chunk.numel() - 1))
            seen += chunk.numel()
            for rotation, spec in self._specs.items():
                if first == last:
                    peak = tensor_amax(chunk, spec).cpu()
                    found[rotation][first] = torch.maximum(found[rotation][first], peak)
                else:
                    peaks = torch.stack([tensor_amax(row, spec).cpu() for row in chunk])
                    found[rotation].scatter_reduce_(0, _owners(matrix, seen - chunk.numel(), chunk), peaks, "amax")
        return found


def _owners(matrix: Matrix, seen: int, chunk: Tensor) -> Tensor:
    """Which of the stack each row of a chunk belongs to; `seen` elements came before it."""
    rows = seen // matrix.shape[-1] + torch.arange(chunk.shape[0])
    return rows * matrix.stack * matrix.shape[-1] // matrix.numel


def _fused(matrix: Matrix) -> object:
    """Equal for the matrices that share a per-tensor scale."""
    parent, _, leaf = matrix.name.rpartition(".")
    siblings = next((each for each in SIBLINGS if leaf in each), None)
    # What an adapter adds is never served by itself, hence never fused.
    if siblings is None or matrix.stack > 1 or matrix.kind == "delta":
        return (matrix.name, matrix.kind)
    return (parent, siblings, matrix.kind)


def scan_matrix(
    matrix: Matrix, specs: Sequence[QuantSpec], thresholds: str, peaks: Peaks
) -> tuple[list[ScanRow], list[Finding]]:
    """One row for each spec."""
    label = matrix.name if matrix.kind == "weight" else f"{matrix.name} ({matrix.kind})"
    if not matrix.numel:
        return [], [Finding(label, f"has no elements (shape {list(matrix.shape)})", serious=True)]
    scales = peaks.of(matrix)
    every = max(1, matrix.numel // SAMPLE)
    gathered = [Figures(spec, sample_every=every) for spec in specs]
    seen = 0
    for chunk in matrix.chunks():
        owners = _owners(matrix, seen, chunk) if matrix.stack > 1 else None
        seen += chunk.numel()
        for figures in gathered:
            amax = None
            if figures.spec.per_tensor_scale:
                own = scales[figures.spec.rotation].to(chunk.device)
                amax = own[0] if owners is None else own[owners].unsqueeze(-1)
            figures.add(chunk, amax)
    rows = [
        make_row(matrix.name, matrix.kind, matrix.shape, matrix.dtype, each, thresholds)
        for each in gathered
        if each.count
    ]
    siblings = peaks.siblings(matrix)
    rows = [replace(row, scale_shared_with=siblings) if row.spec.per_tensor_scale else row for row in rows]
    findings = []
    if gathered[0].left_out:
        what = f"NaN or Inf in blocks of {gathered[0].left_out:,} of {matrix.numel:,} values; left out of the figures"
        findings.append(Finding(label, what, serious=True))
    elif rows[0].figures["amax"] == 0:
        findings.append(Finding(label, "all zeros"))
    return rows, findings


def make_row(name: str, kind: str, shape: tuple[int, ...], dtype: str, gathered: Figures, thresholds: str) -> ScanRow:
    """The row of what was gathered, beside its gaussian reference."""
    figures, spec = gathered.result(), gathered.spec
    reference = gaussian_figures(spec, figures["rms"], shape[-1], per_row=kind in ACTIVATIONS)
    found = issues(figures, reference, gathered.count, spec, thresholds)
    return ScanRow(
        name, kind, spec, shape, dtype, figures, gathered.decomposition(), reference, found, gathered.histogram
    )


def model_matrices(
    model: nn.Module, include: Iterable[str] | None, exclude: Iterable[str]
) -> tuple[list[Matrix], list[Finding]]:
    """The weights that `patch_model` would quantize, and why the others are left out.

    Raises:
        ValueError: a pattern matches nothing.
    """
    config = PatchConfig("mxfp4", include=None if include is None else tuple(include), exclude=tuple(exclude))
    decisions = decide(model, config)
    names = [d.name for d in decisions if d.kind == "linear" and d.reason != "adapter matrix"]
    for argument, pattern in unmatched_patterns(decisions, config):
        raise _no_match(argument, pattern, names)
    adapted: dict[int, Any] = {id(m._modules["base_layer"]): m for m in model.modules() if is_adapted(m)}
    matrices: list[Matrix] = []
    findings: list[Finding] = []
    for d in decisions:
        if d.kind == "norm" or d.reads or d.reason == "adapter matrix":
            continue
        if d.reason or ".original_module" in d.path:
            findings.append(Finding(d.name, d.reason or "replaced by the copy that PEFT trains"))
        elif isinstance(d.module, PackedLinear):
            findings.append(Finding(d.name, "packed: its full-precision weight is gone", serious=True))
        else:
            axes = contraction_axes(d.module)
            for key, weight in ((key, raw_weight(d.module, key)) for key in axes):
                name = d.name if d.kind == "linear" else f"{d.name}.{key}"
                if weight.device.type == "meta":
                    findings.append(Finding(name, "its weight is offloaded or was never loaded", serious=True))
                else:
                    of_module, more = _weight_matrices(name, weight.detach(), axes[key], adapted.get(id(d.module)))
                    matrices += of_module
                    findings += more
    return matrices, findings


def contraction_axes(module: nn.Module) -> dict[str, int]:
    """The matrices of a module that is quantized, and the axis each is contracted along: that of the blocks."""
    axes = module._qnoise.axes if isinstance(module, FakeQuantMatrices) else matrix_axes(module)
    return {key: axis % raw_weight(module, key).dim() for key, axis in axes.items()} or {"weight": 1}


def _weight_matrices(name: str, weight: Tensor, axis: int, layer: Any) -> tuple[list[Matrix], list[Finding]]:
    merged_in = [] if layer is None else list(getattr(layer, "merged_adapters", []))
    if merged_in:
        what = f"adapter {merged_in[0]!r} is merged into the weight: no rows for the base or for what it adds"
        return [_matrix(name, "merged", lambda: weight, weight, axis)], [Finding(name, what)]
    matrices = [_matrix(name, "weight", lambda: weight, weight, axis)]
    if layer is None:
        return matrices, []
    adapters = active_adapters(layer, name)
    try:
        for adapter in adapters:
            check_mergeable(layer, adapter, name)
    except ValueError as error:
        return matrices, [Finding(name, f"its adapter is not scanned: {error}")]
    if adapters:
        base = torch.promote_types(weight.dtype, torch.float32)

        def merged() -> Tensor:
            return merged_weight(layer, adapters, whole(weight).to(base))

        matrices.append(_matrix(name, "merged", lambda: merged().to(weight.dtype), weight, axis))
        matrices.append(_matrix(name, "delta", lambda: merged() - whole(weight).to(base), weight, axis, base))
    return matrices, []


def _matrix(
    name: str, kind: str, compute: Callable[[], Tensor], like: Tensor, axis: int, dtype: torch.dtype | None = None
) -> Matrix:
    @torch.no_grad()
    def chunks() -> Iterator[Tensor]:
        weight = whole(compute()).detach().movedim(axis, -1)
        for each in weight if weight.dim() == 3 else (weight,):
            yield from row_chunks(each)

    shape = tuple(like.movedim(axis, -1).shape)
    stack = shape[0] if len(shape) == 3 else 1
    return Matrix(name, kind, shape, dtype_name(dtype or like.dtype), chunks, like.numel(), max(1, stack))


def raw_weight(module: nn.Module, name: str = "weight") -> Tensor:
    """A stored weight of a module, past what may stand in for it."""
    weight = module._parameters.get(name)
    # torch.nn.utils.parametrize moves the parameter away and serves it through a property.
    return cast(Tensor, getattr(module, name)) if weight is None else weight


def whole(weight: Tensor) -> Tensor:
    """A weight gathered from all ranks, if it is sharded."""
    gather = getattr(weight, "full_tensor", None)
    return gather() if callable(gather) else weight


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def checkpoint_matrices(
    tensors: Iterable[StoredTensor], include: Iterable[str] | None, exclude: Iterable[str]
) -> tuple[list[Matrix], list[Finding]]:
    """The matrices of a checkpoint that are weights of linears, by their names, and why the others are left out.

    Raises:
        ValueError: a pattern matches nothing.
    """
    tensors = list(tensors)
    wanted = None if include is None else tuple(include)
    unwanted = tuple(exclude)
    names = [_module_name(tensor) for tensor in tensors if len(tensor.shape) > 1]
    for argument, patterns in (("include", wanted or ()), ("exclude", unwanted)):
        for pattern in patterns:
            if not any(matches(name, pattern) for name in names):
                raise _no_match(argument, pattern, names)
    matrices, findings, vectors = [], [], 0
    axes = _expert_axes(tensors)
    for tensor in tensors:
        name = _module_name(tensor)
        if len(tensor.shape) < 2:
            vectors += 1
            continue
        axis = axes.get(tensor.name, 1) if len(tensor.shape) > 2 else 1
        reason = _left_out(tensor, name, wanted, unwanted, tensor.name in axes)
        if reason:
            findings.append(Finding(name, reason))
            continue
        dtype = dtype_name(tensor.torch_dtype or torch.float32)
        if len(tensor.shape) == 2:
            matrices.append(Matrix(name, "weight", tensor.shape, dtype, tensor.chunks, math.prod(tensor.shape)))
            continue
        experts, a, b = tensor.shape
        shape, chunks = ((experts, b, a), tensor.transposed_chunks) if axis == 1 else (tensor.shape, tensor.chunks)
        matrices.append(Matrix(name, "weight", shape, dtype, chunks, math.prod(shape), max(1, experts)))
    if vectors:
        findings.append(Finding("one-dimensional tensors", f"{vectors} norms, biases and the like are not quantized"))
    return matrices, findings


def _module_name(tensor: StoredTensor) -> str:
    return canonical_name(tensor.name.removesuffix(".weight"))


def _expert_axes(tensors: Sequence[StoredTensor]) -> dict[str, int]:
    """The contraction axis of the fused experts of a checkpoint, where a pair of shapes tells it: what goes into the
    second matrix comes out of the first (see `nn.matrices.matrix_axes`)."""
    shapes = {t.name: t.shape for t in tensors if len(t.shape) == 3 and ".experts." in t.name}
    axes: dict[str, int] = {}
    for name, (_, c, d) in shapes.items():
        parent, _, leaf = name.rpartition(".")
        first = next((n for n in ("gate_up_proj", "up_proj") if f"{parent}.{n}" in shapes), "")
        if leaf != "down_proj" or not first:
            continue
        gates = 2 if first == "gate_up_proj" else 1
        _, a, b = shapes[f"{parent}.{first}"]
        out_in, in_out = (a == gates * d and b == c), (b == gates * c and a == d)
        if out_in != in_out:
            each = (f"{parent}.{n}" for n in ("gate_up_proj", "gate_proj", "up_proj", "down_proj"))
            axes |= {key: 2 if out_in else 1 for key in each if key in shapes}
    return axes


def _left_out(
    tensor: StoredTensor, name: str, include: Sequence[str] | None, exclude: Sequence[str], experts: bool
) -> str:
    """Why a tensor of two or more dimensions is not scanned; empty if it is. `experts`: fused ones, contracted along a
    known axis."""
    if _ADAPTER.search(tensor.name):
        return "adapter matrix"
    if tensor.torch_dtype is None:
        return f"stored as {tensor.dtype}: quantized already, or no weight"
    if len(tensor.shape) > 2 and not experts:
        return f"has {len(tensor.shape)} dimensions: along which of them it is contracted the file does not say"
    if any(matches(name, glob) for glob in exclude):
        return "excluded"
    if include is not None:
        hits = [glob for glob in include if matches(name, glob)]
        if not hits:
            return "not included"
        if any(glob.rpartition(".")[2] == name.rpartition(".")[2] for glob in hits):
            return ""
    if _TABLE.search(name):
        return "embedding table"
    if is_router(name):
        return "router or gate"
    if _HEAD.search(name):
        return "output head"
    if _CONV1D.search(name):
        return "may be stored transposed, as GPT-2 does; name it in include= if it is not"
    if not tensor.name.endswith(".weight") and not experts:
        return "its name does not end in .weight: no weight of a linear"
    return ""


def _no_match(argument: str, pattern: str, names: Sequence[str]) -> ValueError:
    near = nearest(pattern.rpartition(".")[2], sorted({name.rpartition(".")[2] for name in names}), cutoff=0.5)
    hint = f" Did you mean {near!r}?" if near else ""
    return ValueError(
        f"{argument} names {pattern!r}, which matches no linear.{hint} There are, among others: {', '.join(names[:6])}"
    )
