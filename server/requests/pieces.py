"""What a chat's chunks tell, piece by piece: the way from a chat's stream to the events of other protocols."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ensemble_server.server.requests.responses import EnsembleObject, TokenLogprobObject, UsageObject

Kind = Literal["thought", "text", "call"]


@dataclass(frozen=True)
class Piece:
    """The next piece of a thought, of the answer's text, or of a call's arguments.

    `begins`: (id, name) of the call that begins with this piece. `tokens`: those that came with it, if
    log-probabilities were asked for.
    """

    kind: Kind
    text: str
    begins: tuple[str, str] | None = None
    tokens: tuple[TokenLogprobObject, ...] = ()


class PieceReader:
    """Reads the chunks of a chat with one choice, that has usage on each of them (`continuous_usage_stats`).

    What the chunks have told by now is in the attributes; `usage` and `ensemble` are whole after the last one.
    """

    def __init__(self) -> None:
        self.usage: UsageObject = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        self.num_chunks = 0
        self.num_thought_tokens = 0
        self.finish_reason = "stop"
        self.stop_reason: str | int | None = None
        self.ensemble: EnsembleObject | None = None
        self._num_told = 0  # tokens up to the last piece; those of text that is held back go with the next one
        self._last: Kind = "text"
        self._tokens: list[TokenLogprobObject] = []  # of text that is held back

    def read(self, chunk: Mapping[str, Any]) -> Iterator[Piece]:
        self.num_chunks += 1
        self.usage = chunk["usage"]
        if not chunk["choices"]:
            self.ensemble = chunk["ensemble"]
            if details := chunk["usage"].get("completion_tokens_details"):  # the engine knows better than the pieces
                self.num_thought_tokens = details["reasoning_tokens"]
            return
        [choice] = chunk["choices"]
        if choice["logprobs"]:
            self._tokens += choice["logprobs"]["content"]
        for place, piece in enumerate(self._pieces(choice["delta"])):
            if place == 0:
                num_tokens = self.usage["completion_tokens"]
                if piece.kind == "thought":
                    self.num_thought_tokens += max(0, num_tokens - self._num_told)
                self._num_told = num_tokens
            self._last = piece.kind
            yield piece
        if choice["finish_reason"]:
            self.finish_reason, self.stop_reason = choice["finish_reason"], choice["stop_reason"]
            if self._tokens:
                yield Piece(self._last, "", tokens=self._taken())

    def _pieces(self, delta: Mapping[str, Any]) -> Iterator[Piece]:
        if thought := delta.get("reasoning_content"):
            yield Piece("thought", thought, tokens=self._taken())
        if text := delta.get("content"):
            yield Piece("text", text, tokens=self._taken())
        for call in delta.get("tool_calls", ()):
            function = call["function"]
            begins = (call["id"], function["name"]) if "id" in call else None
            yield Piece("call", function.get("arguments", ""), begins, self._taken())

    def _taken(self) -> tuple[TokenLogprobObject, ...]:
        tokens, self._tokens = tuple(self._tokens), []
        return tokens
