from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from ensemble_server.server.batch.job.identity import Identity
from ensemble_server.server.batch.job.rows import Row, RowResult
from ensemble_server.server.batch.job.store import JobStore, job_path
from ensemble_server.server.batch.placement.shards import SHARD, Shard
from ensemble_server.server.batch.results.output_line import write_output
from tests.server.cli.conftest import Run

Ensemble = Callable[..., Run]


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    """Two shards of a job of five rows, the last of which failed."""
    rows = [Row(index, f"row {index}", "/v1/completions", {"prompt": str(index)}) for index in range(5)]
    outputs = []
    for text in ("1/2", "2/2"):
        output = tmp_path / f"out{text[0]}.jsonl"
        with JobStore.open(job_path(output), Identity({"the input": "x", SHARD: text})) as store:
            store.take_rows(Shard.parse(text).rows(rows))
            error = {"message": "no", "type": "server_error", "param": None, "code": "member_failed"}
            store.record(
                [
                    (row.index, RowResult(500, "r", {"error": error}) if row.index == 4 else RowResult(200, "r", {}))
                    for row in store.pending()
                ]
            )
            write_output(store, output)
        outputs.append(output)
    return outputs


def test_shards_are_joined_in_the_inputs_order_and_failed_rows_give_3(
    ensemble: Ensemble, shards: list[Path], tmp_path: Path
) -> None:
    run = ensemble("batch", "merge", *shards[::-1], "-o", tmp_path / "all.jsonl")
    assert run.code == 3, run.err
    assert "5 rows: 4 ok, 1 failed, 0 without an answer" in run.err
    lines = [orjson.loads(line) for line in (tmp_path / "all.jsonl").read_bytes().splitlines()]
    assert [line["custom_id"] for line in lines] == [f"row {index}" for index in range(5)]


def test_job_files_are_joined_too(ensemble: Ensemble, shards: list[Path], tmp_path: Path) -> None:
    run = ensemble("batch", "merge", *map(job_path, shards), "-o", tmp_path / "all.jsonl.job")
    assert run.code == 3, run.err
    with JobStore.open(tmp_path / "all.jsonl.job", Identity({"the input": "x"})) as store:
        assert store.counts().total == 5


def test_outputs_alone_leave_a_doubt_that_is_told(ensemble: Ensemble, shards: list[Path], tmp_path: Path) -> None:
    for shard in shards:
        job_path(shard).unlink()
    run = ensemble("batch", "merge", *shards, "-o", tmp_path / "all.jsonl")
    assert "could not be checked" in run.err


@pytest.mark.parametrize("case", ["one is missing", "mixed", "its own input"])
def test_what_cannot_be_joined_writes_nothing(
    ensemble: Ensemble, shards: list[Path], tmp_path: Path, case: str
) -> None:
    output = shards[0] if case == "its own input" else tmp_path / "all.jsonl"
    given = {"one is missing": shards[:1], "mixed": [shards[0], job_path(shards[1])]}.get(case, shards)
    before = shards[0].read_bytes()
    run = ensemble("batch", "merge", *given, "-o", output)
    assert run.code == (1 if case == "one is missing" else 2), run.err
    assert shards[0].read_bytes() == before
    assert not (tmp_path / "all.jsonl").exists()


def test_a_table_of_merged_shards_is_the_one_of_a_single_machine(
    ensemble: Ensemble, tiny: dict[str, Path], tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"models:\n  a: {{path: {tiny['llama']}}}\nengine: {{max_context: 128}}\n", encoding="utf-8")
    source = tmp_path / "in.csv"
    source.write_text("id,word\n" + "".join(f"q{n},w{n}\n" for n in range(5)), encoding="utf-8")

    def run(output: str, *options: str) -> Run:
        asked = ["--template", "Say {{ word }}", "--max-tokens", "4", "--set", "ignore_eos=true"]
        return ensemble("batch", source, "-o", tmp_path / output, "-c", config, *asked, *options)

    assert run("whole.csv").code == 0
    for number in (1, 2):
        assert run(f"part{number}.csv", "--shard", f"{number}/2").code == 0
    parts = [tmp_path / f"part{number}.csv.job" for number in (1, 2)]
    assert ensemble("batch", "merge", *parts, "-o", tmp_path / "merged.csv.job").code == 0
    last = run("merged.csv")
    assert last.code == 0, last.err
    assert "this job is finished" in last.err
    assert (tmp_path / "merged.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
