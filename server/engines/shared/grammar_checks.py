"""What is wrong with a grammar, as far as it can be said without a tokenizer. Loads no torch.

Compiling releases the interpreter, but takes its time, so large sources are refused, and the check belongs off the
event loop. The bound on optional properties is llguidance's: any of them may come next, and it follows all at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ensemble_server.ensembles.base import Grammar

MAX_SOURCE_CHARS = 100_000
MAX_OPTIONAL_PROPERTIES = 490  # of one object: the parser takes 2000 items in a row, four for each of these

_ANY_JSON_OBJECT = json.dumps({"type": "object"})


def problem_of(grammar: Grammar) -> str | None:
    """Why a grammar cannot be used; None if nothing is known against it. Takes up to a second for the largest."""
    from llguidance import LLMatcher

    if problem := size_problem_of(grammar):
        return problem
    try:
        return LLMatcher.validate_grammar(source_of(grammar)) or None
    except ValueError as exc:
        return str(exc)


def size_problem_of(grammar: Grammar) -> str | None:
    """The same as far as it can be seen without compiling."""
    if len(grammar.source) > MAX_SOURCE_CHARS:
        return f"it has {len(grammar.source)} characters, at most {MAX_SOURCE_CHARS} are taken; make it smaller"
    return _too_many_choices(grammar.source) if grammar.kind == "json_schema" else None


def source_of(grammar: Grammar) -> str:
    """In llguidance's own language. Raises `ValueError` for a schema that is no JSON."""
    from llguidance import LLMatcher

    match grammar.kind:
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.source)
        case "json_object":
            return LLMatcher.grammar_from_json_schema(_ANY_JSON_OBJECT)
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(grammar.source)


def _too_many_choices(source: str) -> str | None:
    try:
        schema = json.loads(source)
    except (ValueError, RecursionError):
        return None  # llguidance says it better
    for part in _objects(schema):
        properties, required = part.get("properties"), part.get("required")
        if not isinstance(properties, dict):
            continue
        named = {name for name in required if isinstance(name, str)} if isinstance(required, list) else set()
        num_optional = len(properties.keys() - named)
        if num_optional > MAX_OPTIONAL_PROPERTIES:
            return (
                f"an object in it has {num_optional} optional properties, at most {MAX_OPTIONAL_PROPERTIES} can be "
                "followed; make more of them required, or group them into objects"
            )
    return None


def _objects(schema: Any) -> Iterator[dict[str, Any]]:
    """Every JSON object in `schema`, however deep."""
    left = [schema]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            yield part
            left.extend(part.values())
        elif isinstance(part, list):
            left.extend(part)
