"""What clients send back of earlier answers is taken, whatever became of those answers."""

from __future__ import annotations

import json

import pytest
from pydantic import TypeAdapter

from ensemble_server.server.requests.errors import BodyError, checked
from ensemble_server.server.requests.messages import MAX_MESSAGES, MAX_PARTS, Conversation, template_messages

USER = {"role": "user", "content": "hi"}


def messages(*sent):
    return template_messages(checked(TypeAdapter(Conversation), list(sent)))


def call(arguments):
    return {"id": "call_1", "type": "function", "function": {"name": "save", "arguments": arguments}}


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        ("", {}),
        ("  \n", {}),
        (None, {}),
        ("{", {}),
        ('{"te', {}),
        ('{"text":', {}),
        ('{"text": "once up', {"text": "once up"}),
        ('{"text": "a", "n": [1, 2', {"text": "a", "n": [1, 2]}),
        ('{"text": "a"}', {"text": "a"}),
        ('{"text": "a\\ud83d"}', {"text": "a\ufffd"}),
        ('{"text": "a\\ud83d', {"text": "a\ufffd"}),
    ],
)
def test_arguments_that_were_cut_off_are_read_as_far_as_they_go(sent, read):
    [said] = messages({"role": "assistant", "content": None, "tool_calls": [call(sent)]})
    arguments = said["tool_calls"][0]["function"]["arguments"]
    assert isinstance(arguments, str)
    assert json.loads(arguments) == read


@pytest.mark.parametrize("said", [{}, {"content": None}, {"content": ""}, {"content": None, "tool_calls": []}])
def test_an_assistant_may_have_said_nothing(said):
    assert messages(USER, {"role": "assistant", **said})[1] == {"role": "assistant", "content": ""}


@pytest.mark.parametrize(
    "sent",
    [
        [USER] * (MAX_MESSAGES + 1),
        [{"role": "user", "content": [{"type": "text", "text": "a"}] * (MAX_PARTS + 1)}],
        [{"role": "x"}] * MAX_MESSAGES,
        [{"role": "user", "content": [{"type": "text"}] * MAX_PARTS}] * 100,
    ],
    ids=["many messages", "many parts", "wrong messages", "wrong parts"],
)
def test_lists_are_bounded_and_the_first_wrong_item_ends_the_check(sent):
    with pytest.raises(BodyError) as refused:
        messages(*sent)
    assert ";" not in str(refused.value)
