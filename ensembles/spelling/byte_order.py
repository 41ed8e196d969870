"""A vocabulary in the order of its tokens' bytes, and next-token distributions in that order.

Sorted, all tokens that begin with a string stand side by side: one range [lo, hi), of which those that are that string
itself come first, [lo, eq). The probability that the text goes on with a string is then a difference of two running
sums, and that of every next byte a handful more. A range is a `Node`; nodes are made when somebody first walks there,
so there is no trie of all prefixes and no matrix. Sorting is done once, when a vocabulary is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

DIRECT = 512  # tokens: ranges up to here are summed one by one
SMALL_MASS = 1e-9  # so are larger ones that have less: a difference of running sums is good to about 1e-13


class ByteOrder:
    """`token_bytes[i]`: what token i adds to a text; b"" for tokens that stand for none, which get no probability.

    `end_ids`: tokens any of which ends a text. `ids`: (n,) int64, token ids in the order of their bytes. Raises
    `ValueError` if no token has bytes.
    """

    def __init__(self, token_bytes: Sequence[bytes], end_ids: Iterable[int]) -> None:
        ends = frozenset(end_ids)
        order = sorted((i for i, data in enumerate(token_bytes) if data and i not in ends), key=token_bytes.__getitem__)
        if not order:
            raise ValueError("no token of the vocabulary stands for text")
        self.ids = np.array(order, dtype=np.int64)
        self.end_ids = np.array(sorted(ends), dtype=np.int64)
        self.lengths = np.array([len(token_bytes[i]) for i in order], dtype=np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])  # of each token in `data`
        self.data = np.frombuffer(b"".join(token_bytes[i] for i in order), dtype=np.uint8)
        self.root = Node(self, 0, len(order), 0)
        self._on_device: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def longest(self, data: bytes) -> int | None:
        """Id of the longest token that `data` begins with, if there is one: b"the cat" -> that of b"the"."""
        node, found = self.root, None
        for byte in data:
            child = node.child(byte)
            if child is None:
                break
            node = child
            if node.eq > node.lo:
                found = int(self.ids[node.lo])
        return found

    def bytes_at(self, place: int, begin: int = 0) -> bytes:
        """Of the token in that place, from its byte `begin` on."""
        return self.data[self.starts[place] + begin : self.starts[place + 1]].tobytes()

    def distributions(self, logprobs: torch.Tensor) -> list[Distribution]:
        """logprobs: (n, V) float32 or float64, not changed -> n distributions, normalised over what is text or END.

        Cost: O(V) each, on the device where `logprobs` are; what comes to the CPU is 12 bytes per token.
        """
        import torch

        device = logprobs.device
        if device not in self._on_device:
            self._on_device[device] = (
                torch.as_tensor(self.ids, device=device),
                torch.as_tensor(self.end_ids, device=device),
            )
        ids, end_ids = self._on_device[device]
        text, ends = logprobs[:, ids], logprobs[:, end_ids].double().logsumexp(-1)
        highest = torch.maximum(text.amax(-1).double(), ends).clamp(min=torch.finfo(text.dtype).min)
        text -= highest.to(text.dtype)[:, None]
        log_ends = ends - highest
        running = text.exp().cumsum(-1, dtype=torch.float64)
        totals = (running[:, -1] + log_ends.exp()).clamp(min=1e-300)
        running /= totals[:, None]
        log_totals = totals.log()
        return [
            Distribution(self, *parts)
            for parts in zip(
                text.cpu().numpy(),
                running.cpu().numpy(),
                log_totals.tolist(),
                (log_ends - log_totals).tolist(),
                strict=True,
            )
        ]


class Node:
    """The tokens that begin with one string of `depth` bytes: places [lo, hi) of an order; [lo, eq) are that string.

    `bytes`: (m,) uint8, those that can follow inside a token; `borders`: (m + 1,), where the tokens of each begin, and
    the end of the last.
    """

    __slots__ = (
        "_children",
        "_order",
        "borders",
        "bytes",
        "depth",
        "eq",
        "hi",
        "lo",
        "small",
        "small_places",
        "starts",
    )

    def __init__(self, order: ByteOrder, lo: int, hi: int, depth: int) -> None:
        eq = lo
        while eq < hi and order.lengths[eq] == depth:
            eq += 1
        self.lo, self.eq, self.hi, self.depth = lo, eq, hi, depth
        following = order.data[order.starts[eq:hi] + depth]
        first = np.concatenate([[0], np.flatnonzero(following[1:] != following[:-1]) + 1]) if hi > eq else []
        self.bytes = following[first] if hi > eq else following
        self.borders = np.append(np.asarray(first, dtype=np.int64) + eq, hi)
        self._children: dict[int, Node | None] = {}
        self._order = order
        # Children that are summed one by one, though there are too many tokens for that in all: which, the places of
        # their tokens, and where in those each begins.
        self.small, self.small_places, self.starts = None, None, self.borders[:-1] - eq
        if hi - eq > DIRECT:
            sizes = np.diff(self.borders)
            self.small = np.flatnonzero(sizes <= DIRECT)
            ranges = [np.arange(self.borders[i], self.borders[i + 1]) for i in self.small]
            self.small_places = np.concatenate([np.empty(0, np.int64), *ranges])
            self.starts = np.cumsum(sizes[self.small]) - sizes[self.small]

    def child(self, byte: int) -> Node | None:
        """The node of the string with one more byte; None if no token begins with that."""
        if byte not in self._children:
            at = int(np.searchsorted(self.bytes, byte))
            is_there = at < len(self.bytes) and self.bytes[at] == byte
            borders = self.borders
            self._children[byte] = (
                Node(self._order, int(borders[at]), int(borders[at + 1]), self.depth + 1) if is_there else None
            )
        return self._children[byte]


class Distribution:
    """What a member expects next. Made by `ByteOrder.distributions`; never changed.

    `log_end`: log-probability of END. Sums over tokens and END are 1.
    """

    __slots__ = ("_log_total", "_logprobs", "_running", "log_end", "order")

    def __init__(
        self, order: ByteOrder, logprobs: np.ndarray, running: np.ndarray, log_total: float, log_end: float
    ) -> None:
        self.order = order
        self.log_end = log_end
        self._logprobs = logprobs  # (n,), up to `log_total`
        self._running = running  # (n,) float64, normalised
        self._log_total = log_total

    def logprob(self, place: int) -> float:
        """Of the token in that place of the order."""
        return float(self._logprobs[place]) - self._log_total

    def between(self, lo: np.ndarray, hi: np.ndarray) -> np.ndarray:
        """(m,) float64: the probability of the tokens in the places [lo, hi) of each; good to about 1e-13."""
        return self._running[hi - 1] - np.where(lo > 0, self._running[lo - 1], 0.0)

    def likeliest(self, node: Node, num: int) -> list[tuple[int, float]]:
        """Places and log-probabilities of the `num` likeliest tokens that begin with the string of `node` and are
        longer, in no order."""
        logprobs = self._logprobs[node.eq : node.hi]
        found = np.argpartition(logprobs, -num)[-num:] if num < len(logprobs) else np.arange(len(logprobs))
        return [(node.eq + i, float(logprobs[i]) - self._log_total) for i in found.tolist()]

    def masses(self, node: Node) -> np.ndarray:
        """(m,) float64: the probability of the tokens behind each of `node.bytes`."""
        if node.eq == node.hi:
            return np.empty(0)
        if node.small is None:
            probs = np.exp(self._logprobs[node.eq : node.hi].astype(np.float64) - self._log_total)
            return probs if len(probs) == len(node.starts) else np.add.reduceat(probs, node.starts)
        sums = self._running[node.borders - 1]
        if node.borders[0] == 0:
            sums[0] = 0.0
        masses = np.diff(sums)
        if len(node.small):
            probs = np.exp(self._logprobs[node.small_places].astype(np.float64) - self._log_total)
            masses[node.small] = np.add.reduceat(probs, node.starts)
        if masses.min() < SMALL_MASS:
            is_large = np.diff(node.borders) > DIRECT
            for i in np.flatnonzero(is_large & (masses < SMALL_MASS)):
                tokens = self._logprobs[node.borders[i] : node.borders[i + 1]]
                masses[i] = np.exp(tokens.astype(np.float64) - self._log_total).sum()
        return masses


def log_of(mass: float) -> float:
    return math.log(mass) if mass > 0 else -math.inf
