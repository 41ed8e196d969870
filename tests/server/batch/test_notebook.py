"""`run_batch`: a whole job in one call, in a script, in a notebook's cell, and again where it ended."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.batch import Row, run_batch, run_batch_async
from ensemble_server.server.batch.job.store import job_path
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.hosting import Hosting

SHORT = {"model": "base", "max_tokens": 3, "temperature": 0, "ignore_eos": True}


@pytest.fixture
def config(tiny_config: dict[str, Any]) -> dict[str, Any]:
    """The quickest part of it."""
    models = {name: tiny_config["models"][name] for name in ("base", "red", "mix")}
    return tiny_config | {"models": models}


def test_prompts_become_texts_in_their_order(config: dict[str, Any], tmp_path: Path) -> None:
    answers = run_batch(config, ["To be", "or not to be", "To be"], output := tmp_path / "answers.jsonl", **SHORT)
    texts = list(answers.texts())
    assert len(texts) == 3 and all(texts)
    asked = [line["response"]["body"]["usage"]["prompt_tokens"] for line in answers.lines()]
    assert asked[0] == asked[2] < asked[1]
    assert answers.summary.ended == "finished" and answers.summary.counts.ok == 3
    assert answers.summary.completion_tokens == 6, "equal rows ran once"
    assert [json.loads(line) for line in output.read_text().splitlines()] == list(answers.lines())
    assert [line["custom_id"] for line in answers.lines()] == ["1", "2", "3"]


def test_without_an_output_nothing_is_kept(config: dict[str, Any], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    answers = run_batch(config, ["To be"], **SHORT)
    assert all(answers.texts())
    del answers
    assert list(tmp_path.iterdir()) == []


def test_every_form_of_a_row(config: dict[str, Any]) -> None:
    chat = {"messages": [{"role": "user", "content": "To be"}]}
    rows = [
        "To be",
        chat,
        chat | {"max_tokens": 5},
        {"prompt": "To be"},
        {"custom_id": "mine", "url": "/v1/completions", "body": {"prompt": "To be"}},
        {"body": chat},
        Row(0, "own", "/v1/chat/completions", chat),
        {"prompt": "To be", "model": "nobody"},
    ]
    lines = list(run_batch(config, rows, **SHORT).lines())
    assert [line["custom_id"] for line in lines] == ["1", "2", "3", "4", "mine", "6", "own", "8"]
    used = [line["response"]["body"].get("usage", {}).get("completion_tokens") for line in lines]
    assert used == [3, 3, 5, 3, 3, 3, 3, None]
    assert lines[0]["response"] == lines[1]["response"] == lines[6]["response"]
    assert lines[7]["error"]["code"] == "model_not_found"


def test_columns_go_through_a_template(config: dict[str, Any], tmp_path: Path) -> None:
    columns = [{"id": 7, "question": "To be"}, {"id": 8, "query": "no question"}]
    answers = run_batch(config, columns, template="{{ question }}", **SHORT)
    assert [line["custom_id"] for line in answers.lines()] == ["7", "8"]
    assert list(answers.texts()) == [*run_batch(config, ["To be"], **SHORT).texts(), None]
    (table := tmp_path / "rows.csv").write_text("id,question\n7,To be\n")
    assert list(run_batch(config, table, template="{{ question }}", **SHORT).texts()) == list(answers.texts())[:1]


def test_a_config_may_be_a_file_and_rows_too(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    body = {"messages": [{"role": "user", "content": "To be"}]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (tmp_path / "rows.jsonl").write_text(json.dumps(line) + "\n{torn")
    answers = run_batch(str(tmp_path / "config.yaml"), tmp_path / "rows.jsonl", tmp_path / "out.jsonl", **SHORT)
    good, bad = answers.lines()
    assert good["custom_id"] == "a" and good["error"] is None
    assert bad["custom_id"] is None and bad["error"]["line"] == 2


def test_the_same_call_again_loads_nothing_and_says_the_same(config: dict[str, Any], tmp_path: Path) -> None:
    first = run_batch(config, ["To be", "or"], output := tmp_path / "answers.jsonl", **SHORT)
    before = output.read_bytes()
    output.unlink()
    again = run_batch(config, ["To be", "or"], output, **SHORT)
    assert output.read_bytes() == before
    assert (again.summary.elapsed_s, again.summary.counts) == (0, first.summary.counts)
    assert again.summary.members == first.summary.members


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 1}, "temperature was '0', is now '1'"),
        ({"top_p": 0.5}, "top_p was not given, is now '0.5'"),
        ({"seed": 9}, "the job's seed was '0', is now '9'"),
        ({"rows": ["To be", "and"]}, r"row 2 \('2'\) has another messages"),
        ({"rows": ["To be"]}, "the input had 2 rows, and now has 1"),
        ({"red": {"base": "base", "system_prompt": "Be short."}}, "model 'mix' is not what it was"),
    ],
)
def test_another_job_on_the_same_output_is_refused(
    config: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    rows = ["To be", "or"]
    asked = SHORT | {"model": "mix"}
    run_batch(config, rows, output := tmp_path / "answers.jsonl", **asked)
    before = output.read_bytes(), job_path(output).read_bytes()
    changed = config | {"models": config["models"] | {key: change.pop(key) for key in ["red"] if key in change}}
    with pytest.raises(ConfigError, match=message):
        run_batch(changed, change.pop("rows", rows), output, **asked | change)
    assert before == (output.read_bytes(), job_path(output).read_bytes())


def test_what_is_no_row_is_told(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="rows: number 2 must be a text"):
        run_batch(config, ["To be", {"question": "?"}], **SHORT)
    with pytest.raises(ConfigError, match="give a Path to read a file"):
        run_batch(config, "rows.jsonl", **SHORT)


@pytest.mark.slow
def test_a_deadline_still_writes_every_row(config: dict[str, Any], tmp_path: Path) -> None:
    long = SHORT | {"max_tokens": 90}
    rows = [f"To be {number}" for number in range(20)]
    answers = run_batch(config, rows, output := tmp_path / "answers.jsonl", deadline_s=0.2, **long)
    assert answers.summary.ended == "deadline"
    lines = list(answers.lines())
    assert len(lines) == 20
    assert {line["error"] and line["error"]["code"] for line in lines} == {None, "batch_expired"}
    assert run_batch(config, rows, output, **long).summary.ended == "finished"
    assert all(line["error"] is None for line in answers.lines())


@pytest.mark.parametrize(("max_errors", "num_failed"), [(None, 20), (3, 3), (0, 30)])
def test_a_job_of_which_nothing_succeeds_stops_and_keeps_its_rows(
    config: dict[str, Any], tmp_path: Path, max_errors: int | None, num_failed: int
) -> None:
    rows = [{"prompt": f"To be {number}", "temperature": 5} for number in range(30)]  # which no body may have
    output = tmp_path / "answers.jsonl"
    answers = run_batch(config, rows, output, max_errors=max_errors, concurrency=1, **SHORT)
    assert num_failed <= (failed := answers.summary.counts.failed) < num_failed + 5  # some are in flight by then
    assert answers.summary.ended == ("finished" if num_failed == 30 else "failing")
    said = [line["error"]["message"] for line in answers.lines()]
    assert sum("temperature" in message for message in said) == failed  # the others were not asked any more
    again = run_batch(config, rows, output, max_errors=0, concurrency=1, **SHORT)
    assert again.summary.counts.failed == 30


async def test_it_runs_inside_a_running_event_loop(config: dict[str, Any]) -> None:
    assert asyncio.get_running_loop().is_running()
    assert all(run_batch(config, ["To be"], **SHORT).texts())  # as a notebook's cell does: it waits


async def test_an_open_hosting_stays_open(config: dict[str, Any]) -> None:
    async with Hosting.open(parse_config(config, source=Path("/config.yaml"))) as hosting:
        first = await run_batch_async(hosting, ["To be"], **SHORT)
        second = await run_batch_async(hosting, ["To be"], **SHORT)
    assert list(first.texts()) == list(second.texts())


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, server.batch; print({'torch', 'fastapi', 'pandas', 'transformers'} & set(sys.modules))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "set()\n"
