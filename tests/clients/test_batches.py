"""Files and batches by the official `openai` client against real servers, which are killed in the middle."""

from __future__ import annotations

import json
import random
import re
import signal
import time
from pathlib import Path

import openai
import pytest

from tests.clients.conftest import LiveServer, server_of

URL = "/v1/chat/completions"
NUM_ROWS = 60
ENDS = ("kill", "terminate", "kill")  # of servers in the middle of the batch: -9, or in an orderly way
CONFIG = """
models:
  llama: {{path: "{llama}"}}
  deep: {{path: "{deep}"}}
  mix: {{method: probability_average, members: [llama, deep]}}
server: {{port: 0}}
engine: {{max_context: 256, max_batch: 4}}
"""


def rows(max_tokens: int = 32) -> bytes:
    models = ("llama", "deep", "mix", "nobody")
    bodies = (
        {
            "model": models[n % 4] if n < 8 else models[n % 3],
            "messages": [{"role": "user", "content": f"Number {n}."}],
            "max_tokens": max_tokens,
            "seed": n,
        }
        for n in range(NUM_ROWS)
    )
    lines = ({"custom_id": f"row-{n}", "method": "POST", "url": URL, "body": body} for n, body in enumerate(bodies))
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def client_of(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def begun(client: openai.OpenAI, content: bytes) -> str:
    file = client.files.create(file=("rows.jsonl", content), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h").id


def ended(client: openai.OpenAI, batch_id: str, timeout_s: float = 120) -> openai.types.Batch:
    deadline = time.monotonic() + timeout_s
    while (batch := client.batches.retrieve(batch_id)).status in ("validating", "in_progress", "finalizing"):
        assert time.monotonic() < deadline, f"the batch did not end: {batch}"
        time.sleep(0.1)
    return batch


def results(client: openai.OpenAI, batch: openai.types.Batch) -> tuple[bytes, bytes]:
    return client.files.content(batch.output_file_id).content, client.files.content(batch.error_file_id).content


def test_a_batch_answers_as_chats_do(live):
    with client_of(live) as client:
        body = {"model": "mix", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "seed": 3}
        line = {"custom_id": "one", "method": "POST", "url": URL, "body": body}
        batch = ended(client, begun(client, json.dumps(line).encode()))
        assert batch.status == "completed" and batch.model == "mix"
        [answer] = map(json.loads, client.files.content(batch.output_file_id).iter_lines())
        chat = client.chat.completions.create(**body)
        assert answer["response"]["body"]["choices"][0]["message"]["content"] == chat.choices[0].message.content


def test_the_example_in_the_docs_runs_as_it_stands(live, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "batch-http.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert "http://127.0.0.1:8000" in example
    monkeypatch.chdir(tmp_path)
    exec(compile(example.replace("http://127.0.0.1:8000", live.url), "example", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("completed BatchRequestCounts(completed=2, failed=0, total=2)") for line in lines)
    assert any(line.startswith("row-1 ") for line in lines)


def completed_beyond(num_rows: int, client: openai.OpenAI, batch_id: str) -> int:
    """How many rows of the batch are done, once they are more than `num_rows` or all."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        batch = client.batches.retrieve(batch_id)
        if batch.request_counts.completed > num_rows or batch.status == "completed":
            return batch.request_counts.completed
        time.sleep(0.02)
    raise AssertionError(f"no further row was done in two minutes: {batch}")


@pytest.mark.slow
def test_a_server_that_is_killed_again_and_again_loses_no_row_and_doubles_none(tiny: dict[str, Path], tmp_path: Path):
    config = tmp_path / "killed.yaml"
    config.write_text(CONFIG.format(**tiny))
    moments = random.Random(5)
    batch_id, shown = None, []
    for end in ENDS:
        with server_of(config) as server:
            with client_of(server) as client:
                batch_id = batch_id or begun(client, rows())
                shown.append(completed_beyond(shown[-1] if shown else 0, client, batch_id))
                time.sleep(moments.uniform(0, 0.3))
            getattr(server.process, end)()
            assert server.process.wait(timeout=30) == (0 if end == "terminate" else -signal.SIGKILL)
    with server_of(config) as server, client_of(server) as client:
        batch = ended(client, batch_id)
        assert (batch.status, batch.request_counts.total) == ("completed", NUM_ROWS)
        assert batch.request_counts.failed == 2
        output, errors = results(client, batch)
        ids = [json.loads(line)["custom_id"] for text in (output, errors) for line in text.splitlines()]
        assert sorted(ids) == sorted(f"row-{n}" for n in range(NUM_ROWS))
        uninterrupted = ended(client, begun(client, rows()))
        assert results(client, uninterrupted) == (output, errors)
    assert shown == sorted(shown) and shown[0] < NUM_ROWS - 2, f"no kill met the batch at work: {shown}"
    left = {path.name for path in (tmp_path / "killed.batches" / "jobs").iterdir()}
    assert left == set()
