"""The scan of weights: quantize, dequantize and the figures of every tensor, against reading them once."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

import qnoise
from benchmarks.micro.measure import Case, Contender
from qnoise.kernels import error_sums

TITLE = "the scan of weights, in millions of weights a second and format"


def cases(quick: bool) -> Iterator[Case]:
    rows, width, layers = (256, 1024, 2) if quick else (4096, 4096, 2)
    for dtype in (torch.bfloat16, torch.float32):
        model = weights(layers, rows, width, dtype)
        numel = sum(p.numel() for p in model.parameters())
        for fmt in ("mxfp4", "nvfp4", "mxfp8_e4m3"):
            for threads in (1, 2):
                yield Case(
                    "scan",
                    {
                        "fmt": fmt,
                        "dtype": str(dtype).removeprefix("torch."),
                        "shape": [layers, rows, width],
                        "threads": threads,
                    },
                    [
                        Contender("scan", lambda fmt=fmt, model=model: qnoise.scan(model, fmt, progress=False),
                                  figures={"weights": numel}),
                        Contender("scan, eager figures", eager(model, fmt), rounds=3, figures={"weights": numel}),
                    ],
                    lambda fmt=fmt, model=model: check(model, fmt),
                    rounds=12,
                )  # fmt: skip


def weights(layers: int, rows: int, width: int, dtype: torch.dtype) -> nn.Sequential:
    """Linears with normal weights of the size of a language model's."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width, rows, bias=False, dtype=dtype) for _ in range(layers)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def eager(model: nn.Module, fmt: str) -> Callable[[], object]:
    """The same with the figures computed in PyTorch, as where no compiler is installed."""

    def call() -> qnoise.ScanReport:
        serves, error_sums.serves = error_sums.serves, lambda *_: False
        try:
            return qnoise.scan(model, fmt, progress=False)
        finally:
            error_sums.serves = serves

    return call


def check(model: nn.Module, fmt: str) -> None:
    """The figures of the first tensor are those of `qnoise.metrics`."""
    report = qnoise.scan(model, fmt, progress=False)
    weight = next(model.parameters()).detach()
    expected = qnoise.metrics.error_report(weight, qnoise.fake_quantize(weight, fmt), fmt)
    for name, value in expected.items():
        if abs(report.rows[0].figures[name] - value) > 1e-5 * abs(value) + 1e-9:
            raise ValueError(f"{name} is {report.rows[0].figures[name]}, and metrics has {value}")
