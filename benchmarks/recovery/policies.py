"""The shipped policies: their sizes, and what they were taught. Values only; `pretrain.py` makes them."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Pretraining:
    """Size of the policy and how it is trained.

    mistakes: how often the demonstrations forget a carry or do a change wrongly; repeats: the share of demonstrations
    in which one step is written twice.
    """

    task: str = "words"
    hidden_size: int = 64
    intermediate_size: int = 192
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    steps: int = 1000
    batch: int = 64
    lr: float = 4e-3
    warmup: int = 50
    strict_share: float = 0.15
    mistakes: float = 0.0
    repeats: float = 0.0
    outlier_channels: tuple[int, ...] = (11, 43)  # one in each block of 32
    outlier_factor: int = 8
    log_every: int = 100
    eval_problems: int = 500


WORDS = Pretraining()
STUDY = Pretraining(
    hidden_size=96,
    intermediate_size=256,
    steps=1300,
    lr=3e-3,
    strict_share=1.0,
    mistakes=0.5,
    repeats=0.15,
    outlier_channels=(),
)
WALKS = replace(STUDY, task="walks")
OUTLIER_CHANNELS = (11, 43, 75)
"""One in each block of 32."""
LARGE = replace(STUDY, hidden_size=256, intermediate_size=512, lr=2e-3)

POLICIES: dict[str, tuple[int, Pretraining]] = {
    **{f"words-{seed}": (seed, WORDS) for seed in range(3)},
    "study-words-0": (0, STUDY),
    **{
        f"study-{settings.task}-{seed}": (seed, replace(settings, outlier_channels=channels, outlier_factor=factor))
        for settings in (STUDY, WALKS)
        for seed, (channels, factor) in enumerate((((), 8), (OUTLIER_CHANNELS, 4), (OUTLIER_CHANNELS, 8)))
    },
    "study-large-0": (0, LARGE),
}
"""Name -> (seed, settings)."""
