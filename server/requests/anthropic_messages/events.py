"""A message as it comes to be.

message_start
per content block:  content_block_start · content_block_delta, any number · content_block_stop
message_delta (stop reason, usage) · message_stop
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from typing import Any, cast

from pydantic_core import from_json

from ensemble_server.ensembles.surrogates import with_mended_escapes
from ensemble_server.server.requests.anthropic_messages.shapes import (
    BlockObject,
    MessageObject,
    MessageUsageObject,
    StopReason,
)
from ensemble_server.server.requests.pieces import Piece, PieceReader

Event = dict[str, Any]


class MessageWriter:
    """From a chat's chunks to events. `message` is the message so far; `new_id`: 32 hex digits."""

    def __init__(self, model: str, new_id: Callable[[], str]) -> None:
        self._reader = PieceReader()
        self._texts: list[str] = []
        self._block: Any = None  # the block that is being written
        self._kind: str | None = None
        self.message: MessageObject = {
            "id": f"msg_{new_id()}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
        }

    def write(self, chunk: Mapping[str, Any]) -> Iterator[Event]:
        """The first chunk begins the message."""
        is_first = self._reader.num_chunks == 0
        pieces = list(self._reader.read(chunk))
        if is_first:
            self.message["usage"] = self._usage()
            yield {"type": "message_start", "message": {**self.message, "content": []}}
        for piece in pieces:
            if piece.kind != self._kind or piece.begins is not None:
                yield from self._close()
                yield from self._open(piece)
            yield from self._delta(piece)

    def end(self) -> Iterator[Event]:
        """After the last chunk."""
        yield from self._close()
        reader, message = self._reader, self.message
        message["stop_reason"], message["stop_sequence"] = self._stop()
        message["usage"] = self._usage()
        delta: Event = {"type": "message_delta", "usage": message["usage"]}
        delta["delta"] = {"stop_reason": message["stop_reason"], "stop_sequence": message["stop_sequence"]}
        if reader.ensemble is not None:
            delta["ensemble"] = message["ensemble"] = reader.ensemble
        yield delta
        yield {"type": "message_stop"}

    def _open(self, piece: Piece) -> Iterator[Event]:
        self._kind, self._texts = piece.kind, []
        match piece.kind:
            case "text":
                self._block = {"type": "text", "text": ""}
            case "thought":
                self._block = {"type": "thinking", "thinking": "", "signature": ""}
            case "call":
                assert piece.begins is not None, "the first piece of a call has its name"
                call_id, name = piece.begins
                self._block = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
        yield self._placed("content_block_start", content_block=dict(self._block))

    def _delta(self, piece: Piece) -> Iterator[Event]:
        self._texts.append(piece.text)
        tokens = {"logprobs": list(piece.tokens)} if piece.tokens else {}
        if piece.tokens:
            self._block.setdefault("logprobs", []).extend(piece.tokens)
        if not piece.text and not piece.tokens:
            return
        match piece.kind:
            case "text":
                delta = {"type": "text_delta", "text": piece.text}
            case "thought":
                delta = {"type": "thinking_delta", "thinking": piece.text}
            case "call":
                delta = {"type": "input_json_delta", "partial_json": piece.text}
        yield self._placed("content_block_delta", delta=delta | tokens)

    def _close(self) -> Iterator[Event]:
        if self._kind is None:
            return
        text = "".join(self._texts)
        match self._kind:
            case "text":
                self._block["text"] = text
            case "thought":
                self._block["thinking"] = text
                self._block["signature"] = _signature(text)
                delta = {"type": "signature_delta", "signature": self._block["signature"]}
                yield self._placed("content_block_delta", delta=delta)
            case "call":
                self._block["input"] = _arguments(text)
        yield self._placed("content_block_stop")
        self.message["content"].append(cast(BlockObject, self._block))
        self._kind = None

    def _placed(self, kind: str, **more: Any) -> Event:
        return {"type": kind, "index": len(self.message["content"]), **more}

    def _stop(self) -> tuple[StopReason, str | None]:
        match self._reader.finish_reason, self._reader.stop_reason:
            case "tool_calls", _:
                return "tool_use", None
            case "length", _:
                return "max_tokens", None
            case _, str() as sequence:
                return "stop_sequence", sequence
        return "end_turn", None

    def _usage(self) -> MessageUsageObject:
        used = self._reader.usage
        num_thought = min(self._reader.num_thought_tokens, used["completion_tokens"])
        return {
            "input_tokens": used["prompt_tokens"],
            "output_tokens": used["completion_tokens"],
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens_details": {"thinking_tokens": num_thought},
        }


def _signature(thought: str) -> str:
    """A digest of the thought. Nobody checks it here; clients take a thought without a signature for text."""
    return b64encode(sha256(thought.encode("utf-8", "replace")).digest()).decode()


def _arguments(text: str) -> dict[str, Any]:
    """A call's arguments; of those that were cut off, what is there: '{"a": "on' -> {"a": "on"}"""
    try:
        arguments = from_json(with_mended_escapes(text) or "{}", allow_partial="trailing-strings")
    except ValueError:
        return {}
    return arguments if isinstance(arguments, dict) else {}
