"""Ensembles of texts as they are, over members whose answers come from a log."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from ensemble_server.ensembles.base import Model
from ensemble_server.ensembles.method import MethodConfig, Services
from ensemble_server.server.batch.placement.call_log import Call, CallLog, RecordedDistributions, RecordedModel
from ensemble_server.server.batch.placement.phases import composed, singles
from ensemble_server.server.composition import compose
from ensemble_server.server.config.blocks import Config, HostedModel, RemoteModel
from ensemble_server.server.config.fingerprints import fingerprint
from ensemble_server.server.hosting import Hosting

if TYPE_CHECKING:
    from ensemble_server.server.weights.embeddings import CountingEmbedder
    from ensemble_server.server.weights.view import Surface


class _ReplayedHosting(Hosting):
    """Ensembles as they are, over members that are recorded. Tokenizers are loaded when they are needed."""

    def __init__(self, config: Config, models: Mapping[str, Model], embedder: CountingEmbedder) -> None:
        super().__init__(config, models, {}, None, embedder)
        self._surfaces: dict[str, Surface] = {}

    def surface(self, name: str) -> Surface | None:
        from ensemble_server.server.weights.checkpoints import resolve_checkpoint
        from ensemble_server.server.weights.tokenizer import load_tokenizer
        from ensemble_server.server.weights.view import member_surface

        entry = self.config.models[name]
        if isinstance(entry, MethodConfig):
            members = (member for member in entry.members)
            return next((surface for member in members if (surface := self.surface(member)) is not None), None)
        if isinstance(entry, RemoteModel):
            return None
        if name not in self._surfaces:
            hosted = {one: model for one, model in self.config.models.items() if isinstance(model, HostedModel)}
            root = hosted[entry.base or name]
            assert root.path is not None, "a base has weights of its own"
            folder = resolve_checkpoint(
                root.path, relative_to=self.config.source.parent, revision=root.revision, may_download=False
            )
            self._surfaces[name] = member_surface(name, hosted, load_tokenizer(folder))
        return self._surfaces[name]


def replayed_hosting(config: Config, names: Sequence[str], log: CallLog, note: Callable[[Call], None]) -> Hosting:
    from ensemble_server.server.weights.embeddings import SentenceEmbedder
    from ensemble_server.server.weights.reranking import CrossEncoderReranker

    recorded: dict[str, Model] = {}
    for name in singles(config, names):
        entry = config.models[name]
        cls = RecordedModel if isinstance(entry, RemoteModel) else RecordedDistributions
        members = tuple(entry.members) if isinstance(entry, MethodConfig) else (name,)
        recorded[name] = cls(
            name,
            log,
            fingerprint=fingerprint(name, config),
            note=note,
            members=members,
        )
    embedder = SentenceEmbedder(config.embedding.path, batch_size=config.embedding.batch_size)
    services = Services(
        embedder,
        partial(CrossEncoderReranker, relative_to=config.source.parent),
        max_calls=config.server.max_calls,
    )
    ensembles = {found: entry for name in names for found, entry in composed(config, name).items()}
    return _ReplayedHosting(config, compose(ensembles, recorded, services), embedder)
