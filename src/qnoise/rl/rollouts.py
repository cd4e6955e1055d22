"""Samples of a policy, and everything a trainer must know about how they were made."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SCHEMA = 1
_TENSORS = (
    "prompt_ids",
    "prompt_mask",
    "response_ids",
    "response_mask",
    "rollout_log_probs",
    "finished",
    "lengths",
    "group_ids",
)


@dataclass(frozen=True, eq=False)
class Rollout:
    """N sampled responses. Prompts are padded on the left, responses on the right.

    Log-probabilities of the same tokens under a model, aligned with ``response_ids``::

        logits = model(
            input_ids=rollout.input_ids,
            attention_mask=rollout.attention_mask,
            position_ids=rollout.position_ids,
            logits_to_keep=rollout.response_ids.shape[1] + 1,
        ).logits[:, :-1]
        log_prob, entropy = token_log_probs(logits, rollout.response_ids, temperature)
    """

    prompt_ids: Tensor  #: (N, P) int64
    prompt_mask: Tensor  #: (N, P) bool, True = a token of the prompt
    response_ids: Tensor  #: (N, T) int64, padded with the pad token behind the end
    response_mask: Tensor  #: (N, T) bool, True = a sampled token, the end-of-sequence token included
    rollout_log_probs: Tensor  #: (N, T) fp32, as sampled, in nats; 0 in padding
    finished: Tensor  #: (N,) bool, an end-of-sequence token was sampled
    lengths: Tensor  #: (N,) int64, sampled tokens, the end-of-sequence token included
    group_ids: Tensor  #: (N,) int64, samples of one prompt share it
    texts: tuple[str, ...]  #: N decoded responses, without special tokens
    noise: Mapping[str, Any] = field(default_factory=dict)  #: see :func:`collect_noise_state`
    #: temperature, top_p, top_k, seed, max_new_tokens
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.response_ids.dim() != 2:
            raise ValueError(f"response_ids must have shape (samples, tokens), got {tuple(self.response_ids.shape)}")
        count = self.response_ids.shape[0]
        for name in _TENSORS:
            if getattr(self, name).shape[:1] != (count,):
                raise ValueError(
                    f"{name} has shape {tuple(getattr(self, name).shape)} but response_ids has shape "
                    f"{tuple(self.response_ids.shape)}; the first dimensions must be equal"
                )
        for name in ("response_mask", "rollout_log_probs"):
            if getattr(self, name).shape != self.response_ids.shape:
                raise ValueError(
                    f"{name} has shape {tuple(getattr(self, name).shape)} but response_ids has shape "
                    f"{tuple(self.response_ids.shape)}; they must be equal"
                )
        if self.prompt_mask.shape != self.prompt_ids.shape:
            raise ValueError(
                f"prompt_mask has shape {tuple(self.prompt_mask.shape)} but prompt_ids has shape "
                f"{tuple(self.prompt_ids.shape)}; they must be equal"
            )
        if len(self.texts) != count:
            raise ValueError(f"{len(self.texts)} texts but response_ids has shape {tuple(self.response_ids.shape)}")
        for name in _TENSORS:
            dtype = getattr(self, name).dtype
            if name in ("prompt_mask", "response_mask", "finished"):
                fits, kind = dtype == torch.bool, "bool"
            elif name == "rollout_log_probs":
                fits, kind = dtype.is_floating_point, "floating point"
            else:
                fits, kind = not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool), "integers"
            if not fits:
                raise TypeError(f"{name} must be {kind}, got {dtype}")

    def __len__(self) -> int:
        return self.response_ids.shape[0]

    @property
    def truncated(self) -> Tensor:
        """(N,) bool: no end-of-sequence token within the allowed length."""
        return ~self.finished

    @property
    def input_ids(self) -> Tensor:
        """(N, P + T): prompt and response."""
        return torch.cat([self.prompt_ids, self.response_ids], -1)

    @property
    def attention_mask(self) -> Tensor:
        """(N, P + T) int64: 1 = a real token."""
        return torch.cat([self.prompt_mask, self.response_mask], -1).long()

    @property
    def position_ids(self) -> Tensor:
        """(N, P + T) int64: 0 at the first real token, whatever the padding."""
        return (self.attention_mask.cumsum(-1) - 1).clamp_min(0)

    def to(self, device: torch.device | str) -> Rollout:
        """The same rollout with every tensor on ``device``; TypeError for a dtype."""
        if isinstance(device, torch.dtype):
            raise TypeError(f"to() takes a device, got {device}: ids, masks and log-probabilities keep their dtypes")
        return dataclasses.replace(self, **{name: getattr(self, name).to(device) for name in _TENSORS})

    def select(self, mask: Tensor) -> Rollout:
        """The samples where ``mask`` (N,) bool is True, or those an (M,) integer index names, in its order.

        Group ids keep their values and T stays as it is.

        Raises:
            ValueError: a mask of another length, an index out of range. TypeError: neither bool nor integer (uint8
                is neither: torch takes it for a mask in one place and for an index in another).
        """
        if not isinstance(mask, Tensor):
            raise TypeError(f"select takes a (N,) bool mask or integer index, got {type(mask).__name__}")
        if mask.dtype == torch.bool:
            if mask.shape != (len(self),):
                raise ValueError(f"mask has shape {tuple(mask.shape)} but the rollout holds {len(self)} samples")
            index = mask.nonzero().flatten()
        elif mask.is_floating_point() or mask.is_complex() or mask.dtype == torch.uint8 or mask.dim() != 1:
            raise TypeError(f"select takes a (N,) bool mask or integer index, got {tuple(mask.shape)} {mask.dtype}")
        else:
            index = mask.long()
        picks = index.tolist()
        if any(pick < 0 or pick >= len(self) for pick in picks):
            raise ValueError(f"index {min(picks)}…{max(picks)} is out of range for {len(self)} samples")
        index = index.to(self.response_ids.device)
        return dataclasses.replace(
            self,
            **{name: getattr(self, name)[index] for name in _TENSORS},
            texts=tuple(self.texts[i] for i in picks),
        )

    def split(self, n: int) -> tuple[Rollout, ...]:
        """``n`` consecutive parts whose sizes differ by one at most (micro-batches); all keep P and T.

        Raises:
            ValueError: ``n`` is below 1 or above the number of samples. TypeError: ``n`` is no integer.
        """
        if not isinstance(n, int):
            raise TypeError(f"split() takes a number of parts, got {n!r}")
        if not 1 <= n <= len(self):
            raise ValueError(f"a rollout of {len(self)} samples can be split into 1 … {len(self)} parts, not {n}")
        return tuple(self.select(part) for part in torch.arange(len(self)).tensor_split(n))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; it appears under ``path`` only when it is complete."""
        from safetensors.torch import save

        # Texts are bytes of a tensor because a safetensors header is limited to 100 MB.
        texts = torch.frombuffer(bytearray(json.dumps(self.texts).encode()), dtype=torch.uint8)
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in _TENSORS}
        header = {"schema": _SCHEMA, "noise": dict(self.noise), "sampling": dict(self.sampling)}
        data = save({**tensors, "texts": texts}, metadata={"qnoise_rollout": json.dumps(header)})
        target = Path(path)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(data)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Rollout:
        """Read a rollout written by :meth:`save`, onto the CPU.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, no rollout, or of a later schema (the path is named).
        """
        from safetensors import SafetensorError, safe_open

        if not Path(path).is_file():
            raise FileNotFoundError(f"no rollout at {path}")
        try:
            with safe_open(str(path), framework="pt") as file:
                header = json.loads((file.metadata() or {})["qnoise_rollout"])
                tensors = {name: file.get_tensor(name) for name in (*_TENSORS, "texts")}
            if header["schema"] != _SCHEMA:
                raise ValueError(f"schema {header['schema']!r}, this version reads schema {_SCHEMA}")
            texts = tuple(json.loads(bytes(tensors.pop("texts").numpy())))
            return cls(**tensors, texts=texts, noise=header["noise"], sampling=header["sampling"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a readable rollout file: {error}") from error


def collect_noise_state(model: torch.nn.Module) -> dict[str, Any]:
    """What noise is on in ``model`` now, from every module that offers ``noise_state()``.

    Returns:
        ``{"sigma", "seed", "step", "num_modules", "modules"}``: the largest σ, seed and step (None where the
        modules disagree), the number of modules with active noise, and their σ by name. σ is 0.0 and the
        mapping empty when no noise is on.
    """
    sigmas: dict[str, float] = {}
    seeds, steps = set(), set()
    for name, module in model.named_modules():
        report = getattr(module, "noise_state", None)
        if not callable(report):
            continue
        state = report()
        sigma = float(state.get("sigma") or 0.0)
        if state.get("active", sigma != 0.0) and sigma != 0.0:
            sigmas[state.get("name", name)] = sigma
            seeds.add(state.get("seed"))
            steps.add(state.get("step"))
    return {
        "sigma": max(sigmas.values(), default=0.0),
        "seed": seeds.pop() if len(seeds) == 1 else None,
        "step": steps.pop() if len(steps) == 1 else None,
        "num_modules": len(sigmas),
        "modules": sigmas,
    }
