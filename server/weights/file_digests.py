"""Digests of large files, read once: a start need not read a gigabyte to learn that it is what it was.

As git and make do, a file counts as unchanged while its size, its inode and the time of its last change stay. That time
(ctime) is the kernel's: no program can set it back. Damage on the disk itself is met when the file is next written or
the cache is removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from ensemble_server.server.weights.cache import cache_folder

SETTLED_NS = 2_000_000_000  # a file changed later than this may change again within the same tick of its clock


def known_sha256(file: Path) -> str:
    """Hex SHA-256 of `file`; its content is read only if it has changed since a digest was last kept.

    Raises `OSError` if it cannot be read.
    """
    before = _state(file)
    kept = cache_folder() / "digests" / f"{hashlib.sha256(os.fsencode(file.absolute())).hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError, AttributeError):  # none is kept, or something else lies there
        known = json.loads(kept.read_bytes())
        if known.get("state") == before and isinstance(known.get("sha256"), str):
            return known["sha256"]
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if before == _state(file) and time.time_ns() - file.stat().st_ctime_ns > SETTLED_NS:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time, and nothing else
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial = kept.with_suffix(f".{os.getpid()}.partial")
            partial.write_text(json.dumps({"file": str(file.absolute()), "state": before, "sha256": digest}))
            partial.replace(kept)
    return digest


def _state(file: Path) -> list[int]:
    stat = file.stat()
    return [stat.st_size, stat.st_ino, stat.st_ctime_ns]
