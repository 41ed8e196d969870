"""Secrets planted in every place a config can hold them, and a remote end that repeats all that it was sent in every
place an answer has: none of them is in any answer, log line, metric, page or file.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.compare.planning.plan import load_plan
from ensemble_server.server.compare.run import run_comparison
from ensemble_server.server.config.loading import load_config, parse_config
from ensemble_server.server.hosting import Hosting
from tests.server.api.conftest import CHAT, asgi_client
from tests.server.engines.remote.scripted_remote import Connection, ScriptedRemote

CHAT_PATH = "/v1/chat/completions"
USER, PASSWORD = "planted-user", "planted:pass/word"
PLANTED = {
    "user": USER,
    "password": PASSWORD,
    "quoted password": quote(PASSWORD, safe=""),
    "header of user and password": base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode(),
    "parameter of the URL": "planted-parameter",
    "key of the remote": "planted_remote-key",
    "key of clients": "planted-client-key",
    "key of clients in a variable": "planted-env-key",
}
KEY = PLANTED["key of the remote"]


# --- a remote end that says whatever it hears --------------------------------------------------------------------


def chunk(delta: Any, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None, **more}]}


def letters(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


def tokens_of(text: str, size: int) -> list[dict[str, Any]]:
    pieces = letters(text, size)
    return [
        {
            "token": piece,
            "logprob": -0.5,
            "bytes": list(piece.encode()),
            "top_logprobs": [{"token": piece, "logprob": -0.5}, {"token": text, "logprob": -2.0}],
        }
        for piece in pieces
    ]


async def echo(connection: Connection) -> None:
    """`connection.body["model"]` says in which place it repeats the request's head."""
    heard = f"{connection.path} {json.dumps(connection.headers)} {connection.headers['authorization']}"
    done = chunk({}, finish_reason="stop")
    match connection.body["model"]:
        case "refuses":
            await connection.respond(401, {"error": {"message": heard, "code": heard, "type": heard}})
        case "refuses by another shape":
            await connection.respond(400, {"detail": [{"context length": heard, heard: 1}]})
        case "refuses in words":  # with a secret where the message is cut
            await connection.respond(422, f"{'x' * 150}{heard}{'y' * 300}{heard}")
        case "is busy":
            await connection.respond(503, heard, Retry_After=connection.headers["authorization"])
        case "packs oddly":
            await connection.respond(200, "{}", Content_Encoding=connection.headers["authorization"])
        case "fails on the way":
            await connection.start_stream()
            await connection.event(chunk({"content": "well "}))
            await connection.event({"error": {"message": heard}})
        case "stops for a reason":
            await connection.start_stream()
            await connection.event(chunk({"content": "well"}, finish_reason=heard, stop_reason=heard))
            await connection.event("[DONE]")
        case "makes no sense":
            await connection.start_stream()
            await connection.event(chunk({"content": {heard: heard}}))
        case "breaks off":
            await connection.start_stream()
            await connection.event(chunk({"content": f"Here it is: {heard}"}))
        case "answers whole":
            message = {"content": f"Here it is: {heard}", "reasoning_content": heard, "refusal": heard}
            call = {"id": heard, "type": "function", "function": {"name": heard, "arguments": json.dumps({"a": heard})}}
            choice = {"index": 0, "message": {**message, "tool_calls": [call]}, "finish_reason": "stop"}
            await connection.respond(
                200, {"id": heard, "model": heard, "choices": [choice], "system_fingerprint": heard}
            )
        case "calls tools":
            await connection.start_stream()
            await connection.event(chunk({"content": "Here it is: "}))
            for place, piece in enumerate(letters(heard, 9)):
                call = {"index": 0, "function": {"arguments": piece}}
                first = {"id": heard, "type": "function", "function": {"name": heard, "arguments": piece}}
                await connection.event(chunk({"tool_calls": [call if place else {"index": 0, **first}]}))
            named = {"name": "f", "arguments": "{}"}
            for number, call_id in enumerate((heard.split()[-1], f"call_{heard.split()[-1]}"), start=1):
                await connection.event(chunk({"tool_calls": [{"index": number, "id": call_id, "function": named}]}))
            await connection.event(done)
            await connection.event("[DONE]")
        case "never says that it ends":
            await connection.start_stream()
            await connection.event(chunk({"content": f"Here it is: {heard} {KEY[:9]}"}))
            await connection.event("[DONE]")
        case "streams":
            await connection.start_stream()
            for size in (1, 3, 7, 50):
                for piece, token in zip(letters(heard, size), tokens_of(heard, size), strict=True):
                    said = {"content": piece, "reasoning_content": piece}
                    await connection.event(chunk(said, logprobs={"content": [token]}))
            await connection.event(done)
            await connection.event("[DONE]")
        case "completes":
            pieces = letters(heard, 5)
            logprobs = {
                "tokens": pieces,
                "token_logprobs": [-0.5] * len(pieces),
                "top_logprobs": [{piece: -0.5, heard: -1.0} for piece in pieces],
            }
            await connection.respond(200, {"choices": [{"index": 0, "text": heard, "logprobs": logprobs}]})


