"""Responses that were asked to be stored: in memory, within a bound, each for the key that asked."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from pydantic import TypeAdapter

from ensemble_server.ensembles.errors import NotFoundError
from ensemble_server.server.requests.errors import shortened
from ensemble_server.server.requests.messages import ChatMessage
from ensemble_server.server.requests.openai_responses.body import Item
from ensemble_server.server.requests.openai_responses.shapes import ResponseObject

MESSAGE_BYTES = 1000  # about what a message takes besides its text

_ITEM: TypeAdapter[Item] = TypeAdapter(Item)


@dataclass(frozen=True)
class Stored:
    """`messages`: the whole conversation up to the response's end, without instructions."""

    owner: str
    response: ResponseObject
    messages: tuple[ChatMessage, ...]
    num_bytes: int


class StoredResponses:
    """The least recently used go first. `max_bytes` of 0 stores none. Any thread may ask."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._stored: OrderedDict[str, Stored] = OrderedDict()
        self._response_of: dict[str, str] = {}  # by the id of an item
        self._lock = threading.Lock()
        self.num_bytes = 0

    @property
    def is_off(self) -> bool:
        return self._max_bytes == 0

    def keep(self, owner: str, response: ResponseObject, messages: Sequence[ChatMessage]) -> None:
        """Unless it is larger than all that may be kept."""
        texts = sum(len(str(message.content or "")) for message in messages)
        num_bytes = len(orjson.dumps(response)) + texts + MESSAGE_BYTES * len(messages)
        if num_bytes > self._max_bytes:
            return
        with self._lock:
            self._stored[response["id"]] = Stored(owner, response, tuple(messages), num_bytes)
            self._response_of |= {item["id"]: response["id"] for item in response["output"]}
            self.num_bytes += num_bytes
            while self.num_bytes > self._max_bytes:
                self._remove(next(iter(self._stored)))

    def get(self, owner: str, response_id: str, *, param: str) -> Stored:
        """Raises `NotFoundError`, also for another's."""
        stored = self._used(owner, response_id)
        if stored is None:
            raise NotFoundError(
                f"there is no response {shortened(response_id, 80)!r}: those sent with store: false are not kept, of "
                f"others the {self._max_bytes // 2**20} MB used last are (server.stored_responses_mb), until the "
                "server ends",
                param=param,
            )
        return stored

    def item(self, owner: str, item_id: str) -> Item:
        """Raises `NotFoundError`."""
        stored = self._used(owner, self._response_of.get(item_id, ""))
        if stored is None:
            raise NotFoundError(
                f"there is no item {shortened(item_id, 80)!r} in the responses that are stored; send the item itself",
                param="input",
            )
        found: Any = next(item for item in stored.response["output"] if item["id"] == item_id)
        return _ITEM.validate_python(found)

    def delete(self, owner: str, response_id: str) -> None:
        """Raises `NotFoundError`."""
        self.get(owner, response_id, param="response_id")
        with self._lock:
            self._remove(response_id)

    def _used(self, owner: str, response_id: str) -> Stored | None:
        with self._lock:
            stored = self._stored.get(response_id)
            if stored is None or stored.owner != owner:
                return None
            self._stored.move_to_end(response_id)
            return stored

    def _remove(self, response_id: str) -> None:
        stored = self._stored.pop(response_id)
        self.num_bytes -= stored.num_bytes
        for item in stored.response["output"]:
            del self._response_of[item["id"]]
