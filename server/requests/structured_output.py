"""What a client wants the text to match, as a `Grammar` that is known to be valid."""

from __future__ import annotations

import json
import re

from ensemble_server.ensembles.base import Grammar
from ensemble_server.ensembles.errors import RequestError, UnsupportedError
from ensemble_server.server.engines.shared.grammar_checks import problem_of
from ensemble_server.server.requests.protocol import ResponseFormat, StructuredOutputs

_SERVED = "json, json_object, regex and choice"


def requested_grammar(response_format: ResponseFormat | None, structured: StructuredOutputs | None) -> Grammar | None:
    """The grammar that either asks for; None for free text. Raises `RequestError`, also for a grammar that is wrong."""
    formatted = None if response_format is None else _of_response_format(response_format)
    grammar = None if structured is None else _of_structured_outputs(structured)
    if formatted and grammar:
        raise RequestError("give response_format or structured_outputs, not both", param="structured_outputs")
    grammar = formatted or grammar
    if grammar is not None:
        check_grammar(grammar, param="response_format" if formatted else "structured_outputs")
    return grammar


def check_grammar(grammar: Grammar, *, param: str) -> None:
    """Raise `RequestError` that says what is wrong with a grammar. Blocks while it is compiled.

    Done here and not only by the engine, so that a wrong schema is the client's error also where it goes to an ensemble
    that would count each member's refusal as silence.
    """
    if problem := problem_of(grammar):
        raise RequestError(f"{param}: the {grammar.kind.replace('_', ' ')} cannot be used: {problem}", param=param)


def _of_response_format(wanted: ResponseFormat) -> Grammar | None:
    match wanted.type:
        case "text":
            return None
        case "json_object" if wanted.schema_ is None:
            return Grammar("json_object")
        case "json_object" | "json_schema":
            schema = wanted.schema_ if wanted.json_schema is None else wanted.json_schema.schema_
            if schema is None:
                raise RequestError(
                    "response_format: type json_schema needs json_schema.schema", param="response_format.json_schema"
                )
            return Grammar("json_schema", json.dumps(schema))


def _of_structured_outputs(wanted: StructuredOutputs) -> Grammar:
    if unknown := [name for name, value in (wanted.model_extra or {}).items() if value is not None]:
        raise UnsupportedError(
            f"structured_outputs.{unknown[0][:40]} cannot be honoured; it takes {_SERVED}", param="structured_outputs"
        )
    grammars = []
    if wanted.json_ is not None:
        source = wanted.json_ if isinstance(wanted.json_, str) else json.dumps(wanted.json_)
        grammars.append(Grammar("json_schema", source))
    if wanted.json_object:
        grammars.append(Grammar("json_object"))
    if wanted.regex is not None:
        grammars.append(Grammar("regex", wanted.regex))
    if wanted.choice is not None:
        grammars.append(Grammar("regex", "|".join(f"({re.escape(text)})" for text in wanted.choice)))
    if len(grammars) != 1:
        raise RequestError(f"structured_outputs takes exactly one of {_SERVED}", param="structured_outputs")
    return grammars[0]
