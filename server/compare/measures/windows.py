"""A text as the windows of tokens in which it is scored.

A stream (a continuous text, or one document that stands alone) is tokenised once. Window i holds `window` tokens from
i·`stride` on, and scores those that no earlier window has scored: every token of the stream but its first, exactly
once. With stride = window - 1, the default, that is the rule of `experts/bits_per_byte.py`; a smaller stride gives all
tokens but those of the first window at least window - stride tokens of context, and costs more.

If the tokenizer itself puts tokens before a text (Llama's and Gemma's <s>), they stand at the beginning of every
window, within its length, and the stream's first token is scored too. A token belongs to the document in which it
begins, with all of its bytes; tokens that share a character count its bytes with the last of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ensemble_server.ensembles.errors import ConfigError, UnsupportedError
from ensemble_server.server.compare.measures.documents import Documents
from ensemble_server.server.weights.view import Surface


@dataclass(frozen=True)
class Window:
    """Tokens that are read in one go. `token_ids[first_scored:]` are scored here, what stands before is context.

    `documents`, `num_bytes`: of the scored tokens, (num_scored,) int64: the document's index, and UTF-8 bytes.
    """

    token_ids: tuple[int, ...]
    first_scored: int
    documents: np.ndarray
    num_bytes: np.ndarray


def cut_windows(
    surface: Surface, documents: Documents, *, window: int, stride: int | None = None, shift: int = 0
) -> list[Window]:
    """The windows of all streams of `documents`; see the module's docstring. `shift`: so many tokens, fewer than the
    stride, later than there all windows begin but the first, which is as much shorter.

    Raises `ConfigError` if window and stride do not fit, `UnsupportedError` if the tokenizer cannot say where in the
    text its tokens begin.
    """
    prefix = _prefix(surface)
    length = window - len(prefix)
    if length < 2:
        raise ConfigError(f"window must be at least {2 + len(prefix)} tokens, got {window}")
    stride = length - 1 if stride is None else stride
    if not 1 <= stride < length:
        raise ConfigError(f"stride must be from 1 to {length - 1}, so that windows of {window} overlap; got {stride}")
    windows = []
    for stream in documents.streams:
        texts = [documents.texts[index] for index in stream]
        token_ids, starts = _tokens("".join(texts), surface)
        borders = np.cumsum([len(text.encode()) for text in texts])
        owners = np.asarray(stream)[np.searchsorted(borders, starts[:-1], side="right")] if token_ids else starts
        num_bytes = np.diff(starts)
        scored = 0 if prefix else 1  # tokens before this one are done
        spans = [(begin, begin + length) for begin in range(shift, len(token_ids), stride)]
        if shift:
            spans.insert(0, (0, shift + length - stride))
        for begin, end in spans:
            end = min(end, len(token_ids))
            if scored < end:
                new = slice(scored, end)
                ids = (*prefix, *token_ids[begin:end])
                windows.append(Window(ids, len(prefix) + scored - begin, owners[new], num_bytes[new]))
                scored = end
    return windows


def _prefix(surface: Surface) -> tuple[int, ...]:
    """What the tokenizer puts before every text."""
    with_special, bare = surface.encode("a"), surface.encode("a", add_special_tokens=False)
    return tuple(with_special[: with_special.index(bare[0])]) if bare and bare[0] in with_special else ()


def _tokens(text: str, surface: Surface) -> tuple[list[int], np.ndarray]:
    """Token ids, and the byte at which each begins, with the text's length in bytes as last: (num_tokens + 1,)."""
    if not surface.tokenizer.is_fast:
        raise UnsupportedError("its tokenizer does not say where tokens begin in the text (it is not a fast one)")
    encoding = surface.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    byte_of_char = np.concatenate([[0], np.cumsum([len(char.encode()) for char in text])]).astype(np.int64)
    starts = [start for start, _ in encoding["offset_mapping"]]
    starts[:1] = [0] * len(starts[:1])  # white space that the tokenizer drops counts with the token after it
    return encoding["input_ids"], byte_of_char[[*starts, len(text)]]
