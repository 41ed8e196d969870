from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from ensemble_server.server.batch.running import outages
from tests.server.cli.conftest import Run

CHAT = "/v1/chat/completions"
Ensemble = Callable[..., Run]


@pytest.fixture
def config(tiny: dict[str, Path], tmp_path: Path) -> Path:
    """Two members and their average; contexts of 64 tokens."""
    file = tmp_path / "config.yaml"
    file.write_text(
        f"models:\n  a: {{path: {tiny['llama']}}}\n  b: {{base: a, adapter: {tiny['red']}}}\n"
        "  mix: {method: probability_average, members: [a, b]}\n"
        "engine: {max_batch: 8, max_context: 64}\n",
        encoding="utf-8",
    )
    return file


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def line(custom_id: str, text: str = "Hi", **body: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 4, **body}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}


@pytest.fixture
def batch(ensemble: Ensemble, config: Path) -> Ensemble:
    """`batch(input, output, *options)` with the config."""
    return lambda source, output, *options: ensemble("batch", source, "-o", output, "--config", config, *options)


def test_only_the_models_that_rows_name_are_loaded(batch: Ensemble, config: Path, tmp_path: Path) -> None:
    gone = config.read_text(encoding="utf-8").replace("  mix:", "  gone: {path: nowhere}\n  mix:")
    config.write_text(gone, encoding="utf-8")
    source = write_lines(tmp_path / "in.jsonl", [line("a")])
    assert batch(source, tmp_path / "out.jsonl", "--model", "mix").code == 0
    assert batch(source, tmp_path / "dry.jsonl", "--model", "mix", "--dry-run", "--probe", "0").code == 0
    refused = batch(source, tmp_path / "none.jsonl", "--model", "gone")
    assert (refused.code, "nowhere" in refused.err) == (1, True)


# --- called wrongly -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "mux"], "has no model 'mux'; did you mean 'mix'?"),
        (["--temperature", "warm"], "Invalid value for --temperature"),
        (["--seeds", "3-1"], "Invalid value for --seeds"),
        (["--seed", "1", "--seeds", "1"], "--seeds gives every row its seed already"),
        (["--deadline", "soon"], "Invalid value for --deadline"),
        (["--set", "n"], "must be KEY=JSON"),
        (["--columns", "content"], "belongs to --format csv"),
        (["--id-column", "x"], "rows without --template name themselves"),
        (["--residency", "sequential", "--per-row-max", "1s"], "rows cannot be limited one by one; use --deadline"),
        (["--ray", "2", "--deadline", "1h"], "no limits of time"),
        (["--ray", "2", "--residency", "sequential"], "no --residency"),
        (["--temperature", "0,0"], "a value stands there twice"),
        (["--extend", "--restart"], "keeps answers, --restart forgets them"),
        (["--max-errors", "-1"], "Invalid value for '--max-errors'"),
    ],
)
def test_a_wrong_call_exits_with_2_before_anything_is_written(
    batch: Ensemble, tmp_path: Path, options: list[str], said: str
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [line("a")])
    run = batch(source, tmp_path / "out.jsonl", *options)
    assert run.code == 2
    assert said in re.sub(r"[│\s]+", " ", run.err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "in.jsonl"]


def test_an_input_that_does_not_exist_is_a_wrong_call(batch: Ensemble, tmp_path: Path) -> None:
    run = batch(tmp_path / "no.jsonl", tmp_path / "out.jsonl")
    assert run.code == 2
    assert "does not exist" in run.err


def test_the_input_is_not_overwritten(batch: Ensemble, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [line("a")])
    run = batch(source, source)
    assert run.code == 2
    assert "would overwrite its own input" in run.err


