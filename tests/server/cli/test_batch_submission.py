from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.server.cli.conftest import Run

Ensemble = Callable[..., Run]


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_vote_becomes_a_submission(ensemble: Ensemble, tmp_path: Path) -> None:
    candidates = [{"id": "a", "candidates": ["It is 4", "4!", "5"]}, {"id": "b", "candidates": ["So 7", "7"]}]
    votes, sample, output = tmp_path / "votes.jsonl", tmp_path / "sample.csv", tmp_path / "sub.csv"
    ensemble("vote", write_lines(tmp_path / "in.jsonl", candidates), "-o", votes, "--answer", "number")
    sample.write_text("id,answer\na,0\nb,0\n", encoding="utf-8")
    options = ["--columns", "id,answer", "--sample-submission", sample]
    run = ensemble("batch", "submission", votes, "-o", output, *options)
    assert (run.code, run.err) == (0, f"2 rows; wrote {output}\n")
    assert output.read_text(encoding="utf-8") == "id,answer\na,4\nb,7\n"

    sample.write_text("id,answer\nb,0\na,0\n", encoding="utf-8")
    output.unlink()
    run = ensemble("batch", "submission", votes, "-o", output, *options)
    assert run.code == 1
    assert "the same in another order" in run.err
    assert not output.exists()


def test_failed_rows_of_a_batch_take_the_fallback(ensemble: Ensemble, tmp_path: Path) -> None:
    body = {"choices": [{"message": {"content": "yes"}}]}
    results = [
        {"custom_id": "a", "response": {"body": body}, "error": None},
        {"custom_id": "b", "response": None, "error": {"message": "no"}},
    ]
    file, output = write_lines(tmp_path / "out.jsonl", results), tmp_path / "sub.csv.zip"
    columns = "id=custom_id,guess=content,tokens=usage.tokens"
    run = ensemble("batch", "submission", file, "-o", output, "--columns", columns, "--fallback", "?")
    assert run.code == 3
    assert "column 'tokens': no row has 'usage.tokens'" in run.err
    assert "rows have no answer and took the fallback '?'" in run.err
    with zipfile.ZipFile(output) as archive:
        assert archive.read("sub.csv").decode() == "id,guess,tokens\na,yes,?\nb,?,?\n"


def test_results_that_are_none_are_named(ensemble: Ensemble, tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    file.write_text('{"custom_id": "a"\n', encoding="utf-8")
    run = ensemble("batch", "submission", file, "-o", tmp_path / "sub.csv", "--columns", "content")
    assert run.code == 1
    assert run.err.startswith(f"error: {file}, line 1: is not JSON")
    assert not (tmp_path / "sub.csv").exists()


def test_a_grid_is_no_submission_unless_columns_tell_its_rows_apart(ensemble: Ensemble, tmp_path: Path) -> None:
    body = {"choices": [{"message": {"content": "yes"}}]}
    results = [
        {"custom_id": custom_id, "response": {"body": body | {"model": model}}, "error": None, "cell": {"model": model}}
        for custom_id in ("q1", "q2")
        for model in ("a", "b")
    ]
    file, output = write_lines(tmp_path / "grid.jsonl", results), tmp_path / "sub.csv"
    run = ensemble("batch", "submission", file, "-o", output, "--columns", "id=custom_id,guess=content")
    assert run.code == 1
    assert "the id 'q1' stands in rows 1 and 2" in run.err
    assert f"`ensemble vote {file} -o votes.jsonl`" in run.err
    assert not output.exists()
    run = ensemble("batch", "submission", file, "-o", output, "--columns", "id=custom_id,model,guess=content")
    assert run.code == 0, run.err
    assert output.read_text(encoding="utf-8").splitlines()[1:3] == ["q1,a,yes", "q1,b,yes"]
