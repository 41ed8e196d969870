"""Values of arguments: what models write, made into the JSON that the function's schema speaks of."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from ensemble_server.ensembles.surrogates import with_mended_escapes

_ESCAPE = re.compile(r"""\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})""")
_BEGUN_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?\Z")
_MAX_LITERAL_CHARS = 100_000
_PYTHON = {"True": "true", "False": "false", "None": "null"}


class StringRepair:
    """JSON piece by piece, with its strings as JSON wants them: models write line ends and single backslashes into
    them, as programs have them ('"\\d+"' -> '"\\\\d+"'). What is valid stays as it is."""

    def __init__(self) -> None:
        self._is_string = False
        self._held = ""  # the beginning of an escape

    def feed(self, piece: str, *, is_last: bool = False) -> str:
        text, self._held, out, at = self._held + piece, "", list[str](), 0
        while at < len(text):
            char = text[at]
            if not self._is_string or char == '"':
                self._is_string ^= char == '"'
            elif char == "\\":
                if match := _ESCAPE.match(text, at):
                    char = match.group()
                elif _BEGUN_ESCAPE.match(text, at):
                    self._held = "" if is_last else text[at:]
                    return "".join(out) + (text[at:] if is_last else "")
                else:
                    out.append("\\")
            elif char < " ":
                out.append(json.dumps(char)[1:-1])
                at += 1
                continue
            out.append(char)
            at += len(char)
        return "".join(out)


def types_of(schema: Any) -> set[str]:
    """The JSON types that a schema names for a value; empty where it leaves that open."""
    if not isinstance(schema, Mapping):
        return set()
    kind = schema.get("type")
    if isinstance(kind, str):
        return {kind}
    if isinstance(kind, list):
        return {one for one in kind if isinstance(one, str)}
    if "const" in schema:
        return {_type(schema["const"])}
    if isinstance(values := schema.get("enum"), list) and values:
        return {_type(value) for value in values}
    found: set[str] = set()
    for key in ("anyOf", "oneOf"):
        for part in schema.get(key) or ():
            if not (inner := types_of(part)):
                return set()
            found |= inner
    return found


def typed(text: str, schema: Any) -> Any:
    """A value that was written without quotes: ("3", {"type": "integer"}) -> 3; ("3", {"type": "string"}) -> "3" """
    types = types_of(schema)
    try:
        value = _valid(_PYTHON.get(text.strip(), text))
    except ValueError:
        return _literal(text, types)
    kind = _type(value)
    if not types or kind in types or (kind == "integer" and "number" in types) or "string" not in types:
        return value
    return text


def arguments_object(text: str) -> str | None:
    """`text` if it is a JSON object, also one that was written as JSON inside JSON; None if it is none."""
    text = StringRepair().feed(text, is_last=True)
    try:
        value = _valid(text)
        if isinstance(value, str) and value.strip():
            text = StringRepair().feed(value, is_last=True)
            value = _valid(text)
    except ValueError:
        return None
    if value is None or value == "":
        return "{}"
    return text.strip() if isinstance(value, dict) else None


def _literal(text: str, types: set[str]) -> Any:
    """Lists and objects that were written as Python writes them."""
    if types & {"array", "object"} and "string" not in types and len(text) <= _MAX_LITERAL_CHARS:
        try:
            value = _valid(json.dumps(ast.literal_eval(text.strip())))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return text
        return value if _type(value) in types else text
    return text


def _valid(text: str) -> Any:
    """Raises `ValueError` for what is no JSON: for numbers that are none, too."""
    try:
        value = json.loads(with_mended_escapes(text), parse_constant=_no_constant)
        json.dumps(value, allow_nan=False)  # 1e999
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _type(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"
