from __future__ import annotations

import pytest

from ensemble_server.ensembles.errors import RequestError
from ensemble_server.server.requests.messages import MAX_MESSAGES, template_messages
from ensemble_server.server.requests.turns import Turns, renamed


def shown(turns: Turns) -> list[dict]:
    return [dict(message) for message in template_messages(turns.messages)]


def test_system_texts_at_the_head_are_one_and_later_ones_stay() -> None:
    turns = Turns()
    turns.system("A")
    turns.system("B")
    turns.user("?")
    turns.system("C")
    assert [(message["role"], message["content"]) for message in shown(turns)] == [
        *(("system", "A\n\nB"), ("user", "?")),
        ("system", "C"),
    ]


def test_what_is_said_and_called_without_a_break_is_one_message() -> None:
    turns = Turns()
    turns.call("input[0]", "1", "f", "{}")
    turns.assistant("Said.")
    turns.call("input[2]", "2", "g", '{"x": 1')
    turns.result("1", "one")
    turns.assistant("A")
    turns.assistant("B")
    first, result, *said = shown(turns)
    assert (first["content"], [call["id"] for call in first["tool_calls"]]) == ("Said.", ["1", "2"])
    assert first["tool_calls"][1]["function"]["arguments"] == '{"x": 1}'
    assert (result["role"], [message["content"] for message in said]) == ("tool", ["A", "B"])


def test_a_conversation_has_a_bound() -> None:
    turns = Turns()
    turns.messages = turns.messages + [None] * MAX_MESSAGES  # type: ignore[list-item]
    with pytest.raises(RequestError, match=str(MAX_MESSAGES)):
        turns.user("one more")


@pytest.mark.parametrize(
    ("param", "message", "expected"),
    [
        ("messages", "messages: too long", ("input", "input: too long")),
        ("messages[3].content", "must be text", ("input", "must be text")),
        ("messages_per_day", "too many", ("messages_per_day", "too many")),
        (None, "wrong", (None, "wrong")),
    ],
)
def test_errors_are_told_in_the_clients_words(param: str | None, message: str, expected: tuple) -> None:
    with pytest.raises(RequestError) as caught, renamed({"messages": "input"}):
        raise RequestError(message, param=param)
    assert (caught.value.param, str(caught.value)) == expected
