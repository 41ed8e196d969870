"""What members remember of prompts that came before: a prompt that begins like another continues from there.

A prefix is kept in blocks of `BLOCK` tokens. A block's key is a digest of all tokens up to its end, so prompts that
share a system prompt or a few-shot head share the blocks of it, and each further block is a branch. The least
recently used block goes first when the bytes run out; a block is always used after those behind it, so no branch
loses its root before its leaves. The scheme is that of vLLM's automatic prefix caching; what differs is that rows do
not look at blocks: those that continue from the same ones at the same time share one copy in one piece.

Kept with the keys and values is what the member gave each token of the block, if that was computed: the evidence that
moves posterior weights is then exact without running the prefix again.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from weakref import WeakValueDictionary

import numpy as np

from ensemble_server.server.engines.transformers_engine.kv_cache import LayerSlices, Segment, joined
from ensemble_server.server.engines.transformers_engine.members import Member

BLOCK = 32  # tokens; what is shared less than a whole block is read again

BlockKey = tuple[object, str | None, bytes]  # backbone, adapter, digest of the tokens up to the block's end


@dataclass(frozen=True, eq=False)
class Block:
    """`evidence`: (BLOCK,) float64, nats that the member gave each token, 0 for the first of a text; None if nobody
    asked."""

    layers: LayerSlices
    evidence: np.ndarray | None

    @property
    def num_bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers.values())


class PrefixCache:
    """Belongs to the engine's thread. With `max_bytes` 0 nothing is kept."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._blocks: OrderedDict[BlockKey, Block] = OrderedDict()  # least recently used first
        self._segments: WeakValueDictionary[tuple[BlockKey, int], Segment] = WeakValueDictionary()  # those in use
        self._hits: Counter[str] = Counter()

    def find(self, keys: Sequence[BlockKey], *, with_evidence: bool) -> list[Block]:
        """The longest run of known blocks from the front of `keys`. They count as used."""
        found: list[Block] = []
        for key in keys:
            if not self.has(key, with_evidence=with_evidence):
                break
            found.append(self._blocks[key])
        self._touch(keys[: len(found)])
        return found

    def has(self, key: BlockKey, *, with_evidence: bool) -> bool:
        block = self._blocks.get(key)
        return block is not None and not (with_evidence and block.evidence is None)

    def keep(self, keys: Sequence[BlockKey], block: Block) -> None:
        """Add the block of the last of `keys` (the others lead to it), or replace it; forget others to make room."""
        if block.num_bytes > self.max_bytes:
            return
        self._forget(keys[-1])
        self._blocks[keys[-1]] = block
        self.num_bytes += block.num_bytes
        self._touch(keys)
        while self.num_bytes > self.max_bytes:
            self._forget(next(iter(self._blocks)))

    def segment(self, keys: Sequence[BlockKey], blocks: Sequence[Block], end: int) -> Segment:
        """The first `end` tokens of `blocks`, which `keys` lead to, in one piece: the same one for all who ask while
        somebody holds it."""
        key = (keys[len(blocks) - 1], end)
        segment = self._segments.get(key)
        if segment is None:
            segment = joined([block.layers for block in blocks], end)
            self._segments[key] = segment
        return segment

    def count_hit(self, member: str, num_tokens: int) -> None:
        """A prompt continued from here."""
        self._hits[member] += num_tokens

    def drain_hits(self) -> Counter[str]:
        """Tokens per member that were not read again, since the last call."""
        hits, self._hits = self._hits, Counter()
        return hits

    def _touch(self, keys: Sequence[BlockKey]) -> None:
        for key in reversed(keys):  # the root last: it goes after all that stand on it
            if key in self._blocks:
                self._blocks.move_to_end(key)

    def _forget(self, key: BlockKey) -> None:
        if (block := self._blocks.pop(key, None)) is not None:
            self.num_bytes -= block.num_bytes


def block_keys(member: Member, token_ids: Sequence[int]) -> list[BlockKey]:
    """One key for each whole block of a prompt. Members on the same weights and adapter share them."""
    ids = np.asarray(token_ids, dtype=np.int64)
    digest, keys = blake2b(digest_size=16), []
    for begin in range(0, len(ids) - BLOCK + 1, BLOCK):
        digest.update(ids[begin : begin + BLOCK].tobytes())
        keys.append((member.backbone, member.adapter, digest.digest()))
    return keys
