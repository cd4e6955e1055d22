"""Reinforcement learning as functions on tensors: the parts of a DAPO trainer for a quantized, noisy policy.

Argument names are verl's. Nothing here knows how a model was patched: modules are used by duck type
(``noise_state()``), so any causal language model of transformers works.
"""

from .advantages import group_advantages, informative_groups
from .generation import generate_groups
from .log_probs import token_log_probs
from .losses import agg_loss, dapo_loss, kl_penalty
from .mismatch import mismatch_metrics, rollout_is_weights
from .rewards import gsm8k_reward, soft_overlong_punishment
from .rollouts import Rollout
from .weights import rollout_weights

__all__ = [
    "Rollout",
    "agg_loss",
    "dapo_loss",
    "generate_groups",
    "group_advantages",
    "gsm8k_reward",
    "informative_groups",
    "kl_penalty",
    "mismatch_metrics",
    "rollout_is_weights",
    "rollout_weights",
    "soft_overlong_punishment",
    "token_log_probs",
]
