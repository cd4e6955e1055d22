"""One run on disk: a log of JSON lines, and the checkpoint from which it continues bit for bit.

A checkpoint is one safetensors file: adapter, optimizer state, noise scheduler, and the length of the log when it was
written. It needs no random state, because every draw of a run is a function of (seed, stream, step). Resuming cuts
the log to that length, so nothing stands in it twice and a line that was half-written when the process died is gone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from benchmarks.environment import code_hash, device, git_commit, versions
from benchmarks.files import read_jsonl, write_bytes
from benchmarks.recovery.arms import Arm
from benchmarks.recovery.policy import model_path, weights_hash
from benchmarks.recovery.presets import Preset

if TYPE_CHECKING:
    from benchmarks.recovery.evaluate import Evaluation
    from qnoise import NoiseScheduler

SCHEMA = 1


@dataclass(frozen=True)
class Run:
    """One arm of a preset with one seed, and the folder its files live in."""

    preset: Preset
    arm: Arm
    seed: int
    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "preset", self.preset.changed(**self.arm.preset))

    @property
    def name(self) -> str:
        return f"{self.preset.name}.{self.arm.name}.seed{self.seed}"

    @property
    def log_path(self) -> Path:
        return self.folder / "runs" / f"{self.name}.jsonl"

    @property
    def checkpoint_path(self) -> Path:
        return self.folder / "checkpoints" / f"{self.name}.safetensors"

    @property
    def model_path(self) -> str:
        return model_path(self.preset.model, self.seed % self.preset.checkpoints)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Everything that decides the numbers of the run, apart from the code."""
        config = {
            "preset": dataclasses.asdict(self.preset),
            "arm": dataclasses.asdict(self.arm),
            "seed": self.seed,
            "weights": weights_hash(self.model_path),
        }
        return json.loads(json.dumps(config))

    @property
    def config_hash(self) -> str:
        return hashlib.blake2b(json.dumps(self.config, sort_keys=True).encode(), digest_size=8).hexdigest()

    def begin(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, noise: NoiseScheduler | None, *, resume: bool
    ) -> int:
        """Start a new log and return 0, or restore the last checkpoint and return the steps done.

        Raises:
            ValueError: the log or checkpoint to resume is damaged, or was made with other settings.
        """
        if resume and self.log_path.is_file():
            self._check_header()
            if self.checkpoint_path.is_file():
                return self._restore(model, optimizer, noise)
        elif self.log_path.is_file():
            self.log_path.replace(self.log_path.with_suffix(".previous.jsonl"))
        self.checkpoint_path.unlink(missing_ok=True)
        header = {
            "event": "run",
            "schema": SCHEMA,
            "run": self.name,
            "config_hash": self.config_hash,
            "code_hash": code_hash(),
            "commit": git_commit(),
            "versions": versions(),
            "device": device(),
            "config": self.config,
        }
        write_bytes(self.log_path, _line(header))
        return 0

    def finished(self) -> dict[str, Any] | None:
        """The result line of a run that is done, or None. Raises ValueError as `begin` does."""
        if not self.log_path.is_file():
            return None
        # A process that died may have left half a line at the end; it is cut off when the run resumes.
        if not self.log_path.read_bytes().endswith(b"\n"):
            return None
        self._check_header()
        last = self.rows()[-1]
        return last if last["event"] == "result" else None

    def log_step(self, step: int, metrics: dict[str, float]) -> None:
        self._append({"event": "step", "step": step, **metrics})

    def log_evaluation(self, step: int, result: Evaluation, *, sampled: bool = False) -> None:
        """Accuracies, and the outcome of every problem as a string of 0 and 1, for paired comparisons."""
        row = {
            "event": "sampled evaluation" if sampled else "evaluation",
            "step": step,
            "strict": result.strict_accuracy,
            "flexible": result.flexible_accuracy,
            "response_length": result.mean_length,
            "strict_outcomes": "".join(map(str, map(int, result.strict))),
            "flexible_outcomes": "".join(map(str, map(int, result.flexible))),
        }
        self._append(row)

    def finish(self, **facts: Any) -> dict[str, Any]:
        row = {"event": "result", "run": self.name, "config_hash": self.config_hash, **facts}
        self._append(row)
        return row

    def rows(self) -> list[dict[str, Any]]:
        """Every line of the log."""
        return read_jsonl(self.log_path)

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, noise: NoiseScheduler | None) -> None:
        from safetensors.torch import save

        parameters = _trainable(model)
        tensors = {f"parameter.{name}": value.detach().cpu().contiguous() for name, value in parameters.items()}
        for name, parameter in parameters.items():
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value.detach().cpu().contiguous()
        about = {
            "schema": SCHEMA,
            "config_hash": self.config_hash,
            "step": step,
            "log_bytes": self.log_path.stat().st_size,
            "noise": noise.state_dict() if noise is not None else None,
        }
        write_bytes(self.checkpoint_path, save(tensors, metadata={"run": json.dumps(about)}))

    @torch.no_grad()
    def _restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, noise: NoiseScheduler | None) -> int:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(self.checkpoint_path), framework="pt") as file:
                about = json.loads((file.metadata() or {})["run"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no iterator)
            parameters = _trainable(model)
            for name, parameter in parameters.items():
                parameter.copy_(tensors[f"parameter.{name}"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"{self.checkpoint_path}: this checkpoint cannot be read ({error}). Delete it to begin the run anew."
            ) from error
        if about["config_hash"] != self.config_hash:
            raise ValueError(
                f"{self.checkpoint_path} was written with other settings (config {about['config_hash']}, asked for "
                f"{self.config_hash}). Delete it to begin the run anew."
            )
        for name, parameter in parameters.items():
            state = {}
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if (value := tensors.get(f"optimizer.{key}.{name}")) is not None:
                    state[key] = value if key == "step" else value.to(parameter.device)
            if state:
                optimizer.state[parameter] = state
        if noise is not None:
            noise.load_state_dict(about["noise"])
        with self.log_path.open("r+b") as log:
            if log.seek(0, 2) < about["log_bytes"]:
                raise ValueError(
                    f"{self.log_path} is shorter than when its checkpoint was written; it was changed or cut off. "
                    f"Delete {self.checkpoint_path} to begin the run anew."
                )
            log.truncate(about["log_bytes"])
        self._append(
            {
                "event": "resumed",
                "step": about["step"],
                "code_hash": code_hash(),
                "commit": git_commit(),
                "versions": versions(),
            }
        )
        return about["step"]

    def _check_header(self) -> None:
        """Raises ValueError naming the settings in which the log differs from this run."""
        with self.log_path.open("rb") as log:
            first = log.readline()
        try:
            header = json.loads(first)
            config, config_hash = header["config"], header["config_hash"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.log_path}, line 1: not the head of a run ({error!r})") from error
        if config_hash != self.config_hash:
            raise ValueError(
                f"{self.log_path} was made with other settings: {_differences(config, self.config)}. "
                "Use the same settings, another --out, or begin anew without --resume."
            )

    def _append(self, row: dict[str, Any]) -> None:
        with self.log_path.open("ab") as log:
            log.write(_line(row))


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8")


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    def flat(config: dict[str, Any]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in config.items():
            if isinstance(value, dict):
                values |= {f"{key}.{inner}": item for inner, item in value.items()}
            else:
                values[key] = value
        return values

    before, after = flat(old), flat(new)
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return "; ".join(f"{key} was {before.get(key)!r}, is {after.get(key)!r}" for key in keys) or "unknown ones"
