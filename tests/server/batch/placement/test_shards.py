"""Real job files and outputs, whose answers are made up; no model is needed to join them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_server.ensembles.base import MemberUsage
from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.batch.job.identity import Identity
from ensemble_server.server.batch.job.rows import BadRow, Row, RowResult
from ensemble_server.server.batch.job.store import JobStore, job_path
from ensemble_server.server.batch.placement.shards import SHARD, Shard, merge_jobs, merge_outputs
from ensemble_server.server.batch.results.output_line import write_output

BAD = {"message": "line 4: not JSON", "type": "invalid_request_error", "param": None, "code": "invalid_row"}


def rows_of(num_rows: int) -> list[Row | BadRow]:
    rows: list[Row | BadRow] = [
        Row(index, f"row {index}", "/v1/chat/completions", {"model": "base", "messages": [], "seed": index % 5})
        for index in range(num_rows)
    ]
    if num_rows > 3:
        rows[3] = BadRow(3, None, 4, BAD)
    return rows


def result_of(row: Row, *, fingerprint: str = "fp_1") -> RowResult:
    body = {"model": "base", "system_fingerprint": fingerprint, "choices": [{"text": f"answer {row.body['seed']}"}]}
    if row.body["seed"] == 4:
        return RowResult(500, "req-x", {"error": {**BAD, "code": "member_failed"}})
    return RowResult(200, "req-x", body, {"base": MemberUsage(2, 1)})


Maker = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    """make("1/2"): runs that shard of a job of 20 rows and gives its output; make() runs all of it."""
    numbers = count()

    def make(
        shard: str | None = None,
        *,
        num_rows: int = 20,
        num_answered: int = 1000,
        source: str = "sha256 1",
        fingerprint: str = "fp_1",
    ) -> Path:
        parts = {"the input": source} | ({} if shard is None else {SHARD: shard})
        output = tmp_path / f"out{next(numbers)}.jsonl"
        rows = rows_of(num_rows)
        with JobStore.open(job_path(output), Identity(parts)) as store:
            store.take_rows(rows if shard is None else Shard.parse(shard).rows(rows))
            store.bind_models({"base": fingerprint})
            pending = store.pending()[:num_answered]
            store.record([(row.index, result_of(row, fingerprint=fingerprint)) for row in pending])
            write_output(store, output)
        return output

    return make


def without_jobs(outputs: list[Path]) -> list[Path]:
    for output in outputs:
        job_path(output).unlink()
    return outputs


# --- dividing ---


@given(st.integers(0, 200), st.integers(1, 9), st.integers(1, 4))
def test_every_row_is_in_one_shard_and_cells_of_a_record_stay_together(
    num_records: int, count: int, num_cells: int
) -> None:
    indices = range(num_records * num_cells)
    shards = [
        [index for index in indices if Shard(number, count).holds(index, num_cells)] for number in range(1, count + 1)
    ]
    assert sorted(index for shard in shards for index in shard) == list(indices)
    assert max(map(len, shards)) - min(map(len, shards)) <= num_cells
    assert all(len({index // num_cells for index in shard}) * num_cells == len(shard) for shard in shards)


def test_a_shard_reads_as_it_is_written() -> None:
    assert Shard.parse("2/4") == Shard(2, 4)
    assert str(Shard(2, 4)) == "2/4"


@pytest.mark.parametrize("text", ["", "2", "0/4", "5/4", "-1/4", "1/0", "a/b", "1/99999", "1 / 4", "1/2/3", "²/4"])
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="i from 1 to n"):
        Shard.parse(text)


# --- outputs ---


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_merged_outputs_are_the_bytes_of_the_whole_job(make: Maker, tmp_path: Path, count: int) -> None:
    whole = make()
    shards = [make(f"{number}/{count}") for number in range(1, count + 1)]
    merged = merge_outputs(shards[::-1], tmp_path / "merged.jsonl")
    assert (tmp_path / "merged.jsonl").read_bytes() == whole.read_bytes()
    assert (merged.num_rows, merged.num_failed, merged.num_pending) == (20, 5, 0)  # row 3 is bad; 4, 9, 14, 19 fail
    assert merged.is_checked


def test_outputs_alone_suffice(make: Maker, tmp_path: Path) -> None:
    whole = make()
    shards = without_jobs([make("2/3"), make("3/3"), make("1/3")])
    merged = merge_outputs(shards, tmp_path / "merged.jsonl")
    assert (tmp_path / "merged.jsonl").read_bytes() == whole.read_bytes()
    assert not merged.is_checked


def test_rows_without_an_answer_yet_are_counted(make: Maker, tmp_path: Path) -> None:
    merged = merge_outputs([make("1/2", num_answered=3), make("2/2")], tmp_path / "merged.jsonl")
    assert merged.num_pending > 0
    assert merged.num_failed >= merged.num_pending


def test_a_missing_shard_is_named(make: Maker, tmp_path: Path) -> None:
    shards = [make("1/3"), make("3/3")]
    with pytest.raises(ConfigError, match="shard 2 is missing"):
        merge_outputs(shards, tmp_path / "merged.jsonl")
    with pytest.raises(ConfigError, match="row 1 is in none of the files"):
        merge_outputs(without_jobs(shards), tmp_path / "merged.jsonl")
    assert not (tmp_path / "merged.jsonl").exists()


def test_a_shard_that_is_given_twice_is_refused(make: Maker, tmp_path: Path) -> None:
    shards = [make("1/2"), make("2/2"), make("1/2")]
    with pytest.raises(ConfigError, match="are both shard 1/2"):
        merge_outputs(shards, tmp_path / "merged.jsonl")
    with pytest.raises(ConfigError, match="give each shard once"):
        merge_outputs(without_jobs(shards), tmp_path / "merged.jsonl")


def test_shards_of_different_jobs_are_refused(make: Maker, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="shards of different jobs: the input was"):
        merge_outputs([make("1/2"), make("2/2", source="sha256 2")], tmp_path / "merged.jsonl")
    with pytest.raises(ConfigError, match="the job was divided differently"):
        merge_outputs([make("1/2"), make("2/3")], tmp_path / "merged.jsonl")
    others = without_jobs([make("1/2"), make("2/2", fingerprint="fp_2")])
    with pytest.raises(ConfigError, match="model 'base' was another one"):
        merge_outputs(others, tmp_path / "merged.jsonl")


def test_a_torn_or_edited_line_is_named(make: Maker, tmp_path: Path) -> None:
    first, second = without_jobs([make("1/2"), make("2/2")])
    text = second.read_bytes()
    second.write_bytes(text[:-20])
    with pytest.raises(ConfigError, match="line 10: is no whole line"):
        merge_outputs([first, second], tmp_path / "merged.jsonl")
    lines = [orjson.loads(line) for line in text.splitlines()]
    lines[4]["custom_id"] = "another"
    second.write_bytes(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    with pytest.raises(ConfigError, match="line 5: its id does not say"):
        merge_outputs([first, second], tmp_path / "merged.jsonl")


def test_a_whole_output_is_nothing_to_merge(make: Maker, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="whole job and no shard"):
        merge_outputs([make()], tmp_path / "merged.jsonl")


# --- jobs ---


def test_merged_jobs_are_the_whole_job_and_go_on_where_the_shards_were(make: Maker, tmp_path: Path) -> None:
    whole = make()
    shards = [job_path(make("1/2", num_answered=3)), job_path(make("2/2"))]
    merged = merge_jobs(shards, tmp_path / "merged.job")
    assert merged.num_rows == 20
    assert merged.num_pending > 0
    with JobStore.open(tmp_path / "merged.job", Identity({"the input": "sha256 1"})) as store:
        store.take_rows(rows_of(20))  # the same rows: no complaint
        store.bind_models({"base": "fp_1"})
        store.record([(row.index, result_of(row)) for row in store.pending()])
        write_output(store, tmp_path / "merged.jsonl")
    assert (tmp_path / "merged.jsonl").read_bytes() == whole.read_bytes()


def test_a_failed_merge_of_jobs_leaves_nothing_behind(make: Maker, tmp_path: Path) -> None:
    shards = [job_path(make("1/2")), job_path(make("2/2", fingerprint="fp_2"))]
    with pytest.raises(ConfigError, match="model 'base' was another one"):
        merge_jobs(shards, tmp_path / "merged.job")
    assert not list(tmp_path.glob("merged*"))
    with pytest.raises(ConfigError, match="exists already"):
        merge_jobs([job_path(make("1/1"))], shards[0])
    with pytest.raises(ConfigError, match="there is no such job"):
        merge_jobs([tmp_path / "nothing.job"], tmp_path / "merged.job")
