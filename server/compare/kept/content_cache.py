"""Folders kept under the hash of what they were made from: made once, whole or not at all, made again if damaged.

A folder is filled beside its place and renamed under a file lock, so a killed build leaves nothing that looks whole
and two processes never build the same one at once. `SHA256SUMS` (`sha256sum -c` reads it) tells later users whether
every byte is still there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from ensemble_server.ensembles.errors import ModelLoadError

logger = logging.getLogger(__name__)

CHECKSUM_FILE = "SHA256SUMS"
MODEL_FILE_SUFFIXES = {".json", ".safetensors", ".bin", ".model", ".jinja", ".txt", ".tiktoken"}


def cached_folder(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, which `build(empty folder)` fills unless it is there and whole. What `build` raises passes through."""
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            if folder.exists():
                if is_whole(folder):
                    return folder
                logger.warning("%s is damaged and is made again", folder)
                shutil.rmtree(folder)
            partial = folder.with_name(folder.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)  # left by a killed build: whoever holds the lock may drop it
            partial.mkdir()
            try:
                build(partial)
                files = sorted(file for file in partial.iterdir() if file.is_file())
                sums = "".join(f"{file_sha256(file)}  {file.name}\n" for file in files)
                (partial / CHECKSUM_FILE).write_text(sums, encoding="utf-8")
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as exc:
        raise ModelLoadError(
            f"{folder.parent} must be writable and have room for the weights ({exc}); "
            "set ENSEMBLE_CACHE to another folder"
        ) from exc
    return folder


def is_whole(folder: Path) -> bool:
    """Whether every file is there that `SHA256SUMS` lists, with that content."""
    manifest = folder / CHECKSUM_FILE
    try:
        sums = [line.split("  ", 1) for line in manifest.read_text(encoding="utf-8").splitlines()]
        return bool(sums) and all(file_sha256(folder / name) == sha256 for sha256, name in sums)
    except (OSError, ValueError):
        return False


def folder_digest(folder: Path) -> str:
    """Hex SHA-256 of the files that make a model or an adapter what it is; read-me files do not count."""
    files = sorted(file for file in folder.iterdir() if file.suffix in MODEL_FILE_SUFFIXES and file.is_file())
    return digest({file.name: file_sha256(file) for file in files})


def digest(value: Any) -> str:
    """Hex SHA-256 of a JSON value; the order of its keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_sha256(file: Path) -> str:
    status = file.stat()
    return _sha256(str(file.resolve()), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _sha256(file: str, size: int, mtime_ns: int) -> str:
    """Size and time are in the key: gigabytes are hashed once in a process, and again as soon as they change."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
