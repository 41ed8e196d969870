from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_server.server.batch.job.rows import Row
from ensemble_server.server.batch.uploads.validation import MAX_ERRORS, checked_file, rows_of

URL = "/v1/embeddings"
BODIES = st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5) | st.none(), max_size=3)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("validation") / "rows.jsonl"


def line(custom_id, body) -> bytes:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": URL, "body": body}).encode()


@settings(max_examples=30)
@given(st.dictionaries(st.text(min_size=1, max_size=8), BODIES, min_size=1, max_size=8))
def test_lines_that_are_right_become_rows_in_their_order(path, bodies):
    path.write_bytes(b"\n".join(line(*item) for item in bodies.items()))
    found = checked_file(path, URL, max_rows=8)
    assert (found.errors, found.num_rows) == ((), len(bodies))
    rows = list(rows_of(path, URL))
    assert rows == [Row(place, custom_id, URL, body) for place, (custom_id, body) in enumerate(bodies.items())]


@settings(max_examples=30)
@given(st.lists(st.binary(max_size=30) | st.just(line("a", {})), max_size=12))
def test_any_bytes_are_either_a_batch_or_have_findings_that_name_lines(path, lines):
    path.write_bytes(b"\n".join(lines))
    found = checked_file(path, URL, max_rows=10)
    num_lines = path.read_bytes().count(b"\n") + 1
    assert all(error.line is None or 1 <= error.line <= num_lines for error in found.errors)
    if not found.errors:
        assert len(list(rows_of(path, URL))) == found.num_rows > 0


def test_a_model_is_named_where_all_rows_name_the_same(path):
    for models, shared in ((["a", "a"], "a"), (["a", "b"], None), ([None, None], None), ([["a"], "a"], None)):
        path.write_bytes(b"\n".join(line(str(n), {"model": model}) for n, model in enumerate(models)))
        assert checked_file(path, URL, max_rows=9).model == shared


def test_findings_are_few_and_say_little_of_what_was_sent(path):
    path.write_bytes(b"".join(line("x" * 100_000, {}) + b"\n" for _ in range(500)))
    errors = checked_file(path, URL, max_rows=1000).errors
    assert len(errors) == MAX_ERRORS + 1
    assert sum(len(error.message) for error in errors) < 40_000
