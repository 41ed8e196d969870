"""/v1/batches by the official client, from validation to each of the ends, over scripted models."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from contextlib import asynccontextmanager

import openai
import pytest
from openai.types import Batch
from pydantic import TypeAdapter, with_config

from ensemble_server.ensembles.errors import EngineDeadError, StorageError
from ensemble_server.server.api.batch_objects import BatchList, BatchObject, FileList, FileObject
from ensemble_server.server.api.batches import window_s
from ensemble_server.server.batch.running.runner import run as run_rows
from ensemble_server.server.batch.uploads import lifecycle
from ensemble_server.server.engines.scripted_engine import Script, ScriptedModel
from tests.server.api.conftest import CHAT, HELLO, asgi_client, live_server, until

URL = "/v1/chat/completions"
SLOW = Script(("a", "b", "c", "d"), delay_s=0.05)
STALLED = Script(("a", "b"), stalls_at=1)
KEYS = {"api_keys": ("first", "second")}


def line(custom_id, model="hello", url=URL, **body):
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {"model": model, **CHAT, **body}}


def jsonl(*lines):
    return b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in lines)


@asynccontextmanager
async def openai_client(hosting, key="none"):
    async with (
        live_server(hosting) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client,
    ):
        yield client


async def begun(client, *lines, endpoint=URL, window="24h", **kwargs):
    file = await client.files.create(file=("rows.jsonl", jsonl(*lines)), purpose="batch")
    return await client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window=window, **kwargs)


async def reached(client, batch, *statuses, timeout_s=10):
    async with asyncio.timeout(timeout_s):
        while batch.status not in statuses:
            await asyncio.sleep(0.02)
            batch = await client.batches.retrieve(batch.id)
    Batch.model_validate(batch.model_dump(), strict=True)
    return batch


async def ended(client, batch, timeout_s=10):
    return await reached(client, batch, "completed", "failed", "expired", "cancelled", timeout_s=timeout_s)


async def lines_of(client, file_id):
    return [json.loads(text) for text in (await client.files.content(file_id)).text.splitlines()]


def counts(batch):
    return batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed


# --- to a good end -----------------------------------------------------------------------------------------------


async def test_a_batch_runs_to_its_end_and_its_answers_are_those_of_chats(host):
    hosting = host(hello=HELLO)
    async with openai_client(hosting) as client:
        batch = await begun(client, *(line(f"row-{n}") for n in range(20)), metadata={"for": "a test"})
        assert (batch.status, batch.metadata, batch.endpoint) == ("validating", {"for": "a test"}, URL)
        assert batch.expires_at - batch.created_at == 24 * 3600
        batch = await ended(client, batch)
        assert (batch.status, counts(batch), batch.model) == ("completed", (20, 20, 0), "hello")
        assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
        assert batch.error_file_id is None and batch.errors is None
        output = await client.files.retrieve(batch.output_file_id)
        assert (output.purpose, output.filename) == ("batch_output", f"{batch.id}_output.jsonl")
        rows = await lines_of(client, batch.output_file_id)
        chat = await client.chat.completions.create(model="hello", **CHAT)
        assert [row["custom_id"] for row in rows] == [f"row-{n}" for n in range(20)]
        assert len({row["id"] for row in rows}) == 20
        for row in rows:
            assert row["error"] is None and row["response"]["status_code"] == 200
            answer = type(chat).model_validate(row["response"]["body"])
            assert answer.choices[0].message == chat.choices[0].message
        assert batch.usage.input_tokens == 20 * chat.usage.prompt_tokens
        assert batch.usage.output_tokens == 20 * chat.usage.completion_tokens
        assert batch.usage.total_tokens == 20 * chat.usage.total_tokens
    assert list((hosting.config.batch_folder / "jobs").iterdir()) == []


async def test_rows_that_fail_go_into_the_error_file_and_the_others_on(host):
    rows = (line("a"), line("b", model="nobody"), line("c", temperature=9), line("d", stream=True), line("e"))
    async with openai_client(host(hello=HELLO)) as client:
        batch = await ended(client, await begun(client, *rows))
        assert (batch.status, counts(batch), batch.model) == ("completed", (5, 2, 3), None)
        assert [row["custom_id"] for row in await lines_of(client, batch.output_file_id)] == ["a", "e"]
        unknown, hot, streamed = await lines_of(client, batch.error_file_id)
        assert (await client.files.retrieve(batch.error_file_id)).filename == f"{batch.id}_error.jsonl"
    assert (unknown["custom_id"], unknown["response"]["status_code"]) == ("b", 404)
    assert unknown["response"]["body"]["error"]["code"] == "model_not_found"
    assert (hot["response"]["status_code"], hot["response"]["body"]["error"]["param"]) == (400, "temperature")
    assert (streamed["response"]["status_code"], streamed["error"]["param"]) == (400, "stream")


async def test_completions_and_embeddings_are_batched_too(host):
    async with openai_client(host(hello=HELLO)) as client:
        row = line("a", url="/v1/completions") | {"body": {"model": "hello", "prompt": "Once"}}
        batch = await ended(client, await begun(client, row, endpoint="/v1/completions"))
        [answer] = await lines_of(client, batch.output_file_id)
        assert answer["response"]["body"]["choices"][0]["text"] == "Hello world"
        row = line("a", url="/v1/embeddings") | {"body": {"model": "letters", "input": ["aab", "c"]}}
        batch = await ended(client, await begun(client, row, endpoint="/v1/embeddings"))
        [answer] = await lines_of(client, batch.output_file_id)
        assert len(answer["response"]["body"]["data"]) == 2


async def test_result_files_expire_as_asked(host):
    async with openai_client(host()) as client:
        batch = await begun(client, line("a"), output_expires_after={"anchor": "created_at", "seconds": 7200})
        output = await client.files.retrieve((await ended(client, batch)).output_file_id)
    assert output.expires_at - output.created_at == 7200


async def test_counts_grow_while_it_runs_and_metrics_show_them(host):
    async with asgi_client(host(hello=HELLO, stalled=STALLED)) as client:
        file = await client.post(
            "/v1/files",
            files={"file": ("f", jsonl(line("a"), line("b", model="nobody"), line("c", model="stalled")))},
            data={"purpose": "batch"},
        )
        body = {"input_file_id": file.json()["id"], "endpoint": URL, "completion_window": "1h"}
        batch = (await client.post("/v1/batches", json=body)).json()

        async def shown():
            return (await client.get(f"/v1/batches/{batch['id']}")).json()["request_counts"]

        async with asyncio.timeout(5):
            while await shown() != {"total": 3, "completed": 1, "failed": 1}:
                await asyncio.sleep(0.02)
        metrics = (await client.get("/metrics")).text
        assert 'ensemble:batches{status="in_progress"} 1.0' in metrics
        for state in ("pending", "completed", "failed"):
            assert f'ensemble:batch_rows{{state="{state}"}} 1.0' in metrics
        await client.post(f"/v1/batches/{batch['id']}/cancel")
        async with asyncio.timeout(5):
            while 'batches{status="in_progress"} 0.0' not in (metrics := (await client.get("/metrics")).text):
                await asyncio.sleep(0.02)


async def test_answers_have_the_shapes_that_openapi_shows(host):
    hosting = host(hello=HELLO)
    async with openai_client(hosting) as client:
        completed = await ended(client, await begun(client, line("a"), line("b", model="nobody"), metadata={"k": "v"}))
        failed = await ended(client, await begun(client, b"x"))
    async with asgi_client(hosting) as client:
        for path, shape in (
            (f"/v1/batches/{completed.id}", BatchObject),
            (f"/v1/batches/{failed.id}", BatchObject),
            ("/v1/batches?limit=1", BatchList),
            (f"/v1/files/{completed.output_file_id}", FileObject),
            ("/v1/files", FileList),
        ):
            shown = (await client.get(path)).json()
            assert TypeAdapter(with_config(extra="forbid")(shape)).validate_python(shown, strict=True) == shown


async def test_lists_are_paged_and_newest_first(host):
    async with openai_client(host()) as client:
        batches = [await begun(client, line("a")) for _ in range(5)]
        listed = [batch.id async for batch in client.batches.list(limit=2)]
        assert listed == [batch.id for batch in reversed(batches)]
        page = await client.batches.list(limit=2, after=listed[1])
        assert [batch.id for batch in page.data] == listed[2:4] and page.has_more


# --- what is refused ---------------------------------------------------------------------------------------------


async def test_a_file_with_wrong_lines_fails_and_all_of_them_are_named(host):
    good = line("a")
    lines = (
        good,
        b"{not json\n",
        b"[1]\n",
        b"\n",
        good,
        {key: value for key, value in line("x").items() if key != "custom_id"},
        line("y") | {"custom_id": 7},
        line("z") | {"method": "GET"},
        line("u", url="/v1/completions"),
        line("v") | {"body": "hello"},
        b'{"custom_id": "torn", "meth',
    )
    async with openai_client(host()) as client:
        batch = await ended(client, await begun(client, *lines))
    assert (batch.status, counts(batch), batch.output_file_id) == ("failed", (0, 0, 0), None)
    assert batch.failed_at and not batch.in_progress_at
    assert [(error.line, error.code, error.param) for error in batch.errors.data] == [
        (2, "invalid_json_line", None),
        (3, "invalid_json_line", None),
        (5, "duplicate_custom_id", "custom_id"),
        (6, "missing_required_parameter", "custom_id"),
        (7, "invalid_custom_id", "custom_id"),
        (8, "invalid_method", "method"),
        (9, "invalid_url", "url"),
        (10, "invalid_body", "body"),
        (11, "invalid_json_line", None),
    ]
    assert "stands in line 1 already" in batch.errors.data[2].message


@pytest.mark.parametrize(
    ("lines", "max_rows", "code", "number"),
    [
        ((), 10, "empty_file", None),
        ((b"\n\n",), 10, "empty_file", None),
        ([line(str(n)) for n in range(4)], 3, "too_many_rows", 4),
        ([b"x\n"] * 200, 500, "too_many_errors", None),
    ],
)
async def test_files_of_the_wrong_size_fail(host, lines, max_rows, code, number):
    hosting = host()
    hosting.change("batch", max_rows=max_rows)
    async with openai_client(hosting) as client:
        batch = await ended(client, await begun(client, *lines))
    assert batch.status == "failed"
    assert (batch.errors.data[-1].code, batch.errors.data[-1].line) == (code, number)
    assert len(batch.errors.data) <= 101


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"endpoint": "/v1/responses"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"completion_window": "0h"}, "completion_window"),
        ({"completion_window": "31d"}, "completion_window"),
        ({"input_file_id": None}, "input_file_id"),
        ({"metadata": {"k" * 65: "v"}}, "metadata"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
    ],
)
async def test_a_body_that_asks_for_what_cannot_be_is_a_400_that_names_it(host, change, param):
    async with asgi_client(host()) as client:
        body = {"input_file_id": "file-1", "endpoint": URL, "completion_window": "24h"} | change
        response = await client.post("/v1/batches", json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(param)


async def test_a_batch_over_no_file_is_a_404(host):
    async with openai_client(host()) as client:
        with pytest.raises(openai.NotFoundError, match="file-1") as caught:
            await client.batches.create(input_file_id="file-1", endpoint=URL, completion_window="24h")
    assert caught.value.param == "input_file_id"


async def test_a_result_file_is_no_input(host):
    async with openai_client(host()) as client:
        batch = await ended(client, await begun(client, line("a")))
        with pytest.raises(openai.BadRequestError, match="purpose batch"):
            await client.batches.create(input_file_id=batch.output_file_id, endpoint=URL, completion_window="24h")


async def test_more_live_batches_than_allowed_are_a_429_for_that_key_alone(host):
    hosting = host(KEYS, stalled=STALLED)
    hosting.change("batch", max_live=2)
    async with openai_client(hosting, "first") as client:
        for _ in range(2):
            await begun(client, line("a", model="stalled"))
        with pytest.raises(openai.RateLimitError, match=r"2 batches .*batch.max_live"):
            await begun(client, line("a", model="stalled"))
        await begun(client.with_options(api_key="second"), line("a", model="stalled"))


@pytest.mark.parametrize(("window", "seconds"), [("24h", 86400), ("90s", 90), ("5m", 300), ("30d", 2592000)])
def test_a_window_is_a_number_and_a_unit(window, seconds):
    assert window_s(window) == seconds


# --- ends before the end -----------------------------------------------------------------------------------------


async def test_a_cancelled_batch_ends_soon_and_keeps_what_it_has(host):
    hosting = host(hello=HELLO, stalled=STALLED)
    async with openai_client(hosting) as client:
        batch = await begun(client, line("a"), line("b", model="stalled"), line("c", model="nobody"))
        async with asyncio.timeout(5):
            while counts(batch) != (3, 1, 1):
                await asyncio.sleep(0.02)
                batch = await client.batches.retrieve(batch.id)
        cancelling = await client.batches.cancel(batch.id)
        assert cancelling.status == "cancelling" and cancelling.cancelling_at
        batch = await ended(client, cancelling)
        assert (batch.status, counts(batch)) == ("cancelled", (3, 1, 2))
        assert [row["custom_id"] for row in await lines_of(client, batch.output_file_id)] == ["a"]
        left, wrong = await lines_of(client, batch.error_file_id)
        assert (left["custom_id"], left["response"], left["error"]["code"]) == ("b", None, "batch_cancelled")
        assert (wrong["custom_id"], wrong["error"]["code"]) == ("c", "model_not_found")
        assert hosting.models["stalled"].num_live == 0
        assert (await client.batches.cancel(batch.id)).status == "cancelled"


async def test_a_batch_that_has_ended_cannot_be_cancelled(host):
    async with openai_client(host()) as client:
        batch = await ended(client, await begun(client, line("a")))
        with pytest.raises(openai.ConflictError, match="it is completed"):
            await client.batches.cancel(batch.id)
        with pytest.raises(openai.NotFoundError):
            await client.batches.cancel("batch_0")


async def test_a_batch_whose_window_is_over_expires_with_what_it_has(host):
    hosting = host(slow=Script(("a",), start_delay_s=0.5))
    hosting.change("engine", max_batch=1)  # two rows in flight
    async with openai_client(hosting) as client:
        rows = [line(str(n), model="slow") for n in range(20)]
        batch = await ended(client, await begun(client, *rows, window="3s"), timeout_s=20)
        assert (batch.status, batch.request_counts.total) == ("expired", 20)
        assert batch.expired_at >= batch.expires_at
        answered = await lines_of(client, batch.output_file_id)
        left = await lines_of(client, batch.error_file_id)
    assert counts(batch) == (20, len(answered), len(left))
    assert [row["custom_id"] for row in answered + left] == [str(n) for n in range(20)]
    assert {row["error"]["code"] for row in left} == {"batch_expired"}


async def test_a_batch_that_waits_for_its_turn_expires_too(host):
    hosting = host(stalled=STALLED)
    hosting.change("batch", max_running=1)
    async with openai_client(hosting) as client:
        first = await reached(client, await begun(client, line("a", model="stalled")), "in_progress")
        second = await ended(client, await begun(client, line("b", model="stalled"), window="1s"))
        assert (second.status, counts(second)) == ("expired", (1, 0, 1))
        [row] = await lines_of(client, second.error_file_id)
        assert row["error"]["code"] == "batch_expired"
        assert "completion_window" in row["error"]["message"]
        assert (await client.batches.retrieve(first.id)).status == "in_progress"


async def test_batches_wait_for_a_place_and_can_be_cancelled_there(host):
    hosting = host(hello=HELLO, stalled=STALLED)
    hosting.change("batch", max_running=1)
    async with openai_client(hosting) as client:
        first = await reached(client, await begun(client, line("a", model="stalled")), "in_progress")
        await until(lambda: hosting.models["stalled"].num_live == 1)
        second = await reached(client, await begun(client, line("b")), "in_progress")
        third = await reached(client, await begun(client, line("c")), "in_progress")
        await asyncio.sleep(0.1)
        assert counts(await client.batches.retrieve(third.id)) == (1, 0, 0)
        await client.batches.cancel(second.id)
        assert (await ended(client, second)).status == "cancelled"
        await client.batches.cancel(first.id)
        assert (await ended(client, third)).status == "completed"


async def test_an_input_file_may_go_once_it_has_been_read(host):
    hosting = host(slow=SLOW)
    async with openai_client(hosting) as client:
        batch = await begun(client, *(line(str(n), model="slow") for n in range(5)))
        batch = await reached(client, batch, "in_progress", "completed")
        await client.files.delete(batch.input_file_id)
        assert counts(await ended(client, batch)) == (5, 5, 0)


# --- one server after another ------------------------------------------------------------------------------------


def on_disk(hosting, batch):
    with sqlite3.connect(hosting.config.batch_folder / "catalogue.sqlite") as db:
        [document] = db.execute("SELECT document FROM batches WHERE id = ?", [batch.id]).fetchone()
    db.close()
    return json.loads(document)


async def test_a_batch_is_paused_with_its_server_and_goes_on_with_the_next(host):
    hosting = host(hello=HELLO, stalled=STALLED)
    async with openai_client(hosting) as client:
        rows = [line("a"), line("b", model="stalled"), line("c")]
        batch = await begun(client, *rows)
        async with asyncio.timeout(5):
            while counts(batch) != (3, 2, 0):
                await asyncio.sleep(0.02)
                batch = await client.batches.retrieve(batch.id)
    assert hosting.models["stalled"].num_live == 0
    assert on_disk(hosting, batch)["status"] == "in_progress"
    after = host(hello=HELLO, stalled=HELLO)
    async with openai_client(after) as client:
        batch = await ended(client, await client.batches.retrieve(batch.id))
        assert (batch.status, counts(batch)) == ("completed", (3, 3, 0))
        assert [row["custom_id"] for row in await lines_of(client, batch.output_file_id)] == ["a", "b", "c"]
    assert after.models["hello"].requests == []


@pytest.mark.parametrize("status", ["validating", "cancelling", "finalizing"])
async def test_a_crash_at_any_step_is_made_good_by_the_next_server(host, status):
    hosting = host(stalled=STALLED)
    async with openai_client(hosting) as client:
        batch = await reached(client, await begun(client, line("a", model="stalled")), "in_progress")
    document = on_disk(hosting, batch) | {"status": status}
    with sqlite3.connect(hosting.config.batch_folder / "catalogue.sqlite") as db:
        db.execute("UPDATE batches SET status = ?, document = ? WHERE id = ?", [status, json.dumps(document), batch.id])
    db.close()
    async with openai_client(host(stalled=HELLO)) as client:
        batch = await ended(client, await client.batches.retrieve(batch.id))
    assert batch.status == {"validating": "completed", "cancelling": "cancelled", "finalizing": "expired"}[status]
    assert batch.request_counts.total == 1


async def test_a_batch_whose_models_have_changed_fails_and_keeps_its_answers(host):
    hosting = host(hello=HELLO, stalled=STALLED)
    async with openai_client(hosting) as client:
        batch = await begun(client, line("a"), line("b", model="stalled"))
        async with asyncio.timeout(5):
            while counts(batch) != (2, 1, 0):
                await asyncio.sleep(0.02)
                batch = await client.batches.retrieve(batch.id)
    after = host(hello=HELLO, stalled=HELLO)
    after.fingerprint = lambda name: f"another {name}"
    async with openai_client(after) as client:
        batch = await ended(client, await client.batches.retrieve(batch.id))
        assert (batch.status, counts(batch)) == ("failed", (2, 1, 1))
        assert batch.errors.data[0].code == "model_changed"
        assert str(hosting.config.batch_folder) not in batch.to_json()
        assert [row["custom_id"] for row in await lines_of(client, batch.output_file_id)] == ["a"]
        [left] = await lines_of(client, batch.error_file_id)
        assert (left["custom_id"], left["error"]["code"]) == ("b", "batch_failed")


async def test_a_dead_engine_leaves_the_batch_to_the_next_server(host, caplog):
    hosting = host(hello=HELLO)

    async def die(request):
        hosting.failure = "out of memory"
        raise EngineDeadError("out of memory")
        yield

    hosting.models["hello"].generate = die
    async with asgi_client(hosting) as client:
        file = await client.post("/v1/files", files={"file": ("f", jsonl(line("a")))}, data={"purpose": "batch"})
        body = {"input_file_id": file.json()["id"], "endpoint": URL, "completion_window": "1h"}
        batch = (await client.post("/v1/batches", json=body)).json()
        await until(lambda: "waits for a restart" in caplog.text)
        shown = await client.get(f"/v1/batches/{batch['id']}")
        assert (shown.status_code, shown.json()["status"]) == (200, "in_progress")
        assert (await client.post("/v1/batches", json=body)).status_code == 503
        assert (await client.get(f"/v1/files/{file.json()['id']}/content")).status_code == 200
    async with openai_client(host(hello=HELLO)) as client:
        assert (await ended(client, await client.batches.retrieve(batch["id"]))).status == "completed"


async def test_a_batch_that_met_a_full_disk_is_tried_again(host, monkeypatch, caplog):
    num_runs = 0

    async def run(*args, **kwargs):
        nonlocal num_runs
        num_runs += 1
        if num_runs < 3:
            raise StorageError("the disk is full")
        return await run_rows(*args, **kwargs)

    monkeypatch.setattr(lifecycle, "run", run)
    monkeypatch.setattr(lifecycle, "RETRY_S", 0.1)
    async with openai_client(host()) as client:
        batch = await ended(client, await begun(client, line("a")))
    assert (batch.status, counts(batch), num_runs) == ("completed", (1, 1, 0), 3)
    assert caplog.text.count("the disk is full") == 2


async def test_a_batch_on_which_the_server_fails_says_so_and_no_more(host, monkeypatch, caplog):
    async def run(*args, **kwargs):
        raise RuntimeError("a secret")

    monkeypatch.setattr(lifecycle, "run", run)
    hosting = host()
    async with openai_client(hosting) as client:
        batch = await ended(client, await begun(client, line("a")))
        assert (batch.status, batch.errors.data[0].code) == ("failed", "server_error")
        assert "secret" not in batch.to_json() and "secret" in caplog.text
        monkeypatch.undo()
        assert (await ended(client, await begun(client, line("a")))).status == "completed"
    assert list((hosting.config.batch_folder / "jobs").iterdir()) == []


async def test_a_batch_that_waits_for_an_engine_can_be_cancelled(host):
    hosting = host(hello=HELLO)
    hosting.failure = None
    async with openai_client(hosting) as client:
        file = await client.files.create(file=jsonl(line("a")), purpose="batch")
        hosting.models["hello"] = ScriptedModel("hello", STALLED, surface=None, max_model_len=512)
        batch = await client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
        await reached(client, batch, "in_progress")
    hosting.failure = "dead"
    async with asgi_client(hosting) as client:
        assert (await client.get(f"/v1/batches/{batch.id}")).json()["status"] == "in_progress"
        await client.post(f"/v1/batches/{batch.id}/cancel")
        async with asyncio.timeout(5):
            while (await client.get(f"/v1/batches/{batch.id}")).json()["status"] != "cancelled":
                await asyncio.sleep(0.02)


async def test_old_batches_are_forgotten_with_their_files(host):
    hosting = host()
    async with openai_client(hosting) as client:
        batch = await ended(client, await begun(client, line("a")))
        kept = await ended(client, await begun(client, line("a")))
    with sqlite3.connect(hosting.config.batch_folder / "catalogue.sqlite") as db:
        old = f"batch_{int((time.time() - 31 * 86400) * 1e9):016x}{'0' * 16}"
        db.execute("UPDATE batches SET id = ? WHERE id = ?", [old, batch.id])
    db.close()
    async with openai_client(hosting) as client:
        assert [found.id async for found in client.batches.list()] == [kept.id]


# --- whose it is -------------------------------------------------------------------------------------------------


async def test_a_key_sees_and_uses_its_own_batches_only(host):
    async with openai_client(host(KEYS), "first") as client:
        other = client.with_options(api_key="second")
        batch = await ended(client, await begun(client, line("a")))
        mine = await ended(other, await begun(other, line("a")))
        assert [found.id async for found in other.batches.list()] == [mine.id]
        for ask in (other.batches.retrieve, other.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                await ask(batch.id)
        for file_id in (batch.input_file_id, batch.output_file_id):
            with pytest.raises(openai.NotFoundError):
                await other.files.content(file_id)
        with pytest.raises(openai.NotFoundError):
            await other.batches.create(input_file_id=batch.input_file_id, endpoint=URL, completion_window="24h")
        assert (await client.files.content(batch.output_file_id)).text.count("\n") == 1