MODES = (
    "refuses",
    "refuses by another shape",
    "refuses in words",
    "is busy",
    "packs oddly",
    "fails on the way",
    "stops for a reason",
    "makes no sense",
    "breaks off",
    "answers whole",
    "calls tools",
    "never says that it ends",
    "streams",
    "completes",
)
TALKATIVE = ("answers whole", "never says that it ends", "streams")


# --- a house of them ---------------------------------------------------------------------------------------------


@dataclass
class Search:
    """All that was said, by the place where it was."""

    said: dict[str, list[str]] = field(default_factory=dict)

    def add(self, place: str, *texts: object) -> None:
        self.said.setdefault(place, []).extend(map(str, texts))

    def add_files(self, folder: Path) -> None:
        for path in folder.rglob("*"):
            if path.is_file() and path.name != "config.yaml":
                self.add(f"file {path.relative_to(folder)}", path.read_bytes().decode(errors="replace"))

    def assert_clean(self) -> None:
        found = {
            f"{secret}: {place}: …{text[max(0, text.find(value) - 60) : text.find(value) + 60]}"
            for place, texts in self.said.items()
            for text in texts
            for secret, value in PLANTED.items()
            if value in text
        }
        assert not found, "\n".join(sorted(found))


def named(mode: str, way: str) -> str:
    return f"{mode} {way}".replace(" ", "-")


def blocks(address: str) -> dict[str, Any]:
    """Two of each remote end: one that is given a key, and one that is given a user and a password."""
    host = address.removeprefix("http://")
    by_user = f"http://{USER}:{quote(PASSWORD, safe='')}@"
    common = {"max_retries": 0, "timeout_s": 20}
    models: dict[str, Any] = {}
    for mode in MODES:
        by_key = {"url": f"{address}?token=${{PLANTED_PARAMETER}}", "api_key_env": "PLANTED_KEY"}
        models[named(mode, "keyed")] = {**by_key, "model": mode, **common}
        models[named(mode, "by name")] = {"url": f"{by_user}{host}?token=planted-parameter", "model": mode, **common}
    dead = {"url": f"{by_user}127.0.0.1:9/v1?token=planted-parameter", "api_key_env": "PLANTED_KEY", **common}
    members = [named(mode, "keyed") for mode in TALKATIVE]
    models |= {
        "dead": dead,
        "crowd": {"method": "crowd_vote", "members": [*members, "dead"], "similarity": {"rouge_l_word": 1}},
        "talk": {"method": "exchange_of_thought", "members": members, "answer": "text", "max_rounds": 2},
        "fused": {"method": "answer_fusion", "members": members, "aggregator": members[0]},
        "major": {"method": "majority", "members": members, "answer": "text"},
        "gone": {"method": "majority", "members": ["dead", "refuses-keyed"], "answer": "text"},
    }
    server = {"api_keys": [PLANTED["key of clients"]], "api_keys_env": "PLANTED_KEYS", "log_level": "debug"}
    return {"models": models, "server": server}


@pytest.fixture(autouse=True)
def _variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED_KEY", KEY)
    monkeypatch.setenv("PLANTED_KEYS", PLANTED["key of clients in a variable"])
    monkeypatch.setenv("PLANTED_PARAMETER", PLANTED["parameter of the URL"])


