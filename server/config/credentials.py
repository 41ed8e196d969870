"""Addresses as they may be shown: without the user, the password and the parameters that stand in them."""

from __future__ import annotations

import re

BLANK = "***"

_USER = re.compile(r"(//|^)[^\s?#'\"]*@")
_PARAMETER = re.compile(r"([?&][^=&\s#'\"]*=)[^&\s#'\"]+")


def without_credentials(text: str) -> str:
    """Also of a text that is no address, or nearly one: "http://me:pw@host/?key=x" -> "http://***@host/?key=***" """
    return _PARAMETER.sub(rf"\1{BLANK}", _USER.sub(rf"\1{BLANK}@", text))
