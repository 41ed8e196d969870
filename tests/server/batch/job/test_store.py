"""The durable side of a job: what is recorded stays, what has changed is refused, one process at a time."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from ensemble_server.ensembles.base import MemberUsage
from ensemble_server.ensembles.errors import ConfigError, StorageError
from ensemble_server.server.batch.job.identity import Identity
from ensemble_server.server.batch.job.row_columns import row_columns
from ensemble_server.server.batch.job.rows import BadRow, Row, RowResult
from ensemble_server.server.batch.job.store import Counts, JobStore, job_path

ERROR = {"message": "no", "type": "invalid_request_error", "param": None, "code": "invalid_value"}


def row(index: int, **body: object) -> Row:
    return Row(index, f"r{index}", "/v1/completions", {"model": "m", "prompt": f"p{index}"} | body)


def ok(text: str, **changes: object) -> RowResult:
    used = {"m": MemberUsage(3, 2, cost=0.5)}
    return replace(RowResult(200, "req-1", {"text": text}, used), **changes)


FAILED = RowResult(500, "req-2", {"error": ERROR | {"code": "member_failed"}})
ROWS = [row(0), row(1), BadRow(2, None, 7, ERROR), row(3)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return job_path(tmp_path / "answers.jsonl")


@pytest.fixture
def store(path: Path) -> Iterator[JobStore]:
    with JobStore.open(path, Identity()) as store:
        store.take_rows(ROWS)
        yield store


def test_the_job_lies_beside_the_output(tmp_path: Path) -> None:
    assert job_path(tmp_path / "a.jsonl") == tmp_path / "a.jsonl.job"


# --- rows and results ---


def test_rows_come_back_in_their_order_with_what_became_of_them(store: JobStore) -> None:
    store.record([(3, ok("three")), (0, FAILED)])
    assert [(stored.row, stored.result) for stored in store.rows()] == [
        (ROWS[0], FAILED),
        (ROWS[1], None),
        (ROWS[2], None),
        (ROWS[3], ok("three")),
    ]


def test_pending_are_rows_that_can_run_and_have_no_result(store: JobStore) -> None:
    assert store.pending() == [ROWS[0], ROWS[1], ROWS[3]]
    store.record([(1, ok("one"))])
    assert store.pending() == [ROWS[0], ROWS[3]]
    assert store.pending(after=0) == [ROWS[3]]
    assert store.pending(limit=1) == [ROWS[0]]


def test_counts_follow_every_record_and_a_reopening(path: Path, store: JobStore) -> None:
    assert store.counts() == Counts(total=4, ok=0, failed=1, cut=0)
    store.record([(0, ok("zero")), (1, FAILED), (3, ok("three", is_cut=True))])
    assert store.counts() == Counts(total=4, ok=2, failed=2, cut=1)
    assert store.counts().pending == 0
    store.close()
    with JobStore.open(path, Identity()) as again:
        assert again.counts() == Counts(total=4, ok=2, failed=2, cut=1)


def test_a_row_is_never_recorded_twice(store: JobStore) -> None:
    store.record([(0, ok("first"))])
    with pytest.raises(AssertionError, match="row 0 has a result already"):
        store.record([(1, ok("one")), (0, ok("second"))])
    assert store.counts().ok == 1, "the whole group is left out"
    assert next(store.rows()).result == ok("first")


def test_an_answer_that_a_deadline_cut_gives_way_to_a_better_one(store: JobStore) -> None:
    store.record([(0, ok("ha", is_cut=True))])
    assert store.pending() == [ROWS[1], ROWS[3]]
    assert store.pending(has_cut=True) == [ROWS[0], ROWS[1], ROWS[3]]
    store.record([(0, ok("half"))])
    assert store.counts() == Counts(total=4, ok=1, failed=1, cut=0)
    assert next(store.rows()).result == ok("half")


def test_spending_adds_up_over_results_and_runs(path: Path, store: JobStore) -> None:
    store.record([(0, ok("zero"))])
    store.close()
    with JobStore.open(path, Identity()) as again:
        again.record([(1, ok("one", usage={"m": MemberUsage(1, 1), "judge": MemberUsage(5, 1)}))])
        assert again.spent() == {"judge": MemberUsage(5, 1), "m": MemberUsage(4, 3, cost=0.5)}


def test_failed_rows_are_forgotten_but_not_bad_ones(store: JobStore) -> None:
    store.record([(0, FAILED), (1, ok("one"))])
    assert store.forget_errors() == 1
    assert store.pending() == [ROWS[0], ROWS[3]]
    assert store.counts() == Counts(total=4, ok=1, failed=1, cut=0)


def test_a_body_that_is_not_json_makes_a_bad_row(path: Path) -> None:
    strange = [row(0, temperature=float("nan")), row(1, prompt="\ud800"), row(2, logit_bias={"1": object()})]
    with JobStore.open(path, Identity()) as store:
        store.take_rows(strange)
        assert store.pending() == []
        found = [stored.row for stored in store.rows()]
        assert all(isinstance(bad, BadRow) and "not JSON" in bad.error["message"] for bad in found)
        store.take_rows(strange)  # and they are the same rows the next time


# --- rows that share an answer ---


def test_equal_rows_that_must_have_equal_answers_are_run_once(path: Path) -> None:
    rows = [row(index, prompt="same", temperature=0) for index in range(3)]
    rows += [row(3, prompt="other", temperature=0), row(4, prompt="same"), row(5, prompt="same", temperature=0)]
    rows += [row(6, prompt="same", seed=1), row(7, prompt="same", seed=1), row(8, prompt="same", temperature=True)]
    with JobStore.open(path, Identity()) as store:
        store.take_rows(rows)
        assert [one.index for one in store.pending()] == [0, 3, 4, 6, 8]
        assert store.num_to_run() == 5
        store.record([(0, ok("zero")), (6, FAILED)])
        assert store.counts() == Counts(total=9, ok=4, failed=2, cut=0)
        assert store.spent() == {"m": MemberUsage(3, 2, cost=0.5)}, "the work was done once"
        texts = [stored.result and stored.result.body.get("text") for stored in store.rows()]
        assert texts == ["zero", "zero", "zero", None, None, "zero", None, None, None]
        assert store.forget_errors() == 2


def test_the_order_of_keys_is_part_of_what_is_asked(path: Path) -> None:
    schema = {"a": 1, "b": 2}
    turned = {"b": 2, "a": 1}
    with JobStore.open(path, Identity()) as store:
        store.take_rows([row(0, prompt="", seed=1, x=schema), row(1, prompt="", seed=1, x=turned)])
        assert store.num_to_run() == 2


# --- what makes a job the same job ---


def reopened(path: Path, identity: Identity, rows: list[Row | BadRow] = ROWS) -> None:
    with JobStore.open(path, identity) as store:
        store.take_rows(rows)


@pytest.mark.parametrize(
    ("identity", "message"),
    [
        (Identity({"--template": "{{ b }}"}), r"--template was '\{\{ a \}\}', is now '\{\{ b \}\}'"),
        (Identity(), r"--template was '\{\{ a \}\}', is now not given"),
        (Identity({"--template": "{{ a }}", "--samples": "8"}), "--samples was not given, is now '8'"),
        (Identity({"--template": "{{ a }}"}, seed=1), "the job's seed was '0', is now '1'"),
    ],
)
def test_other_options_are_refused_by_name(path: Path, identity: Identity, message: str) -> None:
    reopened(path, Identity({"--template": "{{ a }}"}))
    with pytest.raises(ConfigError, match=message):
        JobStore.open(path, identity)
    reopened(path, Identity({"--template": "{{ a }}"}))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*ROWS[:3]], "the input had 4 rows, and now has 3"),
        ([*ROWS, row(4)], "the input had 4 rows, and now has more"),
        ([replace(ROWS[0], custom_id="x"), *ROWS[1:]], "row 1 was 'r0', is now 'x'"),
        ([ROWS[0], row(1, prompt="q", n=2), *ROWS[2:]], r"row 2 \('r1'\) has another prompt and n"),
        ([ROWS[0], replace(ROWS[1], url="/v1/embeddings"), *ROWS[2:]], "is now sent to /v1/embeddings"),
        ([ROWS[0], replace(ROWS[1], body={"prompt": "p1", "model": "m"}), *ROWS[2:]], "keys in another order"),
        ([*ROWS[:2], BadRow(2, None, 8, ERROR), ROWS[3]], "row 3 .* is not what it was"),
    ],
)
def test_another_input_is_refused_with_the_first_row_that_differs(
    path: Path, rows: list[Row | BadRow], message: str
) -> None:
    reopened(path, Identity())
    with JobStore.open(path, Identity()) as store, pytest.raises(ConfigError, match=message):
        store.take_rows(rows)


def test_other_models_are_refused_by_name_and_new_ones_are_welcome(store: JobStore) -> None:
    assert store.model_names() == {"m"}
    store.bind_models({"m": "fp_1"})
    store.bind_models({"m": "fp_1", "new": "fp_2"})
    with pytest.raises(ConfigError, match="model 'm' is not what it was"):
        store.bind_models({"m": "fp_9", "new": "fp_2"})
    with pytest.raises(ConfigError, match="model 'new' is no longer in the config"):
        store.bind_models({"m": "fp_1"})


def test_rows_that_name_no_model_are_counted_as_such(path: Path) -> None:
    with JobStore.open(path, Identity()) as store:
        store.take_rows([Row(0, "a", "/v1/completions", {"prompt": "x"}), row(1, model=7)])
        assert store.model_names() == {None}


def extended(store: JobStore, *rows: Row | BadRow) -> Counts:
    store.extend([replace(row, index=index) for index, row in enumerate(rows)], Identity(), may_change=())
    return store.counts()


def test_an_extended_job_keeps_what_has_not_changed_wherever_it_stands(store: JobStore) -> None:
    store.record([(0, ok("zero"))])
    store.record([(1, ok("one"))])
    store.record([(3, FAILED)])
    changed = replace(ROWS[1], body={"model": "m", "prompt": "other"})
    assert extended(store, ROWS[3], row(9), changed, ROWS[0]) == Counts(4, ok=1, failed=1)
    assert [stored.result for stored in store.rows()] == [FAILED, None, None, ok("zero")]
    assert store.num_let_go == 1


def test_rows_with_one_id_and_one_body_share_the_answer_of_the_row_before(store: JobStore) -> None:
    store.record([(0, ok("zero"))])
    assert extended(store, ROWS[0], ROWS[1], ROWS[0]).ok == 2


def test_an_input_of_which_nothing_was_answered_does_not_cost_the_answers(store: JobStore) -> None:
    store.record([(0, ok("zero"))])
    with pytest.raises(ConfigError, match="none of the 1 answers"):
        extended(store, row(7), row(8))
    assert [stored.row for stored in store.rows()] == ROWS
    assert store.counts() == Counts(4, ok=1, failed=1)


def test_rows_that_all_failed_may_all_be_changed(store: JobStore) -> None:
    for index in (0, 1, 3):
        store.record([(index, FAILED)])
    assert extended(store, row(7), row(8)) == Counts(2)


def test_a_model_that_no_row_names_any_more_does_not_bind_the_job(store: JobStore) -> None:
    other = replace(row(5), body={"model": "n", "prompt": "x"})
    extended(store, ROWS[0], other)
    store.bind_models({"m": "fp_1", "n": "fp_2"})
    store.record([(0, ok("zero"))])
    extended(store, ROWS[0])
    store.bind_models({"m": "fp_1"})
    assert store.models() == {"m": "fp_1"}


def test_an_import_that_was_interrupted_begins_anew(path: Path) -> None:
    def torn() -> Iterator[Row]:
        yield from (row(index) for index in range(600))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), JobStore.open(path, Identity()) as store:
        store.take_rows(torn())
    with JobStore.open(path, Identity()) as store:
        assert not store.is_complete
        store.take_rows(ROWS)
        assert store.is_complete
        assert [stored.row for stored in store.rows()] == ROWS


# --- files that cannot be used ---

HOLD = """
import sys
from pathlib import Path
from ensemble_server.server.batch.job.identity import Identity
from ensemble_server.server.batch.job.store import JobStore
store = JobStore.open(Path(sys.argv[1]), Identity())
print("open", flush=True)
sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_is_gone(path: Path) -> None:
    reopened(path, Identity())
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "open\n"
        with pytest.raises(ConfigError, match="another process is working on this job"):
            JobStore.open(path, Identity())
        os.kill(other.pid, signal.SIGKILL)
    reopened(path, Identity())


