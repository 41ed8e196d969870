"""On a local Ray: real actors that load real tiny models."""

from __future__ import annotations

import builtins
import importlib.util
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.batch.job.identity import Identity
from ensemble_server.server.batch.job.rows import BadRow, Row
from ensemble_server.server.batch.job.store import JobStore
from ensemble_server.server.batch.placement.ray_data import RayOptions, run_on_ray
from ensemble_server.server.batch.results.output_line import write_output
from ensemble_server.server.batch.running.failures import FailureWatch
from ensemble_server.server.batch.running.runner import Progress, run
from ensemble_server.server.config.blocks import Config
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.hosting import Hosting

pytestmark = pytest.mark.filterwarnings("default::DeprecationWarning")  # Ray's, of its own settings

LOCAL = RayOptions(workers=2, cpus=0.5, rows_per_batch=4, init={"num_cpus": 2, "object_store_memory": 80 * 2**20})


ASK = {"messages": [{"role": "user", "content": "To be?"}]}


def rows() -> list[Row | BadRow]:
    ask = {"messages": [{"role": "user", "content": "To be?"}], "max_tokens": 4, "ignore_eos": True}
    asked: list[Row | BadRow] = [
        Row(index, f"row {index}", "/v1/chat/completions", {"model": ("base", "crowd")[index % 2], **ask})
        for index in range(14)
    ]
    asked[5] = BadRow(5, None, 6, {"message": "no", "type": "invalid_request_error", "param": None, "code": "x"})
    asked[6] = Row(6, "row 6", "/v1/chat/completions", {"model": "nobody", **ask})
    return asked


def texts(store: JobStore) -> list[tuple[int, Sequence[str]]]:
    found = []
    for stored in store.rows():
        body = stored.result.body if stored.result is not None else {}
        found.append((stored.row.index, [choice["message"]["content"] for choice in body.get("choices", ())]))
    return found


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra `ray` is not installed")
def test_a_local_cluster_answers_what_one_process_answers(tiny_config: dict[str, Any], tmp_path: Path) -> None:
    import asyncio

    import ray

    config = parse_config(tiny_config, source=Path("/config.yaml"))
    with JobStore.open(tmp_path / "one.job", Identity()) as store:
        store.take_rows(rows())

        async def run_here() -> None:
            async with Hosting.open(config) as hosting:
                await run(store, hosting)

        asyncio.run(run_here())
        expected, expected_counts = texts(store), store.counts()

    told: list[Progress] = []
    with JobStore.open(tmp_path / "ray.job", Identity()) as store:
        store.take_rows(rows())
        summary = run_on_ray(store, config, LOCAL, on_progress=told.append)
        assert not ray.is_initialized(), "a cluster that was started here is stopped"
        assert texts(store) == expected
        assert summary.ended == "finished"
        assert summary.counts == expected_counts == store.counts()
        assert summary.completion_tokens > 0
        assert told[-1].done == 13
        write_output(store, tmp_path / "ray.jsonl")
        again = run_on_ray(store, config, LOCAL)
        assert again.counts == summary.counts
        assert again.completion_tokens == 0, "nothing is answered twice"


@pytest.fixture
def dead_remote(tmp_path: Path) -> Config:
    """A config of one remote model whose address nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    return parse_config({"models": {"base": {"url": url, "max_retries": 0}}}, source=tmp_path / "config.yaml")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra `ray` is not installed")
def test_a_job_on_ray_stops_where_nothing_is_answered(dead_remote: Config, tmp_path: Path) -> None:
    said: list[str] = []
    with JobStore.open(tmp_path / "a.job", Identity()) as store:
        store.take_rows(
            Row(index, f"row {index}", "/v1/chat/completions", ASK | {"model": "base"}) for index in range(200)
        )
        summary = run_on_ray(store, dead_remote, LOCAL, watch=FailureWatch(said.append))
    assert summary.ended == "failing"
    assert 20 <= summary.counts.failed < 200
    assert len(said) == 1 and "member 'base': cannot be reached" in said[0]


def test_without_ray_the_error_says_how_to_install_it(
    tiny_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without_ray(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "ray":
            raise ImportError("No module named 'ray'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_ray)
    config = parse_config(tiny_config, source=Path("/config.yaml"))
    with (
        JobStore.open(tmp_path / "a.job", Identity()) as store,
        pytest.raises(ConfigError, match=r"pip install 'ensemble-server\[ray\]'"),
    ):
        store.take_rows(rows())
        run_on_ray(store, config)
