"""The parts of docs/your-own-models.md that take a GGUF file, an Ollama and a vLLM: the file is a tiny one, the servers
are stand-ins that list and answer in their shapes."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from ensemble_server.server.api.app import create_app
from ensemble_server.server.config.loading import load_config
from ensemble_server.server.hosting import Hosting
from ensemble_server.server.metrics import Metrics
from tests.docs.snippets import ROOT, Snippet, snippets
from tests.listening import QuietHandler, listening
from tests.server.cli.conftest import Run, ensemble  # noqa: F401  a fixture
from tests.server.weights.test_checkpoints import written_gguf

PAGE = ROOT / "docs" / "your-own-models.md"
OLLAMA = {
    "object": "list",
    "data": [
        {"id": name, "object": "model", "created": 1755000000, "owned_by": "library"}
        for name in ("llama3.2:1b", "nomic-embed-text:latest")
    ],
}
VLLM = {
    "object": "list",
    "data": [
        {
            "id": "org/qwen",
            "object": "model",
            "created": 1755000000,
            "owned_by": "vllm",
            "root": "org/qwen",
            "parent": None,
            "max_model_len": 32768,
            "permission": [{"id": "modelperm-1", "object": "model_permission", "allow_sampling": True}],
        }
    ],
}


def chunk(delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"role": "assistant", **delta}, "finish_reason": finish_reason, **more}
    return {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}


USAGE = {"usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}}
OLLAMA_SAYS = [chunk({"content": "", "reasoning": "Hm."}), chunk({"content": "Paris"}), chunk({"content": ""}, "stop")]
VLLM_SAYS = [
    chunk({"content": ""}, logprobs=None),
    chunk({"reasoning": "Hm."}, logprobs=None),
    chunk({"content": "Paris"}, logprobs=None, token_ids=None),
    chunk({"content": ""}, "stop", logprobs=None, stop_reason=None, token_ids=None),
]


@contextmanager
def stand_in(listed: dict[str, Any], says: list[dict[str, Any]], key: str | None = None) -> Iterator[str]:
    """A server that lists these models and streams these chunks; its address."""

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            self._answer("application/json", json.dumps(listed) if self.path == "/v1/models" else None)

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            known = asked["model"] in [model["id"] for model in listed["data"]]
            last = {**chunk({}), "choices": [], **USAGE}
            lines = [f"data: {json.dumps(one)}\n\n" for one in (*says, last)]
            self._answer("text/event-stream", "".join(lines) + "data: [DONE]\n\n" if known else None)

        def _answer(self, kind: str, text: str | None) -> None:
            status = 404 if text is None else 200
            if key is not None and self.headers.get("Authorization") != f"Bearer {key}":
                status, text = 401, None
            body = (text or "{}").encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with listening(Handler) as address:
        yield address


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """A text of the page with the stand-ins' addresses in the place of the servers'."""
    monkeypatch.setenv("VLLM_KEY", "s3cret")
    with stand_in(OLLAMA, OLLAMA_SAYS) as ollama, stand_in(VLLM, VLLM_SAYS, "s3cret") as vllm:
        addresses = {"http://127.0.0.1:11434": ollama, "http://127.0.0.1:8001": vllm}
        yield lambda text: re.sub("|".join(addresses), lambda found: addresses[found[0]], text)


def run_here(kind: str) -> list[Snippet]:
    return [
        one for one in snippets(PAGE) if one.kind == kind and one.mark == ("run by", "tests/docs/test_own_models.py")
    ]


@pytest.fixture
def here(tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "base").symlink_to(tiny["llama"])
    written_gguf(tmp_path / "model.Q4_K_M.gguf")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENSEMBLE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_every_init_of_the_page_writes_a_config_that_loads(
    here: Path,
    ensemble: Callable[..., Run],  # noqa: F811
    at: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = [line for snippet in run_here("shell") for line in snippet.commands]
    assert len(lines) == 4
    for line in lines:
        words = shlex.split(at(line), comments=True)
        if "8001" in line and "--api-key-env" not in words:
            words += ["--api-key-env", "VLLM_KEY"]  # the stand-in wants one of everybody
        run = ensemble(*words[1:])
        assert run.code == 0, run.err
        file = here / (words[words.index("-o") + 1] if "-o" in words else "ensemble.yaml")
        load_config(file)
    written = yaml.safe_load((here / "with-ollama.yaml").read_text(encoding="utf-8"))["models"]
    assert written["llama3.2:1b"]["model"] == "llama3.2:1b" and not any("embed" in name for name in written)
    keyed = yaml.safe_load((here / "keyed.yaml").read_text(encoding="utf-8"))["models"]["org-qwen"]
    assert (keyed["max_model_len"], keyed["api_key_env"]) == (32768, "VLLM_KEY")
    monkeypatch.delenv("VLLM_KEY")
    assert "s3cret" not in (here / "keyed.yaml").read_text(encoding="utf-8")


async def test_members_of_both_are_voted_on_beside_one_that_is_hosted_here(
    here: Path, at: Callable[[str], str]
) -> None:
    [snippet] = run_here("yaml")
    (here / "c.yaml").write_text(at(snippet.text), encoding="utf-8")
    async with Hosting.open(load_config(here / "c.yaml")) as hosting:
        app = create_app(hosting, metrics=Metrics())
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server")
        async with client, app.state.batches.running():
            ask = {"messages": [{"role": "user", "content": "The capital of France?"}], "max_tokens": 8}
            for name in ("llama3.2-1b", "qwen"):
                answer = (await client.post("/v1/chat/completions", json={"model": name, **ask})).json()
                message = answer["choices"][0]["message"]
                assert (message["content"], message["reasoning_content"]) == ("Paris", "Hm.")
            answer = (await client.post("/v1/chat/completions", json={"model": "major", **ask})).json()
            assert answer["choices"][0]["message"]["content"] == "Paris"
            assert answer["ensemble"]["turnout"] >= 2  # the two that agree decide it
