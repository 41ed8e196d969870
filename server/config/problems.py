"""What pydantic found wrong in a block of YAML, as sentences: the dotted path, the rule, what came and the way out.

What came is not shown where it may be a secret: keys that are left out of a block's `repr`, and parts of addresses.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ensemble_server.server.config.credentials import without_credentials


class _Short(reprlib.Repr):
    def repr_str(self, x: str, level: int) -> str:
        return super().repr_str(without_credentials(x), level)


_short = _Short()
_short.maxlevel, _short.maxstring = 2, 60


def findings(error: ValidationError, block: type[BaseModel], data: Any, at: str) -> list[str]:
    """One sentence per problem that validating `data` as `block` met; `at` is the block's own path ("models.mix").

    A key at fault is a path below `at`; a rule of the block as a whole stands behind `at` itself.
    """
    return [_sentence(details, block, data, at) for details in error.errors(include_url=False)]


def nearest(name: str, known: Collection[str]) -> str:
    """ "codee", ["code", "base"] -> "; did you mean 'code'? (known: base, code)" """
    near = get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{hint} (known: {', '.join(sorted(known))})"


def _sentence(details: ErrorDetails, block: type[BaseModel], data: Any, at: str) -> str:
    keys = _keys(details, data)
    context = details.get("ctx", {})
    path = ".".join([at, *map(str, keys)]) if at else ".".join(map(str, keys))
    match details["type"]:
        case "extra_forbidden":
            return f"unknown key {path!r}{nearest(str(keys[-1]), _known_keys(block, keys[:-1]))}"
        case "missing":
            return f"{path}: is required"
        case "value_error":
            return f"{path}: {context['error']}"
        case "model_type" | "dict_type" | "model_attributes_type":
            return f"{path}: must be a map of keys, got {_short.repr(details['input'])}"
        case "tuple_type" | "list_type":
            got = "" if _is_secret(block, keys) else f", got {_short.repr(details['input'])}"
            return f"{path}: must be a list such as [one, another]{got}"
        case _:
            pass
    rule = re.sub(r"^(Input|String|List|Tuple|Dictionary|Value) should ", "must ", details["msg"])
    hint = ""
    if details["type"] == "literal_error" and isinstance(details["input"], str):
        choices = re.findall(r"'([^']*)'", context["expected"])
        near = get_close_matches(details["input"], choices, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
    got = "" if _is_secret(block, keys) else f", got {_short.repr(details['input'])}"
    return f"{path}: {rule}{got}{hint}"


def _is_secret(block: type[BaseModel], keys: list[str | int]) -> bool:
    field = block.model_fields.get(str(keys[0])) if keys else None
    return field is not None and not field.repr


def _keys(details: ErrorDetails, data: Any) -> list[str | int]:
    """The part of pydantic's location that is in the YAML too: it also names the branches of unions it tried."""
    keys: list[str | int] = []
    for step in details["loc"]:
        if _holds(data, step):
            data = data[step]
        elif not (details["type"] == "missing" and step == details["loc"][-1]):
            continue
        keys.append(step)
    return keys


def _holds(data: Any, step: int | str) -> bool:
    if isinstance(data, Mapping):
        return step in data
    return isinstance(data, list) and isinstance(step, int) and step < len(data)


def _known_keys(block: type[BaseModel], keys: list[str | int]) -> set[str]:
    """The keys that `block` takes at the path `keys` below it."""
    blocks = [block]
    for key in keys:
        # Behind the name of a field stand the blocks in its type; the keys of a map or list between change nothing.
        inner = [
            found
            for outer in blocks
            if key in outer.model_fields
            for found in _blocks_in(outer.model_fields[str(key)].annotation)
        ]
        blocks = inner or blocks
    return {name for known in blocks for name in known.model_fields}


def _blocks_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [block for argument in get_args(annotation) for block in _blocks_in(argument)]
