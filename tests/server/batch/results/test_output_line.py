"""OpenAI's output lines, and files that are there as a whole or not at all."""

from __future__ import annotations

from pathlib import Path

import orjson

from ensemble_server.server.batch.job.rows import BadRow, Row, RowResult
from ensemble_server.server.batch.job.store import JobStore, StoredRow
from ensemble_server.server.batch.results.output_line import output_line, write_output

ERROR = {"message": "no", "type": "invalid_request_error", "param": None, "code": "invalid_row"}
ROW = Row(0, "a", "/v1/completions", {"prompt": "x"})
OK = RowResult(200, "req-1", {"text": "ä"})


def line(row: Row | BadRow, result: RowResult | None) -> dict:
    text = output_line(StoredRow(row, result))
    assert text.endswith(b"\n") and text.count(b"\n") == 1
    return orjson.loads(text)


# --- lines ---


def test_an_answer_is_openais_line() -> None:
    made = line(ROW, OK)
    assert list(made) == ["id", "custom_id", "response", "error"]
    assert made["id"].startswith("batch_req_")
    assert made["custom_id"] == "a"
    assert made["response"] == {"status_code": 200, "request_id": "req-1", "body": {"text": "ä"}}
    assert made["error"] is None


def test_a_failure_is_both_a_response_and_an_error() -> None:
    made = line(ROW, RowResult(500, "req-1", {"error": ERROR}))
    assert made["response"]["status_code"] == 500
    assert made["error"] == made["response"]["body"]["error"] == ERROR


def test_a_bad_row_says_on_which_line_it_stood() -> None:
    made = line(BadRow(3, None, 9, ERROR), None)
    assert (made["custom_id"], made["response"]) == (None, None)
    assert made["error"] == ERROR | {"line": 9}


def test_a_row_that_never_ran_says_so() -> None:
    made = line(ROW, None)
    assert (made["response"], made["error"]["code"]) == (None, "batch_expired")


def test_ids_differ_from_row_to_row_and_not_from_run_to_run() -> None:
    rows = [ROW, Row(1, "a", ROW.url, ROW.body), Row(0, "b", ROW.url, ROW.body)]
    ids = [line(row, OK)["id"] for row in rows]
    assert len(set(ids)) == 3
    assert ids == [line(row, None)["id"] for row in rows]


def test_the_output_is_in_the_inputs_order(store: JobStore, tmp_path: Path) -> None:
    store.take_rows(Row(index, f"r{index}", ROW.url, ROW.body) for index in range(600))
    store.record([(index, OK) for index in reversed(range(600))])
    write_output(store, tmp_path / "answers.jsonl")
    lines = (tmp_path / "answers.jsonl").read_bytes().splitlines()
    assert [orjson.loads(one)["custom_id"] for one in lines] == [f"r{index}" for index in range(600)]
