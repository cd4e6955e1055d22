"""Groups of samples from a causal language model of transformers, with their behaviour log-probabilities.

Why the log-probabilities are recorded while sampling, and not recomputed afterwards: under top-k or top-p the
tokens come from a truncated, renormalized distribution that a teacher-forced forward does not show, and near
its edge the set of kept tokens can differ between the two forwards. The recording costs one gather a step; a
recomputation costs a forward over every sequence. Keeping ``generate``'s list of scores would cost 4·B·T·V
bytes.
"""

from __future__ import annotations

import dataclasses
import inspect
import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qnoise.spelling import check_choice

from .continuous import generate_continuously
from .decoding import decode
from .rollout_merge import adapters_merged
from .rollouts import Rollout, collect_noise_state
from .sampling import RecordingSampler, Sampling, check_integer

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

ENGINES = ("generate", "continuous")

# What model.generation_config may still decide: how generate() computes, not what it draws.
_KEPT = (
    "cache_implementation",
    "cache_config",
    "max_cache_len",
    "compile_config",
    "disable_compile",
    "prefill_chunk_size",
)


def generate_groups(
    model: PreTrainedModel | torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    num_generations: int,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
    eos_token_id: int | Sequence[int] | None = None,
    engine: str = "generate",
    merge_adapters: bool | None = None,
) -> Rollout:
    """Sample ``num_generations`` responses to each prompt, batched, without gradient.

    Sample i answers prompt ``i // num_generations``, which is its group id. What it draws depends on
    ``seed``, i and the logits only: neither on ``batch_size`` nor on the global random state, which is left
    as it was. Give every rollout of a run its own ``seed``. The model runs in evaluation mode (no dropout) and
    every module gets its own mode back; sampling settings stored in ``model.generation_config``
    (repetition penalty, top-k, …) are not applied. For noise in the rollout call this inside
    ``qnoise.phase(model, "rollout")``; the noise that is on is recorded in ``Rollout.noise``.

    Args:
        model: a causal language model of transformers, patched or not, wrapped by PEFT or not.
        tokenizer: encodes string prompts (with its special tokens), decodes responses, names pad and end
            tokens.
        prompts: strings, or lists of token ids (for prompts that went through a chat template). Padded on the
            left.
        num_generations: responses a prompt, ≥ 1.
        max_new_tokens: most tokens of a response, the end-of-sequence token included.
        temperature: > 0 samples; 0 decodes greedily, and every token then has log-probability 0.
        top_p: keep the smallest set of tokens whose probability reaches this, 0 < top_p ≤ 1; after ``top_k``.
        top_k: keep the k most likely tokens; 0 keeps all.
        seed: 0 … 2⁶⁴−1.
        batch_size: responses generated at a time; None = all.
        progress: show a progress bar, of decoding steps or (continuous) of responses.
        eos_token_id: what ends a response; None = those of ``model.generation_config`` and of ``tokenizer``.
        engine: "generate" goes through the samples in batches of ``batch_size``, prompts of like length together; the
            samples of a group share one forward over their prompt, and responses that have ended leave the batch.
            Models without a plain growing cache (state-space layers, a learned prompt) run ``model.generate``, each
            batch until its last response ends. So does a cache that is full from the start
            (``model.generation_config.cache_implementation = "static"``), which is for compiled decoding on a GPU and
            gains nothing on a CPU. "continuous" runs the continuous
            batching of transformers: whenever one of the ``batch_size`` responses in flight ends, the next begins. It
            pays where many responses of different lengths wait for few places; with sdpa or eager
            attention every token attends through a mask over the caches of all responses in flight, so keep
            ``batch_size`` small there. Both engines draw the same tokens, up to the rounding of the logits.
        merge_adapters: True computes Q(W) + scaling · B A of each linear with a plain LoRA once and decodes with
            that, which saves two products and an addition a linear and token and takes the memory of one more copy of
            these weights. It is rounded to the dtype of the base: in 16 bits most of a small adapter can be lost, and
            the samples are then those of another policy. None (default) merges where nothing is lost and the copy is
            small: fp32, up to 256 MiB. False never does. Parameters are not touched, and adapters that are no
            plain LoRA are left as they are.

    Returns:
        :class:`Rollout` on the model's device with ``rollout_log_probs`` of the distribution that was sampled
        (temperature, top-k and top-p included).

    Raises:
        ValueError: no prompts, an empty prompt, a token the model does not know, no end-of-sequence token
            anywhere, prompt + ``max_new_tokens`` beyond the model's context, an option out of range, logits that
            are not finite; ``engine="continuous"`` with a model or an attention it cannot run, or
            under autocast.
        RuntimeError: continuous batching failed.
        TypeError: prompts that are neither all strings nor all lists of ids, a count that is no integer,
            ``merge_adapters`` neither a bool nor None; a model without ``generate``.
    """
    if not callable(getattr(model, "generate", None)):
        inside = ", or give the model inside it (.module)" if hasattr(model, "module") else ""
        raise TypeError(
            f"{type(model).__name__} has no generate(); generate_groups needs a model of transformers{inside}"
        )
    check_choice("engine", engine, ENGINES)
    if merge_adapters is not None and not isinstance(merge_adapters, bool):
        raise TypeError(
            f"merge_adapters is {merge_adapters!r}; it must be True, False or None (where it loses nothing)"
        )
    sampling = Sampling(temperature, top_p, top_k, seed, max_new_tokens)
    _check_counts(num_generations, batch_size)
    encoded = _encode(tokenizer, prompts)
    _check_context(model, encoded, max_new_tokens)
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    vocabulary = embeddings.weight.shape[0]
    eos = _eos_ids(model, tokenizer, eos_token_id, vocabulary)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos[0]
    config = _generation_config(model, max_new_tokens, eos, pad)
    device: torch.device = embeddings.weight.device
    _check_vocabulary(encoded, vocabulary)
    prompt_ids, prompt_mask = _pad_left(encoded, pad, device)

    count = len(encoded) * num_generations
    batch_size = min(batch_size or count, count)
    noise = collect_noise_state(model)
    with _set_up(model), torch.no_grad(), adapters_merged(model, merge_adapters):
        if engine == "continuous":
            if _has_learned_prompt(model):
                raise ValueError(
                    f"{type(model).__name__} puts a learned prompt before its input, which engine='continuous' does "
                    "not; use engine='generate'"
                )
            with _bar(progress, count, "response") as bar:
                response_ids, log_probs = generate_continuously(
                    _unwrapped(model),
                    config,
                    encoded,
                    num_generations,
                    sampling=sampling,
                    in_flight=batch_size,
                    pad=pad,
                    on_response=bar and bar.update,
                )
        else:
            # Prompts of like length together: less padding to run. Samples of a group stay beside each other.
            order = sorted(range(count), key=lambda sample: len(encoded[sample // num_generations]))
            batches = [order[start : start + batch_size] for start in range(0, count, batch_size)]
            with _bar(progress, len(batches) * max_new_tokens, "step") as bar:
                parts = [
                    _generate_batch(model, config, sampling, prompt_ids, prompt_mask, num_generations, batch, bar)
                    for batch in batches
                ]
            ids, recorded = zip(*parts, strict=True)
            back = torch.tensor(order, device=device).argsort()
            response_ids, log_probs = _join_right(ids, pad)[back], _join_right(recorded, 0.0)[back]

    is_eos = torch.isin(response_ids, torch.tensor(eos, device=device))
    # A position counts up to and including the first end token. (A batch that is narrower than another one has an end
    # in each of its rows, so what fills it up on the right never counts.)
    response_mask = (is_eos.cumsum(-1) - is_eos.long()) == 0
    rollout_log_probs = torch.where(response_mask, log_probs, 0.0)
    _check_finite(rollout_log_probs)
    lengths = response_mask.sum(-1)
    groups = torch.arange(count, device=device) // num_generations
    return Rollout(
        prompt_ids=prompt_ids[groups],
        prompt_mask=prompt_mask[groups],
        response_ids=torch.where(response_mask, response_ids, pad),
        response_mask=response_mask,
        rollout_log_probs=rollout_log_probs,
        finished=(is_eos & response_mask).any(-1),
        lengths=lengths,
        group_ids=groups,
        texts=tuple(
            tokenizer.batch_decode(
                [row[:length] for row, length in zip(response_ids.tolist(), lengths.tolist(), strict=True)],
                skip_special_tokens=True,
            )
        ),
        noise=noise,
        sampling=dataclasses.asdict(sampling),
    )


def _generate_batch(
    model: Any,
    config: GenerationConfig,
    sampling: Sampling,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    num_generations: int,
    samples: Sequence[int],
    bar: Any,
) -> tuple[Tensor, Tensor]:
    """Token ids and log-probabilities, (len(samples), T) each, of the responses of some samples."""
    device = prompt_ids.device
    start = bar.n if bar else 0
    uniform, on_step = sampling.uniforms(samples, device), bar and bar.update
    rows = torch.tensor(samples, device=device) // num_generations
    used, index = torch.unique_consecutive(rows, return_inverse=True)
    ids, mask = prompt_ids[used], prompt_mask[used].long()
    first = int(mask.argmax(-1).min())  # the columns before it are padding in every row of this batch
    ids, mask = ids[:, first:], mask[:, first:]
    cache = None
    if config.cache_implementation in (None, "hybrid"):  # not if the user chose another
        cache = _shared_prefix(model, ids, mask)
    ids, mask = ids[index], mask[index]
    if cache is not None:
        if len(used) < len(rows):
            cache.batch_select_indices(index)
        eos, pad = torch.tensor(config.eos_token_id, device=device), config.pad_token_id
        new, log_probs = decode(model, ids[:, -1:], mask, cache, uniform, sampling, eos, pad, on_step)
    else:
        new, log_probs = _generate(model, ids, mask, config, RecordingSampler(uniform, sampling, on_step))
    if bar:  # steps that early ends have saved
        bar.update(start + sampling.max_new_tokens - bar.n)
    return new, log_probs


def _generate(
    model: Any, ids: Tensor, mask: Tensor, config: GenerationConfig, sampler: RecordingSampler
) -> tuple[Tensor, Tensor]:
    """By the loop of transformers, with whatever cache the model needs."""
    from transformers.generation.logits_process import LogitsProcessorList

    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=config,
        logits_processor=LogitsProcessorList([sampler]),
    )
    new = out[:, ids.shape[1] :]
    return new, torch.stack(sampler.recorded[: new.shape[1]], -1)


def _shared_prefix(model: Any, ids: Tensor, mask: Tensor) -> Any:
    """The key-value cache of all prompt tokens but the last, computed once a prompt.

    None where the model does not work with a plain growing cache whose rows can be copied and left out; ``generate``
    then runs the prompt of every sample, with the same result.
    """
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    accepted = inspect.signature(_unwrapped(model).forward).parameters
    if not {"position_ids", "past_key_values", "logits_to_keep"} <= set(accepted) or _has_learned_prompt(model):
        return None
    ids, mask = ids[:, :-1], mask[:, :-1]
    if ids.shape[1] == 0:
        return None
    output = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
        use_cache=True,
        logits_to_keep=1,
    )
    cache = getattr(output, "past_key_values", None)
    growing = (DynamicLayer, DynamicSlidingWindowLayer)
    if type(cache) is not DynamicCache or not all(type(layer) in growing for layer in cache.layers):
        return None
    return cache


def _check_counts(num_generations: int, batch_size: int | None) -> None:
    check_integer("num_generations", num_generations)
    if batch_size is not None:
        check_integer("batch_size", batch_size)
    if num_generations < 1:
        raise ValueError(f"num_generations must be at least 1, got {num_generations}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, or None for all at once, got {batch_size}")


def _encode(tokenizer: Any, prompts: Sequence[str] | Sequence[Sequence[int]]) -> list[list[int]]:
    if isinstance(prompts, str):
        raise TypeError("prompts must be a list of strings or of lists of token ids, got one string")
    if isinstance(prompts, Mapping):
        raise TypeError(
            f"prompts must be a list of strings or of lists of token ids, got a {type(prompts).__name__}; its "
            "['input_ids'] will do if they are not padded"
        )
    if len(prompts) == 0:
        raise ValueError("prompts is empty; give at least one prompt")
    if all(isinstance(prompt, str) for prompt in prompts):
        encoded = [list(ids) for ids in tokenizer(list(prompts))["input_ids"]]
    elif any(isinstance(prompt, str) for prompt in prompts):
        raise TypeError("prompts mixes strings and lists of token ids; give one kind")
    else:
        encoded = [_token_ids(index, prompt) for index, prompt in enumerate(prompts)]  # type: ignore[arg-type]
    for index, ids in enumerate(encoded):
        if not ids:
            raise ValueError(f"prompts[{index}] = {prompts[index]!r} has no tokens; there is nothing to continue")
    return encoded


def _token_ids(index: int, prompt: Sequence[int]) -> list[int]:
    if not hasattr(prompt, "__iter__"):
        raise TypeError(f"prompts[{index}] is {prompt!r}; give strings or lists of token ids, a list for each prompt")
    ids = []
    for token in prompt:
        try:
            ids.append(operator.index(token))
        except TypeError as error:
            raise TypeError(
                f"prompts[{index}] holds {token!r}, which is no token id; give strings, or lists of ids such as "
                "tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) returns"
            ) from error
    return ids


def _check_context(model: Any, encoded: list[list[int]], max_new_tokens: int) -> None:
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    limit = getattr(config, "max_position_embeddings", None)
    length, longest = max((len(ids), index) for index, ids in enumerate(encoded))
    if limit is not None and length + max_new_tokens > limit:
        raise ValueError(
            f"prompts[{longest}] has {length} tokens; with max_new_tokens={max_new_tokens} that exceeds the "
            f"model's context of {limit} tokens (max_position_embeddings)"
        )


def _check_vocabulary(encoded: list[list[int]], size: int) -> None:
    for index, ids in enumerate(encoded):
        strange = [token for token in ids if not 0 <= token < size]
        if strange:
            raise ValueError(
                f"prompts[{index}] holds token {strange[0]}, but the model knows 0 … {size - 1} only; is this "
                "the model's own tokenizer?"
            )


def _eos_ids(model: Any, tokenizer: Any, given: int | Sequence[int] | None, vocabulary: int) -> list[int]:
    if given is not None:
        return _given_eos_ids(given, vocabulary)
    found: set[int] = set()
    own = getattr(model, "generation_config", None)
    for source in (getattr(own, "eos_token_id", None), tokenizer.eos_token_id):
        if source is not None:
            found.update([source] if isinstance(source, int) else source)
    if not found:
        raise ValueError(
            "neither tokenizer.eos_token_id nor model.generation_config.eos_token_id is set, so no response "
            "could end; set one or pass eos_token_id"
        )
    return sorted(found)


def _given_eos_ids(given: int | Sequence[int], vocabulary: int) -> list[int]:
    several: Any = given if hasattr(given, "__iter__") and not isinstance(given, str) else [given]
    try:
        found = {operator.index(token) for token in several}
    except TypeError as error:
        raise TypeError(f"eos_token_id must be an integer or several, got {given!r}") from error
    if not found:
        raise ValueError("eos_token_id is empty, so no response could end; name one, or leave it None")
    for token in found:
        if not 0 <= token < vocabulary:
            raise ValueError(f"eos_token_id {token} is no token of the model, which knows 0 … {vocabulary - 1} only")
    return sorted(found)


def _generation_config(model: Any, max_new_tokens: int, eos: list[int], pad: int) -> GenerationConfig:
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=eos,
        pad_token_id=pad,
        **{name: getattr(own, name, None) for name in _KEPT},
    )


