"""Log-probabilities of tokens, forward and backward, against `log_softmax(logits.float()).gather` and peers.

From given logits, and from hidden states through a head that is trained or frozen: there, naive and what has no
function of its own for it multiply first. `max_error` of a contender is its largest difference to fp64 over some of the
rows. In `rl_log_probs_memory` a unit is a logit: bytes per logit at the peak of forward and backward, with gradients.

Ours gives the entropy as well, in the same pass; of the others only TRL's chunked function could, and is not asked to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.micro import rl_peers
from benchmarks.micro.measure import Case, Contender
from qnoise.rl import token_log_probs

TITLE = "log-probabilities, forward and backward, against fp32 log_softmax and gather"
ROUNDS = 10
SOME = 64
"""Rows of each sequence, or of all, that are compared with fp64."""


def cases(quick: bool) -> Iterator[Case]:
    sizes = (256, 16_384, 64) if quick else (2048, 65_536, 128)
    for dtype, trained in ((torch.float32, True), (torch.float32, False), (torch.bfloat16, True))[: 1 if quick else 3]:
        yield from_hidden("rl_log_probs_memory", sizes, dtype, trained)
    for dtype in (torch.float32, torch.bfloat16):
        yield from_logits((2, 32, 4096) if quick else (4, 512, 32_768), dtype)
    for trained in (True, False):
        yield from_hidden("rl_log_probs", (128, 4096, 64) if quick else (1024, 32_768, 256), torch.float32, trained)


def naive(logits: Tensor, ids: Tensor) -> Tensor:
    """What everyone starts with: fp32 whatever the logits are."""
    return torch.log_softmax(logits.float(), -1).gather(-1, ids[..., None])[..., 0]


def from_logits(shape: tuple[int, int, int], dtype: torch.dtype, device: str = "cpu") -> Case:
    generator = torch.Generator(device).manual_seed(0)
    logits = (3 * torch.randn(shape, generator=generator, device=device)).to(dtype).requires_grad_()
    ids = torch.randint(shape[-1], shape[:-1], generator=generator, device=device)
    some, some_ids = logits.detach()[:, :SOME], ids[:, :SOME]

    def ours(logits: Tensor, ids: Tensor) -> Tensor:
        return token_log_probs(logits, ids)[0]

    def made(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Callable[[], object], dict[str, Any]]:
        figures = {"max_error": max_error(function(some, some_ids), some, some_ids)}
        return forward_backward(lambda: function(logits, ids), [logits]), figures

    def check() -> None:
        leaf = some.clone().requires_grad_()
        check_equal([ours(leaf, some_ids), naive(leaf, some_ids)], [leaf])

    return Case(
        "rl_log_probs",
        {"from": "logits", "dtype": name_of(dtype), "shape": list(shape)},
        [
            own("naive", made(naive)),
            own("qnoise", made(ours)),
            rl_peers.contender("TRL selective_log_softmax", lambda: made(rl_peers.trl_selective)),
            rl_peers.contender("verl logprobs_from_logits_v2", lambda: made(rl_peers.verl_v2)),
            rl_peers.contender("verl logprobs_from_logits_naive", lambda: made(rl_peers.verl_naive)),
        ],
        check,
        ROUNDS,
    )


def from_hidden(operation: str, sizes: tuple[int, int, int], dtype: torch.dtype, trained: bool) -> Case:
    rows, vocabulary, width = sizes
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(width, vocabulary, bias=False, dtype=dtype).requires_grad_(trained)
    with torch.no_grad():
        head.weight.normal_(0, 3 * width**-0.5, generator=generator)
    hidden = torch.randn(rows, width, generator=generator).to(dtype).requires_grad_()
    ids = torch.randint(vocabulary, (rows,), generator=generator)
    leaves = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    some, some_ids = hidden.detach()[:SOME], ids[:SOME]

    def ours(hidden: Tensor, ids: Tensor) -> Tensor:
        return token_log_probs(hidden, ids, lm_head=head)[0]

    def first_logits(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda hidden, ids: function(head(hidden)[None], ids[None])[0]

    def weight_of_head(function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda hidden, ids: function(hidden, head.weight, ids)

    def made(function: Callable[[Tensor, Tensor], Tensor]) -> tuple[Callable[[], object], dict[str, Any]]:
        with torch.no_grad():
            figures = {"max_error": max_error(function(some, some_ids), head(some), some_ids)}
        return forward_backward(lambda: function(hidden, ids), leaves), figures

    def check() -> None:
        leaf = some.clone().requires_grad_()
        check_equal([ours(leaf, some_ids), first_logits(naive)(leaf, some_ids)], [leaf, *leaves[1:]])

    return Case(
        operation,
        {
            "from": "hidden",
            "head": "trained" if trained else "frozen",
            "dtype": name_of(dtype),
            "rows": rows,
            "vocabulary": vocabulary,
            "hidden": width,
        },
        [
            own("naive", made(first_logits(naive))),
            own("qnoise", made(ours)),
            rl_peers.contender("TRL selective_log_softmax", lambda: made(first_logits(rl_peers.trl_selective))),
            rl_peers.contender("TRL ChunkedLogProbFunction", lambda: made(weight_of_head(rl_peers.trl_chunked))),
            rl_peers.contender("Liger chunked log-prob", lambda: made(weight_of_head(rl_peers.liger_chunked))),
        ],
        check,
        ROUNDS if operation == "rl_log_probs" else 0,
        memory_unit=rows * vocabulary if operation == "rl_log_probs_memory" else None,
    )


def own(name: str, made: tuple[Callable[[], object], dict[str, Any]]) -> Contender:
    return Contender(name, made[0], figures=made[1])


def forward_backward(function: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    def call() -> object:
        log_prob = function()
        return torch.autograd.grad(log_prob, leaves, torch.ones_like(log_prob))

    return call


def max_error(log_prob: Tensor, logits: Tensor, ids: Tensor) -> float:
    exact = torch.log_softmax(logits.double(), -1).gather(-1, ids[..., None])[..., 0]
    return float(f"{(log_prob.double() - exact).abs().max():.1e}")


def check_equal(results: list[Tensor], leaves: list[Tensor]) -> None:
    """The first two results agree, and so do their gradients."""
    ours, theirs = results
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(x.sum(), leaves) for x in (ours, theirs)), strict=True):
        tolerance = 1e-5 if a.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
