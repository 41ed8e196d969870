"""The house: a config becomes a table of models that answer. Members are loaded, ensembles are composed of them."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Protocol, Self

from ensemble_server.ensembles.base import Model
from ensemble_server.ensembles.method import MethodConfig, Services
from ensemble_server.server.composition import SingleMember, compose
from ensemble_server.server.config.blocks import Config, EngineConfig, HostedModel, RemoteModel, VllmEngineConfig
from ensemble_server.server.config.fingerprints import fingerprint
from ensemble_server.server.engines.engine import Engine, Loading, StepStats
from ensemble_server.server.engines.remote.remote import RemoteChat
from ensemble_server.server.rehearsal import rehearse
from ensemble_server.server.weights.embeddings import CountingEmbedder, SentenceEmbedder
from ensemble_server.server.weights.member_views import MemberFiles
from ensemble_server.server.weights.reranking import CrossEncoderReranker
from ensemble_server.server.weights.threads import in_own_thread
from ensemble_server.server.weights.view import Surface

if TYPE_CHECKING:
    from ensemble_server.server.engines.vllm_engine.engine import VllmEngine


class House(Protocol):
    """What the API, batches and comparisons ask of a hosting. `engines.scripted_hosting` is one without weights."""

    config: Config
    models: Mapping[str, Model]  # all that the config names
    listed: Sequence[str]  # those of them that clients see
    embedder: CountingEmbedder
    created: int  # when it was made, in seconds since 1970

    @property
    def failure(self) -> str | None:
        """Why nothing hosted can answer any more; None while all is well."""

    @property
    def num_restarts(self) -> int:
        """How often an engine has died and was started again."""
        ...

    @property
    def down(self) -> frozenset[str]:
        """Hosted models that nothing answers for now."""
        ...

    def surface(self, name: str) -> Surface | None:
        """How model `name` reads and writes text: its own tokenizer, or that of its first member that has one."""

    def allows(self, name: str) -> bool:
        """Whether whoever asks may ask for model `name`."""
        ...

    def only(self, names: Collection[str]) -> Self:
        """The same house, in which only these models may be asked for."""
        ...

    def fingerprint(self, name: str) -> str:
        """Changes when the model's answers may change: its part of the config, its members' and the versions."""
        ...


class Hosting:
    """A `House` of loaded models, running. Made by `Hosting.open`."""

    def __init__(
        self,
        config: Config,
        models: Mapping[str, Model],
        surfaces: Mapping[str, Surface],
        engine: Engine | None,
        embedder: CountingEmbedder,
    ) -> None:
        self.config = config
        self.models = models
        self.listed = [name for name in config.models if config.models[name].listed]
        self.embedder = embedder
        self.created = int(time.time())
        self._surfaces = surfaces
        self._engine = engine
        self._allowed: Collection[str] | None = None  # None: all
        self._fingerprints = {name: fingerprint(name, config) for name in config.models}

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        config: Config,
        *,
        on_step: Callable[[StepStats], None] | None = None,
        on_load: Callable[[Loading], None] = lambda loading: None,
    ) -> AsyncIterator[Self]:
        """Load everything and serve it until the block ends. Raises `ModelLoadError` if something cannot be loaded; all
        that can be told without weights at once, before any are loaded.

        `on_load` is told of each weights before they are loaded, in a thread of its own. A caller that is cancelled
        does not wait for that thread.
        """
        rehearsal = await in_own_thread(rehearse, config)
        rehearsal.check(config)
        engine, surfaces = None, {}
        if rehearsal.files.views:
            engine, surfaces = await _engine(config, rehearsal.files, on_step, on_load)
        embedder = SentenceEmbedder(config.embedding.path, batch_size=config.embedding.batch_size)
        remotes = {
            name: RemoteChat(name, model) for name, model in config.models.items() if isinstance(model, RemoteModel)
        }
        singles = {} if engine is None else {name: SingleMember(name, engine) for name in rehearsal.files.views}
        services = Services(
            embedder,
            partial(CrossEncoderReranker, relative_to=config.source.parent),
            max_calls=config.server.max_calls,
        )
        methods = {name: entry for name, entry in config.models.items() if isinstance(entry, MethodConfig)}
        composed = compose(methods, singles | remotes, services)
        hosting = cls(config, {name: composed[name] for name in config.models}, surfaces, engine, embedder)
        try:
            if engine is not None:
                await in_own_thread(engine.start)
            yield hosting
        finally:
            if engine is not None:
                await asyncio.to_thread(engine.stop)
            for remote in remotes.values():
                await remote.aclose()

    @property
    def failure(self) -> str | None:
        return self._engine.failure if self._engine is not None else None

    @property
    def num_restarts(self) -> int:
        return self._engine.num_restarts if self._engine is not None else 0

    @property
    def down(self) -> frozenset[str]:
        return self._engine.down if self._engine is not None else frozenset()

    def surface(self, name: str) -> Surface | None:
        if name in self._surfaces:
            return self._surfaces[name]
        model = self.models[name]
        others = [member for member in model.members if member != name]
        return next((surface for member in others if (surface := self.surface(member)) is not None), None)

    def allows(self, name: str) -> bool:
        return self._allowed is None or name in self._allowed

    def only(self, names: Collection[str]) -> Self:
        """Shares all that it holds; do not close it."""
        restricted = copy.copy(self)
        restricted._allowed = frozenset(names)
        restricted.listed = [name for name in self.listed if name in names]
        return restricted

    def fingerprint(self, name: str) -> str:
        return self._fingerprints[name]


async def _engine(
    config: Config,
    files: MemberFiles,
    on_step: Callable[[StepStats], None] | None,
    on_load: Callable[[Loading], None],
) -> tuple[Engine, dict[str, Surface]]:
    """The engine that the config asks for, ready to be started, and how its members read text."""
    if isinstance(config.engine, VllmEngineConfig):
        vllm = await (await in_own_thread(_vllm_engine)).planned(config, files=files, on_step=on_step, on_load=on_load)
        return vllm, {name: view.surface for name, view in vllm.views.items()}
    return await in_own_thread(_transformers_engine, config, config.engine, files, on_step, on_load)


def _vllm_engine() -> type[VllmEngine]:
    from ensemble_server.server.engines.vllm_engine.engine import VllmEngine  # loads torch

    return VllmEngine


def _transformers_engine(
    config: Config,
    settings: EngineConfig,
    files: MemberFiles,
    on_step: Callable[[StepStats], None] | None,
    on_load: Callable[[Loading], None],
) -> tuple[Engine, dict[str, Surface]]:
    from ensemble_server.server.engines.transformers_engine.engine import TransformersEngine  # loads torch
    from ensemble_server.server.engines.transformers_engine.members import load_members

    hosted = {name: model for name, model in config.models.items() if isinstance(model, HostedModel)}
    members = load_members(hosted, files, weights=settings.weights, on_load=on_load)
    engine = TransformersEngine(
        members,
        max_batch=settings.max_batch,
        prefill_chunk=settings.prefill_chunk,
        num_threads=settings.num_threads,
        max_queue=config.server.max_queue,
        prefix_cache_bytes=settings.prefix_cache_mb * 2**20,
        kv_cache_bytes=None if settings.kv_cache_mb is None else settings.kv_cache_mb * 2**20,
        drafts=settings.speculation,
        on_step=on_step,
    )
    return engine, {name: member.surface for name, member in members.items()}
