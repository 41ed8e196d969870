"""What a client may want to know about one token: text, bytes, log-probability, alternatives.

Engines know log-probabilities, each in its own form; what is made of them is the same.
"""

from __future__ import annotations

from collections.abc import Iterable

from ensemble_server.ensembles.base import TokenLogprob
from ensemble_server.server.weights.tokenizer import Vocabulary


def report(
    vocabulary: Vocabulary,
    token_id: int,
    logprob: float | None,
    alternatives: Iterable[tuple[int, float]] = (),
    *,
    previous: int | None = None,
) -> TokenLogprob:
    """One token. `logprob`: None if nothing predicts it. `alternatives`: (token id, logprob), the likeliest first.
    `previous`: the token before it, which some vocabularies need to tell its bytes.
    """
    top = tuple(_bare(vocabulary, candidate, value, previous) for candidate, value in alternatives)
    return _bare(vocabulary, token_id, logprob, previous, top)


def _bare(
    vocabulary: Vocabulary,
    token_id: int,
    logprob: float | None,
    previous: int | None,
    top: tuple[TokenLogprob, ...] = (),
) -> TokenLogprob:
    data = vocabulary.bytes_of(token_id, previous)
    return TokenLogprob(token_id, data.decode(errors="replace"), data, logprob, top)
