"""Answers in JSON, and the headers that go with them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import orjson
from starlette.responses import Response

_PLACE = re.compile(r"[\w.]+\[\d+\]:", re.ASCII)


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
    return {header: ", ".join(_safe(name[:60]) or '""' for name in names[:20])} if names else {}


def _safe(name: str) -> str:
    """Quoted as in a URL. What the server itself says of a place stays readable: tools[0]:web_search"""
    place = _PLACE.match(name)
    return quote(name, safe="/[]") if place is None else place.group() + quote(name[place.end() :], safe="/")
