"""Rollouts by the continuous batching of transformers: a finished response makes room for the next one at once.

The loop, the paged cache and the scheduling are transformers' (`init_continuous_batching`). The sampling is ours: its
slot for logits processors with arguments of each request is given one that knows which sample and which token of it a
row of logits is for. So every sample draws from its own stream, as under `generate`, whatever runs beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .sampling import Sampling, force_draw

if TYPE_CHECKING:
    from transformers import GenerationConfig

_PREFILL_TOKENS = 512  # most prompt tokens in one forward; attention by a mask costs this times the cache
_WAIT = 1.0  # seconds between looks at whether the generating thread is alive


def generate_continuously(
    model: Any,
    config: GenerationConfig,
    prompts: list[list[int]],
    num_generations: int,
    *,
    sampling: Sampling,
    in_flight: int,
    pad: int,
    on_response: Callable[[], object] | None = None,
) -> tuple[Tensor, Tensor]:
    """``num_generations`` responses to each prompt.

    Args:
        model: a model of transformers (not a PEFT wrapper), in evaluation mode.
        config: of generation: what ends a response.
        prompts: lists of token ids.
        num_generations: sample i answers ``prompts[i // num_generations]``.
        sampling: how tokens are drawn.
        in_flight: most responses that share the cache at a time.
        pad: fills up what is shorter than the longest response.
        on_response: called when a response is complete.

    Returns:
        (N, T) int64 token ids and (N, T) fp32 log-probabilities of what was sampled, on the model's device.
        N = len(prompts) · num_generations.

    Raises:
        ValueError: a model or an attention implementation without a paged form; an active autocast (it does
            not reach the thread that generates).
        RuntimeError: generation failed, or this version of transformers does not sample through the
            processor that it was given.
    """
    _check(model)
    device: torch.device = model.device
    count = len(prompts) * num_generations
    lengths = [len(prompts[sample // num_generations]) for sample in range(count)]
    with ExitStack() as cleanup:
        # What this thread makes in inference mode, the other one could not write to.
        cleanup.enter_context(torch.inference_mode(False))
        cleanup.enter_context(torch.no_grad())
        # The loop of transformers seeds torch's global generators.
        cleanup.enter_context(torch.random.fork_rng(range(torch.cuda.device_count()) if device.type == "cuda" else []))
        cleanup.callback(_restore_attention, model, model.config._attn_implementation)
        sampler = PagedSampler(sampling, lengths, in_flight, device)
        manager = _manager(model, config, sampler, in_flight, max(lengths) + sampling.max_new_tokens)
        cleanup.callback(_shut_down, manager)
        manager.start()
        # The first samples of all prompts go first: when the others come, their prompts are in the cache.
        for generation in range(num_generations):
            for index, prompt in enumerate(prompts):
                manager.add_request(
                    prompt,
                    request_id=str(index * num_generations + generation),
                    max_new_tokens=sampling.max_new_tokens,
                    eos_token_id=config.eos_token_id,
                )
        responses = _collect(manager, count, on_response)
    return sampler.result(responses, pad)


class PagedSampler:
    """Draws and records like ``RecordingSampler``, row by row for whichever samples are in the batch.

    It stands where transformers expects a per-request logits processor, whose one int32 argument for each row of
    logits is here the *slot*: the place of the token in a (samples · max_new_tokens) table.
    """

    supported_kwargs: ClassVar[dict[str, type]] = {}
    ignored_kwargs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, sampling: Sampling, prompt_lengths: list[int], in_flight: int, device: torch.device) -> None:
        self.sampling, self.prompt_lengths, self.in_flight = sampling, prompt_lengths, in_flight
        uniform = sampling.uniforms(range(len(prompt_lengths)), device)
        size = len(prompt_lengths) * sampling.max_new_tokens
        # One more slot for rows that belong to no sample.
        self.uniform = None if uniform is None else torch.cat([uniform.flatten(), uniform.new_zeros(1)])
        self.tokens = torch.full((size + 1,), -1, device=device)
        self.log_probs = torch.full((size + 1,), torch.nan, device=device)

    def fill_defaults(self, slots: Tensor) -> None:
        slots.fill_(len(self.tokens) - 1)

    def prepare_tensor_args(self, requests: list[Any]) -> Tensor:
        slots = torch.full((self.in_flight,), len(self.tokens) - 1, dtype=torch.int32)
        # Behind these come rows of requests whose prompt is not read to its end; transformers leaves their arguments as
        # they were a batch ago.
        slots[: len(requests)] = torch.tensor([self._slot(request.state) for request in requests], dtype=torch.int32)
        return slots

    def _slot(self, state: Any) -> int:
        # A request that had to give up its cache starts again with what it had generated as part of its prompt.
        sample = int(state.request_id)
        step = len(state.initial_tokens) + len(state.generated_tokens) - self.prompt_lengths[sample]
        return sample * self.sampling.max_new_tokens + step

    def __call__(self, scores: Tensor, slots: Tensor) -> Tensor:
        slot = slots[: len(scores)].long()
        uniform = None if self.uniform is None else self.uniform[slot]
        scores, log_prob = force_draw(scores, uniform, self.sampling)
        self.tokens[slot] = scores.argmax(-1)
        self.log_probs[slot] = log_prob
        return scores

    def result(self, responses: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
        """(N, T) ids and log-probabilities of the responses, after making sure that these are what was drawn here."""
        width = max(map(len, responses))
        device = self.tokens.device
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in responses], device=device)
        given = torch.arange(width, device=device) < torch.tensor([[len(row)] for row in responses], device=device)
        shape = (len(responses), self.sampling.max_new_tokens)
        drawn, log_probs = (x[:-1].view(shape)[:, :width] for x in (self.tokens, self.log_probs))
        if not torch.equal(torch.where(given, drawn, pad), ids):
            raise RuntimeError(
                "continuous batching returned other tokens than were sampled: this version of transformers treats "
                "logits processors in another way than 5.23 does. Use engine='generate'."
            )
        return ids, torch.where(given, log_probs, 0.0)


def _check(model: Any) -> None:
    kind = type(model).__name__
    if not callable(getattr(model, "init_continuous_batching", None)):
        raise ValueError(
            f"{kind} has no init_continuous_batching(), which engine='continuous' needs (a causal language model of "
            "transformers 5.23 or later); use engine='generate'"
        )
    # Others would run, with an attention that knows nothing of the paged cache, and say something else.
    if not getattr(model, "_supports_attention_backend", False) or getattr(model, "_is_stateful", False):
        raise ValueError(
            f"{kind} does not take its attention from transformers' attention interface, so it cannot use the "
            "paged cache of engine='continuous'; use engine='generate'"
        )
    if getattr(model, "_cached_continuous_batching_manager", None) is not None:
        raise ValueError(
            f"{kind} keeps a continuous batching manager of its own (persistent_manager=True); call "
            "model.destroy_cached_continuous_batching_manager() first"
        )
    if torch.is_autocast_enabled(model.device.type):
        raise ValueError(
            f"torch.autocast is on for {model.device.type}, but engine='continuous' runs the model in a thread of its "
            "own, which autocast does not reach. Leave the autocast context, or use engine='generate'."
        )


def _manager(model: Any, config: GenerationConfig, sampler: PagedSampler, in_flight: int, longest: int) -> Any:
    try:
        from transformers.generation.configuration_utils import ContinuousBatchingConfig
        from transformers.generation.continuous_batching.cb_logits_processors import (
            ContinuousBatchingLogitsProcessor,
            ContinuousBatchingLogitsProcessorList,
        )
        from transformers.generation.logits_process import LogitsProcessorList
    except ImportError as error:
        raise ValueError(
            f"engine='continuous' needs the continuous batching of transformers 5.23, and this version has another "
            f"({error}); use engine='generate'"
        ) from error

    # Small pages share more of a prompt and waste less; kernels on a GPU want those of transformers' default.
    page = 16 if model.device.type == "cpu" else ContinuousBatchingConfig.page_size
    settings = ContinuousBatchingConfig(
        page_size=page,
        num_blocks=in_flight * (-(-longest // page) + 1),  # one to spare: kinds of attention do not share pages
        max_batch_tokens=max(in_flight, _PREFILL_TOKENS),
        max_requests_per_batch=in_flight,
        auto_switch_to_flash=False,  # the attention the user chose stays
        # Slots are told from the tokens that have arrived; replayed graphs and double buffering run ahead of them.
        use_async_batching=False,
        use_cuda_graph=False,
        seed=0,
    )
    try:
        manager = model.init_continuous_batching(generation_config=config, continuous_batching_config=settings)
        ContinuousBatchingLogitsProcessor.register(PagedSampler)
        manager.logit_processor = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([sampler]))
        manager.logit_processor.tensors_required = 1
        manager.warmup()  # builds the cache here, where an error can be seen
    except Exception as error:
        raise ValueError(
            f"engine='continuous' cannot run {type(model).__name__} with attn_implementation="
            f"{model.config._attn_implementation!r}: {error}. Use engine='generate', or a "
            "smaller batch_size where it is a matter of memory."
        ) from error
    return manager


def _collect(manager: Any, count: int, on_response: Callable[[], object] | None) -> list[list[int]]:
    responses: dict[int, list[int]] = {}
    while len(responses) < count:
        alive = manager.is_running()
        output = manager.get_result(timeout=_WAIT)
        if output is None:
            if not alive:
                raise RuntimeError(
                    f"continuous batching stopped after {len(responses)} of {count} responses; its log has the reason"
                )
        elif output.error is not None:
            raise RuntimeError(
                f"continuous batching failed on sample {output.request_id}: {output.error}. Use engine='generate'."
            )
        else:
            responses[int(output.request_id)] = output.generated_tokens
            if on_response:
                on_response()
    return [responses[index] for index in range(count)]


def _shut_down(manager: Any) -> None:
    manager.stop(block=True, hard_stop=True)
    manager.destroy()


def _restore_attention(model: Any, implementation: str) -> None:
    if model.config._attn_implementation != implementation:
        model.set_attn_implementation(implementation)
