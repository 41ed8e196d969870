"""The members of an ensemble read the texts once; what they said is kept in the cache, for every target and every run.

The folder is named after all that decides its content: the members' weights, the tokens, `top_k`, the versions. Files
are written one by one; a reading that was killed goes on with the first that is missing.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from ensemble_server.ensembles.base import Mixture
from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.ensembles.pooling import effective_weights, pool
from ensemble_server.ensembles.probability_averaging import ProbabilityAverage
from ensemble_server.server.compare.arms.identity import identity
from ensemble_server.server.compare.kept.content_cache import CHECKSUM_FILE, digest, file_sha256, is_whole
from ensemble_server.server.compare.measures.windows import Window
from ensemble_server.server.disk.whole_file import write_whole
from ensemble_server.server.distill.records import (
    WINDOWS_PER_SHARD,
    Records,
    WindowRecord,
    condensed,
    joined,
    most_bytes,
    shard_file,
    write_shard,
)
from ensemble_server.server.distill.texts import windows_sha256
from ensemble_server.server.distill.translation import Translation
from ensemble_server.server.engines.transformers_engine.engine import TransformersEngine

if TYPE_CHECKING:
    import torch

    from ensemble_server.server.config.blocks import Config

logger = logging.getLogger(__name__)

RECORDS_VERSION = 2  # part of the cache key: raise it when the same reading is written otherwise
DESCRIPTION_FILE = "teacher.json"


@dataclass(frozen=True)
class Teacher:
    """An ensemble ready to be asked. `mixture`: as it is configured; `translation`: into the student's tokens, where
    members have others."""

    name: str
    mixture: Mixture
    model: ProbabilityAverage
    translation: Translation | None = None

    @property
    def members(self) -> list[str]:
        return list(self.mixture.weights)


def num_rows(mixture: Mixture) -> int:
    """Of a record: the members, and a geometric pool, which cannot be told from some of their tokens."""
    return len(mixture.weights) + (mixture.pool == "geometric")


def check_room(windows: Sequence[Window], mixture: Mixture, *, top_k: int, limit_bytes: int) -> None:
    """Raises `ConfigError` if the records may become larger than `limit_bytes`."""
    num_tokens = sum(window.num_read for window in windows)
    needed = most_bytes(num_tokens, num_rows(mixture), top_k)
    if needed > limit_bytes:
        raise ConfigError(
            f"what {len(mixture.weights)} members say of {num_tokens} tokens may take up to {needed / 2**20:.0f} MiB "
            f"on disk; --records-mb allows {limit_bytes // 2**20}. Give less text, a smaller --top-k, or more room"
        )


def kept_records(
    mixture: Mixture,
    config: Config,
    windows: Sequence[Window],
    *,
    top_k: int,
    cache: Path,
    translation: Translation | None = None,
) -> Records | None:
    """What `read_records` has kept, if all of it is there and whole."""
    folder = _folder(mixture, config, windows, top_k, cache, translation)
    return Records(folder, len(windows)) if is_whole(folder) else None


async def read_records(
    teacher: Teacher,
    config: Config,
    windows: Sequence[Window],
    *,
    top_k: int,
    cache: Path,
    on_window: Callable[[int, int], None],
) -> Records:
    """What the teacher's members say of each window, from `cache` as far as it is there.

    `on_window` hears how many are read, and how many there are. Raises what the engine raises, `StorageError`, and
    `ConfigError` while another process reads the same.
    """
    from filelock import FileLock, Timeout

    folder = _folder(teacher.mixture, config, windows, top_k, cache, teacher.translation)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.with_name(folder.name + ".lock"), timeout=0):
            if (folder / CHECKSUM_FILE).exists() and not is_whole(folder):
                logger.warning("%s is damaged and is read again", folder)
                shutil.rmtree(folder)
                folder.mkdir()
            if not (folder / CHECKSUM_FILE).exists():
                await _read_missing(teacher, windows, folder, top_k, on_window)
    except Timeout as exc:
        raise ConfigError(f"{folder}: another process reads these texts with {teacher.name!r}; wait for it") from exc
    return Records(folder, len(windows))


def _folder(
    mixture: Mixture,
    config: Config,
    windows: Sequence[Window],
    top_k: int,
    cache: Path,
    translation: Translation | None,
) -> Path:
    key = digest(
        {
            "members": [identity(config, member) for member in mixture.weights],
            "pool": list(mixture.weights.values()) if mixture.pool == "geometric" else None,
            "translation": None if translation is None else translation.key,
            "windows": windows_sha256(windows),
            "top_k": top_k,
            "versions": [RECORDS_VERSION, *(version(package) for package in ("torch", "transformers"))],
        }
    )
    return cache / "teachers" / key


async def _read_missing(
    teacher: Teacher, windows: Sequence[Window], folder: Path, top_k: int, on_window: Callable[[int, int], None]
) -> None:
    for first in range(0, len(windows), WINDOWS_PER_SHARD):
        number, part = first // WINDOWS_PER_SHARD, windows[first : first + WINDOWS_PER_SHARD]
        if not shard_file(folder, number).exists():
            records = []
            for window in part:
                records.append(await _read(teacher, window, top_k))
                on_window(first + len(records), len(windows))
            write_shard(folder, number, records)
        on_window(first + len(part), len(windows))
    description = {
        "members": teacher.members,
        "num_rows": num_rows(teacher.mixture),
        "top_k": top_k,
        "windows": len(windows),
    }
    write_whole(folder / DESCRIPTION_FILE, (json.dumps(description, indent=1) + "\n").encode())
    files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".json"))
    write_whole(folder / CHECKSUM_FILE, "".join(f"{file_sha256(file)}  {file.name}\n" for file in files).encode())


async def _read(teacher: Teacher, window: Window, top_k: int) -> WindowRecord:
    if teacher.translation is not None:
        assert isinstance(teacher.model.host, TransformersEngine), "others are refused"
        return await teacher.translation.read(teacher.model.host, window, top_k=top_k)
    parts: list[WindowRecord] = []

    def visit(logprobs: torch.Tensor, targets: torch.Tensor) -> None:
        import torch

        if teacher.mixture.pool == "geometric":
            weights = logprobs.new_tensor(effective_weights(list(teacher.mixture.weights.values())))
            pooled = pool("geometric", logprobs, weights[:, None].expand(-1, len(targets)))
            logprobs = torch.cat([logprobs, pooled[None]])
        parts.append(condensed(logprobs, targets, top_k=top_k))

    await window.visit(teacher.model.host, teacher.members, visit)
    return joined(parts)
