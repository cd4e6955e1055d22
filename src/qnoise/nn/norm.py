"""`NoisyRMSNorm`: any RMSNorm, with noise on its weight in the forward and nowhere else.

y = stock_norm(x; w + sigma z), z one standard normal value per channel, in fp32. QeRL (arXiv 2510.11696, section 3.3)
adds such noise in place, in the weight's dtype: there bf16 swallows it (the spacing of bf16 at 1 is 7.8e-3) and what
is not restored accumulates. Here the parameter is never written to: the noisy weight exists during the forward only.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from qnoise.nn.patched import Patched, PatchRecord, autocast_dtype, convert, noise_of, restore, stand_in

# Classes of transformers that are RMSNorms by what they compute, whatever they are called.
_RMS_NORMS = frozenset(
    {
        "T5LayerNorm", "MT5LayerNorm", "UMT5LayerNorm", "LongT5LayerNorm", "SwitchTransformersLayerNorm",
        "UdopLayerNorm", "Pop2PianoLayerNorm", "Pix2StructLayerNorm", "Kosmos2_5LayerNorm", "CpmAntLayerNorm",
    }
)  # fmt: skip


def is_rms_norm(module: nn.Module) -> bool:
    """A class named like an RMSNorm, or known to be one (T5's), with a one-dimensional weight parameter."""
    kind = type(module).__name__
    weight = module._parameters.get("weight")
    return ("rmsnorm" in kind.lower() or kind in _RMS_NORMS) and weight is not None and weight.dim() == 1


class NoisyRMSNorm(Patched, nn.Module):
    """Mixin over a stock norm class; `from_norm` makes an instance. sigma = 0 is the stock forward, bit for bit.

    The stock forward runs on the noisy weight whatever it does with it (w or 1 + w, fp32 or not, gated or not), and
    the result is cast to the dtype the stock norm returns. Gradient reaches the weight. The noise is neither a
    parameter nor a buffer: `state_dict` is the stock one and `.to(bfloat16)` cannot round it.
    """

    @classmethod
    def from_norm(cls, norm: nn.Module) -> NoisyRMSNorm:
        """A noisy norm on the same parameters; `norm` itself stays as it is.

        Raises:
            TypeError: `norm` is not an RMSNorm with a one-dimensional weight.
        """
        if not is_rms_norm(norm):
            raise TypeError(f"from_norm takes an RMSNorm with a one-dimensional weight, not {type(norm).__name__}")
        twin = _twin(norm)
        convert(
            twin,
            noisy_class(type(norm)),
            PatchRecord(name="", stock_class=type(norm), noise_during=("rollout", "training")),
        )
        return cast(NoisyRMSNorm, twin)

    def to_norm(self) -> nn.Module:
        """A stock norm on the same parameters; this module stays as it is."""
        twin = _twin(self)
        restore(twin)
        return twin

    def effective_weight(self) -> Tensor:
        """The weight a forward done now uses: w, or w + sigma z in fp32 where noise acts."""
        weight = cast(Tensor, self._parameters["weight"])
        if not self._qnoise.acts:
            return weight
        noise = noise_of(self._qnoise, weight)
        return weight.to(noise.dtype) + noise

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._qnoise.acts:
            return super().forward(*args, **kwargs)
        dtype = self._stock_dtype(*args, **kwargs)
        if torch.compiler.is_compiling():
            twin = stand_in(self, weight=self.effective_weight())
            return self._qnoise.stock_class.forward(twin, *args, **kwargs).to(dtype)
        # The stock forward reads `self.weight`; an instance attribute goes before the registered parameter.
        self.__dict__["weight"] = self.effective_weight()
        try:
            output = super().forward(*args, **kwargs)
        finally:
            del self.__dict__["weight"]
        return output.to(dtype)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time; pickle, deepcopy and spawn make it again from the stock class.
        state = {key: value for key, value in self.__dict__.items() if key != "_qnoise_dtypes"}
        return _rebuild, (self._qnoise.stock_class,), state

    def _stock_dtype(self, *args: Any, **kwargs: Any) -> torch.dtype:
        """The dtype the stock norm returns for such an input: asked of the norm itself, once per kind of input."""
        if torch.compiler.is_compiling():
            # Only the dtype is used: the compiler drops the computation.
            return cast(torch.dtype, super().forward(*args, **kwargs).dtype)
        first = args[0] if args else next(iter(kwargs.values()))
        weight = cast(Tensor, self._parameters["weight"])
        key = (first.dtype, weight.dtype, autocast_dtype(first.device))
        dtypes: dict[Any, torch.dtype] = self.__dict__.setdefault("_qnoise_dtypes", {})
        if key not in dtypes:
            with torch.no_grad():
                dtypes[key] = super().forward(*args, **kwargs).dtype
        return dtypes[key]


_NOISY_CLASSES: dict[type[nn.Module], type[NoisyRMSNorm]] = {}


def noisy_class(stock_class: type[nn.Module]) -> type[NoisyRMSNorm]:
    """The noisy subclass of a stock norm class (one per class)."""
    if stock_class in _NOISY_CLASSES:
        return _NOISY_CLASSES[stock_class]
    name = f"Noisy{stock_class.__name__}"
    namespace = {"__module__": stock_class.__module__, "__doc__": stock_class.__doc__}
    noisy = _NOISY_CLASSES[stock_class] = cast(type[NoisyRMSNorm], type(name, (NoisyRMSNorm, stock_class), namespace))
    return noisy


def _rebuild(stock_class: type[nn.Module]) -> NoisyRMSNorm:
    cls = noisy_class(stock_class)
    return cls.__new__(cls)


def _twin(norm: nn.Module) -> nn.Module:
    """A shallow copy: same class, same parameter and buffer objects, own containers."""
    twin = type(norm).__new__(type(norm))
    for key, value in norm.__dict__.items():
        twin.__dict__[key] = value.copy() if isinstance(value, dict) else value
    return twin
