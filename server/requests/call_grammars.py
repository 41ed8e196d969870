"""The grammars that force a call: the arguments of one function, or a call of any."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ensemble_server.ensembles.base import Grammar


def named_call_grammar(parameters: Mapping[str, Any] | None) -> Grammar:
    """The arguments of one function, and nothing else."""
    return Grammar("json_schema", json.dumps(parameters or {"type": "object"}))


def required_call_grammar(functions: Sequence[tuple[str, Mapping[str, Any] | None]]) -> Grammar:
    """One call of any of `functions`, pairs of name and JSON schema: {"name": ..., "arguments": {...}}"""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": name},
                "arguments": _moved(parameters or {"type": "object"}, f"#/anyOf/{place}/properties/arguments"),
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for place, (name, parameters) in enumerate(functions)
    ]
    return Grammar("json_schema", json.dumps({"anyOf": calls}))


def _moved(schema: Any, root: str) -> Any:
    """`schema` with its references into itself rewritten for its new place in a larger one."""
    match schema:
        case dict():
            return {
                key: root + value[1:]
                if key == "$ref" and isinstance(value, str) and value.startswith("#")
                else _moved(value, root)
                for key, value in schema.items()
            }
        case list():
            return [_moved(value, root) for value in schema]
    return schema
