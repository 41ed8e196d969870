"""What of a JSON schema is enforced, what is an annotation, and what is refused with a way out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ensemble_server.ensembles.base import Grammar
from ensemble_server.server.engines.shared.grammar_checks import problem_of, source_of


def schema(**keys: Any) -> Grammar:
    return Grammar("json_schema", json.dumps(keys))


@pytest.mark.parametrize("name", ["password", "path", "binary", "file-path", "int64", "json-pointer", "no such"])
def test_an_unknown_format_is_an_annotation_wherever_it_stands(name):
    part = {"type": "string", "format": name}
    assert problem_of(schema(**part)) is None
    assert problem_of(schema(type="object", properties={"format": part, "const": part})) is None
    assert problem_of(schema(anyOf=[part, {"type": "array", "items": part}])) is None
    assert problem_of(schema(**{"$defs": {"default": part}, "$ref": "#/$defs/default"})) is None


def test_a_known_format_is_enforced_and_data_is_not_touched():
    assert '"date"' in source_of(schema(type="string", format="date"))
    data = {"format": "password", "uniqueItems": False}
    assert "password" in source_of(schema(const=data)) and "password" in source_of(schema(enum=[data]))


def test_what_cannot_be_enforced_is_refused_with_a_way_out():
    assert problem_of(schema(type="array", uniqueItems=False)) is None
    problem = problem_of(schema(type="array", uniqueItems=True))
    assert problem is not None and "uniqueItems" in problem and "leave them out" in problem


def test_what_is_no_object_is_left_to_the_compiler():
    assert problem_of(Grammar("json_schema", "true")) is None
    assert all(problem_of(Grammar("json_schema", source)) for source in ("{", "[1]", '"x"', "nonsense"))
