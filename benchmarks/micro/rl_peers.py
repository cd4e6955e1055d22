"""Other libraries' functions for the RL benchmarks, called as they are; none is a dependency.

One folder holds them all, put on PYTHONPATH by the user. Their own requirements pin other versions of torch and
transformers, so they are installed without them, and with what their imports alone need:

    pip install --no-deps --target PEERS trl verl liger-kernel ray tensordict omegaconf pandas datasets pyarrow dill \\
        multiprocess xxhash aiohttp requests urllib3 certifi msgpack protobuf pyvers cloudpickle codetiming orjson \\
        python-dateutil pytz six "antlr4-python3-runtime==4.9.3"
    PYTHONPATH=PEERS python -m benchmarks run rl_log_probs rl_dapo_loss
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from benchmarks.micro.measure import Contender, optional

ROUNDS = 6


def contender(name: str, make: Callable[[], tuple[Callable[[], object], dict[str, Any]]]) -> Contender:
    """The contender whose call and figures `make` gives, or why it cannot: a missing module, or whatever it raised."""
    figures: dict[str, Any] = {}

    def made() -> Callable[[], object]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call, more = make()
        figures.update(more)
        return call

    return optional(name, made, rounds=ROUNDS, figures=figures)


def _trl_utils() -> Any:
    return importlib.import_module("trl.trainer.utils")


def trl_selective(logits: Tensor, ids: Tensor) -> Tensor:
    return _trl_utils().selective_log_softmax(logits, ids)


def trl_chunked(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """TRL's log-probabilities from hidden states; it takes the weight, and never calls the head."""
    utils = _trl_utils()
    size = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    return utils._ChunkedLogProbFunction.apply(hidden, weight, None, ids, 1.0, size, None, 1.0, ())[0]


def liger_chunked(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    """Liger's log-probabilities from hidden states; it takes the weight, and never calls the head."""
    liger = importlib.import_module("liger_kernel.chunked_loss.fused_linear_ppo")
    size = liger._SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE
    return liger._ChunkedSelectiveLogProbFunction.apply(hidden, weight, ids, None, 1.0, size)


def verl_v2(logits: Tensor, ids: Tensor) -> Tensor:
    return importlib.import_module("verl.utils.torch_functional").logprobs_from_logits_v2(logits, ids)


def verl_naive(logits: Tensor, ids: Tensor) -> Tensor:
    return importlib.import_module("verl.utils.torch_functional").logprobs_from_logits_naive(logits, ids)


def verl_policy_loss(**clip: float) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """verl's loss of (log_prob, old_log_prob, advantages, response_mask, weights or None), token-mean."""
    algorithms = importlib.import_module("verl.trainer.ppo.core_algos")
    actor = importlib.import_module("verl.workers.config").ActorConfig
    config = actor(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **clip)

    def loss(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, weights: Tensor | None) -> Any:
        return algorithms.compute_policy_loss_vanilla(
            old, new, advantages, mask, loss_agg_mode="token-mean", config=config, rollout_is_weights=weights
        )

    return loss
