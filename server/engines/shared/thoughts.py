"""What a model thinks aloud, told apart from its answer while both stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ensemble_server.ensembles.base import GenerationRequest
from ensemble_server.server.weights.thinking import Markers
from ensemble_server.server.weights.view import Surface

_TAIL = 16  # tokens of a prompt in which an opening marker is looked for


class ThoughtStream:
    """Text in, (answer, thought) out. Thoughts are one block at the beginning of what is written.

    `is_open`: the prompt ends with the opening marker, as many templates have it. Text that may be the beginning of a
    marker is held back until that is clear. White space around a thought belongs to neither.
    """

    def __init__(self, markers: Markers, *, is_open: bool) -> None:
        self.markers = markers
        self._phase: Literal["before", "inside", "after", "none"] = "inside" if is_open else "before"
        self._held = ""
        self._has_shown = False  # of the thought, or, once it is over, of the answer

    @property
    def is_thinking(self) -> bool:
        """Whether what comes next belongs to a thought."""
        return self._phase == "inside"

    def add(self, piece: str) -> tuple[str, str]:
        """-> (of the answer, of the thought)"""
        text, self._held = self._held + piece, ""
        start, end = self.markers.start, self.markers.end
        if self._phase == "before":
            begun = text.lstrip()
            if begun != start and start.startswith(begun):  # nothing yet, or the beginning of the marker
                self._held = text
                return "", ""
            if not begun.startswith(start):
                self._phase = "none"
                return text, ""
            self._phase, text = "inside", begun.removeprefix(start)
        if self._phase != "inside":
            return (self._trimmed(text) if self._phase == "after" else text), ""
        thought, marker, answer = text.partition(end)
        if not marker:
            settled = text[: len(text) - _beginning_of(end, text)].rstrip()
            self._held = text[len(settled) :]
            return "", self._trimmed(settled)
        thought = self._trimmed(thought.rstrip())
        self._phase, self._has_shown = "after", False
        return self._trimmed(answer), thought

    def flush(self) -> tuple[str, str]:
        """What was held back, when nothing more comes."""
        held, self._held = self._held, ""
        return ("", self._trimmed(held.rstrip())) if self._phase == "inside" else (held, "")

    def _trimmed(self, text: str) -> str:
        """Without white space before the first that is shown."""
        text = text if self._has_shown else text.lstrip()
        self._has_shown = self._has_shown or bool(text)
        return text


class ThoughtLimit:
    """Forces the end of a thought that has had its tokens. `end`: the tokens of the marker that closes it.

    What else a token that is forced might have been does not matter: it is no draw, and no evidence for anybody.
    """

    def __init__(self, max_tokens: int, end: Sequence[int]) -> None:
        self._max_tokens = max_tokens
        self._end = tuple(end)
        self._num_forced = 0

    def next(self, num_tokens: int) -> int | None:
        """The token that must come now, in a thought of so many tokens; None: any may."""
        if num_tokens < self._max_tokens or self._num_forced == len(self._end):
            return None
        self._num_forced += 1
        return self._end[self._num_forced - 1]


class ThoughtBytesLimit:
    """The same where text is drawn byte by byte. `max_tokens`: pieces; `end`: the marker that closes a thought."""

    def __init__(self, max_tokens: int, end: bytes) -> None:
        self._max_tokens = max_tokens
        self._end = end

    def next(self, num_tokens: int, text: bytes, *, is_whole: bool) -> int | None:
        """The byte that must come behind `text`, in a thought of so many pieces; None: any may. `is_whole`: `text` does
        not end within a character. What it ends with may be the marker's beginning, of its own accord."""
        if num_tokens < self._max_tokens or self._end in text:
            return None
        num_there = next((n for n in range(len(self._end) - 1, 0, -1) if text.endswith(self._end[:n])), 0)
        return self._end[num_there] if num_there or is_whole else None


def max_thought_tokens(request: GenerationRequest, surface: Surface) -> int | None:
    """None where thoughts may be as long as they like. What is not wanted at all is closed before it begins."""
    if surface.thinking is None:
        return None
    return 0 if request.wants_thoughts is False else request.max_reasoning_tokens


def thought_limit(request: GenerationRequest, surface: Surface) -> ThoughtLimit | None:
    limit = max_thought_tokens(request, surface)
    if limit is None or surface.thinking is None:
        return None
    return ThoughtLimit(limit, surface.encode(surface.thinking.end, add_special_tokens=False))


def thought_bytes_limit(request: GenerationRequest, surface: Surface) -> ThoughtBytesLimit | None:
    limit = max_thought_tokens(request, surface)
    if limit is None or surface.thinking is None:
        return None
    return ThoughtBytesLimit(limit, surface.thinking.end.encode())


def thought_stream(request: GenerationRequest, surface: Surface, prompt: Sequence[int]) -> ThoughtStream | None:
    """For an answer to a conversation by a model that thinks; None where nothing is told apart: raw completions, models
    without markers, and answers under a grammar, which holds from the first token.
    """
    markers = surface.thinking
    if markers is None or request.messages is None or request.sampling.grammar is not None:
        return None
    is_open = surface.decode(prompt[-_TAIL:]).rstrip().endswith(markers.start)
    return ThoughtStream(markers, is_open=is_open)


def _beginning_of(marker: str, text: str) -> int:
    """Length of the longest end of `text` that begins `marker`: ("</think>", "so </th") -> 4"""
    return next((n for n in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:n])), 0)
