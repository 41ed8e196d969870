"""What a body does not say about how it is answered: for a client that waits, or as one row of many."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from ensemble_server.server.config.blocks import ServerConfig


@dataclass(frozen=True)
class Terms:
    """`created`: Unix time that the answer gives as its own. `new_id`: 32 hex digits, others at every call.
    `priority` and `deadline_s`: as in `GenerationRequest`.
    """

    request_id: str
    created: int
    new_id: Callable[[], str]
    priority: int = 0
    deadline_s: float | None = None

    @classmethod
    def of_client(cls, request_id: str, config: ServerConfig) -> Self:
        """Those of an HTTP client that waits for its answer."""
        return cls(request_id, int(time.time()), lambda: uuid.uuid4().hex, deadline_s=config.request_timeout_s)
