"""A house of models that need no weights, for tests of everything above them: HTTP, batches, methods of others.

It offers what `server.hosting.House` does. Models are given ready, `scripted_engine.ScriptedModel`s mostly; what would
go wrong with real engines is said instead: `hosting.failure = "out of memory"`, `hosting.down = frozenset({"a"})`.
It ships with the package, as httpx's mock transport does.

    hosting = ScriptedHosting({"hello": ScriptedModel("hello", Script(("Hel", "lo")))}, folder=tmp_path)
    app = create_app(hosting, metrics=Metrics())
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from ensemble_server.ensembles.base import Model
from ensemble_server.server.config.blocks import BatchConfig, Config, ServerConfig

if TYPE_CHECKING:
    from ensemble_server.server.weights.view import Surface


class LetterCounts:
    """An embedder whose vectors count the letters a, b and c: enough to see that order, form and length arrive."""

    name = "letters"
    dim = 3
    max_tokens = 8
    is_there = True

    def num_tokens(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    async def embed(self, texts: Sequence[str]) -> np.ndarray:
        counts = np.array([[text.count(letter) for letter in "abc"] for text in texts], dtype=np.float32)
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)


class ScriptedHosting:
    """`surfaces`: of the models that have one. `folder`: for what the server would keep. `server`: keys of the config's
    block of that name. The config names no models, since these come from none.
    """

    def __init__(
        self,
        models: Mapping[str, Model],
        surfaces: Mapping[str, Surface] | None = None,
        folder: Path = Path("batches"),
        **server: Any,
    ) -> None:
        self.config = Config(
            models={},
            server=ServerConfig(**server),
            batch=BatchConfig(folder=str(folder)),
            source=folder / "config.yaml",
        )
        self.models = models
        self.listed = list(models)
        self.embedder = LetterCounts()
        self.created = 1_700_000_000
        self.failure: str | None = None
        self.num_restarts = 0
        self.down: frozenset[str] = frozenset()
        self._surfaces = surfaces or {}
        self._allowed: Collection[str] | None = None  # None: all

    def change(self, block: Literal["server", "engine", "embedding", "batch"], **keys: Any) -> None:
        """Give keys of one block of the config other values, before anything is made of it."""
        changed = getattr(self.config, block).model_copy(update=keys)
        self.config = self.config.model_copy(update={block: changed})

    def surface(self, name: str) -> Surface | None:
        return self._surfaces.get(name)

    def allows(self, name: str) -> bool:
        return self._allowed is None or name in self._allowed

    def only(self, names: Collection[str]) -> Self:
        """As it is now: what is said to go wrong later is said of the whole house."""
        restricted = copy.copy(self)
        restricted._allowed = frozenset(names)
        restricted.listed = [name for name in self.listed if name in names]
        return restricted

    def fingerprint(self, name: str) -> str:
        return f"fp_{name}"
