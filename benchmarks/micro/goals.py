"""The figures that were to be reached, and where each is found in the results.

Fake quantization at 4096 x 4096 on one thread, in units of `Tensor.copy_` in the same run; a module in units of the
stock module, by the upper end of the 95 % interval; log-probabilities in units of fp32 `log_softmax` and `gather`.
On a GPU: shares of the bandwidth of a copy, and medians.
"""

from __future__ import annotations

from benchmarks.micro.tables import Goal, Line, Pick, row

OURS, EAGER = "qnoise, out=", "qnoise eager, out="
DEFAULT = ("floor", "two_level")
FMTS = ("mxfp4", "nvfp4")
STORAGES = (("cached", 1.05), ("dynamic", 1.1), ("packed", 1.2))
SIX_AND_EIGHT = ("mxfp6_e2m3", "mxfp6_e3m2", "mxfp8_e4m3", "mxfp8_e5m2", "mxint8")


def speed(contender: str, fmt: str | tuple[str, ...], **more: object) -> Pick:
    """Median ratio to `copy_` of a default mode, rounded to nearest."""
    return Pick(contender, {"fmt": fmt, "scale_mode": DEFAULT, "rounding": "nearest", **more})


def faster_than(peer: str, dtype: str) -> Pick:
    """How many times faster than the peer, MXFP4 and NVFP4."""
    parameters = {"fmt": ("mxfp4", "nvfp4"), "scale_mode": DEFAULT, "rounding": "nearest", "dtype": dtype}
    return Pick(OURS, parameters, over=peer)


def linear(storage: str, fmt: str) -> Pick:
    """Forward and backward of 2048 tokens, 1024 to 4096; upper end of the interval."""
    return Pick(f"{storage} {fmt}", {"pass": "forward + backward"}, key="ratio.high")


def from_hidden(head: str) -> Pick:
    return Pick("qnoise", {"from": "hidden", "head": head})


def threads_kept(line: Line) -> float | None:
    """Speed-up from one thread to two, over that of the copy."""
    found = {
        count: (row(line, f"{OURS}, {count}"), row(line, f"copy_, {count}")) for count in ("1 thread", "2 threads")
    }
    medians = {}
    for count, (ours, copy) in found.items():
        if ours is None or copy is None:
            return None
        medians[count] = ours["wall_ms"]["median"] / copy["wall_ms"]["median"]
    return float(medians["1 thread"] / medians["2 threads"])


def scanned(line: Line) -> float | None:
    """Millions of weights a second, with two threads."""
    found = row(line, "scan")
    if line["parameters"]["threads"] != 2 or found is None:
        return None
    return float(found["figures"]["weights"] / found["wall_ms"]["median"] / 1e3)


