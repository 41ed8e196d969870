"""What every ensemble method is: a model made of models, with its own block of configuration."""

from __future__ import annotations

import reprlib
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from ensemble_server.ensembles.base import Embedder, Event, GenerationRequest, Model, Reranker


def _names_to_weights(value: Any) -> Any:
    """[base, code] -> {base: 1.0, code: 1.0}"""
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        if len(set(value)) < len(value):
            raise ValueError("the same member is listed twice; give it a weight instead")
        return dict.fromkeys(value, 1.0)
    if not isinstance(value, dict):
        raise ValueError(f"must be a list of names, or a map from names to weights, got {reprlib.repr(value)}")
    return value


MemberWeights = Annotated[
    dict[str, Annotated[float, Field(allow_inf_nan=False)]], BeforeValidator(_names_to_weights), Field(min_length=1)
]


class MethodConfig(BaseModel):
    """One ensemble's block in the YAML. Each method extends it with its own keys, their defaults and their rules."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    yaml_files: ClassVar[tuple[str, ...]] = ()  # keys whose value may be the path of a YAML file, read in its place

    method: str = Field(description="which method; a name in ensembles.registry")
    members: MemberWeights = Field(description="names of models: a list, or a map from name to weight")
    listed: bool = Field(default=True, description="false hides it from /v1/models; it can still be a part of others")

    def references(self) -> set[str]:
        """Names of all models that this one needs. Methods that name more than `members` (a judge) add theirs."""
        return set(self.members)

    def num_calls(self, calls: Mapping[str, int]) -> int:
        """The most calls of single models that one reply takes, if a reply of each reference takes `calls` of them.

        Methods that ask more than once say so.
        """
        return sum(calls[name] for name in self.references())


@dataclass(frozen=True)
class Services:
    """What methods may use besides models. `reranker` makes one from the path of a cross-encoder.

    `max_calls`: of single models, that one request may come to; None for no limit.
    """

    embedder: Embedder | None = None
    reranker: Callable[[str], Reranker] | None = None
    max_calls: int | None = None


class Method(ABC):
    """A model composed of `models` (every name that its config refers to, loaded) under `config`.

    The constructor checks that the models can do what the method needs and raises `ModelLoadError` if not.
    """

    Config: ClassVar[type[MethodConfig]]
    reference: ClassVar[str]  # the paper or page that the method follows
    explains_tokens: bool = False  # ensembles of texts explain by their trace, and share no tokens
    overridable: ClassVar[tuple[str, ...]] = ()  # what a request's `ensemble` object may change

    def __init__(self, name: str, config: MethodConfig, models: Mapping[str, Model], services: Services) -> None:
        self.name = name
        self.config = config
        self.models = models
        self.services = services
        self.members: tuple[str, ...] = tuple(config.members)
        lengths = [models[member].max_model_len for member in self.members]
        self.max_model_len: int | None = min((length for length in lengths if length is not None), default=None)

    @property
    def embedder(self) -> Embedder:
        """The embedding model. Methods that use one have checked that it is there."""
        assert self.services.embedder is not None, "a method that embeds is refused without an embedding model"
        return self.services.embedder

    def num_calls(self, config: MethodConfig | None = None) -> int:
        """The most calls of single models that one reply takes, under `config` or the method's own."""
        calls = {name: model.num_calls() if isinstance(model, Method) else 1 for name, model in self.models.items()}
        return (config or self.config).num_calls(calls)

    @property
    def fan_out(self) -> int:
        """See `ensembles.base.Model.fan_out`: that of all members, `samples` times where the config has that key."""
        return max(1, getattr(self.config, "samples", 1) * sum(self.models[member].fan_out for member in self.members))

    @property
    def singles(self) -> frozenset[str]:
        """The models at the bottom of it, which answer by themselves."""
        parts = (part.singles if isinstance(part, Method) else {part.name} for part in self.models.values())
        return frozenset().union(*parts)

    @abstractmethod
    def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        """See `ensembles.base.Model.generate`."""
