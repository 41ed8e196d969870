from __future__ import annotations

import asyncio
import json
import os
import pty
import select
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path

import pytest

from ensemble_server.ensembles.base import Delta, Done, Event, GenerationRequest, Sampling, Usage
from ensemble_server.ensembles.errors import MemberError
from ensemble_server.server.cli.chat import Conversation
from tests.server.cli.conftest import Run

# --- a conversation ---


class Parrot:
    """Repeats the last message word by word; stands still at "wait", fails at "fail"."""

    name = "parrot"
    members = ("parrot",)
    max_model_len = None
    explains_tokens, fan_out = True, 1

    def __init__(self) -> None:
        self.requests: list[GenerationRequest] = []

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        self.requests.append(request)
        for word in request.messages[-1]["content"].split():
            if word == "wait":
                await asyncio.sleep(60)
            if word == "fail":
                raise MemberError("parrot", "lost its voice")
            yield Delta(0, word + " ", reasoning="hm " if word == "why" else "")
        yield Done(Usage(1, 2), "parrot", ("parrot",), 1)


def said(request: GenerationRequest) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in request.messages]


async def test_a_conversation_remembers_and_forgets() -> None:
    parrot = Parrot()
    conversation = Conversation(parrot, "Be a bird.", Sampling(seed=1))
    shown: list[tuple[str, bool]] = []
    await conversation.ask("hello why", lambda text, is_reasoning: shown.append((text, is_reasoning)))
    assert shown == [("hello ", False), ("hm ", True), ("why ", False)]
    await conversation.ask("again", lambda *_: None)
    assert said(parrot.requests[1]) == [
        ("system", "Be a bird."),
        ("user", "hello why"),
        ("assistant", "hello why "),
        ("user", "again"),
    ]
    conversation.reset()
    await conversation.ask("who", lambda *_: None)
    assert said(parrot.requests[2]) == [("system", "Be a bird."), ("user", "who")]
    assert parrot.requests[2].sampling.seed == 1


async def test_what_came_before_an_interruption_is_remembered() -> None:
    conversation = Conversation(Parrot(), None, Sampling())
    has_begun = asyncio.Event()
    answer = asyncio.create_task(conversation.ask("one wait two", lambda *_: has_begun.set()))
    await has_begun.wait()
    answer.cancel()
    with pytest.raises(asyncio.CancelledError):
        await answer
    assert [message["content"] for message in conversation.messages] == ["one wait two", "one "]


async def test_a_question_that_fails_is_as_if_not_asked() -> None:
    conversation = Conversation(Parrot(), None, Sampling())
    with pytest.raises(MemberError):
        await conversation.ask("one fail", lambda *_: None)
    assert conversation.messages == []


# --- against a server ---


ALL = [{"id": "first"}, {"id": "second"}]
OURS = {"id": "mix", "explains_tokens": True, "ensemble": {"weights": {"base": 1, "code": 2}}}


