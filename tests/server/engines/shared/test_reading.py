"""What a request asks members to read, and what is refused before it is queued."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from ensemble_server.ensembles.base import GenerationRequest, Sampling
from ensemble_server.ensembles.errors import ContextLengthError, RequestError, UnsupportedError
from ensemble_server.server.engines.shared.reading import Reading, RequestReader
from ensemble_server.server.weights.view import Surface

HI = ({"role": "user", "content": "Hi"},)


@dataclass(frozen=True)
class Member:
    name: str
    surface: Surface
    vocab_size: int = 320


def ask(*, sampling: dict[str, Any] | None = None, **changes: Any) -> GenerationRequest:
    changes = {"prompt": (5, 6, 7)} | changes
    return GenerationRequest(sampling=Sampling(**(sampling or {})), **changes)


@pytest.fixture
def member(surface: Surface) -> Member:
    return Member("a", surface)


def read(request: GenerationRequest, *members: Member, limit: int = 10, always_writes: bool = False) -> Reading:
    return RequestReader(always_writes=always_writes).read(request, members, max_model_len=limit)


def test_text_ids_and_conversations_become_token_ids(member: Member, surface: Surface) -> None:
    assert read(ask(prompt="a fox"), member).prompts == [surface.encode("a fox")]
    assert read(ask(), member, member).prompts == [[5, 6, 7]] * 2
    other = Member("b", Surface(surface.tokenizer, system_prompt="Be brief."))
    mine, theirs = read(ask(prompt=None, messages=HI), member, other, limit=500).prompts
    assert mine == surface.render(HI) and theirs == other.surface.render(HI)


def test_of_several_members_the_one_that_cannot_read_a_conversation_is_named(member: Member, surface: Surface) -> None:
    mute = Member("b", Surface(surface.tokenizer))
    mute.surface.chat_template = None
    with pytest.raises(UnsupportedError, match="member 'b' has no chat template; use /v1/completions") as refused:
        read(ask(prompt=None, messages=HI), member, mute, limit=500)
    assert refused.value.param == "messages"
    with pytest.raises(UnsupportedError, match="this model has no chat template"):
        read(ask(prompt=None, messages=HI), mute, limit=500)
    assert read(ask(), member, mute).prompts == [[5, 6, 7]] * 2


def test_truncation_keeps_the_end(member: Member) -> None:
    assert read(ask(truncate_prompt_tokens=2), member).prompts == [[6, 7]]


def test_new_tokens_are_those_asked_for_as_far_as_there_is_room(member: Member) -> None:
    assert read(ask(), member).max_new_tokens == 7
    assert read(ask(sampling={"max_tokens": 4}), member).max_new_tokens == 4
    assert read(ask(sampling={"max_tokens": 40}), member).max_new_tokens == 7


def test_a_prompt_must_leave_room_for_a_token_unless_none_is_to_be_written(member: Member) -> None:
    with pytest.raises(ContextLengthError, match="the prompt has 3 tokens; this model's context holds 3") as refused:
        read(ask(), member, limit=3)
    assert refused.value.param == "prompt"
    scored = ask(sampling={"max_tokens": 0}, prompt_logprobs=0)
    assert read(scored, member, limit=3).max_new_tokens == 0
    assert read(ask(prompt_logprobs=0), member, limit=3).max_new_tokens == 0
    with pytest.raises(ContextLengthError):
        read(scored, member, limit=3, always_writes=True)
    with pytest.raises(ContextLengthError, match="context holds 2"):
        read(scored, member, limit=2)


@pytest.mark.parametrize(
    ("changes", "param", "sentence"),
    [
        ({"prompt": ()}, "prompt", "no tokens"),
        ({"prompt": (5, 320)}, "prompt", "token id 320 is outside the vocabulary of 320"),
        ({"sampling": {"logit_bias": {400: 1.0}}}, "logit_bias", "token id 400"),
        ({"sampling": {"stop": ("x" * 2000,)}}, "stop", "at most 1000 characters"),
    ],
)
def test_what_cannot_be_honoured_is_named(member: Member, changes: dict[str, Any], param: str, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence) as refused:
        read(ask(**changes), member)
    assert refused.value.param == param


def test_a_prompt_that_members_read_differently_has_no_scores(member: Member, surface: Surface) -> None:
    other = Member("b", Surface(surface.tokenizer, system_prompt="Be brief."))
    with pytest.raises(UnsupportedError, match="different views") as refused:
        read(ask(prompt=None, messages=HI, prompt_logprobs=1), member, other, limit=500)
    assert refused.value.param == "prompt_logprobs"
