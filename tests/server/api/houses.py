"""Tiny real models behind the whole HTTP API, for tests that run once per engine.

The fixtures `engine` and `folders` of tests/conftest.py say which engine it is and give models that it can run.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from ensemble_server.server.api.app import create_app
from ensemble_server.server.api.serve import listening
from ensemble_server.server.composition import SingleMember
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.engines.engine import StepStats
from ensemble_server.server.hosting import Hosting
from ensemble_server.server.metrics import Metrics
from tests.conftest import ENGINES
from tests.server.api.conftest import until

NUM_STEPS_OF_A_LONG_ANSWER = 150  # fewer than any answer takes that tests break off
ASKED = {"messages": [{"role": "user", "content": "def f(x): return?"}]}


@dataclass
class House:
    """A running server and a client of it. `steps`: what its engine has done. `body`: what each chat asks for."""

    client: httpx.AsyncClient
    hosting: Hosting
    steps: list[StepStats]
    body: dict[str, Any]

    async def complete(self, **body: Any) -> dict[str, Any]:
        return await self._post("/v1/completions", body)

    async def chat(self, model: str, **more: Any) -> dict[str, Any]:
        return await self._post("/v1/chat/completions", self.body | {"model": model} | more)

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        response = await self.client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    async def until_busy(self) -> None:
        """Wait until the engine works for a request that has just been sent."""
        self.steps.clear()
        await until(lambda: bool(self.steps) and self.steps[-1].num_running > 0)

    async def assert_idle(self) -> None:
        """Fail if the engine goes on with what nobody waits for: who asks next has it for itself, long before that
        would have come to its end. Counted in steps, so that no clock has a say."""
        member = next(name for name, model in self.hosting.models.items() if isinstance(model, SingleMember))
        while True:
            num_before = len(self.steps)
            await self.chat(member, max_tokens=3, n=1)
            mine = self.steps[num_before:]
            if mine and max(step.num_running + step.num_waiting for step in mine) <= 1:
                return
            assert len(self.steps) < NUM_STEPS_OF_A_LONG_ANSWER, "the engine still steps for nobody"


@asynccontextmanager
async def open_house(
    engine: str,
    models: dict[str, Any],
    folder: Path,
    *,
    body: dict[str, Any] = ASKED,
    limits: dict[str, int] | None = None,
    **blocks: Any,
) -> AsyncIterator[House]:
    """`models` on `engine`, behind a port of this machine. `limits`: keys of the config's block `engine`; `blocks`: its
    other blocks. What the server keeps goes into `folder`.
    """
    blocks |= {"models": models, "engine": ENGINES[engine] | (limits or {})}
    config = parse_config(blocks, source=folder / "config.yaml")
    steps: list[StepStats] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ENSEMBLE_CACHE", str(folder / "cache"))
        async with Hosting.open(config, on_step=steps.append) as hosting:
            free_port = config.server.model_copy(update={"port": 0})
            async with (
                listening(create_app(hosting, metrics=Metrics()), free_port) as port,
                httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=300) as client,
            ):
                yield House(client, hosting, steps, body)
