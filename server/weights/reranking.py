"""Cross-encoders: models of sentence-transformers that read a prompt and an answer together and score the pair.

Loaded on first use. Loading and scoring run in threads, so that neither holds up the event loop.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.weights.checkpoints import require_hub_copy
from ensemble_server.server.weights.threads import in_own_thread

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder


def check_cross_encoder(path: str, *, relative_to: Path) -> None:
    """Raises `ModelLoadError` if it is known without loading that there is no cross-encoder at `path`."""
    folder = relative_to / Path(path).expanduser()
    if folder.is_dir():
        return
    if Path(path).is_absolute() or path.startswith((".", "~")):
        raise ModelLoadError(f"cross-encoder {path!r} is not there ({folder.absolute()}); give the folder of a model")
    require_hub_copy(path)


class CrossEncoderReranker:
    """An `ensembles.ranking.Reranker`. `path`: a folder, seen from `relative_to`, or a Hugging Face hub id."""

    def __init__(self, path: str, *, relative_to: Path, batch_size: int = 32) -> None:
        folder = relative_to / Path(path).expanduser()
        self._path = str(folder) if folder.is_dir() else path
        self._batch_size = batch_size
        self._working = threading.Lock()
        self._model: CrossEncoder | None = None  # loaded and used under the lock

    async def score(self, prompt: str, texts: Sequence[str]) -> np.ndarray:
        """(len(texts),) float64, higher is better. Pairs that are too long are cut at the model's own limit.

        Raises `ModelLoadError` at the first call if there is no such model, or if it gives more than one score.
        """
        pairs = [(prompt, text) for text in texts]
        return await in_own_thread(self._score, pairs)

    def _score(self, pairs: list[tuple[str, str]]) -> np.ndarray:
        with self._working:
            if self._model is None:
                self._model = self._load()
            scores = self._model.predict(pairs, batch_size=self._batch_size, show_progress_bar=False)
        return np.asarray(scores, dtype=np.float64)

    def _load(self) -> CrossEncoder:
        from sentence_transformers import CrossEncoder

        try:
            model = CrossEncoder(self._path)
        except Exception as exc:  # the library raises what its parts raise: OSError, ValueError, safetensors' own
            raise ModelLoadError(
                f"cross-encoder {self._path!r} cannot be loaded ({exc}); give the folder of a model"
            ) from exc
        if model.num_labels != 1:
            raise ModelLoadError(
                f"cross-encoder {self._path!r} has {model.num_labels} labels; ranking needs one that gives one score"
            )
        return model