def test_one_process_cannot_open_a_job_twice(path: Path, store: JobStore) -> None:
    with pytest.raises(ConfigError, match="another process is working on this job"):
        JobStore.open(path, Identity())
    store.record([(0, ok("still ours"))])


def test_a_full_disk_is_told_and_loses_nothing(path: Path) -> None:
    with JobStore.open(path, Identity()) as store:
        store.take_rows(ROWS)
        store.record([(0, ok("zero"))])
        with store._file.reading() as db:
            db.execute("PRAGMA max_page_count = 1")  # what SQLite does at ENOSPC, without a disk to fill
        with pytest.raises(StorageError, match=r"the disk is full; what was recorded is kept"):
            store.record([(1, ok("x" * 100_000))])
        assert store.counts().ok == 1
    with JobStore.open(path, Identity()) as store:
        store.record([(1, ok("x" * 100_000))])
        assert store.counts().ok == 2


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be read or written"):
        JobStore.open(tmp_path / "nowhere" / "a.job", Identity())


def test_a_folder_in_the_place_of_the_job_is_told(path: Path) -> None:
    path.mkdir()
    with pytest.raises(StorageError, match="cannot be read or written"):
        JobStore.open(path, Identity())


def test_a_file_that_is_no_job_is_left_alone(path: Path) -> None:
    path.write_bytes(b"my novel, chapter one" * 100)
    with pytest.raises(ConfigError, match="is not the file of a batch job"):
        JobStore.open(path, Identity())
    assert path.read_bytes() == b"my novel, chapter one" * 100


