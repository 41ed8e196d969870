"""A file that is either the old one or the new one, whatever happens in between."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ensemble_server.ensembles.errors import StorageError


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends well, with its permissions; nothing happens to
    `path` otherwise. On disk when the block has ended.

    Raises `StorageError` if it cannot be written. What the block raises for other reasons passes through.
    """
    path = path.resolve()  # what a link points to is replaced, and the link stays
    try:
        if path.exists() and not path.is_file():  # a pipe or a device takes what comes; a folder is an error
            with path.open("wb") as file:
                yield file
            return
        beside = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with beside.open("wb") as file:
                yield file
                if path.exists():
                    os.fchmod(file.fileno(), path.stat().st_mode)
            give_name(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as exc:
        raise StorageError(
            f"{path} cannot be written ({exc.strerror or exc}); what was there before is unchanged. Free some space, or"
            " choose another place"
        ) from exc


def write_whole(path: Path, content: bytes) -> None:
    """Put `content` at `path`. Makes the folder if need be. Raises `StorageError`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise StorageError(f"{path.parent} cannot be made ({exc.strerror or exc}); choose another place") from exc
    with whole_file(path) as file:
        file.write(content)


def give_name(written: Path, path: Path) -> None:
    """Bring the bytes of a file that is closed to the disk, then give it its name, and bring that there, too.

    Not every file system can do the last. Raises `OSError`.
    """
    _sync(written)
    written.replace(path)
    try:
        _sync(path.parent)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES):
            raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
