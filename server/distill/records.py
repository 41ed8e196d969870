"""What the members of an ensemble said of a text, small enough to keep: one file per `WINDOWS_PER_SHARD` windows.

    per position: the union of all members' top k tokens, what each member gives each of them, the rest as one bucket

So every average of the members is known exactly on these tokens, and so is what it leaves to all others together.
Log-probabilities are float16, those of the tokens that came float32. With k = 64 the demo's four members take 1.3 kB
per position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ensemble_server.server.disk.whole_file import write_whole

if TYPE_CHECKING:
    import torch

WINDOWS_PER_SHARD = 16
Row = tuple[np.ndarray, np.ndarray]  # ids of tokens, and their probabilities
FLOOR = float(np.finfo(np.float16).min)  # stands for minus infinity, whose exponential is the same


@dataclass(frozen=True)
class WindowRecord:
    """R rows (members, and the pool where it cannot be told from them) on the T tokens of a window that were expected.

    `ids`: (N,) int32, the tokens that are kept, position after position; `counts`: (T,) how many each position has;
    `logprobs`: (R, N) nats; `tail`: (R, T) nats of all other tokens together; `of_tokens`: (R, T) nats of what came.
    `of_bytes`: (R, B) nats of each byte of it, NaN where nothing was expected, and `num_bytes`: (T,) of each token,
    where members have other vocabularies; else there is no byte.
    """

    ids: np.ndarray
    counts: np.ndarray
    logprobs: np.ndarray
    tail: np.ndarray
    of_tokens: np.ndarray
    of_bytes: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=np.float32))
    num_bytes: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))

    @property
    def is_over_bytes(self) -> bool:
        return self.of_bytes.size > 0

    def dense(self) -> tuple[np.ndarray, np.ndarray]:
        """`ids` (T, M) and `logprobs` (R, T, M) float32; places that a position does not fill repeat its first token,
        with -inf."""
        width = int(self.counts.max(initial=1))
        is_filled = np.arange(width) < self.counts[:, None]
        first = self.ids[np.cumsum(self.counts) - self.counts]
        ids = np.repeat(first[:, None], width, axis=1).astype(np.int64)
        ids[is_filled] = self.ids
        logprobs = np.full((len(self.logprobs), *ids.shape), -np.inf, dtype=np.float32)
        logprobs[:, is_filled] = self.logprobs
        return ids, logprobs


def condensed(logprobs: torch.Tensor, targets: torch.Tensor, *, top_k: int) -> WindowRecord:
    """logprobs: (R, T, V) nats, normalised over V; targets: (T,) int64, what came. Neither is changed."""
    import torch

    num_rows, num_tokens, width = logprobs.shape
    top = logprobs.topk(min(top_k, width), dim=-1).indices
    ids = top.permute(1, 0, 2).reshape(num_tokens, -1).sort(dim=-1).values  # (T, R·k)
    is_first = torch.ones_like(ids, dtype=torch.bool)
    is_first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    given = logprobs.gather(2, ids[None].expand(num_rows, -1, -1))
    counts = is_first.sum(dim=1)
    rest = 1 - torch.where(is_first, given.double().exp(), 0.0).sum(dim=-1)
    tail = torch.where(counts < width, rest, 0.0).clamp(min=0).log()
    of_tokens = logprobs.gather(2, targets[None, :, None].expand(num_rows, -1, 1))[..., 0]
    return WindowRecord(
        ids[is_first].int().cpu().numpy(),
        counts.int().cpu().numpy(),
        given[:, is_first].clamp(min=FLOOR).half().cpu().numpy(),
        tail.clamp(min=FLOOR).half().cpu().numpy(),
        of_tokens.float().cpu().numpy(),
    )


def recorded(
    rows: Sequence[Sequence[Row | None]],
    of_bytes: np.ndarray,
    begins: np.ndarray,
    targets: Sequence[int],
    *,
    top_k: int,
) -> WindowRecord:
    """As `condensed`, of rows that are known in part. rows: of R members at T tokens, None where nothing was expected;
    of_bytes: (R, B) nats, NaN where nothing was; begins: (T + 1,) bytes of B; targets: (T,) ids that came.

    A token of which some member expects nothing is certain for all.
    """
    of_bytes = np.where(np.isnan(of_bytes).any(axis=0), np.nan, of_bytes)
    counts, ids, probs = [], [], []
    of_tokens = np.zeros((len(rows), len(targets)))
    for place, target in enumerate(targets):
        found = [row[place] for row in rows]
        nats = of_bytes[:, begins[place] : begins[place + 1]]
        told = [row for row in found if row is not None]
        if len(told) < len(found) or np.isnan(nats).any():
            told = [(np.array([target]), np.array([1.0]))] * len(found)
        else:
            of_tokens[:, place] = nats.sum(axis=1)
        best = [row_ids[np.argsort(-row_probs, kind="stable")[:top_k]] for row_ids, row_probs in told]
        union = np.unique(np.concatenate(best))
        given = np.zeros((len(told), len(union)))
        for row, (row_ids, row_probs) in zip(given, told, strict=True):
            kept = np.isin(row_ids, union)
            np.add.at(row, np.searchsorted(union, row_ids[kept]), row_probs[kept])
        counts.append(len(union))
        ids.append(union)
        probs.append(given / np.maximum(given.sum(axis=1, keepdims=True), 1.0))
    bounds = np.cumsum(counts) - counts
    whole = np.concatenate(probs, axis=1)
    with np.errstate(divide="ignore"):
        return WindowRecord(
            np.concatenate(ids).astype(np.int32),
            np.asarray(counts, dtype=np.int32),
            np.maximum(np.log(whole), FLOOR).astype(np.float16),
            np.maximum(np.log(np.maximum(1 - np.add.reduceat(whole, bounds, axis=1), 0)), FLOOR).astype(np.float16),
            of_tokens.astype(np.float32),
            of_bytes[:, begins[0] :].astype(np.float32),
            np.diff(begins).astype(np.int32),
        )


def joined(parts: Sequence[WindowRecord]) -> WindowRecord:
    """One after the other."""
    return WindowRecord(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.counts for part in parts]),
        np.concatenate([part.logprobs for part in parts], axis=1),
        np.concatenate([part.tail for part in parts], axis=1),
        np.concatenate([part.of_tokens for part in parts], axis=1),
        np.concatenate([part.of_bytes for part in parts], axis=1),
        np.concatenate([part.num_bytes for part in parts]),
    )


def most_bytes(num_tokens: int, num_rows: int, top_k: int) -> int:
    """What the records of so many positions can take on disk at most: when no two members agree on a token."""
    return num_tokens * (num_rows * top_k * (4 + 2 * num_rows) + 4 + 6 * num_rows)


# --- on disk ---


def shard_file(folder: Path, number: int) -> Path:
    return folder / f"windows-{number:05d}.safetensors"


def write_shard(folder: Path, number: int, records: Sequence[WindowRecord]) -> None:
    """The file is there as a whole or not at all. Raises `StorageError`."""
    from safetensors.numpy import save

    whole = joined(records)
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in vars(whole).items()}
    tensors["bytes_of_window"] = np.asarray([record.of_bytes.shape[1] for record in records], dtype=np.int32)
    tensors["num_tokens"] = np.asarray([len(record.counts) for record in records], dtype=np.int32)
    write_whole(shard_file(folder, number), save(tensors))


class Records(Sequence[WindowRecord]):
    """The records of `num_windows` windows in a folder. A file is read when one of its windows is asked for."""

    def __init__(self, folder: Path, num_windows: int) -> None:
        self.folder = folder
        self._num_windows = num_windows
        self._shard = lru_cache(maxsize=8)(self._read)

    def __len__(self) -> int:
        return self._num_windows

    def __getitem__(self, index: int) -> WindowRecord:  # type: ignore[override]  # no slices
        if not 0 <= index < self._num_windows:
            raise IndexError(index)
        return self._shard(index // WINDOWS_PER_SHARD)[index % WINDOWS_PER_SHARD]

    def _read(self, number: int) -> list[WindowRecord]:
        from safetensors.numpy import load_file

        tensors = load_file(shard_file(self.folder, number))
        return list(_cut(tensors))


def _cut(tensors: dict[str, np.ndarray]) -> Iterator[WindowRecord]:
    counts = tensors["counts"]
    tokens = np.concatenate([[0], np.cumsum(tensors["num_tokens"])])
    kept = np.concatenate([[0], np.cumsum(counts)])[tokens]
    bytes_ = np.concatenate([[0], np.cumsum(tensors["bytes_of_window"])])
    has_bytes = bytes_[-1] > 0
    for window in range(len(tokens) - 1):
        here, there = slice(*tokens[window : window + 2]), slice(*kept[window : window + 2])
        yield WindowRecord(
            tensors["ids"][there],
            counts[here],
            tensors["logprobs"][:, there],
            tensors["tail"][:, here],
            tensors["of_tokens"][:, here],
            tensors["of_bytes"][:, bytes_[window] : bytes_[window + 1]],
            tensors["num_bytes"][here] if has_bytes else tensors["num_bytes"],
        )
