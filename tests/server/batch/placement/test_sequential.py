"""Real tiny models: what is answered member by member is what is answered with all of them resident."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.batch.job.identity import Identity, seeded
from ensemble_server.server.batch.job.rows import Row, RowResult, Url
from ensemble_server.server.batch.job.store import JobStore
from ensemble_server.server.batch.placement.call_log import CallLog
from ensemble_server.server.batch.placement.memory_estimate import estimated_memory
from ensemble_server.server.batch.placement.phases import Phase, check_can_be_sequential, phases
from ensemble_server.server.batch.placement.sequential import run_sequential
from ensemble_server.server.batch.running.answering import answer
from ensemble_server.server.config.blocks import Config
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.hosting import Hosting
from tests.thinned import first_fast

CHAT: Url = "/v1/chat/completions"


@pytest.fixture(scope="module")
def house(tiny: dict[str, Path]) -> dict[str, Any]:
    return {
        "models": {
            "base": {"path": str(tiny["llama"])},
            "red": {"base": "base", "adapter": str(tiny["red"])},
            "deep": {"path": str(tiny["deep"])},
            "mix": {"method": "probability_average", "members": ["base", "red"]},
            "crowd": {"method": "crowd_vote", "members": {"base": 1, "deep": 2}, "min_turnout": 2},
            "major": {"method": "majority", "members": ["base", "red", "deep"], "samples": 2},
            "fused": {"method": "answer_fusion", "members": ["base", "deep"], "aggregator": "mix"},
            "judged": {"method": "ranking", "members": ["red", "deep"], "judge": "base"},
            "likely": {"method": "ranking", "members": ["base", "deep"], "samples": 2},
            "nested": {"method": "crowd_vote", "members": ["crowd", "mix"]},
            "talk": {"method": "exchange_of_thought", "members": ["base", "deep"]},
            "routed": {"method": "routing", "members": {"base": {"positive_prompts": ["x"]}}},
            "around": {"method": "crowd_vote", "members": ["base", "talk"]},
        },
        "engine": {"max_context": 400, "max_batch": 8},
    }


@pytest.fixture(scope="module")
def config(house: dict[str, Any]) -> Config:
    return parse_config(house, source=Path("/config.yaml"))


def rows_of(models: Sequence[str], num_rows: int = 2, **body: Any) -> list[Row]:
    return [
        Row(
            index,
            f"row {index}",
            CHAT,
            {
                "model": models[index % len(models)],
                "messages": [{"role": "user", "content": f"Is {index} odd?"}],
                "max_tokens": 6,
                "ignore_eos": True,
                **body,
            },
        )
        for index in range(num_rows * len(models))
    ]


async def sequential(
    config: Config, rows: Sequence[Row], folder: Path, said: list[str] | None = None
) -> dict[int, RowResult]:
    with JobStore.open(folder / "a.job", Identity()) as store, CallLog.open(folder / "a.calls") as log:
        store.take_rows(rows)
        await run_sequential(store, config, log, say=(said if said is not None else []).append)
        return {stored.row.index: stored.result for stored in store.rows() if stored.result is not None}


def shown(result: RowResult) -> tuple[Any, ...]:
    """What an answer says: not the last bits of log-probabilities, which depend on who shared a step, nor how far those
    had come whom a majority stopped."""
    choices = [(choice["message"]["content"], choice["finish_reason"]) for choice in result.body.get("choices", ())]
    usage = None if result.body.get("model") == "major" else result.body.get("usage")
    return result.status_code, choices, usage, result.request_id


@pytest.mark.parametrize(
    "changes", first_fast([{}, {"n": 6}, {"n": 4, "stop_when_decided": "text"}]), ids=["plain", "n", "vote"]
)
async def test_answers_are_those_of_members_that_are_all_resident(
    config: Config, tmp_path: Path, changes: dict[str, Any]
) -> None:
    models = ["crowd", "major", "fused", "judged", "likely", "nested", "base"]
    rows = rows_of(models, 1 if changes else 2, **changes)
    async with Hosting.open(config) as hosting:
        resident = {row.index: await answer(hosting, seeded(row, 0)) for row in rows}
    found = await sequential(config, rows, tmp_path)
    assert {index: shown(result) for index, result in found.items()} == {
        index: shown(result) for index, result in resident.items()
    }
    assert all(result.is_ok for result in found.values())


@pytest.mark.slow
async def test_labels_are_averaged_over_members_that_were_never_loaded_together(config: Config, tmp_path: Path) -> None:
    body = {"model": "crowd", "prompt": "The fox is", "labels": ["quick", "lazy"], "content_free": {"prompt": "It is"}}
    rows = [Row(index, str(index), "/v1/classify", {**body, "prompt": f"Fox {index} is"}) for index in range(3)]
    async with Hosting.open(config) as hosting:
        resident = [(await answer(hosting, row)).body["probabilities"] for row in rows]
    found = await sequential(config, rows, tmp_path)
    assert [found[index].body["probabilities"] for index in range(3)] == [
        pytest.approx(probabilities, abs=1e-5) for probabilities in resident
    ]


async def test_each_phase_is_loaded_once_per_round(config: Config, tmp_path: Path) -> None:
    said: list[str] = []
    await sequential(config, rows_of(["crowd", "major"], 3), tmp_path, said)
    loads = [line for line in said if line.startswith("loading")]
    assert loads == ["loading base, red for 15 calls", "loading deep for 9 calls"]


async def test_a_bad_row_and_a_member_that_refuses_are_errors_of_their_rows(config: Config, tmp_path: Path) -> None:
    rows = [
        *rows_of(["crowd"], 1),
        Row(1, "long", CHAT, {"model": "crowd", "messages": [{"role": "user", "content": "word " * 900}]}),
        Row(2, "wrong", CHAT, {"model": "crowd", "messages": []}),
        Row(3, "tokens", CHAT, {"model": "crowd", "messages": rows_of(["a"], 1)[0].body["messages"], "logprobs": True}),
    ]
    found = await sequential(config, rows, tmp_path)
    assert [found[index].status_code for index in range(4)] == [200, 400, 400, 400]
    assert found[1].body["error"]["code"] == "context_length_exceeded"


async def test_the_log_answers_another_vote_without_loading_anything(config: Config, tmp_path: Path) -> None:
    await sequential(config, rows_of(["crowd"]), tmp_path)
    (tmp_path / "a.job").unlink()
    said: list[str] = []
    rows = rows_of(["crowd"], ensemble={"weights": {"base": 5, "deep": 1}}, seed=None)
    found = await sequential(config, rows, tmp_path, said)
    assert all(result.is_ok for result in found.values())
    assert not [line for line in said if line.startswith("loading")]


@pytest.mark.slow
async def test_a_run_that_was_stopped_goes_on(config: Config, tmp_path: Path) -> None:
    rows = rows_of(["major"], 3)
    whole_folder = tmp_path / "whole"
    whole_folder.mkdir()
    whole = await sequential(config, rows, whole_folder)
    stop = asyncio.Event()
    with JobStore.open(tmp_path / "a.job", Identity()) as store, CallLog.open(tmp_path / "a.calls") as log:
        store.take_rows(rows)
        said: list[str] = []

        def say(text: str) -> None:
            said.append(text)
            if text.startswith("loading deep"):
                stop.set()  # base and red have answered, deep has not

        await run_sequential(store, config, log, stop=stop, say=say)
        assert store.counts().pending == 3
    again: list[str] = []
    assert await sequential(config, rows, tmp_path, again) == whole
    assert [line for line in again if line.startswith("loading")] == ["loading deep for 6 calls"]


async def test_when_the_deadline_passes_members_that_were_not_asked_are_silent(config: Config, tmp_path: Path) -> None:
    rows = rows_of(["major", "crowd"], 2)  # of the crowd both members must answer
    with JobStore.open(tmp_path / "a.job", Identity()) as store, CallLog.open(tmp_path / "a.calls") as log:
        store.take_rows(rows)
        passed = False

        def say(text: str) -> None:
            nonlocal passed
            passed = passed or text.startswith("loading deep")

        summary = await run_sequential(store, config, log, is_over=lambda: passed, say=say)
        assert summary.ended == "deadline"
        results = {stored.row.index: stored.result for stored in store.rows()}
    assert [results[index] is not None for index in range(4)] == [True, False, True, False]
    assert results[0].is_cut
    assert results[0].body["ensemble"]["turnout"] == 2
    whole = await sequential(config, rows, tmp_path)
    assert [whole[index].body["ensemble"]["turnout"] for index in range(4)] == [3, 2, 3, 2]


# --- what can run this way, and what it takes ---


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mix", "averages its members' next-token distributions at every token"),
        ("talk", r"'talk' \(exchange_of_thought\) .* every round"),
        ("around", r"'talk' \(exchange_of_thought\)"),
        ("routed", r"\(routing\)"),
    ],
)
def test_what_needs_its_members_together_says_why(house: dict[str, Any], name: str, said: str) -> None:
    models = dict(house["models"])
    models["mix"] = {"method": "probability_average", "members": ["base", "deep"]}
    config = parse_config({"models": models}, source=Path("/config.yaml"))
    with pytest.raises(ConfigError, match=said):
        check_can_be_sequential(config, name)


def test_members_on_the_same_weights_are_loaded_together(config: Config) -> None:
    assert phases(config, ["nested", "major"]) == (
        Phase(("base", "red", "mix"), ("base",)),
        Phase(("deep",), ("deep",)),
    )


def test_memory_is_estimated_from_headers(config: Config) -> None:
    estimate = estimated_memory(config, ["major"])
    of_base, of_deep = estimate.phases.values()
    assert estimate.peak == max(of_base, of_deep)
    assert estimate.resident == of_base + of_deep
    assert len(list(estimate.sentences())) == 3


# --- kill -9 ---

SCRIPT = """
import asyncio, sys
from pathlib import Path
from ensemble_server.server.batch.placement.call_log import CallLog
from ensemble_server.server.batch.job.identity import Identity
from ensemble_server.server.batch.results.output_line import write_output
from ensemble_server.server.batch.placement.sequential import run_sequential
from ensemble_server.server.batch.job.store import JobStore
from ensemble_server.server.config.loading import load_config
from tests.server.batch.placement.test_sequential import rows_of

