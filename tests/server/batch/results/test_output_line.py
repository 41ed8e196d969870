"""OpenAI's output lines, and files that are there as a whole or not at all."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from ensemble_server.ensembles.errors import StorageError
from ensemble_server.server.batch.job.rows import BadRow, Row, RowResult
from ensemble_server.server.batch.job.store import JobStore, StoredRow
from ensemble_server.server.batch.results.output_line import output_line, whole_file, write_output

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


# --- whole files ---


def test_a_file_appears_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with whole_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["out"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o600 == 0o600


def test_a_file_that_failed_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out"]


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "out"
    link.symlink_to(tmp_path / "real" / "out")
    with whole_file(link) as file:
        file.write(b"new")
    assert link.is_symlink() and (tmp_path / "real" / "out").read_bytes() == b"new"


def test_a_pipe_takes_what_comes(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", tmp_path / "pipe"], stdout=subprocess.PIPE) as reader:
        with whole_file(tmp_path / "pipe") as file:
            file.write(b"through")
        assert reader.stdout.read() == b"through"
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.parametrize("path", ["nowhere/out", "."])
def test_a_place_that_takes_no_file_is_told(tmp_path: Path, path: str) -> None:
    with pytest.raises(StorageError, match="cannot be written"), whole_file(tmp_path / path) as file:
        file.write(b"new")


WRITE = """
import resource, signal, sys
from pathlib import Path
from ensemble_server.ensembles.errors import StorageError
from ensemble_server.server.batch.results.output_line import whole_file
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with whole_file(Path(sys.argv[1])) as file:
        for _ in range(100):
            file.write(b"x" * 100_000)
except StorageError as exc:
    print(exc)
"""


def test_a_disk_that_takes_no_more_is_told_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    ended = subprocess.run([sys.executable, "-c", WRITE, path], capture_output=True, text=True, check=True)
    assert "what was there before is unchanged" in ended.stdout
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["out"]
