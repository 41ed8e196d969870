"""Users and batches on a real vLLM: who is served next when all places are taken, and who is turned away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

pytest.importorskip("vllm", reason="needs vLLM: make test-vllm")

from ensemble_server.ensembles.base import Done, GenerationRequest, Model, PromptScored, Sampling
from ensemble_server.ensembles.errors import OverloadedError
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.engines.engine import StepStats
from ensemble_server.server.hosting import Hosting
from tests.conftest import WIDE, make_model
from tests.server.api.conftest import until

pytestmark = [pytest.mark.vllm, pytest.mark.asyncio(loop_scope="module")]

PLACES, QUEUE = 2, 3
USER, ROW = 0, 1  # priorities


class Traffic:
    """Requests to one model. `log`: whose answer began and ended, as it happened."""

    def __init__(self, model: Model, steps: list[StepStats]) -> None:
        self._model = model
        self._steps = steps
        self.log: list[str] = []

    def send(self, name: str, priority: int, num_tokens: int) -> asyncio.Task[None]:
        sampling = Sampling(max_tokens=num_tokens, ignore_eos=True)
        request = GenerationRequest(prompt=(5, 6), sampling=sampling, priority=priority)
        return asyncio.create_task(self._answer(name, request))

    async def _answer(self, name: str, request: GenerationRequest) -> None:
        async for event in self._model.generate(request):
            if isinstance(event, PromptScored):
                self.log.append(f"{name} begins")
            if isinstance(event, Done):
                self.log.append(f"{name} ends")

    async def until_load_is(self, num_running: int, num_waiting: int) -> None:
        def is_so() -> bool:
            last = self._steps[-1] if self._steps else None
            return last is not None and (last.num_running, last.num_waiting) == (num_running, num_waiting)

        await until(is_so, timeout_s=60)

    async def fill_with_rows(self) -> list[asyncio.Task[None]]:
        """All places are taken, and the queue of rows is full. The row that ends first is `row 0`."""
        rows = []
        for number, num_tokens in enumerate((300, 480, 20, 20, 20)):
            rows.append(self.send(f"row {number}", ROW, num_tokens))
            await self.until_load_is(min(number + 1, PLACES), max(0, number + 1 - PLACES))
        return rows


@pytest.fixture(scope="module")
def steps() -> list[StepStats]:
    return []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hosting(steps: list[StepStats], tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Hosting]:
    root = tmp_path_factory.mktemp("priorities")
    blocks = {
        "models": {"only": {"path": str(make_model(root / "model", **WIDE)), "dtype": "float32"}},
        "server": {"max_queue": QUEUE},
        "engine": {
            "kind": "vllm",
            "max_batch": PLACES,
            "max_context": 512,
            "kv_cache_gb": 0.1,
            "options": {"enforce_eager": True},
        },
    }
    async with Hosting.open(parse_config(blocks, source=root / "config.yaml"), on_step=steps.append) as hosting:
        yield hosting


@pytest.fixture
def traffic(hosting: Hosting, steps: list[StepStats]) -> Traffic:
    steps.clear()
    return Traffic(hosting.models["only"], steps)


async def test_a_user_is_served_before_waiting_rows_and_running_rows_go_on(traffic: Traffic) -> None:
    rows = await traffic.fill_with_rows()
    user = traffic.send("user", USER, 5)
    await asyncio.gather(user, *rows)
    log = traffic.log
    assert log[:4] == ["row 0 begins", "row 1 begins", "row 0 ends", "user begins"]
    assert log.index("user ends") < log.index("row 2 begins")
    assert len(log) == 2 * (1 + PLACES + QUEUE)


async def test_rows_are_served_in_the_order_in_which_they_came(traffic: Traffic) -> None:
    await asyncio.gather(*await traffic.fill_with_rows())
    begun = [line.removesuffix(" begins") for line in traffic.log if line.endswith("begins")]
    assert begun == [f"row {number}" for number in range(PLACES + QUEUE)]


async def test_a_queue_full_of_rows_turns_rows_away_and_takes_users_until_theirs_is_full(traffic: Traffic) -> None:
    rows = await traffic.fill_with_rows()
    with pytest.raises(OverloadedError, match="3 requests are waiting, the queue is full") as refused:
        await traffic.send("one row too many", ROW, 1)
    assert refused.value.retry_after_s > 0
    users = []
    for number in range(QUEUE):
        users.append(traffic.send(f"user {number}", USER, 5))
        await traffic.until_load_is(PLACES, QUEUE + number + 1)
    with pytest.raises(OverloadedError, match="3 requests are waiting, the queue is full"):
        await traffic.send("one user too many", USER, 1)
    await asyncio.gather(*users, *rows)
    begun = [line.removesuffix(" begins") for line in traffic.log if line.endswith("begins")]
    assert begun[PLACES : PLACES + QUEUE] == ["user 0", "user 1", "user 2"]
    assert len(begun) == PLACES + 2 * QUEUE
