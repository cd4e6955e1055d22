"""Rows for activations: the inputs of the linears and the outputs of the layers, seen by hooks in a forward.

Blocks run along the features. A per-tensor scale is that of the token, as `act_fmt` has it. The figures of each token
count alike: one token with massive activations, which most language models have, does not decide them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qnoise.config import PatchConfig
from qnoise.faults import repeated_layers
from qnoise.formats import QuantSpec
from qnoise.functional import fake_quantize
from qnoise.nn.packed import PackedLinear
from qnoise.sensitivity.batches import tokens, watch
from qnoise.sensitivity.figures import CHUNK, Figures
from qnoise.sensitivity.rows import Finding, ScanRow
from qnoise.sensitivity.weights import contraction_axes, dtype_name, make_row, raw_weight, whole
from qnoise.targets import decide

_Key = tuple[str, str]


class _Gathered:
    """What has been seen at one place."""

    def __init__(self, specs: Sequence[QuantSpec]) -> None:
        self.figures = [Figures(spec, "column") for spec in specs]
        self.tokens = 0
        self.width = 0
        self.dtype = torch.float32

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        self.tokens += rows.shape[0]
        self.width, self.dtype = rows.shape[1], rows.dtype
        step = max(1, CHUNK // max(1, self.width))
        for start in range(0, rows.shape[0], step):
            chunk = rows[start : start + step]
            finite = chunk.abs().float().nan_to_num_(nan=0.0, posinf=0.0)
            amax = finite.amax(-1, keepdim=True) if self.width else None
            for figures in self.figures:
                figures.add(chunk, amax if figures.spec.per_tensor_scale else None)


def scan_activations(
    model: nn.Module,
    inputs: Iterable[Any],
    specs: Sequence[QuantSpec],
    thresholds: str,
    include: Iterable[str] | None,
    exclude: Iterable[str],
) -> tuple[list[ScanRow], list[Finding], dict[tuple[str, QuantSpec], float]]:
    """Run the model on the inputs, and look.

    Returns:
        Rows, findings, and for each (linear, spec) the relative RMS error of its output when its weight alone is
        quantized: ||x (Q(W) - W)^T|| / ||x W^T|| over all tokens.

    Raises:
        ValueError: there are no inputs.
    """
    config = PatchConfig("mxfp4", include=None if include is None else tuple(include), exclude=tuple(exclude))
    linears = {
        d.name: d.module
        for d in decide(model, config)
        if d.kind == "linear" and not d.reason and ".original_module" not in d.path
    }
    gathered: dict[_Key, _Gathered] = {}
    energies: dict[tuple[str, QuantSpec], tuple[float, float]] = {}
    mask: list[Tensor | None] = [None]

    def see(name: str, kind: str, x: Any) -> Tensor | None:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
            return None
        rows = tokens(x.detach(), mask[0])
        gathered.setdefault((name, kind), _Gathered(specs)).add(rows)
        return rows

    def before(name: str, module: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rows = see(name, "input", args[0] if args else next(iter(kwargs.values()), None))
            if rows is not None and not isinstance(module, PackedLinear):
                for spec, parts in _output_energies(module, rows, specs):
                    seen = energies.get((name, spec), (0.0, 0.0))
                    energies[name, spec] = (seen[0] + parts[0], seen[1] + parts[1])

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, output: Any) -> None:
            see(name, "output", output[0] if isinstance(output, tuple | list) and output else output)

        return hook

    handles = [m.register_forward_pre_hook(before(n, m), with_kwargs=True) for n, m in linears.items()]
    handles += [m.register_forward_hook(after(n)) for n, m in repeated_layers(model)]
    watch(model, inputs, handles, mask)
    rows = [
        make_row(name, kind, (each.tokens, each.width), dtype_name(each.dtype), figures, thresholds)
        for (name, kind), each in gathered.items()
        for figures in each.figures
        if figures.count
    ]
    seen = {name for name, kind in gathered if kind == "input"}
    findings = [Finding(name, "got no input in the forward") for name in linears if name not in seen]
    for (name, kind), each in gathered.items():
        if each.figures[0].left_out:
            what = f"NaN or Inf in blocks of {each.figures[0].left_out:,} values; left out of the figures"
            findings.append(Finding(f"{name} ({kind})", what, serious=True))
    relative = {key: (noise / signal) ** 0.5 if signal else 0.0 for key, (signal, noise) in energies.items()}
    return rows, findings, relative


def _output_energies(
    module: nn.Module, rows: Tensor, specs: Sequence[QuantSpec]
) -> Iterator[tuple[QuantSpec, tuple[float, float]]]:
    """For each spec, energy of the output and of its error with the weight quantized."""
    weight = whole(raw_weight(module)).detach().movedim(contraction_axes(module)["weight"], -1)
    if weight.device.type == "meta":  # offloaded: loaded only inside the forward
        return
    rows = rows[torch.isfinite(rows).all(-1)].float()
    signal = F.linear(rows, weight.float()).square().sum(dtype=torch.float64).item()
    for spec in specs:
        generator = torch.Generator().manual_seed(0) if spec.rounding == "stochastic" else None
        error = fake_quantize(weight, spec, generator=generator).float() - weight.float()
        yield spec, (signal, F.linear(rows, error).square().sum(dtype=torch.float64).item())
