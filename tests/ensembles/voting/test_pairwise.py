from __future__ import annotations

import math

import numpy as np
import pytest

from ensemble_server.ensembles.base import GenerationRequest, Grammar, TokenLogprob
from ensemble_server.ensembles.voting.pairwise import (
    CRITERION,
    comparison_request,
    mean_logprob,
    place_bias,
    preferences,
    probability_of_first,
)


def token(text: str, probability: float, *top: TokenLogprob) -> TokenLogprob:
    return TokenLogprob(hash(text), text, text.encode(), math.log(probability), top)


def test_letters_share_their_probability() -> None:
    chosen = token("A", 0.6, token("A", 0.6), token("B", 0.2), token("The", 0.1))
    assert probability_of_first(chosen) == pytest.approx(0.75)


def test_a_letter_counts_with_and_without_its_space() -> None:
    chosen = token("B", 0.3, token("B", 0.3), token(" A", 0.2), token(" B", 0.2), token("A", 0.1))
    assert probability_of_first(chosen) == pytest.approx(0.3 / 0.8)


def test_a_letter_out_of_sight_has_at_most_what_the_least_seen_has() -> None:
    chosen = token("A", 0.6, token("A", 0.6), token("x", 0.2), token("y", 0.1))
    assert probability_of_first(chosen) == pytest.approx(0.6 / 0.7)


def test_a_choice_between_two_letters_out_of_sight_is_a_draw() -> None:
    chosen = token("A", 0.01, token("x", 0.6), token("y", 0.3))
    assert probability_of_first(chosen) == pytest.approx(0.5)


def test_both_orders_are_averaged_so_that_a_lean_to_one_place_cancels() -> None:
    # 0 is better by 0.2, and whoever is shown first gains 0.1
    first_wins = {(0, 1): 0.8, (1, 0): 0.4}
    assert preferences(2, first_wins) == pytest.approx(np.array([[0.5, 0.7], [0.3, 0.5]]))
    assert place_bias(first_wins) == pytest.approx(0.1)


def test_what_was_not_asked_is_a_draw_and_one_order_counts_as_it_is() -> None:
    matrix = preferences(3, {(2, 0): 0.9})
    assert matrix == pytest.approx(np.array([[0.5, 0.5, 0.1], [0.5, 0.5, 0.5], [0.9, 0.5, 0.5]]))
    assert place_bias({}) == 0


def test_a_chat_is_judged_as_a_chat_and_a_text_as_a_text() -> None:
    chat = GenerationRequest(messages=({"role": "user", "content": "Where?"}, {"role": "assistant", "content": None}))
    asked = comparison_request(chat, "here", "there", criterion=CRITERION)
    text = asked.messages[0]["content"]
    assert text.index("user: Where?") < text.index("here") < text.index("there")
    assert CRITERION in text
    assert asked.sampling.grammar == Grammar("regex", "[AB]")
    assert (asked.sampling.max_tokens, asked.sampling.temperature, asked.top_logprobs) == (1, 0, 20)
    asked = comparison_request(GenerationRequest(prompt="Once", priority=3), "here", "there", criterion="longer")
    assert asked.messages is None
    assert asked.prompt.startswith("[Text]\nOnce")
    assert asked.prompt.endswith("Which answer is longer? It is answer (")
    assert asked.priority == 3


def test_mean_logprob_is_per_token() -> None:
    assert mean_logprob([token("a", 0.5), token("b", 0.125)]) == pytest.approx(2 * math.log(0.5))
    assert mean_logprob([]) is None


def test_mean_logprob_is_of_what_is_no_thought() -> None:
    said = [token("<think>", 0.9), token("x", 0.9), token("</think>", 0.9), token(" yes", 0.25)]
    assert mean_logprob(said) == pytest.approx(math.log(0.25))
    assert mean_logprob(said[:2]) is None


def test_a_judge_does_not_read_what_was_thought_before() -> None:
    messages = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>hm</think>Hello"})
    asked = comparison_request(GenerationRequest(messages=messages), "a", "b", criterion=CRITERION)
    assert "assistant: Hello\n" in asked.messages[0]["content"]
