from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.batch.results.columns import Column, parse_columns
from ensemble_server.server.batch.results.submission import SampleSubmission, write_table


def line(custom_id: str, *texts: str | None, error: str | None = None) -> dict[str, Any]:
    body = {"choices": [{"message": {"content": text}, "finish_reason": "stop"} for text in texts]}
    return {
        "custom_id": custom_id,
        "response": {"status_code": 200, "body": body} if texts else None,
        "error": None if error is None else {"message": error},
    }


def table(lines: Sequence[dict[str, Any]], columns: str, **changes: Any) -> tuple[str, Any]:
    file = io.BytesIO()
    report = write_table(lines, parse_columns(columns), file, **changes)
    return file.getvalue().decode(), report


def sample(tmp_path: Path, text: str) -> SampleSubmission:
    path = tmp_path / "sample.csv"
    path.write_text(text, encoding="utf-8")
    return SampleSubmission.read(path)


def test_a_table_has_a_row_for_each_line() -> None:
    written, report = table([line("a", 'x, "y"\nz'), line("b", "ü", "v")], "id=custom_id,prediction=content")
    assert written == 'id,prediction\na,"x, ""y""\nz"\nb,ü\n'
    assert (report.num_rows, report.num_filled, report.absent) == (2, 0, ())


def test_with_the_column_sample_each_choice_has_a_row() -> None:
    written, report = table([line("a", "x", "y"), line("b", error="no")], "custom_id,sample,content")
    assert written == "custom_id,sample,content\na,0,x\na,1,y\nb,0,\n"
    assert report.num_rows == 3


def test_answers_that_are_missing_or_blank_take_the_fallback_and_are_counted() -> None:
    lines = [line("a", "4"), line("b", error="no"), line("c", None), line("d", " "), line("e", "no number")]
    written, report = table(lines, "custom_id,content|number,finish_reason,error", fallback="0")
    assert written.splitlines()[1:] == ["a,4,stop,", "b,0,,no", "c,0,stop,", "d,0,stop,", "e,0,stop,"]
    assert report.num_filled == 4
    written, report = table(lines[:2], "custom_id,content")
    assert written.splitlines()[1:] == ["a,4", "b,"]
    assert report.num_filled == 1


def test_a_column_that_no_row_has_is_reported() -> None:
    _, report = table([line("a", "x")], "custom_id,usage.tokens,content")
    assert report.absent == (Column("usage.tokens", "usage.tokens"),)


def test_ids_that_match_the_sample_submission_pass(tmp_path: Path) -> None:
    sample(tmp_path, "id,prediction\na,0\nb,0\n").check_ids(lambda: ["a", "b"])


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (["a", "b"], ["it has 3 rows, this job 2", "row 3 is 'c' there and the end here", "missing here: 'c'"]),
        (["a", "b", "c", "d"], ["it has 3 rows, this job 4", "the end there and 'd' here", "not in it: 'd'"]),
        (["a", "c", "b"], ["row 2 is 'b' there and 'c' here", "the same in another order; sort the input"]),
        (["a", "x", "c"], ["missing here: 'b'", "not in it: 'x'"]),
        (["a", "b", "c", None], ["a row without an id"]),
        (["a", "b", "c", "c"], ["it has 3 rows, this job 4"]),
        ([], ["it has 3 rows, this job 0"]),
    ],
)
def test_ids_that_do_not_match_are_told_apart(tmp_path: Path, ids: list[str | None], said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        sample(tmp_path, "id,prediction\na,0\nb,0\nc,0\n").check_ids(lambda: ids)
    for part in said:
        assert part in str(caught.value)


def test_many_wrong_ids_make_a_short_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        sample(tmp_path, "id,p\n" + "".join(f"{n},0\n" for n in range(1000))).check_ids(lambda: ["x"])
    assert "and 997 more" in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("columns", "error"),
    [
        ("id=custom_id,answer=content", "has the columns id, prediction in this order, got id, answer"),
        ("prediction=content,id=custom_id", "has the columns id, prediction in this order"),
        ("id=content,prediction=content", "write id=custom_id"),
        ("id=custom_id,prediction=sample", "with `sample` an id has several rows"),
    ],
)
def test_columns_must_be_those_of_the_sample(tmp_path: Path, columns: str, error: str) -> None:
    given = sample(tmp_path, "id,prediction\na,0\n")
    given.check_columns(parse_columns("id=custom_id,prediction=content|number"))
    with pytest.raises(ConfigError) as caught:
        given.check_columns(parse_columns(columns))
    assert error in str(caught.value)


def test_a_sample_of_two_columns_says_what_goes_into_them(tmp_path: Path) -> None:
    assert sample(tmp_path, "key,target\na,0\n").columns() == (Column("key", "custom_id"), Column("target", "content"))
    with pytest.raises(ConfigError, match="say with --columns"):
        sample(tmp_path, "key,a,b\n1,0,0\n").columns()


@pytest.mark.parametrize(
    ("text", "error"), [("id,p\n", "has no rows"), ("id,p\na,0\na,0\n", "'a' stands there twice"), ("", "header|names")]
)
def test_a_sample_that_is_none_is_refused(tmp_path: Path, text: str, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        sample(tmp_path, text)