def _pad_left(encoded: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, encoded))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in encoded], device=device)
    lengths = torch.tensor([len(row) for row in encoded], device=device)
    return ids, torch.arange(width, device=device) >= width - lengths[:, None]


def _join_right(parts: Sequence[Tensor], fill: float) -> Tensor:
    """Matrices of different widths under one another, filled up on the right."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=fill) for part in parts])


def _check_finite(log_probs: Tensor) -> None:
    bad = (~log_probs.isfinite()).nonzero().tolist()
    if bad:
        sample, token = bad[0]
        raise ValueError(
            f"the model gave logits that are not finite: sample {sample}, token {token} ({len(bad)} tokens in all)"
        )


@contextmanager
def _set_up(model: Any) -> Iterator[None]:
    """Evaluation mode and no stored generation settings inside; afterwards everything as it was.

    ``generate`` fills whatever a call leaves open from ``model.generation_config``: a repetition penalty or a list
    of suppressed tokens there would change what is drawn behind the recorded log-probabilities.
    """
    from transformers import GenerationConfig

    modes = [(module, module.training) for module in model.modules()]  # they may differ
    owners = [owner for owner in (model, _unwrapped(model)) if hasattr(owner, "generation_config")]
    stored = [(owner, owner.generation_config) for owner in owners]
    try:
        model.eval()
        for owner in owners:
            owner.generation_config = GenerationConfig()
        yield
    finally:
        for owner, config in stored:
            owner.generation_config = config
        for module, mode in modes:
            module.training = mode


def _unwrapped(model: Any) -> Any:
    """The model of transformers inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _has_learned_prompt(model: Any) -> bool:
    """A PEFT model with prompt or prefix tuning."""
    return bool(getattr(model, "prompt_encoder", None))


@contextmanager
def _bar(show: bool, total: int, unit: str) -> Iterator[Any]:
    if not show:
        yield None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc="rollout", unit=unit) as bar:
        yield bar
