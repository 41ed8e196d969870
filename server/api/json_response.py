"""Answers in JSON, and the headers that go with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import orjson
from starlette.responses import Response


class JSONResponse(Response):
    """An answer whose content is one of the shapes of `requests.responses`."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def ignored_header(names: Sequence[str]) -> dict[str, str]:
    """The header that tells a client which parameters were ignored."""
    return names_header("x-ignored-parameters", names)


def names_header(header: str, names: Sequence[str]) -> dict[str, str]:
    """A header that lists `names`, made safe and short, since clients may have chosen them; none without any."""
    return {header: ", ".join(quote(name[:60], safe="/[]:") or '""' for name in names[:20])} if names else {}
