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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ensemble_server.ensembles.base import MixtureHost
from ensemble_server.ensembles.errors import ConfigError, UnsupportedError
from ensemble_server.server.compare.measures.documents import Documents
from ensemble_server.server.weights.view import Surface

if TYPE_CHECKING:
    import torch

Visitor = Callable[["torch.Tensor", "torch.Tensor"], None]
OVERLAP = 16  # tokens of the surface, or a quarter of the window: context that windows of bytes have at least


@dataclass(frozen=True)
class Window:
    """Tokens that are read in one go. `token_ids[first_scored:]` are scored here, what stands before is context.

    `documents`, `num_bytes`: of the scored tokens, (num_scored,) int64: the document's index, and UTF-8 bytes.
    """

    token_ids: tuple[int, ...]
    first_scored: int
    documents: np.ndarray
    num_bytes: np.ndarray

    @property
    def num_read(self) -> int:
        """Tokens that something is expected of: all but the first."""
        return len(self.token_ids) - 1

    @property
    def num_tokens(self) -> np.ndarray:
        """(num_scored,): of the surface, that each scored token stands for."""
        return np.ones(len(self.documents), dtype=np.int64)

    async def visit(self, host: MixtureHost, members: Sequence[str], visit: Visitor, *, priority: int = 1) -> None:
        """`MixtureHost.visit_logprobs`"""
        await host.visit_logprobs(members, self.token_ids, visit, priority=priority)


@dataclass(frozen=True)
class TextWindow:
    """A text that members of different vocabularies read in one go. Its last bytes are scored here, what stands before
    is context; `documents`, `num_bytes` and `num_tokens` as of a `Window`, but for each scored byte."""

    text: str
    documents: np.ndarray
    num_tokens: np.ndarray

    @property
    def num_read(self) -> int:
        """Bytes; of the first ones nothing may be expected."""
        return len(self.text.encode())

    @property
    def num_bytes(self) -> np.ndarray:
        return np.ones(len(self.documents), dtype=np.int64)

    async def visit(self, host: MixtureHost, members: Sequence[str], visit: Visitor, *, priority: int = 1) -> None:
        """`MixtureHost.visit_bytes`"""
        await host.visit_bytes(members, self.text, visit, priority=priority)


def cut_windows(
    surface: Surface, documents: Documents, *, window: int, stride: int | None = None, shift: int = 0
) -> list[Window]:
    """The windows of all streams of `documents`; see the module's docstring. `shift`: so many tokens, fewer than the
    stride, later than there all windows begin but the first, which is as much shorter.

    Raises `ConfigError` if window and stride do not fit, `UnsupportedError` if the tokenizer cannot say where in the
    text its tokens begin.
    """
    prefix = _prefix(surface)
    length, stride = _length_and_stride(window, stride, len(prefix))
    windows = []
    for stream in documents.streams:
        texts = [documents.texts[index] for index in stream]
        token_ids, starts = tokens_and_starts("".join(texts), surface)
        owners = _owners(stream, texts, starts[:-1]) if token_ids else starts
        num_bytes = np.diff(starts)
        for begin, scored, end in _spans(len(token_ids), length, stride, shift, first=0 if prefix else 1):
            ids = (*prefix, *token_ids[begin:end])
            windows.append(
                Window(ids, len(prefix) + scored - begin, owners[scored:end], num_bytes[scored:end]),
            )
    return windows


def cut_text_windows(
    surface: Surface, documents: Documents, *, window: int, stride: int | None = None, shift: int = 0
) -> list[TextWindow]:
    """`cut_windows` for members of different vocabularies: windows of the same size, in tokens of the first member.

    Where one begins the others may have no border of tokens, and expect its bytes only behind their first token: so
    windows overlap by `OVERLAP` tokens at least, or a quarter of their length. Every byte is scored once, but for those
    at the beginning of a stream that some member cannot expect.
    """
    length, stride = _length_and_stride(window, stride, len(_prefix(surface)))
    stride = min(stride, length - min(OVERLAP, max(1, length // 4)))
    windows = []
    for stream in documents.streams:
        texts = [documents.texts[index] for index in stream]
        whole = "".join(texts)
        data = whole.encode()
        token_ids, starts = tokens_and_starts(whole, surface)
        owners = _owners(stream, texts, np.arange(len(data))) if data else starts
        begins_token = np.bincount(starts[:-1], minlength=len(data))
        for begin, scored, end in _spans(len(token_ids), length, stride, shift, first=0):
            text, new = data[starts[begin] : starts[end]].decode(), slice(starts[scored], starts[end])
            if new.start < new.stop:
                windows.append(TextWindow(text, owners[new], begins_token[new]))
    return windows


def _length_and_stride(window: int, stride: int | None, num_before: int) -> tuple[int, int]:
    """Of what is cut, in tokens; `num_before`: tokens that the tokenizer puts before every window."""
    length = window - num_before
    if length < 2:
        raise ConfigError(f"window must be at least {2 + num_before} tokens, got {window}")
    stride = length - 1 if stride is None else stride
    if not 1 <= stride < length:
        raise ConfigError(f"stride must be from 1 to {length - 1}, so that windows of {window} overlap; got {stride}")
    return length, stride


def _spans(num_tokens: int, length: int, stride: int, shift: int, *, first: int) -> Iterator[tuple[int, int, int]]:
    """(where a window begins, its first scored token, where it ends); tokens before `first` are not scored."""
    spans = [(begin, begin + length) for begin in range(shift, num_tokens, stride)]
    if shift:
        spans.insert(0, (0, shift + length - stride))
    scored = first
    for begin, end in spans:
        end = min(end, num_tokens)
        if scored < end:
            yield begin, scored, end
            scored = end


def _owners(stream: Sequence[int], texts: Sequence[str], places: np.ndarray) -> np.ndarray:
    """The document in which each byte lies."""
    borders = np.cumsum([len(text.encode()) for text in texts])
    return np.asarray(stream)[np.searchsorted(borders, places, side="right")]


def _prefix(surface: Surface) -> tuple[int, ...]:
    """What the tokenizer puts before every text."""
    with_special, bare = surface.encode("a"), surface.encode("a", add_special_tokens=False)
    return tuple(with_special[: with_special.index(bare[0])]) if bare and bare[0] in with_special else ()


def tokens_and_starts(text: str, surface: Surface) -> tuple[list[int], np.ndarray]:
    """Token ids, and the byte at which each begins, with the text's length in bytes as last: (num_tokens + 1,)."""
    if not surface.tokenizer.is_fast:
        raise UnsupportedError("its tokenizer does not say where tokens begin in the text (it is not a fast one)")
    encoding = surface.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    byte_of_char = np.concatenate([[0], np.cumsum([len(char.encode()) for char in text])]).astype(np.int64)
    starts = [start for start, _ in encoding["offset_mapping"]]
    starts[:1] = [0] * len(starts[:1])  # white space that the tokenizer drops counts with the token after it
    return encoding["input_ids"], byte_of_char[[*starts, len(text)]]
