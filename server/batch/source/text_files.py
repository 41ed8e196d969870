"""Files of text as people have them: plain or compressed, in UTF-8 or as Excel and PowerShell write them.

What a file is follows from its first bytes and not from its name. What cannot be read as text is refused by name.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

from ensemble_server.ensembles.errors import ConfigError

UTF8 = "utf-8"

_HEAD_BYTES = 1024
_COMPRESSIONS: Mapping[bytes, tuple[str, Callable[[Path], Any]]] = {
    b"\x1f\x8b": ("gzip", gzip.GzipFile),
    b"BZh": ("bzip2", bz2.BZ2File),
    b"\xfd7zXZ\0": ("xz", lzma.LZMAFile),
}
_NO_TEXT: Mapping[bytes, str] = {
    b"PK\x03\x04": "a ZIP archive or an Excel workbook; unpack it, or save the sheet as CSV",
    b"\xd0\xcf\x11\xe0": "an old Excel or Word file; save it as CSV or text",
    b"\x28\xb5\x2f\xfd": "compressed with Zstandard; unpack it first (zstd -d)",
    b"PAR1": "a Parquet file; say --input-format parquet",
    b"ARROW1": "an Arrow file; save it as Parquet",
    b"SQLite format 3\0": "an SQLite database; export what is to be asked as CSV or JSONL",
    b"%PDF": "a PDF; save its text",
}
_MARKS = (  # the longer first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def compression_of(head: bytes) -> str | None:
    """ "gzip", "bzip2" or "xz"; None if these first bytes begin nothing that is unpacked here."""
    return next((name for magic, (name, _) in _COMPRESSIONS.items() if head.startswith(magic)), None)


def no_text(head: bytes) -> str | None:
    """What a file with these first bytes is instead of text, and the way out; None if it may be text."""
    return next((what for magic, what in _NO_TEXT.items() if head.startswith(magic)), None)


def encoding_of(head: bytes) -> str:
    """Python's name of the encoding that these first bytes are in: UTF-8 unless a mark, or the zeros of UTF-16, say
    otherwise."""
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    if len(head) >= 4 and b"\0" in head[:4]:
        if head[1] == head[3] == 0 and head[0] and head[2]:
            return "utf-16-le"
        if head[0] == head[2] == 0 and head[1] and head[3]:
            return "utf-16-be"
    return UTF8


@contextmanager
def opened(path: Path) -> Iterator[tuple[BinaryIO, str]]:
    """The bytes of a file of text, unpacked, and their encoding. Raises `ConfigError` for what is no text, and, for
    what the block reads of it, where the file is damaged or not in its encoding."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if (what := no_text(head)) is not None:
        raise ConfigError(f"{path}: is {what}")
    compression = next((pair for magic, pair in _COMPRESSIONS.items() if head.startswith(magic)), None)
    if compression is None:
        with path.open("rb") as file, _in_its_encoding(path, encoding_of(head)):
            yield file, encoding_of(head)
        return
    name, unpack = compression
    try:
        with io.BufferedReader(unpack(path)) as file:
            head = file.peek(_HEAD_BYTES)[:_HEAD_BYTES]
            if (what := no_text(head)) is not None:
                raise ConfigError(f"{path}: holds {what}")
            with _in_its_encoding(path, encoding_of(head)):
                yield file, encoding_of(head)
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as exc:
        if isinstance(exc, OSError) and exc.errno is not None:  # the disk's fault, and not the file's
            raise
        raise ConfigError(f"{path}: the {name} file is damaged or was cut off ({exc}); copy it again") from exc


def lines_of(file: BinaryIO, encoding: str) -> Iterator[bytes]:
    """The lines of a file that `opened` gave, in UTF-8; those of UTF-8 as they are, right or wrong."""
    if encoding == UTF8:
        yield from file
        return
    with as_text(file, encoding, newline="\n") as lines:
        for line in lines:
            yield line.encode()


@contextmanager
def as_text(file: BinaryIO, encoding: str, *, newline: Literal["", "\n"]) -> Iterator[Iterable[str]]:
    """The lines of a file that `opened` gave. Bytes that are no UTF-8 arrive as lone surrogates, so that they cost
    their own row alone."""
    if encoding == UTF8:
        text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline=newline)
    else:
        text = io.TextIOWrapper(file, encoding, newline=newline)
    try:
        yield text
    finally:
        text.detach()  # `file` is closed by whoever opened it


def text_of(content: bytes) -> str:
    """The text of a whole file. Raises `UnicodeDecodeError` if it is not in the encoding that it begins with."""
    encoding = encoding_of(content[:_HEAD_BYTES])
    return content.decode("utf-8-sig" if encoding == UTF8 else encoding)


@contextmanager
def _in_its_encoding(path: Path, encoding: str) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as exc:
        raise ConfigError(
            f"{path}: begins as {encoding.upper()}, and is not that to its end ({exc.reason}); save it as UTF-8"
        ) from exc
