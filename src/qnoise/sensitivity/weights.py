"""Rows for weights: those of a model's linears, with and without adapters, and those of a checkpoint's matrices."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from qnoise.config import PatchConfig
from qnoise.formats import QuantSpec
from qnoise.names import canonical_name, matches
from qnoise.nn.packed import PackedLinear
from qnoise.rl.adapters import active_adapters, check_mergeable, is_adapted, merged_weight
from qnoise.scales import finite_amax
from qnoise.sensitivity.checkpoint import StoredTensor
from qnoise.sensitivity.figures import SAMPLE, Figures, row_chunks
from qnoise.sensitivity.gaussian import gaussian_figures
from qnoise.sensitivity.rows import ACTIVATIONS, Finding, ScanRow
from qnoise.sensitivity.thresholds import issues
from qnoise.spelling import nearest
from qnoise.targets import decide, unmatched_patterns

# Names under which checkpoints keep tables and heads; a model tells by itself (`get_output_embeddings`).
_TABLE = re.compile(r"(embed|(^|\.)(wte|wpe)$)")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|score|output)$")
_ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate|wg|classifier)$")
_ADAPTER = re.compile(r"(^|\.)(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)(\.|$)")
_CONV1D = re.compile(r"(^|\.)(c_attn|c_fc|c_proj|q_attn)$")


@dataclass(frozen=True)
class Matrix:
    """A matrix to scan: what it is, and how to read it in chunks of rows, as often as needed."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    chunks: Callable[[], Iterator[Tensor]]
    numel: int


