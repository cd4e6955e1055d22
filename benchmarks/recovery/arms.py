"""Arms: what is done to the base of a run. A value each; `ARMS` names them all."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.recovery.choices import find, refuse

NOISES = ("staged", "entropy", "accumulating")
TUNINGS = ("lora", "full")


@dataclass(frozen=True)
class Adapter:
    """How a LoRA starts, and its distillation before RL.

    start: "zero" (as PEFT has it), or a method of `init_lora_from_residual`; "weighted" is "residual" with the error
    weighted by the activations. `turns` are its iterations, weighted by the activations where there are several.
    """

    start: str = "zero"
    steps: int = 0  # of distillation
    rank: int = 8
    alpha: int = 16
    lr: float = 3e-3  # of AdamW, falling linearly to zero
    batch: int = 48
    turns: int = 1


@dataclass(frozen=True)
class Arm:
    """What is done to the base while it is trained and evaluated.

    `noise_during` names the phases in which norm noise acts: ("rollout",) is QeRL's behaviour and the report's,
    ("rollout", "training") shares the noise with the trained policy, () is none.
    `sampling_stream` tells apart runs that differ in chance alone. `preset` holds the preset's fields that the arm
    changes: its learning rate, its sigmas, more steps.
    """

    name: str
    label: str
    fmt: str | None
    noise_during: tuple[str, ...] = ()
    sampling_stream: int = 0
    note: str = ""
    spec: dict[str, Any] = field(default_factory=dict, hash=False)  # further fields of the QuantSpec
    act_fmt: str | None = None
    repairs: tuple[str, ...] = ()  # of `qnoise.repairs.recipe.STEPS`, in order
    adapter: Adapter = Adapter()
    borrow: Arm | None = None  # the arm whose adapter this one starts from, with the function of the base unchanged
    tuning: str = "lora"  # or "full": every parameter, no adapter
    noise: str = "staged"
    multipliers: str = ""  # factors on sigma by layer, from a scan
    importance_weights: bool = False
    keep_distilling: float = 0.0  # weight of KL(full-precision base || policy) in the loss
    one_level: bool = False  # the weights as the report's faulty NVFP4 had them
    preset: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, allowed in (("noise", NOISES), ("tuning", TUNINGS)):
            refuse(f"arm {self.name!r}", name, getattr(self, name), allowed)


_ARMS = (
    Arm("bf16", "BF16 + LoRA", None, note="full precision: bf16 weights; on a CPU the arithmetic is fp32"),
    Arm("mxfp4", "MXFP4 + LoRA", "mxfp4", note="frozen base in MXFP4"),
    Arm("mxfp4-aa", "MXFP4 + LoRA (A/A)", "mxfp4", (), 1, note="MXFP4 with other random samples: the size of chance"),
    Arm("mxfp4+noise", "MXFP4 + LoRA + noise", "mxfp4", ("rollout",), note="norm noise in the rollout only (AQN)"),
    Arm(
        "mxfp4+shared-noise",
        "MXFP4 + LoRA + shared noise",
        "mxfp4",
        ("rollout", "training"),
        note="the same norm noise in rollout and training",
    ),
    Arm("nvfp4", "NVFP4 + LoRA", "nvfp4", note="frozen base in NVFP4"),
    Arm("nvfp4-aa", "NVFP4 + LoRA (A/A)", "nvfp4", (), 1, note="NVFP4 with other random samples"),
    Arm("nvfp4+noise", "NVFP4 + LoRA + noise", "nvfp4", ("rollout",), note="norm noise in the rollout only (AQN)"),
)
ARMS = {arm.name: arm for arm in _ARMS}
DEMO_ARMS = ("bf16", "mxfp4", "mxfp4-aa", "mxfp4+noise")


def arm(name: str) -> Arm:
    return find("arm", name, ARMS)
