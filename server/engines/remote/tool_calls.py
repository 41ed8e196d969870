"""The tool calls of one choice, as remote ends send them: whole, or in pieces that name their call by its place."""

from __future__ import annotations

import re

from ensemble_server.ensembles.base import ToolCallDelta
from ensemble_server.server.engines.remote.protocol import CallPiece
from ensemble_server.server.engines.remote.secrets import BlankedStream, Secrets

MAX_CALLS = 128  # of one choice
_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


class RemoteToolCalls:
    """Pieces in, the same without secrets out. A piece with another id than its call has begins a call of its own: some
    servers give every call the same place, or none."""

    def __init__(self, secrets: Secrets) -> None:
        self._secrets = secrets
        self._ids: list[str | None] = []
        self._arguments: list[BlankedStream] = []
        self._place_of: dict[int, int] = {}  # their number -> ours

    def add(self, piece: CallPiece) -> list[ToolCallDelta]:
        """Raises `ValueError` for pieces of a call without a name, and for too many calls."""
        name, text = piece.function.name, piece.function.text
        known = None if piece.index is None else self._place_of.get(piece.index)
        if known is None and piece.index is None and not name:
            known = len(self._ids) - 1 if self._ids else None
        is_other = known is not None and bool(name) and bool(piece.id) and piece.id != self._ids[known]
        if known is not None and not is_other:
            shown = self._arguments[known].add(text)
            return [ToolCallDelta(known, None, shown)] if shown else []
        if not name:
            raise ValueError("a tool call has no name")
        if len(self._ids) == MAX_CALLS:
            raise ValueError(f"it has more than {MAX_CALLS} tool calls")
        place = len(self._ids)
        if piece.index is not None:
            self._place_of[piece.index] = place
        self._ids.append(piece.id)
        self._arguments.append(self._secrets.stream())
        is_fit = piece.id is not None and _ID.fullmatch(piece.id) and self._secrets.blank(piece.id) == piece.id
        call_id = piece.id if is_fit else None
        return [ToolCallDelta(place, self._secrets.blank(name), self._arguments[place].add(text), call_id)]

    def flush(self) -> list[ToolCallDelta]:
        """What was held back, when no more comes."""
        rests = [(place, stream.flush()) for place, stream in enumerate(self._arguments)]
        return [ToolCallDelta(place, None, rest) for place, rest in rests if rest]