class Handler(BaseHTTPRequestHandler):
    """Serves two models, and below /ours an ensemble as this server has. The answer repeats the question; at "slow"
    it goes on until the client leaves."""

    bodies: list[dict]
    keys: list[str | None]

    def do_GET(self) -> None:
        self.keys.append(self.headers["Authorization"])
        status = 401 if self.path.startswith("/locked") and not self.headers["Authorization"] else 200
        data = {"data": [{"id": "first"}, {"id": "second"}, OURS] if self.path.startswith("/ours") else ALL}
        if self.path.startswith("/odd"):
            data = {"hello": "world"}
        self._start(status, "application/json")
        self.wfile.write(json.dumps(data).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append(body)
        self._start(200, "text/event-stream")
        question = body["messages"][-1]["content"]
        if body.get("ensemble", {}).get("explain"):
            self._explained_chunk(
                "Paris", {"base": {"logprob": -0.1, "weight": 0.3}, "code": {"logprob": -3, "weight": 0.7}}
            )
        self._chunk({"content": f"you said {question}\x1b[31m"})
        while question == "slow":
            time.sleep(0.02)
            self._chunk({"content": "."})
        self._chunk({}, finish_reason="stop")
        self.wfile.write(b"data: [DONE]\n\n")

    def _start(self, status: int, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.end_headers()

    def _chunk(self, delta: dict, finish_reason: str | None = None) -> None:
        choices = [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
        self.wfile.write(f"data: {json.dumps({'choices': choices})}\n\n".encode())

    def _explained_chunk(self, token: str, members: dict) -> None:
        content = [{"token": token, "logprob": -0.5, "bytes": list(token.encode()), "members": members}]
        choices = [{"index": 0, "delta": {"content": token}, "logprobs": {"content": content}, "finish_reason": None}]
        told = {"trace": {"gates": {"base": 0.25}}}
        self.wfile.write(f"data: {json.dumps({'choices': choices, 'ensemble': told})}\n\n".encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None:
            pass  # a client that hangs up is part of the test

    Handler.bodies, Handler.keys = [], []
    server = Quiet(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_one_message_prints_the_answer_alone(ensemble: Callable[..., Run], url: str) -> None:
    arguments = ["--model", "second", "--system", "Be brief.", "--max-tokens", "7", "--temperature", "0", "--seed", "3"]
    run = ensemble("chat", f"{url}/v1/", "--message", "hi", *arguments)
    assert (run.code, run.out, run.err) == (0, "you said hi\x1b[31m\n", "")
    body = Handler.bodies[0]
    assert body["model"] == "second"
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert (body["temperature"], body["seed"], body["stream"]) == (0, 3, True)
    assert 7 in (body.get("max_tokens"), body.get("max_completion_tokens"))


def test_text_on_standard_input_is_asked(
    ensemble: Callable[..., Run], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", StringIO("from a pipe\n"))
    run = ensemble("chat", url)
    assert run.out == "you said from a pipe\x1b[31m\n"
    assert run.err == "Talking to first; --model takes any of first, second.\n"
    monkeypatch.setattr("sys.stdin", StringIO(" \n"))
    run = ensemble("chat", url)
    assert run.code == 2
    assert "standard input holds no text to ask" in run.err


@pytest.mark.parametrize(
    ("target", "arguments", "error"),
    [
        ("{url}", ["-m", "secnd"], "there is no model 'secnd'; did you mean 'second'? (known: first, second)"),
        ("{url}/locked", [], "{url}/locked/v1/models answered 401; give --api-key-env"),
        ("{url}/odd", [], "{url}/odd/v1/models is no list of models; is it an OpenAI-compatible server?"),
        ("http://127.0.0.1:1", [], "no server answers at http://127.0.0.1:1/v1 ("),
        ("http://[", [], "no server answers at http://[/v1 ("),
        ("{url}", ["--api-key-env", "NO_SUCH_KEY"], "--api-key-env names NO_SUCH_KEY, which is not set"),
        ("no.yaml", [], "no.yaml: cannot be read (No such file or directory)"),
    ],
)
def test_whom_one_cannot_talk_to_is_explained(
    ensemble: Callable[..., Run], url: str, target: str, arguments: list[str], error: str
) -> None:
    run = ensemble("chat", target.format(url=url), "--message", "hi", *arguments)
    assert run.code == 1
    assert run.err.startswith("error: " + error.format(url=url))


def test_the_key_is_taken_from_the_environment(
    ensemble: Callable[..., Run], url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "sesame")
    assert ensemble("chat", f"{url}/locked", "--message", "hi", "--api-key-env", "MY_KEY").code == 0
    assert Handler.keys == ["Bearer sesame"]


class Terminal:
    """`ensemble chat` in a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ensemble_server", "chat", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            preexec_fn=lambda: os.login_tty(theirs),  # so that Ctrl-C typed there is a signal here
            env=os.environ | {"TERM": "dumb", "COLUMNS": "200"},
        )
        os.close(theirs)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def wait_for(self, text: str, *, typing: str = "") -> None:
        """Until `text` comes after what was waited for last; types `typing` now and each second."""
        deadline = time.monotonic() + 60
        types_at = time.monotonic()
        while text not in self.seen:
            if typing and time.monotonic() >= types_at:
                self.type(typing)
                types_at += 1
            assert time.monotonic() < deadline, f"{text!r} did not come in 60 s, but: {self.seen!r}"
            if select.select([self._ours], [], [], 0.1)[0]:
                self.seen += os.read(self._ours, 4096).decode(errors="replace")
        self.seen = self.seen.partition(text)[2]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_not_the_program(url: str) -> None:
    terminal = Terminal(url, "--model", "first")
    try:
        terminal.wait_for("> ")
        terminal.type("hello\n")
        terminal.wait_for("you said hello[31m")  # without its escape code
        terminal.wait_for("> ")
        terminal.type("slow\n")
        terminal.wait_for("you said slow")
        terminal.type("\x03")
        terminal.wait_for("(stopped)")
        terminal.wait_for("> ")
        # At the prompt it does not leave either. Again and again: readline notices a signal that comes while it is
        # about to wait for a key only with the next key.
        terminal.wait_for("/exit (or Ctrl-D) leaves", typing="\x03")
        terminal.type("/rest\n")
        terminal.wait_for("unknown command /rest")
        terminal.type("/reset\n")
        terminal.wait_for("forgotten")
        terminal.type("again\n")
        terminal.wait_for("you said again")
        terminal.wait_for("> ")
        terminal.type("/exit\n")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.close()
    histories = [[message["content"] for message in body["messages"]] for body in Handler.bodies]
    assert histories[0] == ["hello"]
    assert histories[1] == ["hello", "you said hello\x1b[31m", "slow"]
    assert histories[2] == ["again"]


def test_commands_change_whom_one_talks_to_and_how(url: str) -> None:
    terminal = Terminal(f"{url}/ours", "--model", "first")
    try:
        for line, answer in (
            ("/help", "/weights [A=1 B=0.5]"),
            ("/weights", "first has no weights"),
            ("/model mix", "talking to mix"),
            ("/system Be brief.", "Be brief."),
            ("/weights base=1 code=0.5", "base=1, code=0.5"),
            ("/explain", "the member that drove them"),
            ("where?", "⟨base⟩Paris"),  # the terminal is dumb: no colours
            ("/explain off", "shown plainly"),
            ("again", "you said again"),
        ):
            terminal.wait_for("> ")
            terminal.type(f"{line}\n")
            terminal.wait_for(answer)
        terminal.wait_for("> ")
        terminal.type("/exit\n")
        assert terminal.process.wait(timeout=30) == 0
    finally:
        terminal.close()
    first, second = Handler.bodies
    assert first["ensemble"] == {"weights": {"base": 1, "code": 0.5}, "explain": True}
    assert second["ensemble"] == {"weights": {"base": 1, "code": 0.5}}
    assert first["model"] == "mix"
    assert first["messages"][0] == {"role": "system", "content": "Be brief."}


# --- with models of its own ---


def test_a_configs_models_answer_in_this_process(
    ensemble: Callable[..., Run], tiny: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        f"models:\n  llama: {{path: {tiny['llama']}}}\n  red: {{base: llama, adapter: {tiny['red']}}}\n"
        "  mix: {method: probability_average, members: [llama, red]}\n",
        encoding="utf-8",
    )
    arguments = ["--message", "The quick", "--max-tokens", "4", "--temperature", "0"]
    run = ensemble("chat", file, *arguments)
    assert run.code == 0, run.err
    assert "Talking to mix; --model takes any of llama, red, mix." in run.err
    assert len(run.out) > 1
