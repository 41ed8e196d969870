"""A request's sampling in vLLM's terms."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_server.ensembles.base import GenerationRequest, Grammar, Mixture, Sampling
from ensemble_server.ensembles.errors import UnsupportedError
from ensemble_server.server.engines.vllm_engine.parameters import check_supported, choice_seed, sampling_params

ONE, TWO = Mixture({"a": 1.0}), Mixture({"a": 1.0, "b": 1.0})


def ask(**changes: Any) -> GenerationRequest:
    return GenerationRequest(prompt="x", sampling=Sampling(**changes.pop("sampling", {})), **changes)


def params_of(request: GenerationRequest, index: int = 0, max_new_tokens: int = 5) -> Any:
    pytest.importorskip("vllm")
    return sampling_params(
        request, index, max_new_tokens=max_new_tokens, eos_ids=frozenset({2, 900}), vocab_size=320, extra_args=None
    )


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 127))
def test_seeds_are_ones_that_vllm_takes_as_seeds(seed: int, index: int) -> None:
    found = choice_seed(seed, index)
    assert 0 <= found < 2**63
    assert found == choice_seed(seed, index)
    assert found != choice_seed(seed, index + 1)


def test_members_views_are_refused_only_where_they_would_be_shown() -> None:
    check_supported(ask(explain=True), TWO)  # inside a vote, which shows no tokens
    check_supported(ask(explain=True, top_logprobs=0), ONE)
    with pytest.raises(UnsupportedError, match=r"engine\.kind transformers") as caught:
        check_supported(ask(explain=True, top_logprobs=0), TWO)
    assert caught.value.param == "ensemble.explain"


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 0.01, 1.0, 2.0])
def test_temperatures_that_vllm_honours_pass(temperature: float) -> None:
    check_supported(ask(sampling={"temperature": temperature}), ONE)


def test_temperatures_that_vllm_would_raise_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"from 0\.01 on; got 0\.001"):
        check_supported(ask(sampling={"temperature": 0.001}), ONE)


@pytest.mark.vllm
def test_sampling_arrives() -> None:
    sampling = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 3,
        "min_p": 0.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.5,
        "min_tokens": 2,
        "stop_token_ids": (7,),
        "logit_bias": {5: -100.0},
    }
    params = params_of(ask(sampling=sampling, top_logprobs=3, prompt_logprobs=1))
    for key in sampling.keys() - {"stop_token_ids"}:
        assert getattr(params, key) == sampling[key], key
    assert params.stop_token_ids == [2, 7]  # the end of text, and no id beyond the vocabulary
    assert (params.logprobs, params.prompt_logprobs, params.max_tokens, params.seed) == (3, 1, 5, None)
    assert params_of(ask(prompt_logprobs=1), index=1).prompt_logprobs is None


@pytest.mark.vllm
def test_an_ignored_end_of_text_still_ends_a_grammar() -> None:
    assert params_of(ask(sampling={"ignore_eos": True})).stop_token_ids == []
    grammar = Grammar("regex", "a+")
    assert params_of(ask(sampling={"ignore_eos": True, "grammar": grammar})).stop_token_ids == [2]
    assert params_of(ask(sampling={"grammar": grammar})).structured_outputs.regex == "a+"


@pytest.mark.vllm
def test_scoring_alone_asks_for_the_one_token_that_vllm_insists_on() -> None:
    assert params_of(ask(prompt_logprobs=0, sampling={"min_tokens": 0}), max_new_tokens=0).max_tokens == 1


@pytest.mark.vllm
def test_the_bound_of_a_thought_arrives() -> None:
    pytest.importorskip("vllm")
    assert params_of(ask()).thinking_token_budget is None
    bounded = sampling_params(
        ask(),
        0,
        max_new_tokens=5,
        eos_ids=frozenset(),
        vocab_size=320,
        extra_args=None,
        max_thought_tokens=0,
    )
    assert bounded.thinking_token_budget == 0
