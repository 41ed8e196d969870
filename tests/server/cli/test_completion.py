"""Completion as the shells ask for it: by variables of the environment, in a process that prints and exits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.listening import QuietHandler, listening
from tests.server.cli.conftest import Run

DEMO = Path(__file__).parents[3] / "configs" / "demo.yaml"
Complete = Callable[[str], list[str]]


@pytest.fixture
def complete(ensemble: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> Complete:
    """complete("ensemble chat c.yaml -m a") -> what bash offers for the last word."""

    def complete(line: str) -> list[str]:
        monkeypatch.setenv("_ENSEMBLE_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
        run = ensemble()
        assert run.err == ""
        return run.out.split()

    return complete


def test_names_of_models_come_from_the_config_on_the_line(complete: Complete) -> None:
    assert complete(f"ensemble chat {DEMO} --model a") == ["adaptive"]
    assert set(complete(f"ensemble chat {DEMO} -m ")) >= {"base", "code", "mix", "crowd"}
    assert complete(f"ensemble vote in.jsonl -c {DEMO} --judge sh") == ["shakespeare"]
    assert complete(f"ensemble batch in.csv -c {DEMO} --model base,sh") == ["base,shakespeare"]


def test_fit_and_export_offer_averages_only(complete: Complete) -> None:
    assert complete(f"ensemble fit {DEMO} ") == ["mix", "adaptive"]
    assert complete(f"ensemble export {DEMO} m") == ["mix"]


def test_names_of_models_come_from_the_server_on_the_line(complete: Complete) -> None:
    with server_of(["small", "smart"]) as address:
        assert complete(f"ensemble chat {address} --model sm") == ["small", "smart"]


@pytest.mark.parametrize("target", ["no.yaml", "http://127.0.0.1:1", "http://[", "pyproject.toml"])
def test_what_cannot_be_read_completes_to_nothing(complete: Complete, target: str) -> None:
    assert complete(f"ensemble chat {target} --model a") == []


@contextmanager
def server_of(names: list[str]) -> Iterator[str]:
    class Handler(QuietHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"data": [{"id": name} for name in names]}).encode())

    with listening(Handler) as address:
        yield address
