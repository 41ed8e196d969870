from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from ensemble_server.server.config.blocks import HostedModel
from ensemble_server.server.engines.transformers_engine.engine import TransformersEngine
from ensemble_server.server.engines.transformers_engine.members import Member, load_members
from ensemble_server.server.weights.member_views import read_member_files
from tests.reference import Reference
from tests.server.engines.transformers_engine.families import Families


@pytest.fixture(scope="session")
def members(tiny: dict[str, Path]) -> dict[str, Member]:
    """llama, deep, qwen, gpt2, gemma on weights of their own; red, green, blue as adapters of llama; polite a view."""
    models = {name: HostedModel(path=str(tiny[name])) for name in ("llama", "deep", "qwen", "gpt2", "gemma")}
    models |= {name: HostedModel(base="llama", adapter=str(tiny[name])) for name in ("red", "green", "blue")}
    models["polite"] = HostedModel(base="llama", system_prompt="Be very polite.")
    return load_members(models, read_member_files(models, relative_to=Path(), max_context=256))


@pytest.fixture(scope="session")
def reference(tiny: dict[str, Path], members: dict[str, Member]) -> Reference:
    folders = {name: (tiny[name], None) for name in ("llama", "deep", "qwen", "gpt2", "gemma")}
    folders |= {name: (tiny["llama"], tiny[name]) for name in ("red", "green", "blue")}
    folders["polite"] = (tiny["llama"], None)
    return Reference(folders, members["llama"].vocab_size)


EngineMaker = Callable[..., "contextmanager[TransformersEngine]"]


@pytest.fixture(scope="session")
def running(members: dict[str, Member]) -> EngineMaker:
    """`with running(max_batch=2) as engine`: an engine over all members, or `only` some, stopped at the end."""

    @contextmanager
    def run(*, only: Sequence[str] = (), **options: object) -> Iterator[TransformersEngine]:
        engine = TransformersEngine({name: members[name] for name in only or members}, **options)
        engine.start()
        try:
            yield engine
        finally:
            engine.stop()

    return run


@pytest.fixture(scope="session")
def engine(running: EngineMaker) -> Iterator[TransformersEngine]:
    with running() as engine:
        yield engine


@pytest.fixture(scope="session")
def families(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Families:
    return Families(tmp_path_factory.mktemp("families"), tiny)


@pytest.fixture(scope="session")
def mixed(families: Families) -> Iterator[TransformersEngine]:
    """An engine over members of different vocabularies."""
    with families.running() as engine:
        yield engine
