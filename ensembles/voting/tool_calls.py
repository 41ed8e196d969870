"""Tool calls as answers: when two answers call the same, and how a call reads among texts.

Two answers with calls are equal exactly if they call the same functions with equal arguments, in any order. Arguments
are equal as JSON values: the order of keys, white space, escapes and the spelling of numbers (1, 1.0, 1e0) make no
difference. What is said beside the calls does not count. Arguments that are no JSON are equal as texts.

Methods that compare texts compare calls exactly: a weather in Oslo is not much like one in Bergen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from typing import Any

import numpy as np

from ensemble_server.ensembles.base import Choice, Message, ToolCall
from ensemble_server.ensembles.surrogates import with_mended_escapes
from ensemble_server.ensembles.thoughts import without_thoughts

_PLAIN_EXPONENTS = range(-20, 21)  # of numbers that are written out


def said(choice: Choice) -> str:
    """What an answer says, as others read it: its calls, or else its text without thoughts."""
    return called(choice) or without_thoughts(choice.text)


def called(choice: Choice) -> str | None:
    """The calls of an answer in their canonical form; None for an answer in text."""
    return canonical_calls(choice.calls) if choice.calls else None


def canonical_calls(calls: Sequence[ToolCall]) -> str:
    """[ToolCall("f", '{"b": 1.0, "a": "x"}')] -> 'f({"a": "x", "b": 1})'"""
    return "; ".join(sorted(f"{call.name}({canonical_arguments(call.arguments)})" for call in calls))


def calls_of(message: Message) -> str:
    """Those of an assistant's message in a conversation, as `canonical_calls` writes them; "" without any."""
    functions = [call["function"] for call in message.get("tool_calls") or ()]
    return canonical_calls([ToolCall(function["name"], function["arguments"]) for function in functions])


def canonical_arguments(text: str) -> str:
    """The one spelling of a JSON value; other text stays as it is. ' {"b":1e0,"a":[]}' -> '{"a": [], "b": 1}'"""
    try:
        value = json.loads(
            with_mended_escapes(text) or "{}", parse_float=Decimal, parse_int=Decimal, parse_constant=_no_constant
        )
        return _written(value)
    except (ValueError, ArithmeticError, RecursionError):
        return text.strip()


def with_calls(matrix: np.ndarray, calls: Sequence[str | None]) -> np.ndarray:
    """Similarities of answers (n, n) in which those with calls (canonical; None for a text) are like none but those
    with equal calls."""
    known = np.array([call or "" for call in calls], dtype=object)
    has_calls = np.array([call is not None for call in calls])
    equal = (known[:, None] == known[None, :]).astype(matrix.dtype)
    return np.where(has_calls[:, None] | has_calls[None, :], equal, matrix)


def _written(value: Any) -> str:
    match value:
        case Decimal():
            return _number(value)
        case dict():
            return _members(value)
        case list():
            return f"[{', '.join(map(_written, value))}]"
    return json.dumps(value, ensure_ascii=False)


def _members(value: Mapping[str, Any]) -> str:
    return (
        "{" + ", ".join(f"{json.dumps(key, ensure_ascii=False)}: {_written(value[key])}" for key in sorted(value)) + "}"
    )


def _number(value: Decimal) -> str:
    if not value:
        return "0"
    exact = Context(prec=len(value.as_tuple().digits), Emax=MAX_EMAX, Emin=MIN_EMIN)
    value = value.normalize(exact)
    return f"{value:f}" if value.as_tuple().exponent in _PLAIN_EXPONENTS else str(value)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
