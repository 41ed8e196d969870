"""Whether members have one vocabulary, so that their next-token distributions can be pooled token by token."""

from __future__ import annotations

from collections.abc import Iterable
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


def check_shared_vocabulary(members: Iterable[Reader]) -> None:
    """Raise `ModelLoadError` unless all members map the same tokens to the same ids (widths may differ by padding)."""
    first, *others = members
    for other in others:
        ours, theirs = first.surface.token_ids, other.surface.token_ids
        if ours == theirs and first.vocab_size == other.vocab_size:
            continue
        pair = f"members {first.name!r} and {other.name!r} have"
        if ours == theirs:
            raise ModelLoadError(
                f"{pair} one vocabulary, but weights for {first.vocab_size} and {other.vocab_size} of its tokens; "
                "resize the smaller one's embeddings, or choose a text-level method such as crowd_vote"
            )
        strangers = sorted(set(ours.items()) ^ set(theirs.items()), key=lambda item: (item[1], item[0]))
        token, token_id = strangers[0]
        raise ModelLoadError(
            f"{pair} different vocabularies ({len(ours)} and {len(theirs)} tokens, {len(strangers)} token-id pairs "
            f"differ, for example {token!r} with id {token_id}); next-token distributions can only be pooled over one "
            "vocabulary: choose members of one family, or a text-level method such as crowd_vote"
        )
