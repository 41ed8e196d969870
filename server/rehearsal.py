"""Everything that can be refused before weights are loaded: the house is built once from configs and tokenizers alone.

Members are there as their files describe them, ensembles are composed as they will be, and every check that a method or
an engine makes of its members is made. What remains for the loading are the weights themselves.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ensemble_server.ensembles.base import AveragedOver, Event, GenerationRequest, Mixture, Model
from ensemble_server.ensembles.errors import ConfigError, ModelLoadError
from ensemble_server.ensembles.method import MethodConfig, Services
from ensemble_server.ensembles.probability_averaging import ProbabilityAverage
from ensemble_server.server.composition import SingleMember, compose
from ensemble_server.server.config.blocks import Config, HostedModel, RemoteModel, VllmEngineConfig
from ensemble_server.server.engines.remote.remote import RemoteChat
from ensemble_server.server.engines.vllm_engine.one_prompt import check_one_model
from ensemble_server.server.weights.devices import resolve_device
from ensemble_server.server.weights.embeddings import SentenceEmbedder, check_embedder
from ensemble_server.server.weights.member_views import MemberFiles, MemberView, read_member_files
from ensemble_server.server.weights.quantisation import check_quantisation
from ensemble_server.server.weights.reranking import CrossEncoderReranker, check_cross_encoder
from ensemble_server.server.weights.spelled_vocabulary import averaged_over
from ensemble_server.server.weights.thinking import are_told_apart


@dataclass(frozen=True)
class Rehearsal:
    """`files`: of the hosted models. `problems`: one sentence, naming it, for each model that cannot be served.
    `averaged_over`: what each probability average is over.
    """

    files: MemberFiles
    problems: tuple[str, ...]
    averaged_over: Mapping[str, AveragedOver] = field(default_factory=dict)

    def check(self, config: Config) -> None:
        """Raise `ModelLoadError` with all problems."""
        if len(self.problems) == 1:
            raise ModelLoadError(self.problems[0])
        if self.problems:
            raise ModelLoadError("\n  - ".join([f"{config.source}: {len(self.problems)} problems", *self.problems]))


def rehearse(config: Config, *, may_download: bool = True, files: MemberFiles | None = None) -> Rehearsal:
    """Blocks: checkpoints may have to be converted or (if they may) downloaded, and tokenizers are loaded.

    `files`: what has been read of the same hosted models before, which takes most of the time.
    """
    if files is None:
        hosted = {name: model for name, model in config.models.items() if isinstance(model, HostedModel)}
        files = read_member_files(
            hosted, relative_to=config.source.parent, max_context=config.engine.max_context, may_download=may_download
        )
    failures: dict[str, ConfigError] = dict(files.failures)
    runs_on_vllm = isinstance(config.engine, VllmEngineConfig)  # which places weights itself
    host = _Unloaded(files.views, is_one_model=runs_on_vllm)
    parts: dict[str, Model] = {name: SingleMember(name, host) for name in files.views}
    for name, model in config.models.items():
        try:
            if isinstance(model, RemoteModel):
                parts[name] = RemoteChat(name, model)
            elif isinstance(model, HostedModel) and model.path is not None and not runs_on_vllm:
                device = resolve_device(model.device)
                if name in files.checkpoints:
                    check_quantisation(files.checkpoints[name], device)
        except ConfigError as exc:
            failures.setdefault(name, exc)
    refused, ensembles = _rehearsed_ensembles(config, parts)
    failures |= refused
    over: dict[str, AveragedOver] = {
        name: host.averages_over(model.mixture)
        for name, model in ensembles.items()
        if isinstance(model, ProbabilityAverage)
    }
    return Rehearsal(files, tuple(_naming(name, failures[name]) for name in config.models if name in failures), over)


def _naming(name: str, error: ConfigError) -> str:
    return str(error) if repr(name) in str(error) else f"model {name!r}: {error}"


def _rehearsed_ensembles(
    config: Config, parts: Mapping[str, Model]
) -> tuple[dict[str, ModelLoadError], dict[str, Model]]:
    """Ensembles whose parts are all there: those that their methods refuse, also for an embedding model that is not
    there, and all models that can be."""
    folder = config.source.parent

    def reranker(path: str) -> CrossEncoderReranker:
        check_cross_encoder(path, relative_to=folder)
        return CrossEncoderReranker(path, relative_to=folder)

    missing: ModelLoadError | None = None
    try:
        check_embedder(config.embedding.path)
    except ModelLoadError as exc:
        missing = exc
    embedder = None if missing else SentenceEmbedder(config.embedding.path)
    methods = {name: entry for name, entry in config.models.items() if isinstance(entry, MethodConfig)}
    refused: dict[str, ModelLoadError] = {}
    models = compose(methods, parts, Services(embedder, reranker, config.server.max_calls), failures=refused)
    if missing is not None:
        for name, error in refused.items():
            if "embedding model" in str(error):
                refused[name] = ModelLoadError(f"{error} ({missing})")
    return refused, models


class _Unloaded:
    """A `MixtureHost` of members without weights: it checks what engines check, and answers nothing."""

    def __init__(self, views: Mapping[str, MemberView], *, is_one_model: bool) -> None:
        self._views = views
        self._is_one_model = is_one_model

    def check(self, mixture: Mixture) -> None:
        views = [self._views[name] for name in mixture.weights]
        if self._is_one_model:
            check_one_model(mixture, views)
        else:
            averaged_over(mixture, views)

    def averages_over(self, mixture: Mixture) -> AveragedOver:
        views = [self._views[name] for name in mixture.weights]
        return "tokens" if self._is_one_model else averaged_over(mixture, views)

    def max_model_len(self, mixture: Mixture) -> int:
        return min(self._views[name].max_model_len for name in mixture.weights)

    def ends_thoughts(self, mixture: Mixture) -> bool:
        markers = [self._views[name].surface.thinking for name in mixture.weights]
        if self._is_one_model:
            return len(markers) == 1 or not any(markers)
        return self.averages_over(mixture) == "tokens" or are_told_apart(markers)

    def generate(self, mixture: Mixture, request: GenerationRequest, *, method: str) -> AsyncGenerator[Event]:
        raise AssertionError("a rehearsal has no weights to answer with")

    async def visit_logprobs(self, *arguments: Any, **options: Any) -> None:
        raise AssertionError("a rehearsal has no weights to read with")

    async def visit_bytes(self, *arguments: Any, **options: Any) -> None:
        raise AssertionError("a rehearsal has no weights to read with")
