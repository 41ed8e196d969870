"""How one choice draws its tokens: controls, grammar and random numbers, and what of the past they depend on."""

from __future__ import annotations

import copy
import secrets
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from ensemble_server.ensembles.base import Sampling
from ensemble_server.ensembles.pooling import sampling
from ensemble_server.server.engines.shared.grammar import GrammarMask


class Drawing:
    """`ends`: tokens that `min_tokens` holds off."""

    def __init__(
        self,
        settings: Sampling,
        prompt_ids: Sequence[int],
        ends: Sequence[int],
        grammar: GrammarMask | None,
        random: torch.Generator,
    ) -> None:
        self._settings = settings
        self._prompt_ids = torch.tensor(prompt_ids, dtype=torch.long)
        self._ends = ends
        self._grammar = grammar
        self._random = random
        self._counts: Counter[int] = Counter()

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow, by the grammar."""
        return self._grammar is not None and self._grammar.is_finished

    def draw(self, logprobs: torch.Tensor) -> int:
        """The next token, from (V,) of the mixture, or of whoever guesses what the mixture will draw."""
        return sampling.choose(self._controlled(logprobs), self._settings, self._random)

    def take(self, token_id: int) -> None:
        """The token that came, drawn or not. Raises as `GrammarMask.advance` does."""
        if self._grammar is not None:
            self._grammar.advance(token_id)
        self._counts[token_id] += 1

    def fork(self) -> Drawing:
        """Draws with the random numbers that this one is going to draw with."""
        other = copy.copy(self)
        other._random = self._random.clone_state()
        other._counts = self._counts.copy()
        other._grammar = None if self._grammar is None else self._grammar.copy()
        return other

    def _controlled(self, logprobs: torch.Tensor) -> torch.Tensor:
        logits = sampling.penalise(logprobs, self._settings, self._prompt_ids, self._counts)
        forbidden = []
        if self._counts.total() < self._settings.min_tokens:
            forbidden = [token_id for token_id in self._ends if token_id < len(logits)]
        if self._grammar is not None:
            logits = logits.masked_fill(~self._grammar.allowed().to(logits.device), -torch.inf)
        if forbidden:
            others = logits.clone()
            others[forbidden] = -torch.inf
            if self._grammar is None or not others.isneginf().all():  # a text that is complete ends, however short
                return others
        return logits


def generator(seed: int | None, index: int) -> torch.Generator:
    """Random numbers of choice `index`: equal for equal (seed, index), unrelated between choices."""
    entropy = secrets.randbits(64) if seed is None else seed % 2**64
    state = np.random.SeedSequence([entropy, index]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))
