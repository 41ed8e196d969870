"""Members whose vocabularies extend each other, as members of one mixture.

    p_k(x) = 0                                           if x is not a token of member k
    p_k(x) = what it gives x, normalised over its own tokens     otherwise

So the arithmetic and posterior pools give an added token x the weighted sum over the members that have it, and a
posterior weight falls to nothing on a token that its member does not have (share brings it back). In the geometric pool
a member has no opinion of what it does not have: `ensembles.pooling.geometric`.

A token that is drawn is read by every member: by one that lacks it as its text, in that member's own tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ensemble_server.ensembles.errors import RequestError
from ensemble_server.server.engines.transformers_engine.members import Member
from ensemble_server.server.weights.tokenizer import Vocabulary
from ensemble_server.server.weights.view import Surface
from ensemble_server.server.weights.vocabularies import Family, family_of


@dataclass(frozen=True, eq=False)
class FamilyMember(Member):
    """A member beside others that have tokens it lacks, or lack some of its. `known`: (width,) bool, its own tokens."""

    known: torch.Tensor

    @property
    def vocab_size(self) -> int:
        return len(self.known)

    def has(self, token_id: int) -> bool:
        return token_id < len(self.known) and bool(self.known[token_id])

    def widened(self, logprobs: torch.Tensor) -> torch.Tensor:
        """(n, the backbone's vocab_size) -> (n, width), normalised over the member's own tokens, -inf elsewhere."""
        rows = torch.nn.functional.pad(logprobs, (0, len(self.known) - logprobs.shape[-1]), value=-torch.inf)
        known = self.known.to(rows.device)
        return torch.log_softmax(rows.masked_fill(~known, -torch.inf), dim=-1)


class FamilySurface(Surface):
    """One member's surface that also knows the added tokens of the others. `others`: id -> a vocabulary that has it."""

    def __init__(self, own: Surface, others: Mapping[int, Vocabulary], width: int) -> None:
        super().__init__(
            own.tokenizer,
            chat_template=own.chat_template,
            system_prompt=own.system_prompt,
            template_kwargs=own.template_kwargs,
            thinking=own.thinking or "off",
        )
        self._others = others
        self._width = width

    @cached_property
    def vocab_size(self) -> int:
        return self._width

    @cached_property
    def special_ids(self) -> frozenset[int]:
        foreign = {token_id for token_id, vocabulary in self._others.items() if token_id in vocabulary.special_ids}
        return super().special_ids | foreign

    def bytes_of(self, token_id: int, previous: int | None = None) -> bytes:
        if (vocabulary := self._others.get(token_id)) is not None:
            return vocabulary.bytes_of(token_id)
        return super().bytes_of(token_id, None if previous in self._others else previous)

    def own_ids(self, token_ids: Sequence[int]) -> list[int]:
        """`token_ids` in this member's own: those that it lacks as its tokens for their text."""
        if self._others.keys().isdisjoint(token_ids):
            return list(token_ids)
        return [own for token_id in token_ids for own in self._spelled(token_id)]

    def _spelled(self, token_id: int) -> list[int]:
        if (vocabulary := self._others.get(token_id)) is None:
            return [token_id]
        return self.encode(vocabulary.bytes_of(token_id).decode(errors="replace"), add_special_tokens=False)


def as_family(members: Sequence[Member]) -> list[Member]:
    """`members` as they are where they have one vocabulary, else each among the others.

    Raises `ModelLoadError` where their vocabularies are of no family.
    """
    family = family_of(members)
    if family.is_uniform:
        return list(members)
    return [_among(family, k, members) for k in range(len(members))]


def known_rows(rows: Sequence[Sequence[Member]], logprobs: torch.Tensor) -> torch.Tensor | None:
    """The tokens that members have, for `pool`. rows: (B, K), the members behind each row; logprobs: (K, B, V).

    -> (K, B, V) bool; None if all of them have all.
    """
    if not any(isinstance(members[0], FamilyMember) for members in rows):
        return None
    known = torch.ones(logprobs.shape, dtype=torch.bool, device=logprobs.device)
    for b, members in enumerate(rows):
        for k, member in enumerate(members):
            if isinstance(member, FamilyMember):
                known[k, b] = member.known.to(logprobs.device)
    return known


def check_shared_ids(token_ids: Sequence[int], members: Sequence[Member]) -> None:
    """Raises `RequestError` for a text with a token that one of `members`, who are to read the same ids, lacks."""
    for member in members:
        if (own := member.surface.own_ids(token_ids)) != list(token_ids):
            place = next(i for i, (mine, given) in enumerate(zip(own, token_ids, strict=False)) if mine != given)
            raise RequestError(
                f"token id {token_ids[place]} is no token of member {member.name!r}; a text that all are to be scored "
                "on can only have tokens that all have",
                param="token_ids",
            )


def _among(family: Family, k: int, members: Sequence[Member]) -> FamilyMember:
    member = members[k]
    others = {token_id: members[family.added[token_id]].surface for token_id in family.lacking[k]}
    known = torch.zeros(family.width, dtype=torch.bool, device=member.backbone.device)
    known[: member.vocab_size] = True
    known[sorted(family.lacking[k])] = False
    return FamilyMember(
        member.name,
        member.backbone,
        member.adapter,
        FamilySurface(member.surface, others, family.width),
        member.eos_ids,
        member.max_model_len,
        known,
    )
