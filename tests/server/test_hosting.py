from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from ensemble_server.ensembles.base import (
    Delta,
    DistributionModel,
    Done,
    GenerationRequest,
    PromptScored,
    Sampling,
    collect,
)
from ensemble_server.ensembles.errors import EngineDeadError, ModelLoadError, RequestError
from ensemble_server.server.config.blocks import Config
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.engines.engine import StepStats
from ensemble_server.server.engines.transformers_engine import members
from ensemble_server.server.hosting import Hosting
from tests.conftest import make_model
from tests.server.engines.transformers_engine.vocabularies import word_piece

EngineThreads = Callable[[], set[threading.Thread]]
REMOTE = {"url": "http://127.0.0.1:9/v1"}


def config_of(models: dict[str, Any], **blocks: Any) -> Config:
    return parse_config({"models": models, "engine": {"max_context": 128}, **blocks}, source=Path("/config.yaml"))


@asynccontextmanager
async def hosted(models: dict[str, Any], **options: Any) -> AsyncIterator[Hosting]:
    async with Hosting.open(config_of(models), **options) as hosting:
        yield hosting


def crowd(*members: str, **changes: Any) -> dict[str, Any]:
    return {"method": "crowd_vote", "members": list(members), "similarity": {"rouge_l_word": 1}, **changes}


def average(*members: str, **changes: Any) -> dict[str, Any]:
    return {"method": "probability_average", "members": list(members), **changes}


@pytest.fixture
def house(tiny: dict[str, Path]) -> dict[str, Any]:
    """Every ensemble stands before what it is made of."""
    return {
        "outer": crowd("inner", "far"),
        "inner": crowd("mix", "deep"),
        "mix": average("code", "base", pool="posterior", share=0.01),
        "far": REMOTE,
        "deep": {"path": str(tiny["deep"])},
        "code": {"base": "base", "adapter": str(tiny["red"]), "listed": False},
        "base": {"path": str(tiny["llama"])},
    }


def ask(*, max_tokens: int = 4, **changes: Any) -> GenerationRequest:
    sampling = Sampling(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    return GenerationRequest(prompt="To be", sampling=sampling, **changes)


@pytest.fixture
def engine_threads() -> EngineThreads:
    """The engines that this test has started and that still run."""

    def running() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name == "engine"}

    before = running()
    return lambda: running() - before


# --- what is hosted ---


async def test_models_stand_in_the_configs_order_whatever_they_are_made_of(house: dict[str, Any]) -> None:
    async with hosted(house) as hosting:
        assert list(hosting.models) == list(house)
        assert hosting.listed == ["outer", "inner", "mix", "far", "deep", "base"]
        assert all(model.name == name for name, model in hosting.models.items())
        assert hosting.models["outer"].models["inner"] is hosting.models["inner"]
        assert hosting.models["inner"].models["mix"] is hosting.models["mix"]
        assert hosting.failure is None


async def test_members_and_mixtures_answer(house: dict[str, Any]) -> None:
    async with hosted(house) as hosting:
        for name, method, members in [
            ("base", "member", ("base",)),
            ("code", "member", ("code",)),
            ("mix", "probability_average", ("code", "base")),
        ]:
            model = hosting.models[name]
            assert isinstance(model, DistributionModel)
            answer = await collect(model, ask())
            assert (answer.done.method, answer.done.members) == (method, members)
            assert answer.done.usage.completion_tokens == 4
        crowd = await collect(hosting.models["inner"], ask())
        assert (crowd.done.method, crowd.done.turnout) == ("crowd_vote", 2)


async def test_a_single_member_may_be_weighted_but_not_exchanged(house: dict[str, Any]) -> None:
    async with hosted(house) as hosting:
        base = hosting.models["base"]
        weighted = await collect(base, ask(overrides={"weights": {"base": 3}, "pool": "geometric"}))
        assert weighted.text == (await collect(base, ask())).text
        with pytest.raises(RequestError, match="names 'deep', which is no member"):
            base.generate(ask(overrides={"weights": {"deep": 1}}))


async def test_the_context_of_an_ensemble_is_its_shortest_members(tiny: dict[str, Path], tmp_path: Path) -> None:
    short = make_model(tmp_path / "short", max_position_embeddings=64)
    models = {"base": {"path": str(tiny["llama"])}, "short": {"path": str(short)}, "mix": average("base", "short")}
    async with hosted(models) as hosting:
        assert {name: model.max_model_len for name, model in hosting.models.items()} == {
            "base": 128,
            "short": 64,
            "mix": 64,
        }


async def test_steps_are_reported(house: dict[str, Any]) -> None:
    steps: list[StepStats] = []
    async with hosted(house, on_step=steps.append) as hosting:
        await collect(hosting.models["mix"], ask())
    assert sum(step.num_tokens["base"] for step in steps) >= 5
    assert all(step.duration_s > 0 for step in steps)


async def test_a_house_of_remote_models_runs_no_engine(engine_threads: EngineThreads) -> None:
    async with hosted({"far": REMOTE, "crowd": crowd("far")}) as hosting:
        assert engine_threads() == set() and hosting.failure is None
        assert hosting.surface("far") is None and hosting.surface("crowd") is None


