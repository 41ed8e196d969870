"""Over what the distributions of members can be averaged: tokens, or the bytes that their tokens spell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

from ensemble_server.ensembles.base import AveragedOver, Mixture
from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.ensembles.spelling.byte_order import ByteOrder
from ensemble_server.server.weights.tokenizer import Vocabulary
from ensemble_server.server.weights.vocabularies import Reader, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Speller(Reader, Protocol):
    """A member as far as the text that its tokens spell is concerned. `eos_ids`: tokens that end it."""

    @property
    def eos_ids(self) -> frozenset[int]: ...


@dataclass(frozen=True, eq=False)
class SpelledVocabulary:
    """`token_bytes`: what each id adds to a text, b"" for those that stand for none."""

    token_bytes: Sequence[bytes]
    order: ByteOrder


def averaged_over(mixture: Mixture, members: Sequence[Speller]) -> AveragedOver:
    """What the distributions of these members are averaged over: tokens where they have the same but for added ones.

    Raises `ModelLoadError` naming the member if they can be averaged over neither.
    """
    try:
        if mixture.vocabulary == "auto":
            family_of(members)
            return "tokens"
    except ModelLoadError:  # of no family, but their texts may be averaged
        pass
    names = ", ".join(member.name for member in members)
    if mixture.when is not None:
        raise ModelLoadError(
            f"when: members of different vocabularies ({names}) are averaged over the bytes of their text, where all "
            "have to read all; leave out `when`, or choose members of one vocabulary"
        )
    if mixture.gate is not None:
        raise ModelLoadError(
            f"gate: members of different vocabularies ({names}) are averaged over the bytes of their text, and a gate "
            "weighs tokens; leave out `gate`, or choose members of one vocabulary"
        )
    for member in members:
        spelled_vocabulary(member)
    return "bytes"


def spelled_vocabulary(member: Speller) -> SpelledVocabulary:
    """A member's tokens in the order of their bytes; sorted once for all that have this tokenizer.

    Raises `ModelLoadError` naming the member if its tokens are not bytes.
    """
    try:
        return _spelled(member.surface.tokenizer, member.vocab_size, member.eos_ids)
    except ModelLoadError as exc:
        raise ModelLoadError(
            f"member {member.name!r} cannot be averaged over text: {exc}; choose a member whose tokenizer is byte-"
            "level BPE or SentencePiece with byte fallback, members of one vocabulary, or a text-level method such as "
            "crowd_vote"
        ) from exc


@lru_cache(maxsize=32)
def _spelled(tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_ids: frozenset[int]) -> SpelledVocabulary:
    token_bytes = Vocabulary(tokenizer).token_bytes()[:vocab_size]
    return SpelledVocabulary(token_bytes, ByteOrder(token_bytes, [i for i in eos_ids if i < vocab_size]))
