from __future__ import annotations

from typing import Any

import pytest

from ensemble_server.ensembles.errors import NotFoundError
from ensemble_server.server.requests.messages import UserMessage
from ensemble_server.server.requests.openai_responses.body import MessageItem
from ensemble_server.server.requests.openai_responses.stored import MESSAGE_BYTES, StoredResponses

SAID = UserMessage(role="user", content="Hello?")


def response(name: str, text: str = "Hi.") -> Any:
    part = {"type": "output_text", "text": text, "annotations": []}
    item = {"type": "message", "id": f"msg_{name}", "role": "assistant", "status": "completed", "content": [part]}
    return {"id": f"resp_{name}", "output": [item]}


def names(stored: StoredResponses, *wanted: str) -> list[str]:
    found = []
    for name in wanted:
        try:
            found.append(stored.get("me", f"resp_{name}", param="x").response["id"])
        except NotFoundError:
            continue
    return found


def test_the_least_recently_used_go_first() -> None:
    stored = StoredResponses(0)
    stored.keep("me", response("a"), [SAID])
    assert names(stored, "a") == [] and stored.is_off
    stored = StoredResponses(5 * MESSAGE_BYTES)
    for name in "abcdefg":
        stored.keep("me", response(name), [SAID])
        stored.get("me", "resp_a", param="x")
    kept = names(stored, *"abcdefg")
    assert kept[0] == "resp_a" and kept[-1] == "resp_g" and len(kept) < 7
    assert stored.num_bytes <= 5 * MESSAGE_BYTES
    with pytest.raises(NotFoundError, match="msg_b"):
        stored.item("me", "msg_b")


def test_one_that_is_larger_than_all_that_may_be_kept_drives_nothing_out() -> None:
    stored = StoredResponses(5 * MESSAGE_BYTES)
    stored.keep("me", response("a"), [SAID])
    stored.keep("me", response("b", "x" * 6 * MESSAGE_BYTES), [SAID])
    assert names(stored, "a", "b") == ["resp_a"]


def test_items_are_found_by_their_ids_and_are_their_owners_own() -> None:
    stored = StoredResponses(2**20)
    stored.keep("me", response("a"), [SAID])
    item = stored.item("me", "msg_a")
    assert isinstance(item, MessageItem) and item.role == "assistant"
    for owner, name in (("you", "msg_a"), ("me", "msg_b")):
        with pytest.raises(NotFoundError):
            stored.item(owner, name)


def test_what_is_deleted_is_gone_with_its_items_and_its_bytes() -> None:
    stored = StoredResponses(2**20)
    stored.keep("me", response("a"), [SAID])
    with pytest.raises(NotFoundError):
        stored.delete("you", "resp_a")
    stored.delete("me", "resp_a")
    assert names(stored, "a") == [] and stored.num_bytes == 0
    with pytest.raises(NotFoundError):
        stored.item("me", "msg_a")