def test_other_peoples_databases_are_left_alone(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE mine (x)")
    with pytest.raises(ConfigError, match="is not the file of a batch job"):
        JobStore.open(path, Identity())


def test_a_job_of_a_later_version_is_refused(path: Path) -> None:
    reopened(path, Identity())
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match="is a job of version 99"):
        JobStore.open(path, Identity())


def test_a_damaged_file_is_told(path: Path) -> None:
    with JobStore.open(path, Identity()) as store:
        store.take_rows(row(index, prompt="x" * 3000) for index in range(50))
    content = bytearray(path.read_bytes())
    content[8192 : len(content) - 8192] = b"\xff" * (len(content) - 16384)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"is damaged .* \.recover"), JobStore.open(path, Identity()) as store:
        list(store.rows())


# --- size ---


def test_no_step_of_a_run_reads_the_whole_table(path: Path) -> None:
    with JobStore.open(path, Identity()) as store:
        store.take_rows(row(index, temperature=0, prompt=index % 7) for index in range(20))
        statements: list[str] = []
        with store._file.reading() as db:
            db.set_trace_callback(statements.append)
        store.record([(store.pending(after=2, limit=3)[0].index, ok("a"))])
        store._insert([row_columns(row(20, temperature=0, prompt=3))])
        next(store.rows())
        with store._file.reading() as db:
            db.set_trace_callback(None)
            queries = [sql for sql in statements if sql.startswith(("SELECT", "INSERT"))]
            plans = {sql: [step[3] for step in db.execute(f"EXPLAIN QUERY PLAN {sql}")] for sql in queries}
    assert len(plans) >= 6
    assert not [(sql, plan) for sql, plan in plans.items() if any("SCAN" in step for step in plan)]


def test_memory_does_not_grow_with_the_rows(path: Path) -> None:
    def peak(num_rows: int, at: Path) -> int:
        tracemalloc.start()
        with JobStore.open(at, Identity()) as store:
            store.take_rows(row(index, prompt="x" * 500) for index in range(num_rows))
            for one in (stored for stored in store.rows() if stored.row.index % 10 == 0):
                store.record([(one.row.index, ok("y" * 100))])
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    few, many = peak(600, path), peak(3000, path.with_name("b.job"))
    assert many < 1.3 * few, (few, many)
