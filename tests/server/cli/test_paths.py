"""Paths that are there and cannot be read: every command says so at once, with exit code 2, and waits for nobody."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ensemble_server.server.cli.app import app
from ensemble_server.server.cli.paths import check_readable, check_text, problem_of

CONFIG = Path(__file__).parents[3] / "configs" / "demo.yaml"
COMMANDS = [
    ["serve", "@"],
    ["chat", "@", "--message", "hi"],
    ["models", "@"],
    ["batch", "good.txt", "-o", "out.jsonl", "-c", "@"],
    ["batch", "@", "-o", "out.jsonl", "-c", CONFIG],
    ["compare", "@", "-o", "out"],
    ["compare", "plan.yaml", "--init", "@"],
    ["vote", "@"],
    ["vote", "--systems", "@", "good.txt"],
    ["fit", "@", "average", "good.txt"],
    ["fit", CONFIG, "average", "--text", "@"],
    ["distill", "@", "average", "--student", "a", "-o", "out", "--text", "good.txt"],
    ["distill", CONFIG, "average", "--student", "a", "-o", "out", "--text", "@"],
    ["export", "@", "average", "out"],
]
TAKE_ANY_BYTES = (["batch", "@"], ["vote", "@"], ["vote", "--systems"])  # gzip, UTF-16, Parquet; or rows of errors


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    Path("good.txt").write_text("hello\n")
    Path("empty.yaml").touch()
    Path("binary.yaml").write_bytes(b"a\x00b")
    Path("latin.yaml").write_bytes(b"caf\xe9")
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        yield


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(map(str, words[:3])))
def test_what_is_no_file_is_refused_by_every_command(command: list[object]) -> None:
    for path, what in {"pipe": "a named pipe", "socket": "a socket", "/dev/null": "a device"}.items():
        done = CliRunner().invoke(app, [path if word == "@" else str(word) for word in command], env={"COLUMNS": "200"})
        assert (done.exit_code, what in done.output) == (2, True), done.output


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(map(str, words[:3])))
def test_a_config_or_text_that_is_empty_or_binary_is_refused(command: list[object]) -> None:
    if command[:2] in TAKE_ANY_BYTES:
        return
    for path, what in {"empty.yaml": "is empty", "binary.yaml": "no text", "latin.yaml": "UTF-8"}.items():
        done = CliRunner().invoke(app, [path if word == "@" else str(word) for word in command], env={"COLUMNS": "200"})
        assert (done.exit_code, what in done.output) == (2, True), done.output


@pytest.mark.parametrize("command", [["serve", "bare"], ["chat", "bare", "--message", "x"], ["vote", "bare"]])
def test_a_folder_without_anything_is_refused(command: list[str]) -> None:
    Path("bare").mkdir()
    done = CliRunner().invoke(app, command, env={"COLUMNS": "200"})
    assert (done.exit_code, "folder" in done.output) == (2, True), done.output


def test_a_file_without_permission_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may read everything
    with pytest.raises(typer.BadParameter, match="permission denied"):
        check_readable(Path("good.txt"), "INPUT")


def test_a_text_may_be_cut_within_a_character_where_its_beginning_ends() -> None:
    Path("long.yaml").write_text("x" * 4095 + "é" * 10, encoding="utf-8")
    check_text(Path("long.yaml"), "CONFIG")


def test_pipes_of_the_shell_and_standard_input_are_read() -> None:
    assert [problem_of(Path(path)) for path in ("-", "/dev/stdin", "/dev/fd/0", "not-there")] == [None] * 4
