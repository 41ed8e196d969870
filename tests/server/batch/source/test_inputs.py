from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.batch.job.rows import BadRow, Row
from ensemble_server.server.batch.source.grid import Grid
from ensemble_server.server.batch.source.inputs import Recipe, read_rows
from ensemble_server.server.batch.source.records import BadRecord, Record
from ensemble_server.server.batch.source.template import PromptTemplate

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Hi"}]


def rows_of(*values: Mapping[str, Any] | BadRecord, recipe: Recipe | None = None) -> list[Row | BadRow]:
    records = [one if isinstance(one, BadRecord) else Record(line, one) for line, one in enumerate(values, start=1)]
    return list(read_rows(records, recipe or Recipe()))


def line(custom_id: Any = "a", **changes: Any) -> dict[str, Any]:
    whole = {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": {"messages": MESSAGES}} | changes
    return {key: value for key, value in whole.items() if value is not ...}


def test_a_line_of_an_openai_batch_file_is_a_row_as_it_stands() -> None:
    assert rows_of(line("a"), line("b", url="/v1/completions", body={"prompt": "x", "seed": 3})) == [
        Row(0, "a", CHAT, {"messages": MESSAGES}),
        Row(1, "b", "/v1/completions", {"prompt": "x", "seed": 3}),
    ]


@pytest.mark.parametrize(
    ("bad", "error", "param"),
    [
        (line(body=...), "there is no body; rows of columns need --template", "body"),
        (line(body=[1]), "body must be an object, got list", "body"),
        (line(url="/v1/audio"), "url must be one of /v1/chat/completions, ", "url"),
        (line(url=...), "got none", "url"),
        (line(url=["x"]), "got ['x']", "url"),
        (line(method="GET"), "method must be POST, got 'GET'", "method"),
        (line(custom_di="x"), "unknown field 'custom_di'; did you mean 'custom_id'?", "custom_di"),
        (line(custom_id=1.5), "custom_id must be a text or a whole number, got 1.5", "custom_id"),
        (line(custom_id=True), "custom_id must be a text or a whole number, got True", "custom_id"),
        (BadRecord(2, "is not JSON: oh"), "is not JSON: oh", None),
    ],
)
def test_a_bad_line_is_an_error_in_its_own_row_and_the_rest_goes_on(bad: Any, error: str, param: str | None) -> None:
    before, row, after = rows_of(line("before"), bad, line("after"))
    assert isinstance(row, BadRow)
    assert (row.index, row.line) == (1, 2)
    assert row.error["message"].startswith("line 2: ")
    assert error in row.error["message"]
    assert row.error["param"] == param
    assert isinstance(before, Row)
    assert isinstance(after, Row)
    assert after.index == 2


def test_equal_ids_are_an_error_that_names_both_lines() -> None:
    first, second = rows_of(line("a"), line("a"))
    assert isinstance(first, Row)
    assert isinstance(second, BadRow)
    assert second.custom_id == "a"
    assert second.error["message"] == "line 2: custom_id 'a' stands in line 1 already; ids must differ"


@pytest.mark.parametrize(
    ("value", "custom_id"), [(7, "7"), (7.0, "7"), (None, "1"), ("", "1"), ("007", "007"), (..., "1")]
)
def test_ids_are_kept_as_text_and_missing_ones_are_the_rows_number(value: Any, custom_id: str) -> None:
    assert [row.custom_id for row in rows_of(line(value))] == [custom_id]


def test_columns_become_chats_completions_or_inputs() -> None:
    template = PromptTemplate("Q: {{ q }}")
    columns = {"id": 5, "q": "Why?", "name": "Ann"}
    system = PromptTemplate("You are {{ name }}.")
    [chat] = rows_of(columns, recipe=Recipe(template=template, system=system))
    assert chat == Row(
        0,
        "5",
        CHAT,
        {"messages": [{"role": "system", "content": "You are Ann."}, {"role": "user", "content": "Q: Why?"}]},
    )
    [completion] = rows_of(columns, recipe=Recipe(template=template, url="/v1/completions", id_column="name"))
    assert completion == Row(0, "Ann", "/v1/completions", {"prompt": "Q: Why?"})
    [embedding] = rows_of(columns, recipe=Recipe(template=template, url="/v1/embeddings"))
    assert embedding.body == {"input": "Q: Why?"}


def test_a_missing_column_is_an_error_in_the_row_that_names_it() -> None:
    recipe = Recipe(template=PromptTemplate("{{ q }}"))
    _, row = rows_of({"q": "x"}, {"id": "two", "p": "x"}, recipe=recipe)
    assert isinstance(row, BadRow)
    assert row.custom_id == "two"
    assert "no column 'q' (there are: id, p)" in row.error["message"]
    _, row = rows_of(
        {"q": "x", "key": 1}, {"q": "x"}, recipe=Recipe(template=PromptTemplate("{{ q }}"), id_column="key")
    )
    assert "no column 'key' for the id (there are: q)" in row.error["message"]


def test_defaults_fill_what_a_body_lacks_and_overrides_replace_what_it_has() -> None:
    recipe = Recipe(
        defaults={"model": "mix", "max_tokens": 16, "temperature": 0},
        overrides={"ensemble.explain": True, "ensemble.weights.a": 2, "seed": 9},
    )
    body = {"messages": MESSAGES, "temperature": 1, "seed": 1, "ensemble": {"weights": {"b": 1}}}
    [row] = rows_of(line(body=body), recipe=recipe)
    assert row.body == {
        "model": "mix",
        "max_tokens": 16,
        "temperature": 1,
        "messages": MESSAGES,
        "seed": 9,
        "ensemble": {"weights": {"b": 1, "a": 2}, "explain": True},
    }
    assert body["ensemble"] == {"weights": {"b": 1}}, "the record's own objects must not change"
    [row] = rows_of(line(url="/v1/embeddings", body={"input": "x"}), recipe=Recipe(defaults=recipe.defaults))
    assert row.body == {"model": "mix", "input": "x"}
    labelled = Recipe(defaults={**recipe.defaults, "labels": ["a", "b"]})
    [chat, classified] = rows_of(line(), line("b", url="/v1/classify", body={"prompt": "x"}), recipe=labelled)
    assert "labels" not in chat.body
    assert classified.body == {"model": "mix", "labels": ["a", "b"], "prompt": "x"}


def test_each_record_is_a_row_in_every_cell_and_a_bad_one_an_error_in_every_cell() -> None:
    grid = Grid({"temperature": (0.2, 0.7), "seed": (0, 1)})
    rows = rows_of(
        line("a"), line("b", body=...), line("c", body={"messages": MESSAGES, "seed": 5}), recipe=Recipe(grid=grid)
    )
    assert [row.index for row in rows] == list(range(12))
    assert [row.custom_id for row in rows] == ["a"] * 4 + ["b"] * 4 + ["c"] * 4
    assert all(isinstance(row, BadRow) for row in rows[4:8])
    for row in [*rows[:4], *rows[8:]]:
        assert isinstance(row, Row)
        assert row.body == {"messages": MESSAGES, **grid.cell_of(row.index)}


def test_a_system_prompt_needs_a_chat_that_a_template_makes() -> None:
    system = PromptTemplate("x")
    for recipe in ({}, {"template": system, "url": "/v1/completions"}):
        with pytest.raises(ConfigError, match="--system goes into chats"):
            Recipe(system=system, **recipe)


def test_rows_may_be_given_up_half_way_in_another_thread() -> None:
    rows = read_rows([Record(1, line("a")), Record(2, line("b"))], Recipe())
    next(rows)
    with ThreadPoolExecutor(1) as threads:
        threads.submit(rows.close).result()
