from __future__ import annotations

import math
from collections import Counter
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from ensemble_server.ensembles.base import Sampling
from ensemble_server.ensembles.pooling import sampling
from ensemble_server.ensembles.pooling.sampling import choose, penalise, truncate


def logprobs_of(logits: np.ndarray | list[float]) -> torch.Tensor:
    return torch.log_softmax(torch.as_tensor(logits, dtype=torch.float32), -1)


@st.composite
def distributions(draw: st.DrawFn) -> torch.Tensor:
    """(V,) log-probabilities, some of them -inf."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    logits = random.normal(scale=draw(st.sampled_from([0, 1, 8])), size=draw(st.integers(1, 12)))
    logits[random.random(len(logits)) < draw(st.sampled_from([0, 0.4]))] = -np.inf
    logits[random.integers(len(logits))] = 0
    return logprobs_of(logits)


truncations = st.builds(
    Sampling,
    top_p=st.just(1.0) | st.floats(0.01, 1),
    top_k=st.just(0) | st.integers(1, 15),
    min_p=st.just(0.0) | st.floats(0.001, 1),
)


def num_left(logprobs: torch.Tensor, sampling: Sampling, slack: float) -> int:
    """How many tokens truncation leaves, by sorting all of them. `slack` > 0 moves all thresholds, to leave more."""
    probs = sorted((math.exp(logprob) for logprob in logprobs.tolist() if logprob > -100), reverse=True)
    probs = [p for p in probs if p >= sampling.min_p * probs[0] * (1 - slack)] or probs[:1]
    probs = probs[: sampling.top_k or None]
    if sampling.top_p < 1:
        more_likely = [0.0, *accumulate(probs)][:-1]
        probs = [p for p, mass in zip(probs, more_likely, strict=True) if mass < sampling.top_p * sum(probs) + slack]
    return max(len(probs), 1)


def assert_truncated(logprobs: torch.Tensor, settings: Sampling) -> None:
    """The tokens left are the most likely ones, as many as the slow way leaves, with their probabilities."""
    ids, probs = truncate(logprobs, settings)
    assert len(set(ids.tolist())) == len(ids)
    assert torch.equal(probs, logprobs.exp()[ids])
    assert torch.equal(probs.sort(descending=True).values, logprobs.exp().sort(descending=True).values[: len(ids)])
    assert num_left(logprobs, settings, -1e-5) <= len(ids) <= num_left(logprobs, settings, 1e-5)


# --- truncation ---


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        (Sampling(), {0, 1, 2, 3}),
        (Sampling(top_k=2), {0, 1}),
        (Sampling(top_k=9), {0, 1, 2, 3}),
        (Sampling(top_p=0.4), {0}),
        (Sampling(top_p=0.51), {0, 1}),  # 0.5 does not reach 0.51
        (Sampling(top_p=0.85), {0, 1, 2}),
        (Sampling(top_p=1e-9), {0}),
        (Sampling(min_p=0.35), {0, 1}),  # 0.35 · 0.5 = 0.175
        (Sampling(min_p=1), {0}),
        (Sampling(top_k=2, top_p=0.6), {0}),  # 0.5 of the 0.8 that top_k left is 0.625
        (Sampling(min_p=0.25, top_p=0.9), {0, 1, 2}),  # 0.5 + 0.3 of 0.95 is 0.84
    ],
)
def test_truncation_worked_out_by_hand(settings: Sampling, left: set[int]) -> None:
    ids, _ = truncate(torch.tensor([0.5, 0.3, 0.15, 0.05]).log(), settings)
    assert set(ids.tolist()) == left


@given(distributions(), truncations)
def test_truncation_leaves_what_a_full_sort_leaves(logprobs: torch.Tensor, settings: Sampling) -> None:
    assert_truncated(logprobs, settings)


@given(distributions(), truncations)
def test_truncation_by_way_of_few_candidates_leaves_the_same(logprobs: torch.Tensor, settings: Sampling) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "CANDIDATES", 3)
        assert_truncated(logprobs, settings)


@pytest.mark.parametrize("settings", [Sampling(top_p=0.9), Sampling(min_p=0.01), Sampling(top_p=0.9, min_p=0.01)])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 4.0])
def test_large_vocabularies_flat_and_sharp_are_truncated_alike(settings: Sampling, sharpness: float) -> None:
    torch.manual_seed(0)
    assert_truncated(logprobs_of(torch.randn(5000) * sharpness), settings)


def test_only_a_flat_distribution_costs_a_full_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    sharp, flat = logprobs_of(torch.randn(5000) * 8), logprobs_of(torch.randn(5000) * 0.1)
    sorts = []
    sort = torch.Tensor.sort
    monkeypatch.setattr(torch.Tensor, "sort", lambda *args, **kwargs: sorts.append(1) or sort(*args, **kwargs))
    truncate(sharp, Sampling(top_p=0.9))
    truncate(sharp, Sampling(min_p=0.1))
    truncate(flat, Sampling(top_k=50, top_p=0.9))
    assert not sorts
    truncate(flat, Sampling(top_p=0.9))
    assert sorts


# --- the draw ---


@given(distributions(), truncations)
def test_temperature_zero_takes_the_most_likely_and_draws_nothing(logprobs: torch.Tensor, settings: Sampling) -> None:
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    greedy = Sampling(temperature=0, top_p=settings.top_p, top_k=settings.top_k, min_p=settings.min_p)
    assert choose(logprobs, greedy, generator) == logprobs.tolist().index(max(logprobs.tolist()))
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("temperature", [1e-2, 1e-5, 1e-20, 1e-39, 5e-324])
def test_temperatures_next_to_zero_take_the_most_likely(temperature: float) -> None:
    logprobs = logprobs_of([0.0, 1.0, 2.0, -3.0])
    assert choose(logprobs, Sampling(temperature=temperature), torch.Generator().manual_seed(0)) == 2


@given(distributions(), truncations, st.floats(0.1, 2), st.integers(0, 2**32))
def test_a_draw_takes_one_uniform_number_and_an_allowed_token(
    logprobs: torch.Tensor, settings: Sampling, temperature: float, seed: int
) -> None:
    settings = Sampling(temperature=temperature, top_p=settings.top_p, top_k=settings.top_k, min_p=settings.min_p)
    generator, expected = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    token = choose(logprobs, settings, generator)
    torch.rand((), generator=expected, dtype=torch.float64)
    assert torch.equal(generator.get_state(), expected.get_state())
    assert logprobs[token] > -torch.inf
    assert token in truncate(logprobs_of(logprobs / temperature), settings)[0]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Sampling(), [0.4, 0.3, 0.2, 0.1, 0]),
        # squared: 0.16, 0.09, 0.04, 0.01 of 0.3
        (Sampling(temperature=0.5), [16 / 30, 9 / 30, 4 / 30, 1 / 30, 0]),
        (Sampling(top_k=2), [4 / 7, 3 / 7, 0, 0, 0]),
        (Sampling(top_p=0.8), [4 / 9, 3 / 9, 2 / 9, 0, 0]),
        (Sampling(min_p=0.4), [4 / 9, 3 / 9, 2 / 9, 0, 0]),
        # temperature comes first: squared, 0.16 and 0.09 are 0.83 of all
        (Sampling(temperature=0.5, top_p=0.8), [16 / 25, 9 / 25, 0, 0, 0]),
    ],
)
def test_draws_are_distributed_as_stated(settings: Sampling, expected: list[float]) -> None:
    logprobs = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0]).log()
    generator = torch.Generator().manual_seed(7)
    drawn = Counter(choose(logprobs, settings, generator) for _ in range(1000))
    possible = [token for token, probability in enumerate(expected) if probability]
    assert set(drawn) == set(possible)
    fit = chisquare([drawn[token] for token in possible], [1000 * expected[token] for token in possible])
    assert fit.pvalue > 0.01


def test_a_seed_repeats_its_draws() -> None:
    logprobs = logprobs_of(torch.zeros(1000))
    one, other, different = (torch.Generator().manual_seed(seed) for seed in (3, 3, 4))
    draws = [[choose(logprobs, Sampling(), generator) for _ in range(5)] for generator in (one, other, different)]
    assert draws[0] == draws[1] != draws[2]


# --- penalties and bias ---


@st.composite
def penalised(draw: st.DrawFn) -> tuple[torch.Tensor, Sampling, list[int], dict[int, int]]:
    logprobs = draw(distributions())
    token_ids = st.integers(0, len(logprobs) - 1)
    settings = Sampling(
        presence_penalty=draw(st.sampled_from([0.0, 0.5, -1.0])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.25, -0.5])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.5, 0.5])),
        logit_bias=draw(st.dictionaries(token_ids, st.floats(-100, 100, width=32), max_size=3)),
    )
    prompt_ids = draw(st.lists(token_ids, max_size=5))
    return logprobs, settings, prompt_ids, draw(st.dictionaries(token_ids, st.integers(1, 4), max_size=4))


@given(penalised())
def test_penalties_follow_their_definitions(case: tuple[torch.Tensor, Sampling, list[int], dict[int, int]]) -> None:
    logprobs, settings, prompt_ids, counts = case
    expected = logprobs.tolist()
    for token in set(prompt_ids) | set(counts):
        expected[token] *= settings.repetition_penalty  # log-probabilities are negative: multiplied, not divided
    for token, times in counts.items():
        expected[token] -= settings.presence_penalty + settings.frequency_penalty * times
    for token, bias in settings.logit_bias.items():
        expected[token] += bias
    before = logprobs.clone()
    result = penalise(logprobs, settings, torch.tensor(prompt_ids, dtype=torch.long), counts)
    assert result.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert torch.equal(logprobs, before)


def test_nothing_to_penalise_copies_nothing() -> None:
    logprobs = logprobs_of([1.0, 2.0])
    assert penalise(logprobs, Sampling(presence_penalty=1.0), torch.tensor([0]), {}) is logprobs
    assert penalise(logprobs, Sampling(), torch.tensor([0]), {1: 3}) is logprobs


def test_presence_and_frequency_look_at_generated_tokens_repetition_at_the_prompt_too() -> None:
    logprobs, prompt_ids = logprobs_of([0.0, 0.0, 0.0]), torch.tensor([0])
    once = penalise(logprobs, Sampling(presence_penalty=1.0), prompt_ids, {1: 3}) - logprobs
    thrice = penalise(logprobs, Sampling(frequency_penalty=1.0), prompt_ids, {1: 3}) - logprobs
    both = penalise(logprobs, Sampling(repetition_penalty=2.0), prompt_ids, {1: 3}) / logprobs
    assert (once.tolist(), thrice.tolist(), both.tolist()) == ([0, -1, 0], [0, -3, 0], [2, 2, 1])


def test_a_bias_of_minus_100_bans_and_of_100_forces() -> None:
    logprobs = logprobs_of([5.0, 0.0, -5.0])
    banned = penalise(logprobs, Sampling(logit_bias={0: -100}), torch.tensor([], dtype=torch.long), {})
    forced = penalise(logprobs, Sampling(logit_bias={2: 100}), torch.tensor([], dtype=torch.long), {})
    assert (int(banned.argmax()), int(forced.argmax())) == (1, 2)