folder = Path(sys.argv[2])
with JobStore.open(folder / "a.job", Identity()) as store, CallLog.open(folder / "a.calls") as log:
    store.take_rows(rows_of(["fused", "major"], 12))
    asyncio.run(run_sequential(store, load_config(Path(sys.argv[1])), log, say=lambda text: print(text, flush=True)))
    write_output(store, folder / "a.jsonl")
"""


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_with_the_bytes_of_an_undisturbed_run(
    house: dict[str, Any], tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(house), encoding="utf-8")
    folders = tmp_path / "whole", tmp_path / "killed"
    for folder in folders:
        folder.mkdir()

    def start(folder: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SCRIPT, str(config), str(folder)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": "."})

    with start(folders[0]) as process:
        assert len(process.stdout.readlines()) > 3
    moments = random.Random(0)
    num_killed = 0
    for latest in (1, 3, 3, 3):  # kills follow what it says, not the clock: a fast machine is at work then, too
        with start(folders[1]) as process:
            for _ in range(moments.randint(1, latest)):
                process.stdout.readline()
            time.sleep(moments.uniform(0, 0.2))
            process.send_signal(signal.SIGKILL)
            num_killed += process.wait() == -signal.SIGKILL
    assert num_killed
    with start(folders[1]) as process:
        assert process.wait() == 0
    whole, killed = [(folder / "a.jsonl").read_bytes() for folder in folders]
    assert killed == whole
    assert all(orjson.loads(line)["error"] is None for line in whole.splitlines())
