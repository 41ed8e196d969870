"""vLLM's tokens become the same text, ends and reports as the embedded engine's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from ensemble_server.ensembles.base import Delta, GenerationRequest, MemberToken, Sampling
from ensemble_server.ensembles.errors import MemberError
from ensemble_server.server.engines.vllm_engine.choice import VllmChoice, describe_prompt
from ensemble_server.server.weights.view import Surface
from tests.conftest import make_tokenizer
from tests.server.engines.vllm_engine.outputs import completion, logprob

EOS = 2


@pytest.fixture(scope="module")
def surface(tmp_path_factory: pytest.TempPathFactory) -> Surface:
    from transformers import AutoTokenizer

    folder: Path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return Surface(AutoTokenizer.from_pretrained(folder))


def choice_of(
    surface: Surface, *, top_logprobs: int | None = None, max_new_tokens: int = 20, **sampling: Any
) -> VllmChoice:
    request = GenerationRequest(prompt="x", sampling=Sampling(**sampling), top_logprobs=top_logprobs)
    return VllmChoice(
        0,
        request,
        surface,
        member="a",
        max_new_tokens=max_new_tokens,
        eos_ids=frozenset({EOS}),
        explained_as="a" if top_logprobs else None,
    )


def read_all(choice: VllmChoice, *outputs: Any) -> list[Delta]:
    return [delta for output in outputs if (delta := choice.read(output)) is not None]


def test_text_is_that_of_the_tokens_and_characters_stay_whole(surface: Surface) -> None:
    ids = surface.encode("fox 😀!")
    choice = choice_of(surface)
    deltas = read_all(choice, *(completion([token_id]) for token_id in ids))
    assert "".join(delta.text for delta in deltas) == "fox 😀!"
    assert [token_id for delta in deltas for token_id in delta.token_ids] == ids
    assert not choice.is_finished


def test_an_end_of_text_is_counted_but_not_shown(surface: Surface) -> None:
    choice = choice_of(surface)
    [delta] = read_all(choice, completion([*surface.encode("fox"), EOS], finish_reason="stop"))
    assert (delta.text, delta.finish_reason, delta.stop_reason) == ("fox", "stop", None)
    assert EOS not in delta.token_ids
    assert choice.num_generated == len(delta.token_ids) + 1


def test_ignored_ends_of_text_are_text(surface: Surface) -> None:
    [delta] = read_all(choice_of(surface, ignore_eos=True, skip_special_tokens=False), completion([EOS]))
    assert (delta.text, delta.finish_reason) == ("<|im_end|>", None)


def test_stop_tokens_are_named(surface: Surface) -> None:
    [delta] = read_all(choice_of(surface, stop_token_ids=(40,)), completion([40], finish_reason="stop"))
    assert (delta.token_ids, delta.finish_reason, delta.stop_reason) == ((), "stop", 40)


def test_a_stop_string_ends_the_choice_though_vllm_goes_on(surface: Surface) -> None:
    choice = choice_of(surface, stop=("jumps",))
    ids = surface.encode("The fox jumps over the dog")
    deltas = read_all(choice, *(completion([token_id]) for token_id in ids))
    assert "".join(delta.text for delta in deltas) == "The fox "
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == ("stop", "jumps")
    assert choice.is_finished and choice.num_generated < len(ids)


def test_several_tokens_at_once_stop_at_the_stop_string(surface: Surface) -> None:
    """As they come when the client is slow, or with speculative decoding."""
    choice = choice_of(surface, stop=("jumps",), include_stop_str_in_output=True)
    [delta] = read_all(choice, completion(surface.encode("The fox jumps over the dog")))
    assert (delta.text, delta.stop_reason) == ("The fox jumps", "jumps")


def test_stop_strings_wait_for_min_tokens(surface: Surface) -> None:
    ids = surface.encode("a a a a")
    choice = choice_of(surface, stop=("a",), min_tokens=len(ids))
    deltas = read_all(choice, *(completion([token_id]) for token_id in ids))
    assert deltas[-1].stop_reason == "a" and choice.num_generated == len(ids)


def test_the_length_ends_it_and_what_was_held_back_comes(surface: Surface) -> None:
    ids = surface.encode("fox jum")
    choice = choice_of(surface, stop=("jumps",), max_new_tokens=len(ids))
    deltas = read_all(choice, *(completion([token_id]) for token_id in ids))
    assert "".join(delta.text for delta in deltas) == "fox jum"
    assert deltas[-1].finish_reason == "length"


def test_an_end_that_only_vllm_knows_of_is_an_end(surface: Surface) -> None:
    [delta] = read_all(choice_of(surface), completion([], finish_reason="length"))
    assert delta.finish_reason == "length"


def test_a_generation_that_vllm_gave_up_is_the_members_error(surface: Surface) -> None:
    with pytest.raises(MemberError, match=r"member 'a': vLLM ended the generation \(error\)"):
        choice_of(surface).read(completion([], finish_reason="error"))


def test_an_expired_choice_shows_what_it_held_back(surface: Surface) -> None:
    choice = choice_of(surface, stop=("fox!",))
    read_all(choice, completion(surface.encode("fox")))
    delta = choice.expire()
    assert (delta.text[-2:], delta.finish_reason, delta.stop_reason) == ("ox", "length", "deadline")


def test_logprobs_are_vllms_best_first_and_as_many_as_asked_for(surface: Surface) -> None:
    known = {40: logprob(-3.0, 7), 50: logprob(-0.5, 1), 60: logprob(-1.5, 2)}
    [delta] = read_all(choice_of(surface, top_logprobs=2), completion([40], logprobs=[known]))
    [token] = delta.tokens
    assert (token.token_id, token.logprob) == (40, -3.0)
    assert [(top.token_id, top.logprob) for top in token.top] == [(50, -0.5), (60, -1.5)]
    assert token.bytes == surface.bytes_of(40)
    assert token.members == {"a": MemberToken(-3.0, 1.0)}


def test_a_prompts_first_token_has_no_logprob(surface: Surface) -> None:
    ids = surface.encode("The fox")
    known = [None, *({token_id: logprob(-float(place), 1)} for place, token_id in enumerate(ids[1:], start=1))]
    tokens = describe_prompt(surface, ids, known, 0)
    assert [token.token_id for token in tokens] == ids
    assert tokens[0].logprob is None
    assert math.isclose(tokens[1].logprob, -1.0) and tokens[1].top == ()
