from __future__ import annotations

from typing import Any

import pytest

from ensemble_server.server.batch.results.candidates import BatchLine, Candidates, grouped


def line(custom_id: str | None, *texts: str | None, error: str | None = None, **more: Any) -> dict[str, Any]:
    choices = [{"index": index, "message": {"role": "assistant", "content": text}} for index, text in enumerate(texts)]
    response = {"status_code": 200, "body": {"model": "mix", "choices": choices}} if texts else None
    return {"custom_id": custom_id, "response": response, "error": error and {"message": error, "code": "x"}} | more


def groups_of(*values: dict[str, Any]) -> list[Candidates]:
    return grouped((number, BatchLine.model_validate(value)) for number, value in enumerate(values, start=1))


def test_samples_and_cells_of_one_id_are_candidates_of_one_row() -> None:
    first, second = groups_of(
        line("a", "x", "y", cell={"model": "mix", "temperature": 0.2}),
        line("b", "z"),
        line("a", "w", cell={"model": "mix", "temperature": 0.7}),
    )
    assert (first.custom_id, first.line, first.texts) == ("a", 1, ["x", "y", "w"])
    assert first.systems == ["mix temperature=0.2", "mix temperature=0.2", "mix temperature=0.7"]
    assert (second.custom_id, second.texts, second.systems) == ("b", ["z"], ["mix"])


def test_failed_rows_give_no_candidate_and_say_why() -> None:
    refused = line("a") | {"response": {"status_code": 400, "body": {"error": {"message": "too long"}}}}
    first, second = groups_of(refused, line("b", error="bad row"), line("a", "x"))
    assert (first.texts, first.failure) == (["x"], "too long")
    assert (second.texts, second.failure) == ([], "bad row")


def test_completions_and_answers_without_text_are_read() -> None:
    completion = {"custom_id": "c", "response": {"body": {"choices": [{"text": "t"}]}}, "error": None}
    first, second, third = groups_of(completion, line("d", None), line(None, "x"))
    assert (first.texts, first.systems) == (["t"], [None])
    assert second.texts == [""]
    assert third.custom_id == 3


@pytest.mark.parametrize("value", [{"id": 1, "candidates": ["a"]}, {"custom_id": "a", "body": {}}, ["custom_id"], 5])
def test_other_lines_are_told_apart(value: Any) -> None:
    assert not BatchLine.is_one(value)
