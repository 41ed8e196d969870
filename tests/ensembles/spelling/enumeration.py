"""The independent reference: random models over small vocabularies, and all covers of a text, one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch

from ensemble_server.ensembles.spelling import END, ROW
from ensemble_server.ensembles.spelling.byte_order import ByteOrder, Distribution
from ensemble_server.ensembles.spelling.lattice import Lattice


class RandomModel:
    """Next-token distributions that depend on the whole history, for `tokens` and one end-of-text id behind them."""

    def __init__(self, tokens: Sequence[bytes], *, seed: int, scale: float = 2.0) -> None:
        self.tokens = list(tokens)
        self.end_id = len(tokens)
        self.order = ByteOrder([*tokens, b"</s>"], [self.end_id])
        self._seed, self._scale = seed, scale
        self.num_asked = 0
        # covers share their beginnings, and texts theirs
        self.probs, self.mass, self.row = cache(self.probs), cache(self.mass), cache(self.row)

    def probs(self, history: tuple[int, ...]) -> np.ndarray:
        rng = np.random.default_rng([self._seed, len(history), *history])
        logits = rng.normal(size=len(self.tokens) + 1) * self._scale
        probs = np.exp(logits - logits.max())
        return probs / probs.sum()

    def distribution(self, history: tuple[int, ...]) -> Distribution:
        self.num_asked += 1
        return self.order.distributions(torch.from_numpy(np.log(self.probs(history)))[None])[0]

    def lattice(self, **options: object) -> Lattice:
        return Lattice(self.distribution(()), **options)

    def supply(self, lattice: Lattice) -> None:
        """Give what is wanted, until nothing is."""
        while lattice.wanted:
            for history in list(lattice.wanted):
                lattice.give(history, self.distribution(tuple(history.tokens())))

    def read(self, lattice: Lattice, text: bytes) -> list[float]:
        """Feed `text`; the evidence of its bytes."""
        evidence = []
        for byte in text:
            lattice.feed(byte)
            self.supply(lattice)
            evidence.append(lattice.evidence)
        return evidence

    def mass(self, text: bytes, *, then_end: bool = False) -> float:
        """P(text), or P(text, END): the sum over all covers."""

        def over(history: tuple[int, ...], rest: bytes) -> float:
            probs = self.probs(history)
            if not rest:
                return probs[self.end_id] if then_end else 1.0
            total = 0.0
            for i, token in enumerate(self.tokens):
                if rest.startswith(token):
                    total += probs[i] * over((*history, i), rest[len(token) :])
                elif token.startswith(rest) and not then_end:
                    total += probs[i]
            return total

        return over((), text)

    def row(self, text: bytes) -> np.ndarray:
        """(257,): log P(x | text) for every byte and END."""
        row = np.full(ROW, -math.inf)
        whole = self.mass(text)
        for byte in {data[i] for data in self.tokens for i in range(len(data))}:
            mass = self.mass(text + bytes([byte]))
            row[byte] = math.log(mass / whole) if mass else -math.inf
        row[END] = math.log(self.mass(text, then_end=True) / whole)
        return row


def random_vocabulary(rng: np.random.Generator, alphabet: bytes, num_longer: int, max_length: int = 4) -> list[bytes]:
    """All letters, and longer tokens in no order; some strings twice."""
    tokens = [bytes([letter]) for letter in alphabet]
    for _ in range(num_longer):
        length = int(rng.integers(2, max_length + 1))
        tokens.append(bytes(rng.choice(list(alphabet), size=length).tolist()))
    rng.shuffle(tokens)
    return tokens


def random_text(rng: np.random.Generator, alphabet: bytes, length: int) -> bytes:
    return bytes(rng.choice(list(alphabet), size=length).tolist())


@cache
def trained_tokens() -> tuple[bytes, ...]:
    """The tokens of a tiny byte-level BPE that was trained on a few lines."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=60, show_progress=False)
    tokenizer.train_from_iterator(["the bat ate the oat, the other he bore; no one bet on that, né 数数"] * 3, trainer)
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    return tuple(bytes(byte_of[char] for char in token) for token, _ in vocabulary)
