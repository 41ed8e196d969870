from __future__ import annotations

from typing import Any

import pytest

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.batch.results.columns import (
    ABSENT,
    Column,
    cell_text,
    check_batch_columns,
    num_samples,
    parse_columns,
)

CHAT: dict[str, Any] = {
    "id": "batch_req_1",
    "custom_id": "q1",
    "response": {
        "status_code": 200,
        "request_id": "r",
        "body": {
            "model": "mix",
            "choices": [
                {"message": {"content": "It is 3/4."}, "finish_reason": "stop"},
                {"message": {"content": "No idea"}, "finish_reason": "length"},
            ],
            "usage": {"completion_tokens": 5},
        },
    },
    "error": None,
    "cell": {"temperature": 0.5},
}
COMPLETION = {"custom_id": "q2", "response": {"body": {"choices": [{"text": "done"}]}}, "error": None}
FAILED = {"custom_id": "q3", "response": None, "error": {"code": "x", "message": "no such thing"}, "cell": {"seed": 1}}
VOTE = {"id": "q1", "winner": 1, "text": "So 18", "scores": [0.5, 1.0]}


@pytest.mark.parametrize(
    ("line", "source", "sample", "value"),
    [
        (CHAT, "custom_id", 0, "q1"),
        (CHAT, "content", 0, "It is 3/4."),
        (CHAT, "content", 1, "No idea"),
        (CHAT, "content", 2, ABSENT),
        (CHAT, "content|number", 0, "0.75"),
        (CHAT, "content|number", 1, None),
        (CHAT, "finish_reason", 1, "length"),
        (CHAT, "error", 0, None),
        (CHAT, "sample", 1, 1),
        (CHAT, "temperature", 0, 0.5),
        (CHAT, "seed", 0, ABSENT),
        (CHAT, "model", 0, "mix"),
        (CHAT, "usage.completion_tokens", 0, 5),
        (CHAT, "choices.1.message.content", 0, "No idea"),
        (CHAT, "choices.x", 0, ABSENT),
        (CHAT, "usage.total", 0, ABSENT),
        (CHAT, "response.status_code", 0, 200),
        (COMPLETION, "content", 0, "done"),
        (FAILED, "error", 0, "no such thing"),
        (FAILED, "content", 0, ABSENT),
        (FAILED, "seed", 0, 1),
        (VOTE, "id", 0, "q1"),
        (VOTE, "text|number", 0, "18"),
        (VOTE, "scores.1", 0, 1.0),
    ],
)
def test_a_column_finds_its_value_in_a_line(line: dict[str, Any], source: str, sample: int, value: Any) -> None:
    [column] = parse_columns(source)
    assert column.value(line, sample) == value


def test_columns_are_named_by_what_stands_before_the_equals_sign() -> None:
    assert parse_columns("id=custom_id, prediction = content|number,usage.total_tokens") == (
        Column("id", "custom_id"),
        Column("prediction", "content", "number"),
        Column("usage.total_tokens", "usage.total_tokens"),
    )


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("id=", "NAME=SOURCE"),
        ("=content", "NAME=SOURCE"),
        ("", "NAME=SOURCE"),
        ("a=content,a=error", "names must differ, got a, a"),
        ("a=content|numbr", "no such kind of answer; did you mean 'number'?"),
    ],
)
def test_what_is_no_list_of_columns_is_refused(text: str, error: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_columns(text)
    assert error in str(caught.value)


def test_a_source_that_no_answer_has_is_refused_with_the_nearest() -> None:
    check_batch_columns(parse_columns("content,usage.total_tokens,response.status_code,cell.seed,choices.0.index"))
    with pytest.raises(ConfigError, match="'contnt' is nothing that an answer has; did you mean 'content'"):
        check_batch_columns(parse_columns("contnt"))


def test_cells_are_texts() -> None:
    assert [cell_text(value) for value in (None, ABSENT, "a", 1, 0.5, True, [1, "é"])] == [
        "",
        "",
        "a",
        "1",
        "0.5",
        "true",
        '[1, "é"]',
    ]


def test_a_line_has_as_many_samples_as_choices_and_at_least_one() -> None:
    assert [num_samples(line) for line in (CHAT, COMPLETION, FAILED, VOTE)] == [2, 1, 1, 1]
