"""Whether members have one vocabulary, so that their next-token distributions can be pooled token by token.

Fine-tunes add tokens to the vocabulary of their base: padding, the marks of a chat template, of tools, of thoughts.
Such vocabularies are one *family*: the same tokens under the same ids, but for added ones that only some members have.
A token is a member's if its tokenizer knows it and its weights have a row for it: an added one that the embeddings were
never resized for is not. What only looks alike (equal sizes, other tokens or another order) is no family.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.weights.tokenizer import Vocabulary


class Reader(Protocol):
    """A member as far as its tokens are concerned. `vocab_size`: how many ids it has weights for."""

    @property
    def name(self) -> str: ...

    @property
    def surface(self) -> Vocabulary: ...

    @property
    def vocab_size(self) -> int: ...


@dataclass(frozen=True)
class Family:
    """Vocabularies that extend what they share.

    `width`: one more than the largest id. `added`: tokens that some lack, id -> the index of the first member that has
    it. `lacking`: per member, the ids below `width` that are another's and not its own.
    """

    width: int
    added: Mapping[int, int]
    lacking: tuple[frozenset[int], ...]

    @property
    def is_uniform(self) -> bool:
        """Whether all members have all tokens."""
        return not self.added


def family_of(members: Sequence[Reader]) -> Family:
    """Raises `ModelLoadError` with both names and an example if two members' vocabularies are of no family."""
    first, *others = members
    has_one_map = all(other.surface.token_ids == first.surface.token_ids for other in others)
    if has_one_map and len({member.vocab_size for member in members}) == 1:
        return Family(first.vocab_size, {}, tuple(frozenset[int]() for _ in members))
    own = [_own_tokens(member) for member in members]
    for other, tokens in zip(others, own[1:], strict=True):
        _check_pair(first, own[0], other, tokens)
    for i, one in enumerate(others, start=1):
        for j in range(i + 1, len(members)):
            _check_pair(one, own[i], members[j], own[j])
    count = Counter(token_id for tokens in own for token_id in tokens.values())
    extra = {token_id for token_id, number in count.items() if number < len(members)}
    has = [frozenset(tokens.values()) for tokens in own]
    added = {token_id: next(k for k, ids in enumerate(has) if token_id in ids) for token_id in sorted(extra)}
    return Family(max(count) + 1, added, tuple(frozenset(extra - ids) for ids in has))


def check_shared_vocabulary(members: Iterable[Reader]) -> None:
    """Raise `ModelLoadError` unless all members map the same tokens to the same ids (widths may differ by padding)."""
    first, *others = members
    for other in others:
        ours, theirs = first.surface.token_ids, other.surface.token_ids
        if ours != theirs:
            raise _different(first, other)
        if first.vocab_size != other.vocab_size:
            raise _fewer_weights(first, other)


def _own_tokens(member: Reader) -> dict[str, int]:
    return {token: token_id for token, token_id in member.surface.token_ids.items() if token_id < member.vocab_size}


def _check_pair(one: Reader, ours: Mapping[str, int], other: Reader, theirs: Mapping[str, int]) -> None:
    """Raise unless all that one has and the other has not is added tokens, under ids that are free there."""
    differing = ours.items() ^ theirs.items()
    if not differing:
        return
    tokens, ids = Counter(token for token, _ in differing), Counter(token_id for _, token_id in differing)
    if max(tokens.values()) > 1 or max(ids.values()) > 1:  # a token under two ids, or an id of two tokens
        raise _different(one, other)
    for member, mine in ((one, ours), (other, theirs)):
        if not {token_id for token, token_id in differing if mine.get(token) == token_id} <= member.surface.added_ids:
            if one.surface.token_ids == other.surface.token_ids:
                raise _fewer_weights(one, other)
            raise _different(one, other)


def _fewer_weights(one: Reader, other: Reader) -> ModelLoadError:
    return ModelLoadError(
        f"members {one.name!r} and {other.name!r} have one vocabulary, but weights for {one.vocab_size} and "
        f"{other.vocab_size} of its tokens; resize the smaller one's embeddings, or choose a text-level method such as "
        "crowd_vote"
    )


def _different(one: Reader, other: Reader) -> ModelLoadError:
    ours, theirs = one.surface.token_ids, other.surface.token_ids
    strangers = sorted(set(ours.items()) ^ set(theirs.items()), key=lambda item: (item[1], item[0]))
    token, token_id = strangers[0]
    return ModelLoadError(
        f"members {one.name!r} and {other.name!r} have different vocabularies ({len(ours)} and {len(theirs)} tokens, "
        f"{len(strangers)} token-id pairs differ, for example {token!r} with id {token_id}); next-token distributions "
        "can only be pooled over one vocabulary: choose members of one family, or a text-level method such as "
        "crowd_vote"
    )
