"""What teacher and student read: texts cut into windows, the last part of each held out.

Windows are those of a comparison (`server.compare.measures.windows`), so that weights that follow the text begin anew
in each, as they do with each prompt that is served.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.compare.kept.content_cache import file_sha256
from ensemble_server.server.compare.measures.documents import Documents, cut_into_documents, read_documents
from ensemble_server.server.compare.measures.windows import Window, cut_windows
from ensemble_server.server.compare.planning.held_out import MAX_SHARE, NUM_WORDS, shared_sequences
from ensemble_server.server.compare.planning.sources import tail_of
from ensemble_server.server.weights.view import Surface


@dataclass(frozen=True)
class Part:
    """Texts that are trained on, or those that are not. One `Documents` per file."""

    texts: tuple[Documents, ...]

    @property
    def num_bytes(self) -> int:
        return sum(len(text.encode()) for documents in self.texts for text in documents.texts)

    def windows(self, surface: Surface, *, window: int) -> list[Window]:
        """Of all files, their documents counted through. Raises what `cut_windows` raises."""
        found, num_before = [], 0
        for documents in self.texts:
            cut = [one for one in cut_windows(surface, documents, window=window) if len(one.documents)]
            found += [replace(one, documents=one.documents + num_before) for one in cut]
            num_before += len(documents)
        return found

    @property
    def whole_texts(self) -> list[str]:
        """One for each stream, so that sequences of words cross where context does."""
        return ["".join(one.texts[i] for i in stream) for one in self.texts for stream in one.streams]


@dataclass(frozen=True)
class Material:
    """Files, each in two parts."""

    train: Part
    held_out: Part
    sha256: dict[str, str]  # of each file


def read_material(paths: Sequence[Path], *, held_out: float) -> Material:
    """`held_out`: the last part of each file's characters, from the start of a line on, or of a `.jsonl`'s documents.

    Raises `ConfigError` if a file cannot be read, or if nothing is left to be trained on or to be held out.
    """
    if not paths:
        return Material(Part(()), Part(()), {})
    train, kept = [], []
    for path in paths:
        documents = read_documents(path)
        first, last = _split(documents, held_out)
        train += [first] if first.texts else []
        kept += [last] if last.texts else []
    if not train or not kept:
        raise ConfigError(
            f"text: {held_out:.0%} at the end of each file is held out, which leaves nothing to "
            f"{'train on' if not train else 'hold out'}; give longer texts, of several lines"
        )
    return Material(Part(tuple(train)), Part(tuple(kept)), {path.name: file_sha256(path) for path in paths})


def _split(documents: Documents, share: float) -> tuple[Documents, Documents]:
    if documents.is_continuous:
        text = "".join(documents.texts)
        tail = tail_of(text, share)
        return _continuous(text[: len(text) - len(tail)]), _continuous(tail)
    num_kept = min(len(documents) - 1, max(1, round(share * len(documents))))
    border = len(documents) - num_kept
    return Documents(documents.texts[:border], False), Documents(documents.texts[border:], False)


def _continuous(text: str) -> Documents:
    return Documents(tuple(cut_into_documents(text)) if text else (), is_continuous=True)


def read_tests(paths: Sequence[Path]) -> dict[Path, list[str]]:
    """Texts that will be measured on, whole. Raises what `read_documents` raises."""
    return {path: Part((read_documents(path),)).whole_texts for path in paths}


def check_unseen(taught: Sequence[str], tests: Mapping[Path, Sequence[str]]) -> None:
    """Raises `ConfigError` that names every file of `tests` of which too much stands in what is trained on."""
    shares = {path: shared_sequences(texts, taught) for path, texts in tests.items()}
    if refused := {path: share for path, share in shares.items() if share > MAX_SHARE}:
        told = ", ".join(f"{share:.0%} of {path}" for path, share in refused.items())
        raise ConfigError(
            f"text: of the sequences of {NUM_WORDS} words in the test texts, {told} stand in what would be trained on, "
            f"too; at most {MAX_SHARE:.0%} may. Train on other text than will be measured"
        )


def windows_sha256(windows: Sequence[Window]) -> str:
    """Of the tokens that are read, and what of them is scored."""
    content = hashlib.sha256()
    for window in windows:
        content.update(np.asarray([len(window.token_ids), window.first_scored, *window.token_ids]).tobytes())
    return content.hexdigest()
