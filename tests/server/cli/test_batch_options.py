from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from ensemble_server.server.cli.batch_options import (
    RequestOptions,
    parse_labels,
    parse_response_format,
    parse_setting,
    summarised,
)


def test_single_values_fill_bodies_and_several_span_the_grid() -> None:
    options = RequestOptions(model="a,b", temperature="0.5", seeds="0-2", samples=4, stop=("\n",), max_tokens=16)
    assert options.defaults() == {"temperature": 0.5, "max_tokens": 16, "n": 4, "stop": ["\n"]}
    assert options.grid().axes == {"model": ("a", "b"), "seed": (0, 1, 2)}


def test_nothing_given_is_nothing_asked() -> None:
    options = RequestOptions()
    assert (options.defaults(), options.overrides(), options.grid().axes, options.stated()) == ({}, {}, {}, {})


def test_what_was_given_is_stated_under_its_flag() -> None:
    options = RequestOptions(model="a", max_tokens=3, set=("seed=1",), response_format="{" + " " * 500 + "}")
    stated = options.stated()
    assert stated["--model"] == "a"
    assert stated["--max-tokens"] == "3"
    assert stated["--set"] == '["seed=1"]'
    assert stated["--response-format"].startswith("502 characters, sha256 ")


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("seed=1", ("seed", 1)),
        ("ensemble.explain=true", ("ensemble.explain", True)),
        ('ensemble.weights={"a": 1}', ("ensemble.weights", {"a": 1})),
        ('user="x=y"', ("user", "x=y")),
    ],
)
def test_settings_are_keys_with_json(text: str, setting: tuple[str, Any]) -> None:
    assert parse_setting(text) == setting


@pytest.mark.parametrize("text", ["seed", "=1", "a..b=1", "a=", "a=text", "a=NaN"])
def test_what_is_no_setting_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"KEY=JSON|is not JSON"):
        parse_setting(text)


def test_a_response_format_is_a_kind_an_object_or_a_schema(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    whole = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(schema), encoding="utf-8")
    assert parse_response_format("json_object") == {"type": "json_object"}
    assert parse_response_format(json.dumps(schema)) == whole
    assert parse_response_format(json.dumps(whole)) == whole
    assert parse_response_format(str(file)) == whole
    for text, said in (("no-such-file", "a file of JSON"), ("{", "is not JSON"), ('{"a": NaN}', "NaN is no JSON")):
        with pytest.raises(ValueError, match=said):
            parse_response_format(text)


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        (RequestOptions(temperature="3"), "--temperature"),
        (RequestOptions(seeds="x"), "--seeds"),
        (RequestOptions(model=","), "--model"),
    ],
)
def test_a_wrong_value_names_its_flag(options: RequestOptions, flag: str) -> None:
    with pytest.raises(typer.BadParameter) as caught:
        options.grid()
    assert caught.value.param_hint == flag


def test_labels_are_words_with_commas_or_a_json_array() -> None:
    assert parse_labels("A,B,tie") == ["A", "B", "tie"]
    assert parse_labels('["yes, sir", " no"]') == ["yes, sir", " no"]
    for text in ("[1, 2]", "[broken"):
        with pytest.raises(ValueError):
            parse_labels(text)


def test_long_texts_are_shown_by_their_hash() -> None:
    assert summarised("short") == "short"
    assert summarised("a\nb").startswith("3 characters, sha256 ")
    assert summarised("x" * 100) != summarised("y" * 100)
