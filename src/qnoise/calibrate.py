"""Static scales for quantized inputs: the largest magnitude that each linear is given on calibration data.

    amaxes = qnoise.calibrate_activations(model, batches)
    qnoise.patch_model(model, config=qnoise.PatchConfig("nvfp4", act_fmt="nvfp4", act_amax=amaxes))

The fp32 scale of a tensor in NVFP4 is fixed by its amax (448 * 6 / amax, arXiv 2509.25149). A linear's input is another
tensor in every forward; an engine that does not look at it first needs a number from before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qnoise.config import PatchConfig
from qnoise.formats import QuantSpec
from qnoise.functional import rotate
from qnoise.patch import patch_config
from qnoise.sensitivity.batches import tokens, watch
from qnoise.targets import decide


def calibrate_activations(model: nn.Module, inputs: Any, config: PatchConfig | None = None) -> dict[str, float]:
    """Run the model on the inputs, noise off, and note the largest |input| of each linear: `PatchConfig(act_amax=)`.

    Values of padding do not count where the batch has an attention_mask that fits. What is quantized already is
    quantized while the model runs. With several processes each sees its own inputs: give all of them the same.

    Args:
        model: patched or not, wrapped by PEFT or not; adapters take part in the forward. Stays as it is.
        inputs: what `qnoise.scan(inputs=)` takes: one batch (a tensor of ids, or a mapping of keyword arguments), or an
            iterable of batches.
        config: what the model is going to be patched with: it says which linears quantize their input, and whether they
            rotate it first. None: what it is patched with, or else the linears that `patch_model` chooses by itself.

    Returns:
        Canonical name of a linear -> amax > 0, in fp32 precision. Linears that read one tensor have one amax.

    Raises:
        ValueError: no batch; no linear to calibrate; a linear that got no input, only zeros, or NaN or Inf. It is
            named.
    """
    if config is None:
        config = patch_config(model) or PatchConfig("nvfp4", "nvfp4")
    watched = {
        d.module: d
        for d in decide(model, config)
        if d.kind == "linear"
        and not d.reason
        and ".original_module" not in d.path
        and (d.act_spec or not config.act_spec)
    }
    if not watched:
        raise ValueError(
            f"{type(model).__name__} has no linear that would quantize its input under {config}; choose others with "
            "include=, or leave config out"
        )
    amaxes: dict[str, Tensor] = {}
    mask: list[Tensor | None] = [None]

    def before(name: str, spec: QuantSpec | None) -> Callable[..., None]:
        def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()), None)
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return
            rows = tokens(x.detach(), mask[0])
            if not rows.numel():
                return
            if spec is not None and spec.rotation is not None:
                rows = rotate(rows, spec)
            amax = rows.abs().amax().float()
            seen = amaxes.get(name)
            # `maximum` keeps a NaN, which is told of below.
            amaxes[name] = amax if seen is None else torch.maximum(seen, amax.to(seen.device))

        return see

    handles = [m.register_forward_pre_hook(before(d.name, d.act_spec), with_kwargs=True) for m, d in watched.items()]
    watch(model, inputs, handles, mask)
    _check(amaxes, sorted({d.name for d in watched.values()} - amaxes.keys()))
    # A name is also a glob for what ends in it, and the last match wins: longer ones have to come later.
    return {name: float(amaxes[name]) for name in sorted(amaxes, key=lambda name: name.count("."))}


def _check(amaxes: dict[str, Tensor], missing: list[str]) -> None:
    if missing:
        more = f" and {len(missing) - 1} other linears" if len(missing) > 1 else ""
        raise ValueError(
            f"{missing[0]}{more} got no input on the calibration data, so there is no amax for it. Calibrate on more "
            "or other data, or leave it out with PatchConfig(exclude=)"
        )
    for name, amax in amaxes.items():
        if not torch.isfinite(amax):
            raise ValueError(f"{name}: NaN or Inf in its input; calibrate on inputs on which the model is finite")
        if not amax:
            raise ValueError(f"{name}: its input was zero throughout, which fixes no scale; calibrate on other data")
