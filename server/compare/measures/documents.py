"""Text files as documents: the unit of which intervals speak, and how much context each may see.

A `.jsonl` file holds one document per line, `{"text": ...}`; they have nothing to do with each other, so none is read
as the context of the next. Any other file is one continuous text, cut into documents only for the statistics: context
crosses their borders, as if the text had not been cut. Every byte of the text is in exactly one document.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.ensembles.surrogates import loads

MIN_DOCUMENT_BYTES = 2000
PIECE_BYTES = 380

_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_SENTENCE = re.compile(r".+?(?:[.!?\u2026][\"')\]\u201d\u2019]*\s+|[\u3002\uff01\uff1f]\s*|\Z)", re.DOTALL)
_WORD = re.compile(r"\s*\S+\s*|\s+")
_PARAGRAPH_START, _LINE_START, _SENTENCE_START, _WORD_START, _NO_START = 4, 3, 2, 1, 0  # the best place comes first
_HEADING = re.compile(r"#{1,6} |={2,} |[ \t]*:[^:\n]+:[ \t]")  # Markdown, wikis, and entries such as "   :term: n."


@dataclass(frozen=True)
class Documents:
    """Documents of one measure, in order. `is_continuous`: they are one text, and context crosses their borders."""

    texts: tuple[str, ...]
    is_continuous: bool

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def streams(self) -> list[tuple[int, ...]]:
        """Indices of the documents that are read one after the other in one context."""
        indices = range(len(self.texts))
        return [tuple(indices)] if self.is_continuous else [(index,) for index in indices]


def read_documents(path: Path, *, min_bytes: int = MIN_DOCUMENT_BYTES) -> Documents:
    """The documents of a file; see the module's docstring. Raises `ConfigError` naming file, line and rule."""
    text = _read(path)
    if path.suffix == ".jsonl":
        documents = Documents(tuple(_from_lines(path, text)), is_continuous=False)
    else:
        documents = Documents(tuple(cut_into_documents(text, min_bytes=min_bytes)), is_continuous=True)
    if not documents.texts:
        raise ConfigError(f"{path}: is empty; there is no text to measure")
    return documents


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read ({exc.strerror or exc})") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: must be UTF-8 text, byte {exc.start} is not") from exc


def _from_lines(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = loads(line)
        except ValueError as exc:
            raise ConfigError(f"{path}, line {number}: is not JSON ({exc})") from exc
        document = row.get("text") if isinstance(row, dict) else None
        if not isinstance(document, str) or not document:
            raise ConfigError(f'{path}, line {number}: must be an object whose "text" is a string that is not empty')
        yield document


def cut_into_documents(text: str, *, min_bytes: int = MIN_DOCUMENT_BYTES) -> list[str]:
    """Consecutive pieces of `min_bytes` UTF-8 bytes or a little more, cut after blank lines and before headings.

    Where no such place comes before twice as many bytes, it is the end of a line; in a line that is longer than a piece
    the end of a sentence, in a longer sentence a space. A rest that is too short joins the last piece, so a text
    shorter than `min_bytes` is one piece. The pieces join to `text`.
    """
    documents: list[str] = []
    piece: list[str] = []
    size = 0
    best: tuple[int, int] | None = None  # rank of a place for a cut, and how many units of `piece` stand before it
    for rank, unit in _units(text, min_bytes):
        num_bytes = len(unit.encode())
        if size >= min_bytes:
            if rank > (_NO_START if best is None else best[0]):
                best = rank, len(piece)
            if best is not None and (rank == _PARAGRAPH_START or size + num_bytes > 2 * min_bytes):
                documents.append("".join(piece[: best[1]]))
                piece = piece[best[1] :]
                size = sum(len(one.encode()) for one in piece)
                best = (rank, len(piece)) if size >= min_bytes and rank else None
        piece.append(unit)
        size += num_bytes
    if best is not None and len("".join(piece[best[1] :]).encode()) >= min_bytes:
        documents.append("".join(piece[: best[1]]))
        piece = piece[best[1] :]
    if piece and documents and size < min_bytes:
        documents[-1] += "".join(piece)
    elif piece:
        documents.append("".join(piece))
    return documents


def _units(text: str, min_bytes: int) -> Iterator[tuple[int, str]]:
    """Lines, or their sentences and words where they are longer than a piece; each with what begins with it."""
    for previous, line in pairwise(["", *_LINE.findall(text)]):
        is_paragraph = (not previous.strip() and bool(line.strip())) or _HEADING.match(line) is not None
        rank = _PARAGRAPH_START if is_paragraph else _LINE_START if line.strip() else _NO_START
        for sentence in _parts(_SENTENCE, line, min_bytes):
            for word in _parts(_WORD, sentence, min_bytes):
                yield rank, word
                rank = _WORD_START
            rank = _SENTENCE_START


def _parts(pattern: re.Pattern[str], text: str, min_bytes: int) -> list[str]:
    return pattern.findall(text) if len(text.encode()) > min_bytes else [text]


def switching_text(
    texts: Mapping[str, str], *, piece_bytes: int = PIECE_BYTES, min_bytes: int = MIN_DOCUMENT_BYTES
) -> Documents:
    """One continuous text that changes its domain every `piece_bytes` bytes or a little less: a, b, c, a, b, c, ...

    Pieces are taken from each domain's text in turn, cut at the last end of a line in their second half, else between
    two characters. It ends with the shortest text, so that every domain has as many pieces. A document is as many
    whole rounds as reach `min_bytes`, so that documents are alike. Same texts, same result.
    """
    if piece_bytes < 8:
        raise ValueError(f"piece_bytes must be at least 8, got {piece_bytes}")
    rounds = ["".join(pieces) for pieces in zip(*(_pieces(text, piece_bytes) for text in texts.values()), strict=False)]
    documents: list[str] = []
    current = ""
    for text in rounds:
        current += text
        if len(current.encode()) >= min_bytes:
            documents.append(current)
            current = ""
    if current and documents:
        documents[-1] += current
    elif current:
        documents.append(current)
    return Documents(tuple(documents), is_continuous=True)


def _pieces(text: str, piece_bytes: int) -> Iterator[str]:
    data = text.encode()
    start = 0
    while start < len(data):
        end = min(start + piece_bytes, len(data))
        if end < len(data):
            newline = data.rfind(b"\n", start + piece_bytes // 2, end)
            if newline >= 0:
                end = newline + 1
            while data[end] & 0xC0 == 0x80:  # inside a character
                end -= 1
        yield data[start:end].decode()
        start = end