def scan_matrix(matrix: Matrix, specs: Sequence[QuantSpec], thresholds: str) -> tuple[list[ScanRow], list[Finding]]:
    """One row for each spec. Two passes over the data: the largest magnitude, and the figures."""
    label = matrix.name if matrix.kind == "weight" else f"{matrix.name} ({matrix.kind})"
    if not matrix.numel:
        return [], [Finding(label, f"has no elements (shape {list(matrix.shape)})", serious=True)]
    amax = None
    if any(spec.per_tensor_scale for spec in specs):
        amax = torch.stack([_finite_peak(chunk) for chunk in matrix.chunks()]).amax()
    every = max(1, matrix.numel // SAMPLE)
    gathered = [Figures(spec, sample_every=every) for spec in specs]
    for chunk in matrix.chunks():
        for figures in gathered:
            figures.add(chunk, amax if figures.spec.per_tensor_scale else None)
    rows = [
        make_row(matrix.name, matrix.kind, matrix.shape, matrix.dtype, each, thresholds)
        for each in gathered
        if each.count
    ]
    findings = []
    if gathered[0].left_out:
        what = f"NaN or Inf in blocks of {gathered[0].left_out:,} of {matrix.numel:,} values; left out of the figures"
        findings.append(Finding(label, what, serious=True))
    elif rows[0].figures["amax"] == 0:
        findings.append(Finding(label, "all zeros"))
    return rows, findings


def _finite_peak(chunk: Tensor) -> Tensor:
    """`finite_amax`, in one pass where all values are finite."""
    low, high = torch.aminmax(chunk)
    peak = torch.maximum(-low, high).float()
    return peak if bool(torch.isfinite(peak)) else finite_amax(chunk)


def make_row(name: str, kind: str, shape: tuple[int, ...], dtype: str, gathered: Figures, thresholds: str) -> ScanRow:
    """The row of what was gathered, beside its gaussian reference."""
    figures, spec = gathered.result(), gathered.spec
    reference = gaussian_figures(spec, figures["rms"], shape[-1], per_row=kind in ACTIVATIONS)
    found = issues(figures, reference, gathered.count, spec.block_format.block_size, thresholds)
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
        if d.kind == "norm" or d.reason == "adapter matrix":
            continue
        if d.reason or ".original_module" in d.path:
            findings.append(Finding(d.name, d.reason or "replaced by the copy that PEFT trains"))
        elif isinstance(d.module, PackedLinear):
            findings.append(Finding(d.name, "packed: its full-precision weight is gone", serious=True))
        else:
            weight = raw_weight(d.module)
            if weight.device.type == "meta":
                findings.append(Finding(d.name, "its weight is offloaded or was never loaded", serious=True))
            else:
                of_module, more = _weight_matrices(d.name, weight.detach(), adapted.get(id(d.module)))
                matrices += of_module
                findings += more
    return matrices, findings


def _weight_matrices(name: str, weight: Tensor, layer: Any) -> tuple[list[Matrix], list[Finding]]:
    merged_in = [] if layer is None else list(getattr(layer, "merged_adapters", []))
    if merged_in:
        what = f"adapter {merged_in[0]!r} is merged into the weight: no rows for the base or for what it adds"
        return [_matrix(name, "merged", lambda: weight, weight)], [Finding(name, what)]
    matrices = [_matrix(name, "weight", lambda: weight, weight)]
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

        matrices.append(_matrix(name, "merged", lambda: merged().to(weight.dtype), weight))
        matrices.append(_matrix(name, "delta", lambda: merged() - whole(weight).to(base), weight, base))
    return matrices, []


def _matrix(
    name: str, kind: str, compute: Callable[[], Tensor], like: Tensor, dtype: torch.dtype | None = None
) -> Matrix:
    @torch.no_grad()
    def chunks() -> Iterator[Tensor]:
        yield from row_chunks(whole(compute()).detach())

    return Matrix(name, kind, tuple(like.shape), dtype_name(dtype or like.dtype), chunks, like.numel())


def raw_weight(module: nn.Module) -> Tensor:
    """The stored weight of a linear, past what may stand in for it."""
    weight = module._parameters.get("weight")
    # torch.nn.utils.parametrize moves the parameter away and serves it through a property.
    return cast(Tensor, module.weight) if weight is None else weight


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
    for tensor in tensors:
        name = _module_name(tensor)
        if len(tensor.shape) < 2:
            vectors += 1
            continue
        reason = _left_out(tensor, name, wanted, unwanted)
        if reason:
            findings.append(Finding(name, reason))
            continue
        numel = tensor.shape[0] * tensor.shape[1]
        dtype = dtype_name(tensor.torch_dtype or torch.float32)
        matrices.append(Matrix(name, "weight", tensor.shape, dtype, tensor.chunks, numel))
    if vectors:
        findings.append(Finding("one-dimensional tensors", f"{vectors} norms, biases and the like are not quantized"))
    return matrices, findings


def _module_name(tensor: StoredTensor) -> str:
    return canonical_name(tensor.name.removesuffix(".weight"))


def _left_out(tensor: StoredTensor, name: str, include: Sequence[str] | None, exclude: Sequence[str]) -> str:
    """Why a tensor of two or more dimensions is not scanned; empty if it is."""
    if _ADAPTER.search(tensor.name):
        return "adapter matrix"
    if tensor.torch_dtype is None:
        return f"stored as {tensor.dtype}: quantized already, or no weight"
    if len(tensor.shape) > 2:
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
    if _HEAD.search(name):
        return "output head"
    if _ROUTER.search(name):
        return "router or gate"
    if _CONV1D.search(name):
        return "may be stored transposed, as GPT-2 does; name it in include= if it is not"
    if not tensor.name.endswith(".weight"):
        return "its name does not end in .weight: no weight of a linear"
    return ""


def _no_match(argument: str, pattern: str, names: Sequence[str]) -> ValueError:
    near = nearest(pattern.rpartition(".")[2], sorted({name.rpartition(".")[2] for name in names}), cutoff=0.5)
    hint = f" Did you mean {near!r}?" if near else ""
    return ValueError(
        f"{argument} names {pattern!r}, which matches no linear.{hint} There are, among others: {', '.join(names[:6])}"
    )
