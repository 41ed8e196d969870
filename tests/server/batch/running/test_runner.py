"""Running a job: every row once, errors in their rows, and what is done stays done however the run ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ensemble_server.ensembles.base import GenerationRequest, MemberUsage
from ensemble_server.ensembles.crowd_vote import CrowdVote
from ensemble_server.ensembles.errors import ConfigError, EngineDeadError, MemberError, OverloadedError, StorageError
from ensemble_server.ensembles.method import Services
from ensemble_server.server.batch.job.identity import Identity
from ensemble_server.server.batch.job.rows import BadRow, Row, RowResult
from ensemble_server.server.batch.job.store import Counts, JobStore
from ensemble_server.server.batch.running import outages, runner
from ensemble_server.server.batch.running.answering import answer
from ensemble_server.server.batch.running.failures import MAX_HOPELESS, FailureWatch
from ensemble_server.server.batch.running.room import Room, num_sequences, sequences_of
from ensemble_server.server.batch.running.runner import Progress, RowBudget, Summary, run
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.engines.scripted_engine import Script, ScriptedModel
from ensemble_server.server.hosting import Hosting

CHAT = "/v1/chat/completions"
ERROR = {"message": "no", "type": "invalid_request_error", "param": None, "code": "invalid_row"}


def rows(num_rows: int, **body: Any) -> list[Row]:
    """Rows that ask "0", "1", ..."""
    asked = [{"messages": [{"role": "user", "content": str(index)}]} | body for index in range(num_rows)]
    return [Row(index, f"r{index}", CHAT, body) for index, body in enumerate(asked)]


def number_of(request: GenerationRequest) -> int:
    return int(request.messages[-1]["content"])


def says(text_of: Callable[[int], str | Script]) -> ScriptedModel:
    """A model that answers row i with `text_of(i)`."""

    def script(request: GenerationRequest, index: int) -> Script:
        said = text_of(number_of(request))
        return said if isinstance(said, Script) else Script((said,))

    return ScriptedModel("m", script)


def texts(store: JobStore) -> list[str | None]:
    """What became of each row: its text, the code of its error, or None."""
    found = []
    for stored in store.rows():
        body = stored.result and stored.result.body
        found.append(body and (body["error"]["code"] if "error" in body else body["choices"][0]["message"]["content"]))
    return found


# --- every row ---


async def test_every_row_is_answered_in_its_place(store: JobStore, scripted) -> None:
    store.take_rows(rows(20))
    hosting = scripted(m=says(lambda i: Script((f"answer {i}",), start_delay_s=0.02 * (i % 3))))
    summary = await run(store, hosting)
    assert summary.ended == "finished"
    assert summary.counts == Counts(total=20, ok=20, failed=0, cut=0)
    assert texts(store) == [f"answer {i}" for i in range(20)]
    assert summary.members == {"m": MemberUsage(0, 20)}
    assert (summary.completion_tokens, len(hosting.models["m"].requests)) == (20, 20)


async def test_a_failed_row_is_an_error_in_its_place(store: JobStore, scripted) -> None:
    asked = rows(3)
    asked[1] = replace(asked[1], body=asked[1].body | {"temperature": 9})
    store.take_rows([*asked, BadRow(3, None, 4, ERROR)])
    summary = await run(store, scripted())
    assert summary.ended == "finished"
    assert summary.counts == Counts(total=4, ok=2, failed=2, cut=0)
    assert texts(store) == ["Hello", "invalid_value", "Hello", None]


async def test_a_job_that_is_done_asks_nothing(store: JobStore, scripted) -> None:
    store.take_rows(rows(2))
    await run(store, scripted())
    hosting = scripted()
    assert (await run(store, hosting)).ended == "finished"
    assert hosting.models["m"].requests == []


async def test_equal_greedy_rows_are_asked_once(store: JobStore, scripted) -> None:
    same = [replace(row, index=index, custom_id=str(index)) for index, row in enumerate(rows(1, temperature=0) * 5)]
    store.take_rows(same)
    hosting = scripted()
    summary = await run(store, hosting)
    assert (summary.counts.ok, len(hosting.models["m"].requests)) == (5, 1)
    assert texts(store) == ["Hello"] * 5


async def test_rows_without_a_seed_get_one_of_their_own_that_the_job_fixes(tmp_path: Path, scripted) -> None:
    async def seeds(name: str, job_seed: int) -> list[int]:
        hosting = scripted()
        with JobStore.open(tmp_path / name, Identity(seed=job_seed)) as store:
            store.take_rows(rows(3))
            await run(store, hosting, concurrency=1)
        return [request.sampling.seed for request in hosting.models["m"].requests]

    first, again, other = await seeds("a", 1), await seeds("b", 1), await seeds("c", 2)
    assert first == again and len(set(first)) == 3 and not set(first) & set(other)
    assert all(0 <= seed < 2**31 for seed in first)


async def test_clients_go_first(store: JobStore, scripted) -> None:
    store.take_rows(rows(2))
    hosting = scripted()
    await run(store, hosting)
    assert [request.priority for request in hosting.models["m"].requests] == [1, 1]


async def test_the_models_must_be_those_that_began_the_job(store: JobStore, scripted) -> None:
    store.take_rows(rows(2))
    await run(store, scripted(m=says(lambda i: Script(("a",), fails_at=0) if i else "a")))
    hosting = scripted()
    hosting.fingerprint = lambda name: "fp_other"
    with pytest.raises(ConfigError, match="model 'm' is not what it was"):
        await run(store, hosting)


# --- how many at once ---


class Watched(ScriptedModel):
    """Notes how many of its generations lived at the same time."""

    most = 0

    async def generate(self, request: GenerationRequest):
        async for event in super().generate(request):
            self.most = max(self.most, self.num_live)
            yield event


async def test_no_more_rows_are_in_flight_than_allowed(store: JobStore, scripted) -> None:
    store.take_rows(rows(12))
    model = Watched("m", Script(("a",), delay_s=0.01))
    await run(store, scripted(m=model), concurrency=3)
    assert model.most == 3


async def test_by_default_two_batches_of_choices_are_in_flight(store: JobStore, scripted) -> None:
    hosting = scripted(m=(model := Watched("m", Script(("a",), delay_s=0.05))))
    assert num_sequences(hosting) == 2 * hosting.config.engine.max_batch == 64
    store.take_rows(rows(30, n=16))
    await run(store, hosting)
    assert model.most == 4


async def test_a_row_counts_for_all_that_its_model_asks(tiny_config: dict[str, Any]) -> None:
    remote = {"url": "http://127.0.0.1:9/v1", "max_concurrency": 5}
    voters = {"method": "crowd_vote", "members": ["base", "mix"], "samples": 4, "similarity": {"rouge_l_word": 1}}
    models = tiny_config["models"] | {"far": remote, "many": voters}
    async with Hosting.open(parse_config(tiny_config | {"models": models}, source=Path("/c.yaml"))) as hosting:
        assert num_sequences(hosting) == 2 * 8 + 5
        [one] = rows(1)
        weights = {name: sequences_of(replace(one, body={"model": name, "n": 2}), hosting) for name in models}
    assert weights == {"base": 2, "red": 2, "mix": 2, "crowd": 6, "far": 2, "many": 16}


async def test_a_row_that_is_too_large_for_the_room_waits_until_it_is_alone() -> None:
    room = Room(4)
    await room.take(3)
    large = asyncio.create_task(room.take(9))
    await asyncio.sleep(0)
    assert not large.done()
    room.give_back(3)
    await large
    next_one = asyncio.create_task(room.take(1))
    await asyncio.sleep(0)
    assert not next_one.done()
    room.give_back(9)
    await next_one


# --- what goes wrong ---


async def test_a_full_queue_is_waited_for_and_is_no_error(store: JobStore, scripted) -> None:
    refusals = iter([OverloadedError("full", retry_after_s=0.01)] * 3)

    def text_of(i: int) -> str | Script:
        refusal = next(refusals, None)
        return "a" if refusal is None else Script(("a",), fails_at=0, error=refusal)

    store.take_rows(rows(3))
    hosting = scripted(m=says(text_of))
    summary = await run(store, hosting)
    assert (summary.counts.ok, len(hosting.models["m"].requests)) == (3, 6)


async def test_a_member_that_fails_is_asked_twice_and_then_believed(store: JobStore, scripted) -> None:
    failing = {0: 1, 1: 9}

    def text_of(i: int) -> str | Script:
        failing[i] = failing.get(i, 0) - 1
        return Script(("a",), fails_at=0, error=MemberError("m", "sick")) if failing[i] >= 0 else "well"

    store.take_rows(rows(3))
    hosting = scripted(m=says(text_of))
    summary = await run(store, hosting, concurrency=1)
    assert texts(store) == ["well", "member_failed", "well"]
    assert summary.counts.failed == 1
    assert [number_of(request) for request in hosting.models["m"].requests] == [0, 0, 1, 1, 2]


async def test_failed_rows_run_again_when_they_are_forgotten(store: JobStore, scripted) -> None:
    store.take_rows(rows(4))
    sick = Script(("a",), fails_at=0)
    await run(store, scripted(m=says(lambda i: sick if i % 2 else "first")))
    assert texts(store) == ["first", "member_failed", "first", "member_failed"]
    assert store.forget_errors() == 2
    await run(store, scripted(m=says(lambda i: "second")))
    assert texts(store) == ["first", "second", "first", "second"]


async def test_a_dead_engine_ends_the_run_and_spoils_no_row(store: JobStore, scripted) -> None:
    def text_of(i: int) -> str | Script:
        return Script(("a",), fails_at=0, start_delay_s=0.1, error=EngineDeadError("gone")) if i == 4 else f"answer {i}"

    store.take_rows(rows(8))
    with pytest.raises(EngineDeadError, match="gone"):
        await run(store, scripted(m=says(text_of)), concurrency=2)
    assert store.counts().failed == 0
    assert texts(store)[:4] == [f"answer {i}" for i in range(4)] and texts(store)[4] is None
    await run(store, scripted(m=says(lambda i: f"answer {i}")))
    assert texts(store) == [f"answer {i}" for i in range(8)]


async def test_an_answer_from_the_moment_of_death_is_not_believed(store: JobStore, scripted) -> None:
    hosting = scripted()
    store.take_rows(rows(1))

    async def answer_while_dying(*args: Any, **kwargs: Any) -> RowResult:
        hosting.failure = "out of memory"  # a vote may go on without the members that died
        return await answer(*args, **kwargs)

    with pytest.raises(EngineDeadError, match="out of memory"):
        await run(store, hosting, answer=answer_while_dying)
    assert texts(store) == [None]
    with pytest.raises(EngineDeadError, match="out of memory"):
        await run(store, hosting)


@pytest.fixture
def crowd(scripted):
    """A vote of two, each of whom says its name."""
    hosting = scripted(left=Script(("left",)), right=Script(("right",)))
    config = CrowdVote.Config(
        method="crowd_vote", members=["left", "right"], similarity={"rouge_l_word": 1}, min_turnout=1
    )
    hosting.models["crowd"] = CrowdVote("crowd", config, dict(hosting.models), Services())
    hosting.listed.append("crowd")
    return hosting


async def test_rows_of_a_vote_wait_while_a_member_is_started_again(store: JobStore, crowd, monkeypatch) -> None:
    monkeypatch.setattr(runner, "TICK_S", 0.01)
    store.take_rows([*rows(2, model="crowd"), replace(rows(1, model="left")[0], index=2, custom_id="single")])
    crowd.down = frozenset({"right"})
    running = asyncio.create_task(run(store, crowd, concurrency=3))
    async with asyncio.timeout(5):
        while store.counts().ok == 0:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert texts(store) == [None, None, "left"]
        assert crowd.models["right"].requests == []
        crowd.down = frozenset()
        assert (await running).counts.ok == 3
    assert len(crowd.models["right"].requests) == 2


@pytest.mark.parametrize("is_back", [False, True], ids=["still down", "back again"])
async def test_a_vote_that_an_engine_left_meanwhile_is_taken_again(
    store: JobStore, crowd, monkeypatch, is_back: bool
) -> None:
    monkeypatch.setattr(runner, "TICK_S", 0.01)
    store.take_rows(rows(1, model="crowd"))
    num_asked = 0

    async def answer_while_dying(*args: Any, **kwargs: Any) -> RowResult:
        nonlocal num_asked
        num_asked += 1
        if num_asked > 1:
            return await answer(*args, **kwargs)
        crowd.down = frozenset() if is_back else frozenset({"right"})
        crowd.num_restarts = int(is_back)
        asyncio.get_running_loop().call_later(0.05, setattr, crowd, "down", frozenset())
        result = await answer(*args, **kwargs)
        return replace(result, body={**result.body, "choices": [{"message": {"content": "of one voter alone"}}]})

    async with asyncio.timeout(5):
        await run(store, crowd, answer=answer_while_dying)
    assert num_asked == 2 and texts(store) == ["left"]


async def test_at_the_deadline_a_vote_that_lacks_members_is_better_than_none(store: JobStore, crowd) -> None:
    store.take_rows(rows(1, model="crowd"))

    async def answer_late(*args: Any, **kwargs: Any) -> RowResult:
        crowd.down = frozenset({"right"})
        await asyncio.sleep(0.3)
        return await answer(*args, **kwargs)

    summary = await run(store, crowd, answer=answer_late, deadline_s=0.2)
    assert summary.ended == "deadline" and summary.counts == Counts(total=1, ok=1, failed=0, cut=1)
    assert texts(store) == ["left"]


async def test_results_that_cannot_be_kept_end_the_run(
    store: JobStore, scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosting = scripted(m=says(lambda i: Script(("a",), start_delay_s=0.0 if i == 0 else 5.0)))
    store.take_rows(rows(8))

    def refuse(results: object) -> None:
        raise StorageError("the disk is full")

    monkeypatch.setattr(store, "record", refuse)
    async with asyncio.timeout(2):
        with pytest.raises(StorageError, match="the disk is full"):
            await run(store, hosting)
    assert hosting.models["m"].num_live == 0
    monkeypatch.undo()
    await run(store, scripted())
    assert store.counts().ok == 8


# --- nobody there, and nothing but failures ---


class Endpoint(ScriptedModel):
    """Refuses requests as a remote model does whose server is down. `is_down`: of the n-th request, for row i."""

    def __init__(self, is_down: Callable[[int, int], bool]) -> None:
        super().__init__("m", self._script)
        self.is_out_of_reach = False
        self._is_down = is_down

    def _script(self, request: GenerationRequest, index: int) -> Script:
        self.is_out_of_reach = self._is_down(len(self.requests), number_of(request))
        refused = Script(("a",), fails_at=0, error=MemberError("m", "cannot reach it"))
        return refused if self.is_out_of_reach else Script(("well",))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST_S", "MAX_S"):
        monkeypatch.setattr(outages, name, 0.002)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("num_refusals", [3, 9])
async def test_rows_wait_while_an_endpoint_is_down_and_none_is_spent(
    store: JobStore, scripted, num_refusals: int
) -> None:
    store.take_rows(rows(6))
    said: list[str] = []
    async with asyncio.timeout(5):
        summary = await run(store, scripted(m=Endpoint(lambda n, i: n <= num_refusals)), concurrency=3, say=said.append)
    assert (summary.ended, summary.counts.ok, summary.counts.failed) == ("finished", 6, 0)
    assert said[0] == "waits 0.002 s and tries again: member 'm': cannot reach it"
    assert said[-1] == "model 'm' answers again"


@pytest.mark.usefixtures("impatient")
async def test_an_address_that_never_answers_ends_the_run_and_keeps_all_rows(store: JobStore, scripted) -> None:
    store.take_rows(rows(6))
    said: list[str] = []
    endpoint = Endpoint(lambda n, i: True)
    async with asyncio.timeout(5):
        summary = await run(store, scripted(m=endpoint), concurrency=2, watch=FailureWatch(said.append))
    assert (summary.ended, summary.counts.pending) == ("failing", 6)
    assert said == ["row 'r0' failed: member 'm': cannot reach it"]
    assert len(endpoint.requests) <= MAX_HOPELESS + 2


@pytest.mark.usefixtures("impatient")
async def test_a_row_that_an_endpoint_never_gets_through_is_given_up_in_the_end(
    store: JobStore, scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "MAX_TRIES_OUT_OF_REACH", 3)
    store.take_rows(rows(4))
    endpoint = Endpoint(lambda n, i: i == 2)
    async with asyncio.timeout(5):
        await run(store, scripted(m=endpoint), concurrency=1)
    assert texts(store) == ["well", "well", "member_failed", "well"]


async def test_a_run_in_which_everything_fails_stops_early_and_says_why_once(store: JobStore, scripted) -> None:
    store.take_rows(rows(200))
    said: list[str] = []
    sick = scripted(m=says(lambda i: Script(("a",), fails_at=0, error=MemberError("m", f"no key for row {i}"))))
    summary = await run(store, sick, concurrency=1, watch=FailureWatch(said.append))
    assert summary.ended == "failing"
    assert MAX_HOPELESS <= summary.counts.failed <= MAX_HOPELESS + 1, "the one that had begun"
    assert said == ["row 'r0' failed: member 'm': no key for row 0"]


async def test_a_run_ends_after_as_many_errors_as_it_may_have(store: JobStore, scripted) -> None:
    store.take_rows(rows(20))
    sick = Script(("a",), fails_at=0)
    hosting = scripted(m=says(lambda i: sick if i % 2 else "well"))
    summary = await run(store, hosting, concurrency=1, watch=FailureWatch(max_errors=3))
    assert summary.ended == "failing"
    assert summary.counts.failed == 3
    assert summary.counts.pending


# --- ending early ---


@pytest.mark.parametrize("how", ["stop", "cancel"])
async def test_a_run_that_is_stopped_keeps_what_is_done(store: JobStore, scripted, how: str) -> None:
    store.take_rows(rows(8))
    stuck = scripted(m=says(lambda i: f"answer {i}" if i < 3 else Script(("a",), stalls_at=0)))
    stop = asyncio.Event()
    task = asyncio.create_task(run(store, stuck, stop=stop))
    async with asyncio.timeout(5):
        while store.counts().ok < 3:
            await asyncio.sleep(0.01)
        if how == "stop":
            stop.set()
            assert (await task).ended == "stopped"
        else:
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
    assert stuck.models["m"].num_live == 0
    assert store.counts() == Counts(total=8, ok=3, failed=0, cut=0)
    await run(store, scripted(m=says(lambda i: f"answer {i}")))
    assert texts(store) == [f"answer {i}" for i in range(8)]


async def test_an_answer_that_came_just_before_the_stop_is_kept(store: JobStore, scripted) -> None:
    store.take_rows(rows(2))
    stop = asyncio.Event()

    async def answer_then_stop(hosting: Any, row: Row, **kwargs: Any) -> RowResult:
        if row.index:
            await asyncio.sleep(60)
        result = await answer(hosting, row, **kwargs)
        asyncio.get_running_loop().call_later(0.0, stop.set)
        return result

    assert (await run(store, scripted(), stop=stop, answer=answer_then_stop)).ended == "stopped"
    assert texts(store) == ["Hello", None]


@pytest.mark.slow
async def test_a_deadline_ends_rows_with_what_they_have_and_they_run_again(
    tiny_config: dict[str, Any], store: JobStore
) -> None:
    asked = rows(24, model="base", max_tokens=100, temperature=0, ignore_eos=True)
    store.take_rows(asked)
    async with Hosting.open(parse_config(tiny_config, source=Path("/c.yaml"))) as hosting:
        summary = await run(store, hosting, deadline_s=0.3)
        assert summary.ended == "deadline"
        assert summary.counts.cut > 0 and summary.counts.pending > 0 and summary.counts.failed == 0
        cut = [stored.result.body for stored in store.rows() if stored.result and stored.result.is_cut]
        assert all(body["choices"][0]["message"]["content"] for body in cut)
        whole = await run(store, hosting)
    assert whole.counts == Counts(total=24, ok=24, failed=0, cut=0)
    assert all(stored.result.body["usage"]["completion_tokens"] == 100 for stored in store.rows())


async def test_rows_that_have_nothing_by_the_deadline_stay_pending(store: JobStore, scripted) -> None:
    store.take_rows(rows(6))
    hosting = scripted(m=says(lambda i: Script(("a",), start_delay_s=0.3)))

    async def impatient(hosting: Any, row: Row, *, deadline_s: float, priority: int) -> RowResult:
        if deadline_s < 0.3:
            await asyncio.sleep(deadline_s)
            return RowResult(504, "req", {"error": ERROR | {"code": "deadline_exceeded"}})
        return await answer(hosting, row, deadline_s=deadline_s, priority=priority)

    summary = await run(store, hosting, concurrency=2, deadline_s=0.5, answer=impatient)
    assert summary.ended == "deadline"
    assert summary.counts == Counts(total=6, ok=2, failed=0, cut=0)


async def test_a_row_that_ignores_the_deadline_is_given_up(
    store: JobStore, scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ensemble_server.server.batch.running.runner.GRACE_S", 0.1)
    store.take_rows(rows(2))
    hosting = scripted(m=says(lambda i: Script(("a",), stalls_at=0) if i else "a"))
    async with asyncio.timeout(5):
        summary = await run(store, hosting, deadline_s=0.1)
    assert (summary.ended, summary.counts.ok, summary.counts.pending) == ("deadline", 1, 1)


class Shares:
    """A budget that gives what it is told to and remembers what it is told."""

    def __init__(self, *allowances: float | None) -> None:
        self._allowances: Iterator[float | None] = iter(allowances)
        self.left: list[int] = []
        self.used: list[tuple[float | None, bool]] = []

    def allowance_s(self, num_left: int) -> float | None:
        self.left.append(num_left)
        return next(self._allowances)

    def ended(self, allowed_s: float | None, used_s: float) -> None:
        self.used.append((allowed_s, used_s < 1))


async def test_a_budget_gives_each_row_its_time_and_hears_what_it_took(store: JobStore, scripted) -> None:
    store.take_rows(rows(3))
    hosting = scripted()
    budget: RowBudget = Shares(5.0, None, 7.0)
    await run(store, hosting, concurrency=2, budget=budget, deadline_s=6)
    limits = [request.deadline_s for request in hosting.models["m"].requests]
    assert limits == [5.0, pytest.approx(6, abs=0.9), pytest.approx(6, abs=0.9)]  # never more than the job has
    assert budget.left == [3, 2, 1]
    assert set(budget.used) == {(5.0, True), (None, True), (7.0, True)}


async def test_a_row_that_used_up_its_own_time_is_done(store: JobStore, tiny_config: dict[str, Any]) -> None:
    store.take_rows(rows(1, model="base", max_tokens=100, temperature=0, ignore_eos=True))
    async with Hosting.open(parse_config(tiny_config, source=Path("/c.yaml"))) as hosting:
        summary = await run(store, hosting, budget=Shares(0.05), deadline_s=60)
    assert (summary.ended, summary.counts) == ("finished", Counts(total=1, ok=1, failed=0, cut=0))


# --- progress ---


async def test_progress_is_told_from_the_first_moment_to_the_last(store: JobStore, scripted) -> None:
    told: list[Progress] = []
    store.take_rows(rows(10))
    hosting = scripted(m=says(lambda i: Script(("a", "b"), delay_s=0.05)))
    summary: Summary = await run(store, hosting, concurrency=4, on_progress=told.append)
    assert (told[0].done, told[0].counts.total) == (0, 10)
    assert max(one.running for one in told) == 4
    assert [one.done for one in told] == sorted(one.done for one in told)
    last = told[-1]
    assert (last.done, last.running, last.counts, last.completion_tokens) == (10, 0, summary.counts, 20)
    assert last.members == summary.members == {"m": MemberUsage(0, 20)}


async def test_silence_is_told_too(store: JobStore, scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ensemble_server.server.batch.running.runner.TICK_S", 0.02)
    told: list[Progress] = []
    store.take_rows(rows(1))
    await run(store, scripted(m=Script(("a",), delay_s=0.3)), on_progress=told.append)
    assert len(told) > 3


async def test_what_waits_for_the_disk_stays_off_the_event_loop(store: JobStore, scripted, monkeypatch) -> None:
    store.take_rows(rows(300))
    threads: dict[str, set[int]] = {}

    def noted(name: str, call: Callable) -> Callable:
        def note(*args: Any, **kwargs: Any) -> Any:
            threads.setdefault(name, set()).add(threading.get_ident())
            return call(*args, **kwargs)

        return note

    waiting = ("bind_models", "num_to_run", "pending", "record", "spent")
    for name in waiting:
        monkeypatch.setattr(store, name, noted(name, getattr(store, name)))
    assert (await run(store, scripted())).counts.ok == 300
    assert sorted(threads) == sorted(waiting)
    assert threading.get_ident() not in set().union(*threads.values())
