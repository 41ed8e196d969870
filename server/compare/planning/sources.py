"""What a plan measures, read from its files: texts as documents (files, parts of them, switching ones), and tasks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.compare.measures.documents import (
    Documents,
    cut_into_documents,
    read_documents,
    switching_text,
)
from ensemble_server.server.compare.measures.task_files import read_task, rows_of
from ensemble_server.server.compare.measures.task_measure import Task
from ensemble_server.server.compare.planning.blocks import TaskSource, TextSource


def read_texts(sources: Mapping[str, TextSource], *, min_bytes: int) -> dict[str, Documents]:
    """The documents of every text. Raises `ConfigError` that names the text if a file cannot be used."""
    plain = {name: _read(name, source, min_bytes) for name, source in sources.items() if source.path is not None}
    return {
        name: plain[name] if source.path is not None else _switching(name, source, plain, min_bytes)
        for name, source in sources.items()
    }


def read_tasks(sources: Sequence[TaskSource]) -> dict[str, Task]:
    """The items of every task. Raises `ConfigError` that names file, line and rule."""
    return {
        source.name: read_task(
            source.name,
            Path(source.data),
            metric=source.metric,
            template=source.template,
            answer=source.answer,
            limit=source.limit,
            is_chat=source.chat,
            system_prompt=source.system_prompt,
            num_samples=source.samples,
            max_tokens=source.max_tokens,
            temperature=source.temperature,
            stop=source.stop,
        )
        for source in sources
    }


def read_clusters(sources: Sequence[TaskSource]) -> dict[str, list[str]]:
    """ "task NAME" -> the cluster of each of its items, for tasks that name a field `cluster`.

    Raises `ConfigError` that names file and line if a row has no such field.
    """
    return {
        f"task {source.name}": _clusters(
            Path(source.data), islice(rows_of(Path(source.data)), source.limit), source.cluster
        )
        for source in sources
        if source.cluster is not None
    }


def read_text_clusters(sources: Mapping[str, TextSource], texts: Mapping[str, Documents]) -> dict[str, list[str]]:
    """ "text NAME" -> the cluster of each of its documents, for `.jsonl` texts that name a field `cluster`.

    Raises `ConfigError` that names file and line if a row has no such field.
    """
    found = {}
    for name, source in sources.items():
        if source.cluster is None or source.path is None:
            continue
        rows = islice(rows_of(Path(source.path)), len(texts[name]))
        found[f"text {name}"] = _clusters(Path(source.path), rows, source.cluster)
    return found


def _clusters(path: Path, rows: Iterable[tuple[int, Mapping[str, Any]]], field: str) -> list[str]:
    clusters = []
    for line, row in rows:
        if field not in row:
            raise ConfigError(f"{path}, line {line}: has no field {field!r}, which `cluster` names")
        clusters.append(str(row[field]))
    return clusters


def sha256_of(documents: Documents) -> str:
    """Of the texts, where they are cut, and whether context crosses the cuts."""
    content = json.dumps([documents.is_continuous, *documents.texts]).encode()
    return hashlib.sha256(content).hexdigest()


def tail_of(text: str, share: float) -> str:
    """The last `share` of a text's characters, from the start of a line on (as `experts/train.py` holds it out)."""
    border = text.find("\n", int(len(text) * (1 - share))) + 1
    return text[border:] if border else ""


def _read(name: str, source: TextSource, min_bytes: int) -> Documents:
    documents = read_documents(Path(source.path or ""), min_bytes=min_bytes)
    if source.tail is not None:
        if not documents.is_continuous:
            raise ConfigError(f"{name}: `tail` takes a part of a text; {source.path} holds documents of their own")
        text = tail_of("".join(documents.texts), source.tail)
        documents = Documents(tuple(cut_into_documents(text, min_bytes=min_bytes)), is_continuous=True)
    documents = _limited(documents, source.bytes, min_bytes)
    if not documents.texts:
        raise ConfigError(f"{name}: nothing is left of {source.path}; raise `tail` or `bytes`")
    return documents


def _switching(name: str, source: TextSource, plain: Mapping[str, Documents], min_bytes: int) -> Documents:
    """Made of the whole pieces that fit into `bytes`; the parts give what they have."""
    parts = {part: "".join(plain[part].texts) for part in source.switching}
    if source.bytes is not None:
        share = source.bytes // len(parts) // source.piece_bytes * source.piece_bytes
        parts = {part: _head(text, share) for part, text in parts.items()}
    documents = switching_text(parts, piece_bytes=source.piece_bytes, min_bytes=min_bytes)
    if not documents.texts:
        raise ConfigError(f"{name}: `bytes` is too small for a piece of each of {', '.join(parts)}")
    return documents


def _limited(documents: Documents, num_bytes: int | None, min_bytes: int) -> Documents:
    if num_bytes is None:
        return documents
    if documents.is_continuous:
        text = _head("".join(documents.texts), num_bytes)
        return Documents(tuple(cut_into_documents(text, min_bytes=min_bytes)), is_continuous=True)
    kept, size = [], 0
    for text in documents.texts:
        size += len(text.encode())
        if size > num_bytes:
            break
        kept.append(text)
    return Documents(tuple(kept), is_continuous=False)


def _head(text: str, num_bytes: int) -> str:
    """At most `num_bytes` bytes from the start, cut between two characters."""
    return text.encode()[:num_bytes].decode("utf-8", errors="ignore")
