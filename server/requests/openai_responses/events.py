"""A response as it comes to be: its events, in order and numbered.

response.created, response.in_progress
per item:  response.output_item.added · its parts and their deltas · response.output_item.done
response.completed | response.incomplete | response.failed
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from ensemble_server.server.requests.errors import ErrorObject
from ensemble_server.server.requests.openai_responses.shapes import (
    CallItemObject,
    ItemObject,
    MessageItemObject,
    OutputTextObject,
    ReasoningItemObject,
    ResponseObject,
    ResponseUsageObject,
    Status,
)
from ensemble_server.server.requests.pieces import Piece, PieceReader
from ensemble_server.server.requests.responses import TokenLogprobObject

Event = dict[str, Any]


class ResponseWriter:
    """From a chat's chunks to events. `response` is the response so far; `new_id`: 32 hex digits."""

    def __init__(self, response: ResponseObject, new_id: Callable[[], str], *, is_summary: bool) -> None:
        self.response = response
        self._new_id = new_id
        self._is_summary = is_summary
        self._reader = PieceReader()
        self._item: _OpenItem | None = None
        self._num_events = 0

    def begin(self) -> Iterator[Event]:
        for kind in ("response.created", "response.in_progress"):
            yield self._numbered({"type": kind, "response": self._snapshot()})

    def write(self, chunk: Mapping[str, Any]) -> Iterator[Event]:
        for piece in self._reader.read(chunk):
            if self._item is None or not self._item.takes(piece):
                yield from self._close("completed")
                yield from self._open(piece)
            assert self._item is not None, "just opened"
            for event in self._item.write(piece):
                yield self._placed(event)

    def end(self, completed_at: int) -> Iterator[Event]:
        """After the last chunk."""
        is_cut = self._reader.finish_reason == "length"
        if self._item is None and not self.response["output"]:  # nothing was said, which is an answer, too
            yield from self._open(Piece("text", ""))
        yield from self._close("incomplete" if is_cut else "completed")
        self.response["status"] = "incomplete" if is_cut else "completed"
        self.response["completed_at"] = None if is_cut else completed_at
        self.response["incomplete_details"] = {"reason": "max_output_tokens"} if is_cut else None
        self.response["usage"] = self._usage()
        if self._reader.ensemble is not None:
            self.response["ensemble"] = self._reader.ensemble
        kind = f"response.{self.response['status']}"
        yield self._numbered({"type": kind, "response": self._snapshot()})

    def fail(self, details: ErrorObject) -> Iterator[Event]:
        """The stream has broken off. The second of the events is what OpenAI's clients raise."""
        code = "rate_limit_exceeded" if details["type"] == "rate_limit_error" else "server_error"
        self.response["status"], self.response["error"] = "failed", {"code": code, "message": details["message"]}
        yield self._numbered({"type": "response.failed", "response": self._snapshot()})
        flat = {name: details[name] for name in ("code", "message", "param")}
        yield self._numbered({"type": "error", **flat, "error": dict(details)})

    def _open(self, piece: Piece) -> Iterator[Event]:
        status: Status = "in_progress"
        match piece.kind:
            case "thought":
                item_id = f"rs_{self._new_id()}"
                self._item = _Summary(item_id) if self._is_summary else _Thought(item_id)
            case "text":
                self._item = _Message(f"msg_{self._new_id()}")
            case "call":
                assert piece.begins is not None, "the first piece of a call has its name"
                self._item = _Call(f"fc_{self._new_id()}", *piece.begins)
        yield self._placed({"type": "response.output_item.added", "item": self._item.shown(status)})
        for event in self._item.begin():
            yield self._placed(event)

    def _close(self, status: Status) -> Iterator[Event]:
        if self._item is None:
            return
        for event in self._item.end():
            yield self._placed(event)
        item = self._item.shown(status)
        yield self._placed({"type": "response.output_item.done", "item": item})
        self.response["output"].append(item)
        self._item = None

    def _placed(self, event: Event) -> Event:
        """An event of the open item."""
        return self._numbered(event | {"output_index": len(self.response["output"])})

    def _numbered(self, event: Event) -> Event:
        numbered = event | {"sequence_number": self._num_events}
        self._num_events += 1
        return numbered

    def _snapshot(self) -> ResponseObject:
        return cast(ResponseObject, {**self.response, "output": list(self.response["output"])})

    def _usage(self) -> ResponseUsageObject:
        used = self._reader.usage
        num_thought = min(self._reader.num_thought_tokens, used["completion_tokens"])
        return {
            "input_tokens": used["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": used["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": num_thought},
            "total_tokens": used["total_tokens"],
        }


class _OpenItem(ABC):
    """An item that is being written."""

    def __init__(self, item_id: str) -> None:
        self.id = item_id
        self._texts: list[str] = []
        self._tokens: list[TokenLogprobObject] = []

    @property
    def text(self) -> str:
        return "".join(self._texts)

    @abstractmethod
    def takes(self, piece: Piece) -> bool: ...

    @abstractmethod
    def shown(self, status: Status) -> ItemObject:
        """The item as it is by now. One that is in progress shows no content: that comes with the events."""

    def begin(self) -> Iterator[Event]:
        yield from ()

    def write(self, piece: Piece) -> Iterator[Event]:
        self._texts.append(piece.text)
        self._tokens += piece.tokens
        if piece.text or piece.tokens:
            yield self._delta(piece)

    @abstractmethod
    def _delta(self, piece: Piece) -> Event: ...

    @abstractmethod
    def end(self) -> Iterator[Event]: ...


class _Message(_OpenItem):
    def takes(self, piece: Piece) -> bool:
        return piece.kind == "text"

    def shown(self, status: Status) -> MessageItemObject:
        content = [] if status == "in_progress" else [self._part()]
        return {"type": "message", "id": self.id, "role": "assistant", "status": status, "content": content}

    def begin(self) -> Iterator[Event]:
        yield self._event("content_part.added", part=self._part())

    def _delta(self, piece: Piece) -> Event:
        return self._event("output_text.delta", delta=piece.text, logprobs=list(piece.tokens))

    def end(self) -> Iterator[Event]:
        yield self._event("output_text.done", text=self.text, logprobs=list(self._tokens))
        yield self._event("content_part.done", part=self._part())

    def _part(self) -> OutputTextObject:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": list(self._tokens)}

    def _event(self, kind: str, **more: Any) -> Event:
        return {"type": f"response.{kind}", "item_id": self.id, "content_index": 0, **more}


class _Thought(_OpenItem):
    """Thoughts as the content of a reasoning item, as models with open weights have them."""

    PART, PLACE = "reasoning_text", "content_index"
    ADDED, TEXT, DONE = "content_part.added", "reasoning_text", "content_part.done"

    def takes(self, piece: Piece) -> bool:
        return piece.kind == "thought"

    def shown(self, status: Status) -> ReasoningItemObject:
        parts: list[Any] = [] if status == "in_progress" else [self._part()]
        is_summary = self.PLACE == "summary_index"
        shown: ReasoningItemObject = {
            "type": "reasoning",
            "id": self.id,
            "status": status,
            "summary": parts if is_summary else [],
            "content": [] if is_summary else parts,
        }
        if self._tokens:
            shown["logprobs"] = list(self._tokens)
        return shown

    def begin(self) -> Iterator[Event]:
        yield self._event(self.ADDED, part=self._part())

    def _delta(self, piece: Piece) -> Event:
        return self._event(f"{self.TEXT}.delta", delta=piece.text)

    def end(self) -> Iterator[Event]:
        yield self._event(f"{self.TEXT}.done", text=self.text)
        yield self._event(self.DONE, part=self._part())

    def _part(self) -> dict[str, str]:
        return {"type": self.PART, "text": self.text}

    def _event(self, kind: str, **more: Any) -> Event:
        return {"type": f"response.{kind}", "item_id": self.id, self.PLACE: 0, **more}


class _Summary(_Thought):
    """Thoughts as a summary that leaves nothing out: where OpenAI's own clients look for them."""

    PART, PLACE = "summary_text", "summary_index"
    ADDED, TEXT, DONE = "reasoning_summary_part.added", "reasoning_summary_text", "reasoning_summary_part.done"


class _Call(_OpenItem):
    def __init__(self, item_id: str, call_id: str, name: str) -> None:
        super().__init__(item_id)
        self._call_id = call_id
        self._name = name

    def takes(self, piece: Piece) -> bool:
        return piece.kind == "call" and piece.begins is None

    def shown(self, status: Status) -> CallItemObject:
        shown: CallItemObject = {
            "type": "function_call",
            "id": self.id,
            "call_id": self._call_id,
            "name": self._name,
            "arguments": "" if status == "in_progress" else self.text,
            "status": status,
        }
        if self._tokens:
            shown["logprobs"] = list(self._tokens)
        return shown

    def _delta(self, piece: Piece) -> Event:
        return {"type": "response.function_call_arguments.delta", "item_id": self.id, "delta": piece.text}

    def end(self) -> Iterator[Event]:
        yield {
            "type": "response.function_call_arguments.done",
            "item_id": self.id,
            "name": self._name,
            "arguments": self.text,
        }
