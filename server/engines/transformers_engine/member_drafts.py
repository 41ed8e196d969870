"""Drafts from a member: the one whose weights are lightest writes ahead by itself, the others read it all at once.

What it expected is kept and pooled with what the others expect, so its forwards are not done twice. It draws as the
choice is going to draw, with the choice's own next random numbers: where it expects about what the mixture expects, it
finds the same token. Sources: Leviathan et al., "Fast inference from transformers via speculative decoding", 2023;
members as drafters of their ensemble: Fu et al., "Speculative Ensemble", 2025; equal random numbers in place of a rule
of acceptance: Daliri et al., "Coupling without communication and drafter-invariant speculative decoding", 2024.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ensemble_server.ensembles.errors import UnsupportedError
from ensemble_server.server.engines.transformers_engine.attention import Span
from ensemble_server.server.engines.transformers_engine.choice import Draft, LiveChoice
from ensemble_server.server.engines.transformers_engine.members import Member


def drafter_of(members: Sequence[Member], weights: np.ndarray) -> int | None:
    """Which member writes ahead; None if that saves nothing, since all are rows of the same weights.

    weights: (K,), as they are now. Of members that are equally light the one with the most weight, which the mixture
    follows most; none that the mixture moves away from.
    """
    if len({member.backbone for member in members}) == 1:
        return None
    trusted = [k for k in range(len(members)) if weights[k] > 0]
    return min(trusted, key=lambda k: (members[k].backbone.num_parameters, -weights[k]), default=None)


class Manuscript:
    """What member `drafter` writes ahead of a choice, at most `max_tokens` >= 1."""

    def __init__(self, choice: LiveChoice, drafter: int, max_tokens: int) -> None:
        self.is_done = False
        self._choice = choice
        self._drafter = drafter
        self._max_tokens = max_tokens
        self._drawing = choice.drawing.fork()
        self._token_ids: list[int] = []
        self._rows: list[torch.Tensor] = []
        self._num_read = 0

    @property
    def draft(self) -> Draft:
        return Draft(self._token_ids, self._drafter, self._rows, self._num_read)

    def next_span(self) -> tuple[Member, Span]:
        """What it reads to write on."""
        member = self._choice.members[self._drafter]
        token_ids = self._token_ids[-1:] or self._choice.last_ids(member)
        self._num_read += len(token_ids)
        return member, Span(self._choice.caches[self._drafter], token_ids, 1, member.adapter)

    def take(self, logprobs: torch.Tensor) -> None:
        """What it expects next, (V,): write a token."""
        self._rows.append(logprobs)
        try:
            token_id = self._drawing.draw(logprobs)
            if not self._choice.can_draft(token_id):
                self.is_done = True
                return
            self._token_ids.append(token_id)
            self._drawing.take(token_id)
        except (
            UnsupportedError,
            RuntimeError,
        ):  # a grammar that cannot go on, as the choice will say if it comes there
            self.is_done = True
            return
        is_end = token_id in self._choice.ends or self._drawing.is_complete
        self.is_done = is_end or len(self._token_ids) == self._max_tokens
