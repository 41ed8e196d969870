"""What is wrong with a grammar, as far as it can be said without a tokenizer. Loads no torch.

Compiling releases the interpreter, but takes its time, so large sources are refused, and the check belongs off the
event loop. The bound on optional properties is llguidance's: any of them may come next, and it follows all at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ensemble_server.ensembles.base import Grammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

MAX_SOURCE_CHARS = 100_000
MAX_OPTIONAL_PROPERTIES = 490  # of one object: the parser takes 2000 items in a row, four for each of these

_ANY_JSON_OBJECT = json.dumps({"type": "object"})
# Between tokens, enough for the lines of an indented answer. Without a bound a model may write nothing else.
_WHITE_SPACE: JsonCompileOptions = {"whitespace_pattern": r"[ \t\r\n]{0,16}"}
_MAPS_OF_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})
_VALUES = frozenset({"const", "enum", "default", "examples"})  # what stands there is data


def problem_of(grammar: Grammar) -> str | None:
    """Why a grammar cannot be used; None if nothing is known against it. Takes up to a second for the largest."""
    from llguidance import LLMatcher

    if problem := size_problem_of(grammar):
        return problem
    try:
        problem = LLMatcher.validate_grammar(source_of(grammar)) or None
    except ValueError as exc:
        return str(exc)
    if problem and "Unimplemented keys" in problem:
        return f"{problem}; these cannot be enforced, so leave them out of the schema and check the answer for them"
    return problem


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
            return LLMatcher.grammar_from_json_schema(_ANY_JSON_OBJECT, overrides=_WHITE_SPACE)
        case "json_schema":
            schema = _enforceable(grammar.source)
            if schema is None:
                return LLMatcher.grammar_from_json_schema(grammar.source)
            return LLMatcher.grammar_from_json_schema(schema, overrides=_WHITE_SPACE)


def _enforceable(source: str) -> str | None:
    """A schema without what says nothing that could be enforced: unknown formats, which are annotations, and
    `uniqueItems: false`. None for what is no schema."""
    try:
        schema = json.loads(source)
    except (ValueError, RecursionError):
        return None
    if schema is True:
        return "{}"
    if not isinstance(schema, dict):
        return None
    left: list[Any] = [schema]
    while left:
        part = left.pop()
        if isinstance(part, list):
            left.extend(part)
        elif isinstance(part, dict):
            if isinstance(part.get("format"), str) and not _is_known_format(part["format"]):
                del part["format"]
            if part.get("uniqueItems") is False:
                del part["uniqueItems"]
            for key, value in part.items():
                if key in _MAPS_OF_SCHEMAS and isinstance(value, dict):
                    left.extend(value.values())
                elif key not in _VALUES:
                    left.append(value)
    return json.dumps(schema)


@lru_cache(maxsize=256)
def _is_known_format(name: str) -> bool:
    from llguidance import LLMatcher

    schema = json.dumps({"type": "string", "format": name})
    return not LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(schema))


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
