"""Scripted models behind a hosting, for what real ones cannot be made to do, and a tiny real house of members."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ensemble_server.ensembles.base import Model
from ensemble_server.server.batch.job.identity import Identity
from ensemble_server.server.batch.job.store import JobStore
from ensemble_server.server.engines.scripted_engine import Script, ScriptedModel
from tests.server.api.conftest import ScriptedHosting

HostingMaker = Callable[..., ScriptedHosting]


@pytest.fixture
def scripted(tmp_path: Path) -> HostingMaker:
    """scripted(name=Script | function | Model, server={...}): models without a tokenizer."""

    def make(server: dict[str, Any] | None = None, **scripts: Any) -> ScriptedHosting:
        models: dict[str, Model] = {
            name: script if hasattr(script, "generate") else ScriptedModel(name, script)
            for name, script in (scripts or {"m": Script(("Hel", "lo"))}).items()
        }
        return ScriptedHosting(models, {}, tmp_path / "server", **(server or {}))

    return make


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    with JobStore.open(tmp_path / "answers.jsonl.job", Identity()) as store:
        yield store


@pytest.fixture(scope="session")
def tiny_config(tiny: dict[str, Path]) -> dict[str, Any]:
    """The value of a YAML file: a member, one with an adapter, their average and a vote of all three."""
    return {
        "models": {
            "base": {"path": str(tiny["llama"])},
            "red": {"base": "base", "adapter": str(tiny["red"])},
            "mix": {"method": "probability_average", "members": ["base", "red"]},
            "crowd": {"method": "crowd_vote", "members": ["base", "red", "mix"], "similarity": {"rouge_l_word": 1}},
        },
        "engine": {"max_context": 128, "max_batch": 8},
    }