# --- how models read text ---


async def test_the_surface_of_an_ensemble_is_its_first_hosted_members(house: dict[str, Any]) -> None:
    house["remote_first"] = crowd("far", "deep")
    async with hosted(house) as hosting:
        surfaces = {name: hosting.surface(name) for name in house}
    assert surfaces["mix"] is surfaces["inner"] is surfaces["outer"] is surfaces["code"]
    assert surfaces["remote_first"] is surfaces["deep"]
    assert surfaces["far"] is None
    assert len({id(surfaces[name]) for name in ("base", "code", "deep")}) == 3


# --- fingerprints ---


async def fingerprints(models: dict[str, Any], **blocks: Any) -> dict[str, str]:
    async with Hosting.open(config_of(models, **blocks)) as hosting:
        return {name: hosting.fingerprint(name) for name in models}


async def test_a_fingerprint_follows_what_can_change_the_answers(house: dict[str, Any]) -> None:
    before = await fingerprints(house)
    assert len(set(before.values())) == len(house)
    assert all(value.startswith("fp_") for value in before.values())

    def changed(after: dict[str, str]) -> set[str]:
        return {name for name in house if after[name] != before[name]}

    assert changed(await fingerprints(house)) == set()
    weighted = house | {"mix": average(pool="posterior", share=0.01) | {"members": {"code": 1, "base": 2}}}
    assert changed(await fingerprints(weighted)) == {"mix", "inner", "outer"}
    polite = house | {"base": house["base"] | {"system_prompt": "Please."}}
    assert changed(await fingerprints(polite)) == {"base", "code", "mix", "inner", "outer"}
    hidden = house | {"base": house["base"] | {"listed": False}}
    assert changed(await fingerprints(hidden)) == set()
    assert changed(await fingerprints(house, server={"port": 9})) == set()


async def test_a_model_may_be_called_as_a_package(tiny: dict[str, Path]) -> None:
    base = {"path": str(tiny["llama"])}
    plain, polite = [await fingerprints({"torch": entry}) for entry in (base, base | {"system_prompt": "Please."})]
    assert plain != polite


# --- what cannot be hosted, and the end ---


async def test_everything_that_tokenizers_and_configs_tell_is_refused_before_any_weights_are_loaded(
    house: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_members(*_: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(members, "load_members", load_members)
    house["blend"] = average("base", "far")
    house["gone"] = {"path": "/no/such/folder"}
    house["nested"] = average("mix", "deep")
    with pytest.raises(ModelLoadError) as caught:
        async with hosted(house):
            pass
    first, *problems = str(caught.value).splitlines()
    assert first == "/config.yaml: 3 problems"
    assert [problem.split("'")[1] for problem in problems] == ["blend", "gone", "nested"]


@pytest.mark.parametrize("broken", ["vocabulary", "folder", "text"])
async def test_what_does_not_fit_is_refused_when_opened_and_leaves_nothing_running(
    tiny: dict[str, Path], tmp_path: Path, engine_threads: EngineThreads, broken: str
) -> None:
    models: dict[str, Any] = {"base": {"path": str(tiny["llama"])}, "far": REMOTE}
    if broken == "vocabulary":
        word_piece(make_model(tmp_path / "other"))
        models["other"] = {"path": str(tmp_path / "other")}
        models["mix"], problem = average("base", "other"), "member 'other' cannot be averaged over text"
    elif broken == "folder":
        models["other"], problem = {"path": str(tmp_path / "gone")}, "model 'other': "
    else:
        models["mix"], problem = average("base", "far"), "'mix': member 'far'"
    with pytest.raises(ModelLoadError, match=problem):
        async with hosted(models):
            pass
    assert engine_threads() == set()


async def test_closing_ends_live_generations_with_an_error(
    house: dict[str, Any], engine_threads: EngineThreads
) -> None:
    events: list[object] = []

    async def talk(hosting: Hosting, name: str) -> None:
        async for event in hosting.models[name].generate(ask(max_tokens=100)):
            events.append(event)

    async with hosted(house) as hosting:
        talks = [asyncio.create_task(talk(hosting, name)) for name in ("base", "mix")]
        while sum(isinstance(event, Delta) for event in events) < 4:
            await asyncio.sleep(0.01)
    results = await asyncio.gather(*talks, return_exceptions=True)
    assert [type(result) for result in results] == [EngineDeadError, EngineDeadError]
    assert any(isinstance(event, PromptScored) for event in events)
    assert not any(isinstance(event, Done) for event in events)
    assert hosting.failure is not None and engine_threads() == set()
    with pytest.raises(EngineDeadError):
        await collect(hosting.models["base"], ask())


async def test_an_error_inside_the_block_closes_the_house_too(
    house: dict[str, Any], engine_threads: EngineThreads
) -> None:
    with pytest.raises(KeyError):
        async with hosted(house):
            raise KeyError
    assert engine_threads() == set()
