"""The house: a config becomes a table of models that answer. Members are loaded, ensembles are composed of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from graphlib import TopologicalSorter
from typing import Self

from ensemble_server.ensembles.base import Embedder, Event, GenerationRequest, Mixture, MixtureHost, Model
from ensemble_server.ensembles.method import Method, MethodConfig, Services
from ensemble_server.ensembles.probability_averaging import overridden
from ensemble_server.ensembles.registry import method_class
from ensemble_server.server.config.blocks import Config, HostedModel, RemoteModel, VllmEngineConfig
from ensemble_server.server.config.fingerprints import fingerprint
from ensemble_server.server.engines.engine import Engine, StepStats
from ensemble_server.server.engines.remote.remote import RemoteChat
from ensemble_server.server.engines.transformers_engine.engine import TransformersEngine
from ensemble_server.server.engines.transformers_engine.members import load_members
from ensemble_server.server.weights.embeddings import SentenceEmbedder
from ensemble_server.server.weights.reranking import CrossEncoderReranker
from ensemble_server.server.weights.threads import in_own_thread
from ensemble_server.server.weights.view import Surface


class SingleMember:
    """One hosted member as a model of its own: the mixture of it alone."""

    def __init__(self, name: str, host: MixtureHost) -> None:
        self.name = name
        self.members = (name,)
        self.host = host
        self.mixture = Mixture({name: 1.0})
        self.max_model_len = host.max_model_len(self.mixture)

    def generate(self, request: GenerationRequest) -> AsyncIterator[Event]:
        mixture = overridden(self.mixture, self.members, request.overrides)
        return self.host.generate(mixture, request, method="member")


class Hosting:
    """Every model of a config, loaded and running. Made by `Hosting.open`."""

    def __init__(
        self,
        config: Config,
        models: Mapping[str, Model],
        surfaces: Mapping[str, Surface],
        engine: Engine | None,
        embedder: Embedder,
    ) -> None:
        self.config = config
        self.models = models
        self.listed = [name for name in config.models if config.models[name].listed]
        self.embedder = embedder
        self.created = int(time.time())
        self._surfaces = surfaces
        self._engine = engine
        self._fingerprints = {name: fingerprint(name, config) for name in config.models}

    @classmethod
    @asynccontextmanager
    async def open(cls, config: Config, *, on_step: Callable[[StepStats], None] | None = None) -> AsyncIterator[Self]:
        """Load everything and serve it until the block ends. Raises `ConfigError` if something cannot be loaded."""
        hosted = {name: model for name, model in config.models.items() if isinstance(model, HostedModel)}
        engine, surfaces = await _engine(config, hosted, on_step) if hosted else (None, {})
        embedder = SentenceEmbedder(config.embedding.path, batch_size=config.embedding.batch_size)
        remotes = {
            name: RemoteChat(name, model) for name, model in config.models.items() if isinstance(model, RemoteModel)
        }
        singles = {name: SingleMember(name, engine) for name in hosted}
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
        """Why nothing hosted can answer any more; None while all is well."""
        return self._engine.failure if self._engine is not None else None

    @property
    def num_restarts(self) -> int:
        """How often an engine has died and was started again."""
        return self._engine.num_restarts if self._engine is not None else 0

    @property
    def down(self) -> frozenset[str]:
        """Hosted models that nothing answers for now."""
        return self._engine.down if self._engine is not None else frozenset()

    def surface(self, name: str) -> Surface | None:
        """How model `name` reads and writes text: its own tokenizer, or that of its first member that has one."""
        if name in self._surfaces:
            return self._surfaces[name]
        model = self.models[name]
        others = [member for member in model.members if member != name]
        return next((surface for member in others if (surface := self.surface(member)) is not None), None)

    def fingerprint(self, name: str) -> str:
        """Changes when the model's answers may change: its part of the config, its members' and the versions."""
        return self._fingerprints[name]


async def _engine(
    config: Config, hosted: Mapping[str, HostedModel], on_step: Callable[[StepStats], None] | None
) -> tuple[Engine, dict[str, Surface]]:
    """The engine that the config asks for, ready to be started, and how its members read text."""
    if isinstance(config.engine, VllmEngineConfig):
        from ensemble_server.server.engines.vllm_engine.engine import VllmEngine

        vllm = await VllmEngine.planned(config, on_step=on_step)
        return vllm, {name: view.surface for name, view in vllm.views.items()}
    members = await in_own_thread(
        load_members, hosted, relative_to=config.source.parent, max_context=config.engine.max_context
    )
    engine = TransformersEngine(
        members,
        max_batch=config.engine.max_batch,
        prefill_chunk=config.engine.prefill_chunk,
        num_threads=config.engine.num_threads,
        max_queue=config.server.max_queue,
        prefix_cache_bytes=config.engine.prefix_cache_mb * 2**20,
        on_step=on_step,
    )
    return engine, {name: member.surface for name, member in members.items()}


def compose(methods: Mapping[str, MethodConfig], parts: Mapping[str, Model], services: Services) -> dict[str, Model]:
    """`parts`, and every ensemble of `methods`, built after those that it refers to."""
    models: dict[str, Model] = dict(parts)
    for name in TopologicalSorter({name: entry.references() for name, entry in methods.items()}).static_order():
        if name in methods:
            entry = methods[name]
            cls: type[Method] = method_class(entry.method)
            models[name] = cls(name, entry, {part: models[part] for part in entry.references()}, services)
    return models
