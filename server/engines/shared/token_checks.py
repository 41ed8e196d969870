"""Token ids that a request brings, checked before any engine queues it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ensemble_server.ensembles.errors import RequestError


def check_prompt(token_ids: Sequence[int], vocab_size: int, field: str) -> None:
    """Raises `RequestError` for an empty prompt and for ids that no token has. `field`: the request's, to blame."""
    if not token_ids:
        raise RequestError("the prompt has no tokens; there is nothing to continue", param=field)
    check_ids(token_ids, vocab_size, field)


def check_ids(token_ids: Iterable[int], vocab_size: int, field: str) -> None:
    """Raises `RequestError` for ids outside the vocabulary."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise RequestError(f"token id {token_id} is outside the vocabulary of {vocab_size} tokens", param=field)