def test_columns_need_a_template(batch: Ensemble, tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text("id,q\n1,x\n", encoding="utf-8")
    run = batch(source, tmp_path / "out.jsonl")
    assert run.code == 2
    assert "csv holds columns; say what is asked of them" in re.sub(r"[│\s]+", " ", run.err)


def test_an_input_without_rows_fails(batch: Ensemble, tmp_path: Path) -> None:
    run = batch(write_lines(tmp_path / "in.jsonl", []), tmp_path / "out.jsonl")
    assert (run.code, run.err) == (1, f"error: {tmp_path / 'in.jsonl'}: has no rows\n")


# --- answers ------------------------------------------------------------------------------------------------------


def test_every_row_is_answered_in_the_inputs_order(batch: Ensemble, tmp_path: Path) -> None:
    rows = [line(f"row {n}", f"Say {n}") for n in range(5)]
    run = batch(write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", "--model", "mix")
    assert run.code == 0, run.err
    assert "5 rows: 5 ok, 0 failed; wrote " in run.err
    assert run.out == ""
    answers = read_lines(tmp_path / "out.jsonl")
    assert [answer["custom_id"] for answer in answers] == [row["custom_id"] for row in rows]
    for answer in answers:
        assert answer["error"] is None
        assert answer["response"]["status_code"] == 200
        assert answer["response"]["body"]["model"] == "mix"
        assert answer["response"]["body"]["usage"]["completion_tokens"] <= 4


def test_bad_rows_are_errors_in_their_places_and_the_exit_code_says_so(batch: Ensemble, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    lines = [
        json.dumps(line("good", model="a")).encode(),
        b"{not json",
        json.dumps(line("good", model="a")).encode(),
        json.dumps({"custom_id": "u", "method": "POST", "url": "/v1/x", "body": {}}).encode(),
        json.dumps(line("model", model="zzz")).encode(),
        json.dumps(line("long", "x" * 500, model="a")).encode(),
        b'{"custom_id": "\xff"}',
        json.dumps(line("last", model="a")).encode(),
        b'{"custom_id": "torn", "bo',
    ]
    source.write_bytes(b"\n".join(lines))
    run = batch(source, tmp_path / "out.jsonl")
    assert run.code == 3, run.err
    assert "9 rows: 2 ok, 7 failed" in run.err
    assert "5 of 9 rows cannot be run" in run.err
    assert "continues" not in run.err
    answers = read_lines(tmp_path / "out.jsonl")
    assert [answer["custom_id"] for answer in answers] == [
        "good",
        None,
        "good",
        "u",
        "model",
        "long",
        None,
        "last",
        None,
    ]
    messages = [answer["error"] and answer["error"]["message"] for answer in answers]
    assert messages[0] is None
    assert messages[7] is None
    assert "line 2: is not JSON" in messages[1]
    assert "'good' stands in line 1 already" in messages[2]
    assert "url must be one of" in messages[3]
    assert "no model 'zzz'" in messages[4]
    assert "context" in messages[5]
    assert "line 7: is not JSON" in messages[6]
    assert "the file ends in the middle of it" in messages[8]


def test_a_template_over_a_table_makes_a_submission(batch: Ensemble, tmp_path: Path) -> None:
    source, sample = tmp_path / "in.csv", tmp_path / "sample.csv"
    source.write_text("key,question\nx,One?\ny,Two?\n", encoding="utf-8")
    sample.write_text("key,target\nx,0\ny,0\n", encoding="utf-8")
    options = ["--template", "Q: {{ question }}", "--id-column", "key", "--model", "a", "--max-tokens", 3]
    run = batch(source, tmp_path / "sub.csv", *options, "--sample-submission", sample)
    assert run.code == 0, run.err
    table = list(csv.DictReader(io.StringIO((tmp_path / "sub.csv").read_text(encoding="utf-8"))))
    assert [row["key"] for row in table] == ["x", "y"]
    assert list(table[0]) == ["key", "target"]

    run = batch(source, tmp_path / "sub.csv", *options, "--columns", "key=custom_id,t=usage.prompt_tokens", "--zip")
    assert run.code == 0, run.err
    with zipfile.ZipFile(tmp_path / "sub.csv.zip") as archive:
        assert archive.namelist() == ["sub.csv"]
        assert archive.read("sub.csv").decode().splitlines()[0] == "key,t"


def test_a_sample_submission_is_checked_before_a_model_is_loaded(
    batch: Ensemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ensemble_server.server.hosting.Hosting.open", None)
    source, sample = tmp_path / "in.csv", tmp_path / "sample.csv"
    source.write_text("id,q\n1,x\n2,y\n", encoding="utf-8")
    sample.write_text("id,target\n2,0\n1,0\n", encoding="utf-8")
    options = ["--template", "{{ q }}", "--model", "a", "--sample-submission", sample]
    run = batch(source, tmp_path / "sub.csv", *options)
    assert run.code == 1
    assert "the ids are the same in another order" in run.err
    run = batch(source, tmp_path / "sub.csv", *options, "--columns", "id=custom_id,guess=content")
    assert run.code == 1
    assert "has the columns id, target in this order, got id, guess" in run.err
    run = batch(source, tmp_path / "sub.csv", *options, "--seeds", "0-1")
    assert run.code == 2
    assert "one row for each id, this grid has 2" in re.sub(r"[│\s]+", " ", run.err)
    assert not list(tmp_path.glob("sub.csv*"))


def test_rows_without_an_answer_take_the_fallback_and_are_counted(batch: Ensemble, tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text(f"id,q\n1,x\n2,{'y' * 500}\n", encoding="utf-8")
    options = ["--template", "{{ q }}", "--model", "a", "--max-tokens", 3]
    run = batch(
        source, tmp_path / "sub.csv", *options, "--fallback", "none", "--columns", "id=custom_id,p=content|number"
    )
    assert run.code == 3
    rows = list(csv.reader(io.StringIO((tmp_path / "sub.csv").read_text(encoding="utf-8"))))
    assert rows[2] == ["2", "none"]
    assert "have no answer and took the fallback 'none'" in run.err


def test_a_folder_of_texts_is_answered(batch: Ensemble, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("b", "a"):
        (folder / f"{name}.txt").write_text(name, encoding="utf-8")
    run = batch(folder, tmp_path / "out.jsonl", "--model", "a", "--max-tokens", 2)
    assert run.code == 0, run.err
    assert [answer["custom_id"] for answer in read_lines(tmp_path / "out.jsonl")] == ["a", "b"]


def test_rows_are_classified_by_labels(batch: Ensemble, tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text("id,review\n1,Nice\n2,Awful\n", encoding="utf-8")
    options = ["--template", "Review: {{ review }}\nSentiment:", "--labels", "good,bad", "--model", "mix"]
    columns = "id=custom_id,label=label,good=probabilities.good,bad=probabilities.bad"
    run = batch(source, tmp_path / "out.csv", *options, "--columns", columns)
    assert run.code == 0, run.err
    table = list(csv.DictReader(io.StringIO((tmp_path / "out.csv").read_text(encoding="utf-8"))))
    assert [row["id"] for row in table] == ["1", "2"]
    for row in table:
        assert float(row["good"]) + float(row["bad"]) == pytest.approx(1)
        assert row["label"] == ("good" if float(row["good"]) >= float(row["bad"]) else "bad")


def test_a_grid_keeps_its_cells_apart_and_a_vote_reads_it(batch: Ensemble, ensemble: Ensemble, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [line("x"), line("y")])
    options = ["--model", "a,mix", "--temperature", "0.2,1", "--seeds", "0-1", "--samples", 2, "--max-tokens", 3]
    run = batch(source, tmp_path / "out.jsonl", *options)
    assert run.code == 0, run.err
    answers = read_lines(tmp_path / "out.jsonl")
    assert [answer["custom_id"] for answer in answers] == ["x"] * 8 + ["y"] * 8
    assert answers[1]["cell"] == {"model": "a", "temperature": 0.2, "seed": 1}
    assert answers[4]["response"]["body"]["model"] == "mix"
    assert all(len(answer["response"]["body"]["choices"]) == 2 for answer in answers)
    run = ensemble("vote", tmp_path / "out.jsonl", "-o", tmp_path / "votes.jsonl", "--explain")
    assert run.code == 0, run.err
    votes = read_lines(tmp_path / "votes.jsonl")
    assert [(vote["id"], len(vote["candidates"])) for vote in votes] == [("x", 16), ("y", 16)]


@pytest.mark.slow
def test_standard_input_and_output_take_part(config: Path) -> None:
    rows = "".join(json.dumps(line(name, model="a")) + "\n" for name in "xy")
    command = [sys.executable, "-m", "ensemble_server", "batch", "-", "-o", "-", "-c", str(config)]
    run = subprocess.run(command, input=rows.encode(), capture_output=True, check=False)
    assert run.returncode == 0, run.stderr
    assert [json.loads(answer)["custom_id"] for answer in run.stdout.splitlines()] == ["x", "y"]


# --- the same command again ---------------------------------------------------------------------------------------


def test_a_finished_job_says_so_and_writes_its_output_again(
    batch: Ensemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [line("x", model="a"), line("y", "z" * 500, model="a")])
    first = batch(source, tmp_path / "out.jsonl")
    assert first.code == 3
    written = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").unlink()
    monkeypatch.setattr("ensemble_server.server.hosting.Hosting.open", None)  # a finished job loads no model
    again = batch(source, tmp_path / "out.jsonl")
    assert again.code == 3
    assert "this job is finished" in again.err
    assert (tmp_path / "out.jsonl").read_bytes() == written


def test_errors_are_run_again_on_request_and_nothing_else(batch: Ensemble, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [line("x", model="a"), line("y", "z" * 500, model="a")])
    assert batch(source, tmp_path / "out.jsonl").code == 3
    run = batch(source, tmp_path / "out.jsonl", "--retry-errors")
    assert run.code == 3
    assert "1 failed rows run again" in run.err
    assert "continues" in run.err
    assert "1 of 2 rows are done" in run.err


def test_a_changed_input_option_or_model_is_refused_with_what_changed(
    batch: Ensemble, config: Path, tmp_path: Path
) -> None:
    source, output = write_lines(tmp_path / "in.jsonl", [line("x", model="a")]), tmp_path / "out.jsonl"
    assert batch(source, output).code == 0
    run = batch(source, output, "--max-tokens", 9)
    assert run.code == 1
    assert "--max-tokens" in run.err
    write_lines(source, [line("x", model="a"), line("y", model="a")])
    run = batch(source, output)
    assert run.code == 1
    assert "input" in run.err
    assert len(read_lines(output)) == 1
    run = batch(source, output, "--restart")
    assert run.code == 0, run.err
    assert len(read_lines(output)) == 2
    config.write_text(config.read_text(encoding="utf-8").replace("path:", "dtype: bfloat16, path:"), encoding="utf-8")
    run = batch(source, output)
    assert run.code == 1
    assert "'a'" in run.err


def interrupted(config: Path, source: Path, output: Path, *, times: int) -> subprocess.CompletedProcess[str]:
    """The command, with Ctrl-C this often once the first answers are kept."""
    command = [sys.executable, "-m", "ensemble_server", "batch", source, "-o", output, "-c", config, "--model", "a"]
    process = subprocess.Popen(
        [*map(str, command), "--concurrency", "2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    log = output.with_name(f"{output.name}.job-wal")  # SQLite's: answers are in it as they are
    begun_s = time.monotonic()
    while process.poll() is None and time.monotonic() - begun_s < 400:  # loading takes its time on a busy machine
        if log.exists() and b'"finish_reason"' in log.read_bytes():
            break
        time.sleep(0.02)
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    out, err = process.communicate(timeout=400)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.slow
def test_an_interrupted_job_exits_with_130_and_the_same_command_ends_it(
    batch: Ensemble, config: Path, tmp_path: Path
) -> None:
    source = write_lines(tmp_path / "in.jsonl", [line(str(n), f"Say {n}", max_tokens=30) for n in range(60)])
    run = interrupted(config, source, tmp_path / "out.jsonl", times=1)
    assert run.returncode == 130, run.stderr
    assert "interrupted; the same command continues" in run.stderr
    assert len(read_lines(tmp_path / "out.jsonl")) == 60, "what is there is written, the rest is marked"
    again = batch(source, tmp_path / "out.jsonl", "--model", "a", "--concurrency", 2)
    assert again.code == 0, again.err
    assert re.search(r"continues .*: [1-9]\d* of 60 rows are done", again.err)
    whole = batch(source, tmp_path / "whole.jsonl", "--model", "a", "--concurrency", 2)
    assert whole.code == 0
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_a_deadline_ends_in_order_and_can_be_continued(batch: Ensemble, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [line(str(n), f"Say {n}", max_tokens=40) for n in range(200)])
    run = batch(source, tmp_path / "out.jsonl", "--model", "mix", "--deadline", "0.5s", "--concurrency", 1)
    assert run.code == 3, run.err
    assert "the deadline passed; the same command continues" in run.err
    assert len(read_lines(tmp_path / "out.jsonl")) == 200


# --- dry run ------------------------------------------------------------------------------------------------------


def test_a_dry_run_counts_measures_and_writes_nothing(batch: Ensemble, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [line(str(n), model="mix") for n in range(10)])
    run = batch(source, tmp_path / "out.jsonl", "--dry-run", "--probe", 2)
    assert run.code == 0, run.err
    assert f"{source}: 10 rows" in run.out
    assert re.search(r"prompts: [\d,]+ tokens \(mean \d+, longest \d+\)", run.out)
    assert "probe: 2 rows in " in run.out
    assert re.search(r"answers: about \d+ ± \d+ tokens", run.out)
    assert re.search(r"members read\+write: a [\d.k]+\+\d+ tokens, b ", run.out)
    assert not list(tmp_path.glob("out.jsonl*"))


def test_a_dry_run_fails_if_a_row_could_not_be_run(batch: Ensemble, tmp_path: Path) -> None:
    rows = [line("x", model="a"), line("long", "z" * 500, model="a"), line("hot", model="a", temperature=9), {"a": 1}]
    run = batch(write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", "--dry-run", "--probe", 1)
    assert run.code == 1
    assert "1 of 4 rows cannot be run" in run.out
    assert "2 rows would be refused" in run.out
    assert "'long': the prompt has " in run.out
    assert "'hot': temperature" in run.out


def test_no_hub_is_ever_asked(batch: Ensemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    batch(write_lines(tmp_path / "in.jsonl", []), tmp_path / "out.jsonl")
    assert os.environ["HF_HUB_OFFLINE"] == "1"


# --- what is wrong is said before it costs anything, and what fails says why -----------------------------------


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensemble_server.server.hosting.Hosting.open", None)


def plain(text: str) -> str:
    return re.sub(r"[│\s]+", " ", text)


@pytest.mark.usefixtures("no_models")
def test_rows_that_name_no_model_are_a_wrong_call_before_anything_runs(batch: Ensemble, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [line("a"), line("b", model="a")])
    run = batch(source, tmp_path / "out.jsonl")
    assert run.code == 2
    assert "Invalid value for --model: rows name no model" in plain(run.err)
    write_lines(source, [line("a", model="bsae")])
    run = batch(source, tmp_path / "out.jsonl")
    assert run.code == 2
    assert "the rows ask 'bsae'" in plain(run.err)
    assert not list(tmp_path.glob("out.jsonl*"))


@pytest.mark.usefixtures("no_models")
def test_a_wrong_id_column_is_a_wrong_call(batch: Ensemble, tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text("key,q\n1,x\n", encoding="utf-8")
    run = batch(source, tmp_path / "out.jsonl", "--model", "a", "--template", "{{ q }}", "--id-column", "kye")
    assert run.code == 2
    assert "Invalid value for --id-column: there is no column 'kye'" in plain(run.err)
    assert "(there are: key, q)" in plain(run.err)


@pytest.fixture
def dead_remote(tmp_path: Path) -> Path:
    """A config of one remote model whose address nobody listens on; a request is tried once."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    file = tmp_path / "remote.yaml"
    file.write_text(f"models: {{r: {{url: 'http://127.0.0.1:{port}/v1', max_retries: 0}}}}", encoding="utf-8")
    return file


def test_a_dead_endpoint_is_said_at_once_and_spends_no_row(
    ensemble: Ensemble, dead_remote: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outages, "FIRST_S", 0.001)
    source = write_lines(tmp_path / "in.jsonl", [line(str(n)) for n in range(30)])
    run = ensemble("batch", source, "-o", tmp_path / "out.csv", "-c", dead_remote, "--max-errors", 3)
    assert run.code == 1
    assert "failed: member 'r': cannot be reached" in run.err
    assert "the job is kept" in run.err
    assert run.err.count("row '") == 1, "each reason once"
    again = ensemble("batch", source, "-o", tmp_path / "out.csv", "-c", dead_remote, "--max-errors", 1)
    assert "continues" in again.err
    assert "0 of 30 rows are done" in again.err


def test_why_rows_failed_is_counted_at_the_end_of_a_table_too(batch: Ensemble, tmp_path: Path) -> None:
    rows = [line("x", model="a"), line("y", "z" * 500, model="a"), line("w", "z" * 400, model="a")]
    run = batch(write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.csv")
    assert run.code == 3
    assert re.search(r"row '[yw]' failed: .*context", run.err)
    assert re.search(r"\n  2 rows: .*context", run.err)


def test_rows_added_to_an_input_reuse_what_is_answered(
    batch: Ensemble, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    first = [line("x", model="a"), line("y", model="a", temperature=0)]
    write_lines(source, first)
    assert batch(source, output).code == 0
    before = {answer["custom_id"]: answer["response"] for answer in read_lines(output)}
    write_lines(source, [line("new", "Ho", model="a"), *reversed(first)])
    refused = batch(source, output)
    assert refused.code == 1
    assert "--extend keeps the answers" in refused.err
    run = batch(source, output, "--extend")
    assert run.code == 0, run.err
    assert "2 of 3 rows are done" in run.err
    after = read_lines(output)
    assert [answer["custom_id"] for answer in after] == ["new", "y", "x"]
    assert {name: answer["response"] for answer in after if (name := answer["custom_id"]) != "new"} == before
    assert batch(source, output, "--extend", "--max-tokens", 3).code == 1, "another option is another job"
    assert batch(source, output).code == 0, "the input is the job's own now"


def test_what_a_folder_has_besides_texts_is_said_aloud(batch: Ensemble, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.txt", ".hidden"):
        (folder / name).write_text("a", encoding="utf-8")
    run = batch(folder, tmp_path / "out.jsonl", "--model", "a", "--max-tokens", 1)
    assert run.code == 0, run.err
    assert "left out of the folder, as hidden or no file: 2 (.hidden, sub)" in run.err


# --- part of a job, and part of the time --------------------------------------------------------------------------


def test_shards_hold_all_rows_of_the_job_between_them(batch: Ensemble, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [line(str(n), model="a") for n in range(5)])
    for shard in ("1/2", "2/2"):
        assert batch(source, tmp_path / f"{shard[0]}.jsonl", "--shard", shard, "--seeds", "0-1").code == 0
    ids = [[answer["custom_id"] for answer in read_lines(tmp_path / f"{shard}.jsonl")] for shard in (1, 2)]
    assert ids == [["0", "0", "2", "2", "4", "4"], ["1", "1", "3", "3"]]
    assert batch(source, tmp_path / "1.jsonl", "--shard", "3/2").code == 2


def test_no_row_takes_more_time_than_one_may(batch: Ensemble, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [line(str(n), model="a", max_tokens=40, n=8) for n in range(6)])
    options = ["--per-row-max", "0.001s", "--concurrency", 1]
    batch(source, tmp_path / "out.jsonl", *options)
    reasons = [
        choice["stop_reason"]
        for answer in read_lines(tmp_path / "out.jsonl")
        if answer["error"] is None
        for choice in answer["response"]["body"]["choices"]
    ]
    errors = [answer["error"]["code"] for answer in read_lines(tmp_path / "out.jsonl") if answer["error"]]
    assert set(reasons) | set(errors) <= {"deadline", "deadline_exceeded", None, 2}
    assert "deadline" in reasons or "deadline_exceeded" in errors


def test_a_time_budget_is_shared_by_all_rows(batch: Ensemble, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [line(str(n), model="a") for n in range(6)])
    run = batch(source, tmp_path / "out.jsonl", "--time-budget", "1h", "--per-row-max", "1m")
    assert run.code == 0, run.err


def test_one_member_is_in_memory_at_a_time_on_request(
    batch: Ensemble, config: Path, tiny: dict[str, Path], tmp_path: Path
) -> None:
    models = f"  c: {{path: {tiny['qwen']}}}\n  major: {{method: majority, members: [a, c], samples: 1}}\n"
    text = config.read_text(encoding="utf-8").replace("engine:", f"{models}engine:")
    config.write_text(
        text.replace("engine:", "  wide: {method: probability_average, members: [a, c]}\nengine:"), "utf-8"
    )
    source = write_lines(tmp_path / "in.jsonl", [line(str(n)) for n in range(3)])
    run = batch(source, tmp_path / "one.jsonl", "--model", "major", "--residency", "sequential")
    assert run.code == 0, run.err
    assert "MB of weights at a time instead of" in run.err
    assert batch(source, tmp_path / "all.jsonl", "--model", "major").code == 0
    one, both = read_lines(tmp_path / "one.jsonl"), read_lines(tmp_path / "all.jsonl")
    for answer in (*one, *both):  # a vote that is decided stops who still writes: how far that one came is chance
        body = answer["response"]["body"]
        del body["usage"], body["ensemble"]["usage"]
    assert one == both
    run = batch(source, tmp_path / "mix.jsonl", "--model", "wide", "--residency", "sequential")
    assert run.code == 1
    assert "all of them must be in memory at the same time" in run.err


@pytest.mark.slow
def test_a_second_interrupt_stops_at_once_and_loses_nothing(batch: Ensemble, config: Path, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [line(str(n), f"Say {n}", max_tokens=30) for n in range(60)])
    run = interrupted(config, source, tmp_path / "out.jsonl", times=2)
    assert run.returncode in (130, -signal.SIGINT), run.stderr  # the latter if it was at the door already
    assert "the same command continues" in run.stderr
    assert "Traceback" not in run.stderr
    again = batch(source, tmp_path / "out.jsonl", "--model", "a", "--concurrency", 2)
    assert again.code == 0, again.err
