"""kill -9 at any moment, then the same command: the bytes of an uninterrupted run, and no row done twice."""

from __future__ import annotations

import json
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from ensemble_server.server.batch import run_batch
from ensemble_server.server.batch.job.identity import Identity
from ensemble_server.server.batch.job.store import JobStore, job_path

CHAT = "/v1/chat/completions"


def lines(num_rows: int) -> Iterator[str]:
    """Greedy rows and drawn ones, of every model; rows that are equal, wrong, or no JSON."""
    models = ("base", "red", "mix", "crowd")
    for number in range(num_rows):
        body: dict[str, Any] = {
            "model": models[number % 4],
            "messages": [{"role": "user", "content": f"To be, {number % 29}?"}],
            "max_tokens": 2 + number % 9,
            "ignore_eos": True,
            "temperature": 0 if number % 3 == 0 else 1,
        }
        if number % 10 == 7:
            body["temperature"] = 7
        line = {"custom_id": f"row {number}", "method": "POST", "url": CHAT, "body": body}
        yield "{torn" if number % 25 == 24 else json.dumps(line)


@pytest.fixture
def job(tmp_path: Path, tiny_config: dict[str, Any]) -> tuple[Path, Path]:
    config, rows = tmp_path / "config.yaml", tmp_path / "rows.jsonl"
    config.write_text(yaml.safe_dump(tiny_config))
    rows.write_text("\n".join(lines(60)) + "\n")
    return config, rows


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tests.server.batch.killed_job", *map(str, arguments)]


def spent(output: Path) -> dict[str, Any]:
    """What the members did for the job, from its file; to be called when the job is done."""
    with closing(sqlite3.connect(job_path(output))) as db:
        identity = Identity(**json.loads(db.execute("SELECT value FROM job WHERE name = 'identity'").fetchone()[0]))
    with JobStore.open(job_path(output), identity) as store:
        assert not store.counts().pending
        return store.spent()


@pytest.mark.slow
def test_a_job_that_was_killed_writes_what_an_uninterrupted_one_writes(job: tuple[Path, Path], tmp_path: Path) -> None:
    run_batch(*job, whole := tmp_path / "whole.jsonl", seed=3)
    ended = subprocess.run(
        command(*job, output := tmp_path / "killed.jsonl", "--kills", 5, "--rows", 9),
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert ended.stdout.count("killed") >= 4, ended.stdout
    assert output.read_bytes() == whole.read_bytes()
    assert spent(output) == spent(whole), "a row that was recorded twice would count twice"
    assert not list(tmp_path.glob(".*.part"))


@contextmanager
def process(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, text=True) as running:
        try:
            yield running
        finally:
            running.kill()


class Forks:
    """Processes that run the job, one after the other; each is killed or ends before the next begins."""

    def __init__(self, parent: subprocess.Popen[str]) -> None:
        self._parent = parent

    def begin(self, output: Path) -> None:
        self._tell(f"begin {output}")

    def wait_until_rows_run(self) -> bool:
        """-> whether there were rows left to run: a job killed after its last row has only its output to write."""
        line = self._parent.stdout.readline()
        assert line in ("running\n", "finished\n")
        return line == "running\n"

    def kill(self) -> int:
        """-> the exit code, which is that of one that ended by itself if it did before."""
        self._tell("kill")
        return self._exit_code()

    def wait(self) -> int:
        self._tell("wait")
        return self._exit_code()

    def _tell(self, line: str) -> None:
        self._parent.stdin.write(f"{line}\n")
        self._parent.stdin.flush()

    def _exit_code(self) -> int:
        *_, code = next(line for line in self._parent.stdout if line.startswith("ended")).split()
        return int(code)


@contextmanager
def forks(*arguments: object) -> Iterator[Forks]:
    line = command(*arguments, "--forks")
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout.readline() == "ready\n"
            yield Forks(parent)
        finally:
            parent.kill()


@pytest.mark.slow
def test_twenty_processes_killed_at_random_moments_lose_nothing(job: tuple[Path, Path], tmp_path: Path) -> None:
    moments = random.Random(7)
    num_kills = num_jobs = 0
    with forks(*job) as jobs:
        began = time.monotonic()
        jobs.begin(whole := tmp_path / "whole.jsonl")
        assert jobs.wait_until_rows_run()
        loading_s = time.monotonic() - began
        assert jobs.wait() == 0
        duration_s = time.monotonic() - began
        while num_kills < 20:
            num_jobs += 1
            output = tmp_path / f"killed-{num_jobs}.jsonl"
            while not output.exists():
                jobs.begin(output)
                if num_kills % 5 == 0:  # every fifth is killed while it loads or takes its rows in
                    time.sleep(moments.uniform(0, loading_s))
                elif jobs.wait_until_rows_run():
                    time.sleep(moments.uniform(0, duration_s / 4))
                num_kills += jobs.kill() == -signal.SIGKILL
            assert output.read_bytes() == whole.read_bytes()
            assert spent(output) == spent(whole)


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done(job: tuple[Path, Path], tmp_path: Path) -> None:
    run_batch(*job, whole := tmp_path / "whole.jsonl", seed=3)
    output = tmp_path / "interrupted.jsonl"
    with process(*job, output) as running:
        assert running.stdout.readline() == "running\n"
        running.send_signal(signal.SIGINT)
        assert running.wait(30) != 0
    assert not output.exists()
    with process(*job, output) as running:
        assert running.stdout.read() == "running\nfinished\n"
    assert output.read_bytes() == whole.read_bytes()
    assert spent(output) == spent(whole)