@pytest.fixture
async def config_file(tmp_path: Path) -> AsyncIterator[Path]:
    async with ScriptedRemote([echo]) as remote:
        file = tmp_path / "config.yaml"
        file.write_text(json.dumps(blocks(remote.url)), encoding="utf-8")
        yield file
        if remote.connections:  # commands that only look at a config ask nobody
            assert any(KEY in connection.headers.get("authorization", "") for connection in remote.connections)
            assert any(PLANTED["parameter of the URL"] in connection.path for connection in remote.connections)


@pytest.fixture
def search(caplog: pytest.LogCaptureFixture) -> Iterator[Search]:
    caplog.set_level(logging.DEBUG)
    for chatty in ("httpx", "httpcore"):  # as the server has them
        logging.getLogger(chatty).setLevel(logging.WARNING)
    search = Search()
    yield search
    search.add("log", *(f"{r.getMessage()} {r.exc_text} {r.__dict__}" for r in caplog.records))
    search.add("log", caplog.text)
    search.assert_clean()


@pytest.mark.slow
async def test_a_server_says_and_writes_none_of_them(config_file: Path, search: Search) -> None:
    config = load_config(config_file)
    search.add("repr", repr(config))
    right = {"authorization": f"Bearer {PLANTED['key of clients']}"}
    async with Hosting.open(config) as hosting, asgi_client(hosting, timeout=60) as client:
        for headers in (right, {"authorization": "Bearer wrong"}):
            for path in ("/v1/models", "/v1/models/dead", "/v1/models/none", "/health", "/openapi.json", "/", "/docs"):
                search.add(path, (await client.get(path, headers=headers)).text)
        seen = 0
        for model in config.models:
            bodies = (
                {},
                {"stream": True},
                {"ensemble": {"explain": True}},
                {"logprobs": True, "top_logprobs": 2},
                {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]},
            )
            answers = [
                await client.post(CHAT_PATH, json=CHAT | {"model": model} | more, headers=right) for more in bodies
            ]
            completion = {"model": model, "prompt": "x", "logprobs": 2}
            answers.append(await client.post("/v1/completions", json=completion, headers=right))
            for more in ({"labels": ["a", "b"]}, {"candidates": ["a", "b"]}):
                path = "/v1/classify" if "labels" in more else "/v1/vote"
                answers.append(await client.post(path, json={"model": model, "prompt": "x"} | more, headers=right))
            search.add(f"answers of {model}", *(answer.text + str(answer.headers) for answer in answers))
            seen += sum("***" in answer.text for answer in answers)
        assert seen > 4 * len(TALKATIVE), "nothing was repeated, so nothing was tried"
        rows = [
            {
                "custom_id": f"{model} {number}",
                "method": "POST",
                "url": CHAT_PATH,
                "body": CHAT | {"model": model} | more,
            }
            for model in config.models
            if model not in {"dead", "gone"} and not model.startswith("is-busy")  # a batch waits for them to come back
            for number, more in enumerate(({}, {"ensemble": {"explain": True}}))
        ]
        form = {"file": ("rows.jsonl", "\n".join(map(json.dumps, rows)).encode())}
        file = (await client.post("/v1/files", files=form, data={"purpose": "batch"}, headers=right)).json()
        asked = {"input_file_id": file["id"], "endpoint": CHAT_PATH, "completion_window": "24h"}
        batch = (await client.post("/v1/batches", json=asked, headers=right)).json()
        while batch["status"] not in ("completed", "failed", "expired"):
            search.add_files(config_file.parent)
            await asyncio.sleep(0.1)
            batch = (await client.get(f"/v1/batches/{batch['id']}", headers=right)).json()
        assert batch["status"] == "completed"
        search.add("batch", batch)
        for name in ("output_file_id", "error_file_id"):
            search.add(name, (await client.get(f"/v1/files/{batch[name]}/content", headers=right)).text)
        search.add("/metrics", (await client.get("/metrics", headers=right)).text)
        search.add_files(config_file.parent)


async def command(folder: Path, *arguments: object) -> str:
    """What `ensemble ARGUMENTS` says, on both its ways out."""
    line = [sys.executable, "-m", "ensemble_server", *map(str, arguments)]
    pipe = asyncio.subprocess.PIPE
    environment = os.environ | {"COLUMNS": "400"}
    process = await asyncio.create_subprocess_exec(
        *line, stdout=pipe, stderr=asyncio.subprocess.STDOUT, cwd=folder, env=environment
    )
    said, _ = await process.communicate()
    return said.decode()


