"""A recipe: a format, and the repairs to apply through it, in order. A value that fits JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from qnoise.formats import QuantSpec, as_spec
from qnoise.patch import patch_model, unpatch_model
from qnoise.repairs.fold_scales import fold_scales
from qnoise.repairs.gptq import gptq
from qnoise.spelling import check_choice

STEPS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "fold_scales": partial(fold_scales, measure=False),
    "gptq": gptq,
    "gptaq": partial(gptq, asymmetric=True),
}
"""Repairs that a recipe can name: each takes a patched model and inputs, and returns a report with `.undo()`."""


@dataclass(frozen=True)
class Recipe:
    """`spec` for every linear that `patch_model` converts, then the `steps`, in that order.

    Args:
        spec: format name or `QuantSpec`.
        steps: names in `STEPS`.

    Raises:
        ValueError: a step that does not exist, or one that occurs twice.
    """

    spec: QuantSpec
    steps: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", as_spec(self.spec))
        steps = (self.steps,) if isinstance(self.steps, str) else tuple(self.steps)
        object.__setattr__(self, "steps", steps)
        for step in steps:
            check_choice("repair", step, tuple(STEPS))
        if len(set(steps)) < len(steps):
            raise ValueError(f"a recipe names {', '.join(steps)}: each repair can be applied once")

    def __str__(self) -> str:
        return " + ".join([str(self.spec), *self.steps])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON; `from_dict` reads them back."""
        return {"spec": self.spec.to_dict(), "steps": list(self.steps)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The recipe that `to_dict` wrote.

        Raises:
            ValueError: a field is missing, or a value does not exist.
        """
        try:
            return cls(QuantSpec.from_dict(values["spec"]), tuple(values["steps"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"this recipe is damaged: {type(error).__name__}: {error}") from None

    def apply(self, model: nn.Module, inputs: Any = None) -> Callable[[], None]:
        """Patch the model, then repair it; a failure leaves it as it was.

        Args:
            model: not patched.
            inputs: what the steps calibrate on, as `qnoise.scan` takes it; not needed without steps.

        Returns:
            A function that takes everything off again, repairs in the reverse order.

        Raises:
            ValueError: steps without inputs; whatever `patch_model` and the steps raise.
        """
        if self.steps and inputs is None:
            raise ValueError(f"{self} calibrates on inputs, and got none; see qnoise.scan for what they can be")
        with ExitStack() as undo:
            patch_model(model, self.spec)
            undo.callback(unpatch_model, model)
            for step in self.steps:
                undo.callback(STEPS[step](model, inputs).undo)
            return undo.pop_all().close
