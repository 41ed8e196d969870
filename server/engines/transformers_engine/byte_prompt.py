"""What members of different vocabularies read before they write: their own tokens of the prompt, up to its last word.

A prompt of raw text may end inside a token: after " th" a member that reads " th" as one token expects no "e". So each
stops before the last word of the prompt, and its lattice is given the bytes of that word (*healing*). Conversations end
with special tokens, behind which a new text begins.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ensemble_server.ensembles.base import Mixture
from ensemble_server.server.engines.transformers_engine.members import Member
from ensemble_server.server.engines.transformers_engine.prefix_cache import PrefixCache
from ensemble_server.server.engines.transformers_engine.prompt import Prompt

MAX_HEALED = 64  # bytes; longer words are not begun anew


class BytePrompt(Prompt):
    """`token_ids`: per member, what it reads before its lattice begins."""

    def __init__(
        self, members: Sequence[Member], token_ids: Sequence[Sequence[int]], mixture: Mixture, prefixes: PrefixCache
    ) -> None:
        super().__init__(members, token_ids, mixture, None, prefixes)
        self._is_lockstep = False  # equal ids are other tokens

    def evidence_of(self, index: int) -> tuple[bytes, np.ndarray]:
        """The bytes that a member has read but for its first token, and the nats that it gave them.

        A token's nats are spread evenly over its bytes. Only what the posterior pool asked for is known.
        """
        surface = self.members[index].surface
        parts = [surface.bytes_of(token_id) for token_id in self.token_ids[index][1:]]
        nats = np.concatenate(self._evidence[index]) if self._evidence[index] else np.zeros(0)
        if len(nats) != len(parts):
            return b"", np.zeros(0)
        lengths = np.array([len(part) for part in parts], dtype=np.int64)
        return b"".join(parts), np.repeat(nats / np.maximum(lengths, 1), lengths)

    def _common_evidence(self) -> np.ndarray:
        """None yet: bytes that the lattices are given are evidence, too."""
        return np.zeros((len(self.members), 0))


def healed(text: bytes, token_bytes: Sequence[bytes], token_ids: Sequence[int]) -> tuple[list[int], bytes]:
    """-> the tokens to read of a prompt, and the bytes of its end that are left for the lattice to spell.

    `token_bytes`: of every id, b"" for special ones; `token_ids`: the prompt's. At least one token is read.
    """
    wanted = len(text) - last_word(text)
    end, num_bytes = len(token_ids), 0
    while end > 1 and num_bytes < wanted and token_bytes[token_ids[end - 1]]:
        end -= 1
        num_bytes += len(token_bytes[token_ids[end]])
    tail = b"".join(token_bytes[token_id] for token_id in token_ids[end:])
    if not text.endswith(tail):  # the prompt was changed on its way into tokens
        return list(token_ids), b""
    return list(token_ids[:end]), tail


def last_word(text: bytes) -> int:
    """Where the last word of `text` begins, with the space before it: b"of  the" -> 2. Trailing space is a word.

    At most `MAX_HEALED` bytes before the end.
    """
    window = text[-MAX_HEALED:]
    body = window.rstrip()
    if len(body) == len(window):
        spaces = [at for at, byte in enumerate(body) if byte in b" \t\n\r\v\f"]
        body = body[: spaces[-1] if spaces else 0].rstrip()
    return len(text) - len(window) + len(body)


def common_end(texts: Sequence[bytes]) -> int:
    """Length of the longest end that all share."""
    shortest = min(map(len, texts))
    arrays = [np.frombuffer(text[len(text) - shortest :], dtype=np.uint8) for text in texts]
    differs = np.any([array != arrays[0] for array in arrays[1:]], axis=0) if len(arrays) > 1 else np.zeros(shortest)
    places = np.flatnonzero(differs)
    return shortest - int(places[-1]) - 1 if len(places) else shortest