@pytest.mark.slow
@pytest.mark.parametrize("residency", ["resident", "sequential"])
async def test_a_batch_job_says_and_writes_none_of_them(config_file: Path, search: Search, residency: str) -> None:
    rows, output = config_file.with_name("rows.csv"), config_file.with_name("answers.jsonl")
    rows.write_text("id,question\n1,What?\n2,Why?\n", encoding="utf-8")
    models = "crowd,fused,major"  # for ends that are down a batch waits until they come back
    models += ",talk" if residency == "resident" else ""
    options = ["--template", "{{ question }}", "--model", models, "--set", "ensemble.explain=true"]
    options += ["--max-errors", "0", "--residency", residency]
    said = await command(config_file.parent, "batch", rows, "-o", output, "-c", config_file, *options)
    assert "***" in output.read_text(encoding="utf-8"), said
    search.add("batch", said)
    search.add("vote", await command(config_file.parent, "vote", output))
    search.add_files(config_file.parent)


@pytest.mark.slow
async def test_commands_that_look_at_a_config_say_none_of_them(config_file: Path, search: Search) -> None:
    address = f"http://{USER}:{quote(PASSWORD, safe='')}@127.0.0.1:9/v1"
    for arguments in (
        ["models", config_file],
        ["models", config_file, "--json"],
        ["serve", address, "--api-key-env", "PLANTED_KEY"],
        ["init", address],
        ["chat", address, "hello"],
        ["chat", config_file, "--model", "dead", "hello"],
        ["--debug", "chat", config_file, "--model", "dead", "hello"],
    ):
        search.add(" ".join(map(str, arguments[:2])), await command(config_file.parent, *arguments))
    search.add_files(config_file.parent)


@pytest.mark.slow
async def test_a_comparison_says_and_writes_none_of_them(config_file: Path, search: Search) -> None:
    (config_file.parent / "sums.jsonl").write_text(
        "\n".join(json.dumps({"question": f"1 + {n}?", "answer": str(n + 1)}) for n in range(3)), encoding="utf-8"
    )
    plan = config_file.parent / "plan.yaml"
    names = [named(mode, "keyed") for mode in ("streams", "refuses", "answers whole")]
    plan.write_text(
        json.dumps(
            {
                "config": "config.yaml",
                "baseline": names[0],
                "arms": [*names, "crowd", "dead"],
                "tasks": [{"name": "sums", "data": "sums.jsonl", "metric": "number", "template": "{{ question }}"}],
                "statistics": {"resamples": 200},
            }
        ),
        encoding="utf-8",
    )

    class Listener:
        def stage(self, text: str) -> None:
            search.add("progress", text)

        def progress(self, done: int, total: int) -> None:
            pass

    results = await run_comparison(load_plan(plan), config_file.parent / "out", Listener(), command="ensemble compare")
    search.add("results", results)
    search.add_files(config_file.parent)
    assert any(place.endswith("report.html") for place in search.said)


@pytest.mark.parametrize(
    "change",
    [
        {"server": {"api_keys": PLANTED["key of clients"]}},
        {"server": {"api_keys": [{"key": PLANTED["key of clients"]}]}},
        {"server": {"api_keys": [17, PLANTED["key of clients"]], "port": "x"}},
        {"models": {"far": {"url": f"ftp://{USER}:{PASSWORD}@host/v1?token=planted-parameter"}}},
        {"models": {"far": {"url": f"{USER}:{quote(PASSWORD, safe='')}@host/v1"}}},
        {"models": {"far": f"http://{USER}:{quote(PASSWORD, safe='')}@host/v1?a=1&token=planted-parameter"}},
        {"models": {"far": {"url": [f"http://{USER}:{quote(PASSWORD, safe='')}@host/v1"]}}},
        {"models": [f"http://{USER}:{quote(PASSWORD, safe='')}@host/v1"]},
    ],
)
def test_a_config_that_is_refused_shows_none_of_them(change: dict[str, Any], search: Search, tmp_path: Path) -> None:
    whole = {"models": {"far": {"url": "http://127.0.0.1:9/v1"}}} | change
    with pytest.raises(ConfigError) as refused:
        parse_config(whole, source=tmp_path / "config.yaml")
    search.add("problems", refused.value)
