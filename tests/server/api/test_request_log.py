from __future__ import annotations

import json
import logging

import pytest

from ensemble_server.ensembles.errors import MemberError, MemberTimeoutError
from ensemble_server.server.api.logs import JSONFormatter, configure_logging
from ensemble_server.server.engines.scripted_engine import Script
from tests.server.api.conftest import CHAT, asgi_client


def lines(caplog):
    return [record.fields for record in caplog.records if record.name == "ensemble.access"]


@pytest.fixture(autouse=True)
def _log_everything(caplog):
    caplog.set_level(logging.INFO)


async def test_every_answer_has_a_request_id_that_is_in_the_log_and_at_the_model(host, caplog):
    hosting = host()
    async with asgi_client(hosting) as client:
        response = await client.post("/v1/chat/completions", json=CHAT)
    [line] = lines(caplog)
    assert response.headers["x-request-id"] == line["request_id"] == hosting.models["hello"].requests[0].request_id


async def test_a_sane_id_of_the_client_is_echoed(host):
    async with asgi_client(host()) as client:
        response = await client.get("/health", headers={"x-request-id": "trace-1/span:2"})
    assert response.headers["x-request-id"] == "trace-1/span:2"


@pytest.mark.parametrize("sent", ["", "x" * 129, "two words", "new\x0bline", "ümlaut".encode()])
async def test_any_other_id_is_replaced(host, sent):
    async with asgi_client(host()) as client:
        response = await client.get("/health", headers={"x-request-id": sent})
    assert response.headers["x-request-id"].startswith("req-")


@pytest.mark.parametrize("stream", [False, True])
async def test_the_log_has_counts_and_no_words(host, caplog, stream):
    async with asgi_client(host()) as client:
        await client.post("/v1/chat/completions", json=CHAT | {"stream": stream})
    [line] = lines(caplog)
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/chat/completions", 200)
    assert (line["model"], line["completion_tokens"], line["stream"]) == ("hello", 4, stream)
    assert line["duration_ms"] > 0
    assert "Say hello" not in caplog.text
    assert "Hello world" not in caplog.text


async def test_probes_do_not_fill_the_log(host, caplog):
    async with asgi_client(host()) as client:
        for path in ("/health", "/metrics", "/v1/models"):
            await client.get(path)
    assert [line["path"] for line in lines(caplog)] == ["/v1/models"]


async def test_an_error_in_mid_stream_is_in_the_log(host, caplog):
    async with asgi_client(host(m=Script(("a", "b"), fails_at=1))) as client:
        await client.post("/v1/chat/completions", json=CHAT | {"stream": True})
    assert lines(caplog)[0]["error"] == "member_failed"


async def test_a_failure_of_the_server_is_logged_with_its_traceback(host, caplog):
    async with asgi_client(host(m=Script(("a",), fails_at=0, error=ZeroDivisionError("oh")))) as client:
        await client.post("/v1/chat/completions", json=CHAT)
    assert "ZeroDivisionError: oh" in caplog.text
    assert lines(caplog)[0]["status"] == 500


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (MemberError("m", "gave up"), 502, "member_failed"),
        (MemberTimeoutError("m", "stalled"), 504, "member_timed_out"),
    ],
)
async def test_a_failed_member_is_one_line_of_the_log(host, caplog, error, status, code):
    async with asgi_client(host(m=Script(("a",), fails_at=0, error=error))) as client:
        response = await client.post("/v1/chat/completions", json=CHAT)
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert caplog.text.count(str(error)) == 1 and "Traceback" not in caplog.text


async def test_a_path_cannot_forge_a_line(host, caplog):
    async with asgi_client(host()) as client:
        await client.get("/a%0aGET /fake 200")
    assert "\n" not in caplog.records[-1].getMessage()


def test_json_lines_hold_fields_messages_and_tracebacks():
    formatter = JSONFormatter()
    record = logging.LogRecord("ensemble.access", logging.INFO, "file", 1, "text", (), None)
    record.fields = {"status": 200}
    assert json.loads(formatter.format(record)) | {"time": ""} == {
        "time": "",
        "level": "info",
        "logger": "ensemble.access",
        "status": 200,
    }
    try:
        raise ValueError("broken")
    except ValueError as exc:
        record = logging.LogRecord(
            "x", logging.ERROR, "file", 1, "it %s", ("broke",), (type(exc), exc, exc.__traceback__)
        )
    line = formatter.format(record)
    assert "\n" not in line
    assert json.loads(line)["message"] == "it broke"
    assert "ValueError: broken" in json.loads(line)["traceback"]


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_the_log_goes_to_standard_error(log_format, capsys):
    before = logging.getLogger().handlers[:]
    try:
        configure_logging(log_format, "warning")
        logging.getLogger("some").warning("careful")
        logging.getLogger("some").info("not shown")
    finally:
        logging.getLogger().handlers[:] = before
    shown = capsys.readouterr().err
    assert "careful" in shown
    assert "not shown" not in shown
    assert (shown[0] == "{") == (log_format == "json")
