"""A request's sampling in vLLM's terms, and by name what vLLM cannot do of it.

Text is not made by vLLM: the server's own streams do that for every engine (stop strings, special tokens, characters
that take several tokens), so that answers do not depend on the engine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ensemble_server.ensembles.base import GenerationRequest, Grammar, Mixture, Sampling
from ensemble_server.ensembles.errors import UnsupportedError
from ensemble_server.server.engines.shared.choice_text import ends_of_text

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams, StructuredOutputsParams

MIN_TEMPERATURE = 0.01  # vLLM takes lower ones for this one, to stay clear of overflows
GREEDY_BELOW = 1e-5


def check_supported(request: GenerationRequest, mixture: Mixture) -> None:
    """Raises `UnsupportedError` for what the vLLM engine cannot do for any model."""
    if request.explain and request.top_logprobs is not None and len(mixture.weights) > 1:
        raise UnsupportedError(
            "vLLM gives the mixture's log-probabilities, not each member's; explain needs engine.kind transformers",
            param="ensemble.explain",
        )
    if GREEDY_BELOW <= request.sampling.temperature < MIN_TEMPERATURE:
        raise UnsupportedError(
            f"vLLM samples at temperatures from {MIN_TEMPERATURE:g} on; got {request.sampling.temperature:g}, choose 0 "
            "for the likeliest token",
            param="temperature",
        )


def sampling_params(
    request: GenerationRequest,
    index: int,
    *,
    max_new_tokens: int,
    eos_ids: frozenset[int],
    vocab_size: int,
    extra_args: Mapping[str, Any] | None,
    max_thought_tokens: int | None = None,
) -> SamplingParams:
    """For choice `index`; the first one also scores the prompt if that is asked for. `max_new_tokens` may be 0;
    `max_thought_tokens`: only for a vLLM that knows the model's markers."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    sampling = request.sampling
    temperature = sampling.temperature if sampling.temperature >= GREEDY_BELOW else 0.0
    return SamplingParams(
        max_tokens=max(1, max_new_tokens),  # vLLM cannot read without writing; what it writes then is dropped
        min_tokens=min(sampling.min_tokens, max(1, max_new_tokens)),
        temperature=temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=dict(sampling.logit_bias) or None,
        seed=None if sampling.seed is None else choice_seed(sampling.seed, index),
        # Which tokens end a text is for the members' views to say, not for vLLM's reading of the checkpoint.
        ignore_eos=True,
        stop_token_ids=_stop_ids(sampling, ends_of_text(sampling, eos_ids), vocab_size),
        logprobs=request.top_logprobs,
        prompt_logprobs=request.prompt_logprobs if index == 0 else None,
        structured_outputs=None if sampling.grammar is None else _structured(sampling.grammar),
        thinking_token_budget=max_thought_tokens,
        extra_args=None if extra_args is None else dict(extra_args),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        skip_clone=True,
    )


def choice_seed(seed: int, index: int) -> int:
    """Equal for equal (seed, index), unrelated between choices. Never -1, which vLLM takes for no seed."""
    state = np.random.SeedSequence([seed % 2**64, index]).generate_state(1, np.uint64)[0]
    return int(state) >> 1


def _stop_ids(sampling: Sampling, ends: frozenset[int], vocab_size: int) -> list[int]:
    """Ids that no token has cannot come."""
    return sorted(token_id for token_id in ends.union(sampling.stop_token_ids) if 0 <= token_id < vocab_size)


def _structured(grammar: Grammar) -> StructuredOutputsParams:
    from vllm.sampling_params import StructuredOutputsParams

    match grammar.kind:
        case "regex":
            return StructuredOutputsParams(regex=grammar.source)
        case "json_schema":
            return StructuredOutputsParams(json=grammar.source)
        case "json_object":
            return StructuredOutputsParams(json=json.dumps({"type": "object"}))