GOALS = (
    Goal("fake quantization, mxfp4", "fake_quantize", 1.5, speed(OURS, "mxfp4")),
    Goal("fake quantization, mxfp6, mxfp8, mxint8", "fake_quantize", 2.0, speed(OURS, SIX_AND_EIGHT)),
    Goal("fake quantization, nvfp4", "fake_quantize", 2.5, speed(OURS, "nvfp4")),
    Goal("fake quantization, `mse` modes", "fake_quantize", 12.0, Pick(OURS, {"scale_mode": "mse"})),
    Goal("eager fallback, mxfp4, bf16", "fake_quantize", 15.0, speed(EAGER, "mxfp4", dtype="bfloat16")),
    Goal("eager fallback, mxfp4, fp32", "fake_quantize", 9.0, speed(EAGER, "mxfp4", dtype="float32")),
    Goal("peak memory over the output", "fake_quantize_memory", 1.1, Pick("qnoise", key="peak_per_unit")),
    Goal("peak memory of the eager fallback", "fake_quantize_memory", 1.1, Pick("qnoise eager", key="peak_per_unit")),
    *(
        Goal(f"times faster than {peer}, {dtype}", "fake_quantize", limit, faster_than(peer, dtype), least=True)
        for peer in ("torchao", "compressed-tensors", "microxcaling")
        for dtype, limit in (("bfloat16", 50.0), ("float32", 30.0))
    ),
    Goal("share of the copy's speed-up with 2 threads", "fake_quantize_threads", 0.9, threads_kept, least=True),
    *(
        Goal(f"linear, {storage} {fmt}", "linear", limit, linear(storage, fmt))
        for storage, limit in STORAGES
        for fmt in FMTS
    ),
    Goal("model, cached", "model", 1.05, Pick("cached mxfp4", key="ratio.high")),
    *(Goal(f"model, dynamic {fmt}", "model", 1.2, Pick(f"dynamic {fmt}", key="ratio.high")) for fmt in FMTS),
    *(
        Goal(
            f"extra operator calls, cached {fmt}",
            "linear",
            0,
            Pick(f"cached {fmt}", key="figures.extra operator calls"),
        )
        for fmt in FMTS
    ),
    *(
        Goal(
            f"packed weight over bf16, {fmt}",
            "linear",
            limit,
            Pick(f"packed {fmt}", key="figures.weight memory over bf16"),
        )
        for fmt, limit in zip(FMTS, (0.27, 0.29), strict=True)
    ),
    *(
        Goal(
            f"patching a 0.5 B model with cached {fmt}, ms",
            "patching",
            1500,
            Pick(f"patching and filling, {fmt}", key="wall_ms.median"),
        )
        for fmt in FMTS
    ),
    Goal("log-probabilities from logits", "rl_log_probs", 1.0, Pick("qnoise", {"from": "logits"})),
    Goal("log-probabilities from hidden states, trained head", "rl_log_probs", 1.4, from_hidden("trained")),
    Goal("log-probabilities from hidden states, frozen head", "rl_log_probs", 1.4, from_hidden("frozen")),
    Goal("largest error of log-probabilities", "rl_log_probs", 1e-6, Pick("qnoise", key="figures.max_error")),
    Goal("bytes per logit from hidden states", "rl_log_probs_memory", 3.0, Pick("qnoise", key="peak_per_unit")),
    Goal("scan, millions of weights a second, 2 threads", "scan", 100.0, scanned, least=True),
    # Where verl is installed it is the first contender.
    Goal("DAPO loss over verl's", "rl_dapo_loss", 0.9, Pick("verl compute_policy_loss_vanilla", over="qnoise")),
)

CUDA_OPERATIONS = (
    "cuda_fake_quantize",
    "cuda_quantize",
    "cuda_dequantize",
    "cuda_decode",
    "cuda_linear",
    "cuda_norm",
    "cuda_rl_log_probs",
)
"""What `benchmarks/micro/cuda.py` times."""

CUDA_GOALS = (
    Goal(
        "fake quantization, every format, share of a copy's bandwidth",
        "cuda_fake_quantize",
        0.9,
        Pick(OURS, key="share_of_bound"),
        least=True,
    ),
    *(
        Goal(
            f"{word}, every format, share of a copy's bandwidth",
            operation,
            0.8,
            Pick("qnoise", key="share_of_bound"),
            least=True,
        )
        for word, operation in (("packing", "cuda_quantize"), ("unpacking", "cuda_dequantize"))
    ),
    *(
        Goal(
            f"decoding 1 to 8 tokens, packed {fmt}, times faster than bf16",
            "cuda_decode",
            2.5,
            Pick(f"packed {fmt}", over="nn.Linear"),
            least=True,
        )
        for fmt in FMTS
    ),
    *(
        Goal(
            f"linear, forward and backward, {contender.format(fmt)}", "cuda_linear", limit, Pick(contender.format(fmt))
        )
        for contender, limit in (("cached {}", 1.02), ("dynamic {}", 1.05), ("dynamic {}, activations too", 1.1))
        for fmt in FMTS
    ),
    Goal("noisy norm, times the stock one", "cuda_norm", 1.02, Pick("noisy, sigma 0.01")),
)
"""On a GPU."""
