"""When calls are equal, and what they are like."""

from __future__ import annotations

import json
import random
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_server.ensembles.base import Choice, ToolCall
from ensemble_server.ensembles.voting.tool_calls import (
    called,
    calls_of,
    canonical_arguments,
    canonical_calls,
    said,
    with_calls,
)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ('{"a": 1, "b": 2}', '{"b":2,"a":1}'),
        ('{"a": 1}', '{"a": 1.0}'),
        ('{"a": 100}', '{"a": 1e2}'),
        ('{"a": 0.5}', '{"a": 5E-1}'),
        ('{"a": 0}', '{"a": -0.0}'),
        ('{"a": 12345678901234567890123456789012345}', '{"a": 12345678901234567890123456789012345.0}'),
        ('{"a": "é"}', '{"a": "\\u00e9"}'),
        ('{"a": {"c": [], "b": null}}', '{"a": {"b": null, "c": []}}'),
        ("", "{}"),
        ('{"a": "on', ' {"a": "on'),
    ],
)
def test_arguments_are_equal_as_values(left, right):
    assert canonical_arguments(left) == canonical_arguments(right)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ('{"a": 1}', '{"a": true}'),
        ('{"a": 1}', '{"a": "1"}'),
        ('{"a": [1, 2]}', '{"a": [2, 1]}'),
        ('{"a": null}', "{}"),
        ('{"a": 1}', '{"a": 1.0000000000000000000000000000000000001}'),
        ('{"a": NaN}', '{"a": "NaN"}'),
        ('{"a": 1e400}', '{"a": 1e401}'),
    ],
)
def test_arguments_that_differ_stay_apart(left, right):
    assert canonical_arguments(left) != canonical_arguments(right)


def test_half_a_character_in_arguments_can_be_written() -> None:
    assert canonical_arguments('{"a": "\\ud83d"}') == '{"a": "\ufffd"}'


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def shuffled(value, rng):
    if isinstance(value, dict):
        items = [(key, shuffled(inner, rng)) for key, inner in value.items()]
        rng.shuffle(items)
        return dict(items)
    return [shuffled(inner, rng) for inner in value] if isinstance(value, list) else value


@given(values, st.integers(0, 99))
def test_order_of_keys_and_spelling_are_irrelevant(value, seed):
    other = json.dumps(shuffled(value, random.Random(seed)), indent=seed % 3 or None, ensure_ascii=bool(seed % 2))
    assert canonical_arguments(other) == canonical_arguments(json.dumps(value))


@given(values)
def test_the_canonical_spelling_has_the_same_value(value):
    spelled = json.dumps(value)
    exact = {"parse_float": Decimal, "parse_int": Decimal}
    assert json.loads(canonical_arguments(spelled), **exact) == json.loads(spelled, **exact)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a": 1e999999999999999999999}', "{", '{"a": ' * 2000 + "1" + "}" * 2000]
)
def test_what_cannot_be_read_is_equal_to_itself_only(text):
    assert canonical_arguments(text) == canonical_arguments(f" {text}\n")
    assert canonical_arguments(text) != canonical_arguments("{}")


def test_the_order_of_parallel_calls_is_irrelevant_their_number_is_not():
    f, g = ToolCall("f", '{"a": 1}', "1"), ToolCall("g", "{}", "2")
    assert canonical_calls([f, g]) == canonical_calls([g, ToolCall("f", '{"a":1.0}')]) == 'f({"a": 1}); g({})'
    assert canonical_calls([f, f]) != canonical_calls([f])


def test_an_answer_with_calls_says_its_calls():
    assert said(Choice(0, "I look.", calls=[ToolCall("f", "{}")])) == "f({})"
    assert (said(Choice(0, "<think>hm</think> 18")), called(Choice(0, "18"))) == ("18", None)


def test_calls_in_a_conversation_are_read():
    message = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}]}
    assert (calls_of(message), calls_of({"role": "user", "content": "?"})) == ('f({"a": 1})', "")


def test_calls_are_like_equal_calls_only():
    matrix = np.array([[1, 0.5, 0.25], [0.5, 0, 0.5], [0.25, 0.5, 0]])
    assert with_calls(matrix, [None, "f()", "f()"]).tolist() == [[1, 0, 0], [0, 1, 1], [0, 1, 1]]
    assert with_calls(matrix, [None, "f()", "g()"]).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
