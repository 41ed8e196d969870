"""Reading tool calls out of text: the format, the pieces, and that cutting the text elsewhere changes nothing."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_server.server.requests.structured_output import check_grammar
from ensemble_server.server.requests.tool_calls import (
    HermesParser,
    NamedCallParser,
    RestOfAnswerParser,
    ToolCallDelta,
    WholeAnswerParser,
    named_call_grammar,
    parser_for,
    read_calls,
    required_call_grammar,
    tool_format,
)

FORMATS = ("hermes", "llama3_json", "mistral")


def read(parser, *texts):
    """(text, calls) of a whole answer that comes in pieces."""
    pieces = [piece for text in texts for piece in parser.feed(text)] + parser.close()
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    return text, [(piece.name, piece.arguments) for piece in pieces if isinstance(piece, ToolCallDelta)]


@pytest.mark.parametrize(
    ("form", "text", "shown", "calls"),
    [
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>', "", [("f", '{"x": 1}')]),
        ("hermes", 'Let me see.\n<tool_call>\n{"name": "f"}\n</tool_call>\n', "Let me see.", [("f", "{}")]),
        (
            "hermes",
            '<tool_call>{"name": "f"}</tool_call>\n<tool_call>{"name": "g"}</tool_call>',
            "",
            [("f", "{}"), ("g", "{}")],
        ),
        ("hermes", '<tool_call>{"name": "f"}</tool_call> Done, it is.', "Done, it is.", [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}', "", [("f", "{}")]),
        ("hermes", "<tool_call>no call</tool_call>", "<tool_call>no call</tool_call>", []),
        ("hermes", "a < b <tool", "a < b <tool", []),
        ("hermes", "plain \n", "plain \n", []),
        ("hermes", "", "", []),
        ("llama3_json", '{"name": "f", "parameters": {"x": "é"}}', "", [("f", '{"x": "é"}')]),
        ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {}}', "", [("f", "{}")]),
        ("llama3_json", '{"name": "f"}; {"name": "g"}', "", [("f", "{}"), ("g", "{}")]),
        ("llama3_json", '{"x": 1}', '{"x": 1}', []),
        ("llama3_json", '{"name": "f"', '{"name": "f"', []),
        ("llama3_json", "  {not json", "  {not json", []),
        ("llama3_json", "I say {x}", "I say {x}", []),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"x": [1]}}]', "", [("f", '{"x": [1]}')]),
        ("mistral", 'Sure. [TOOL_CALLS][{"name": "f"}, {"name": "g"}]', "Sure.", [("f", "{}"), ("g", "{}")]),
        ("mistral", "[TOOL_CALLS]oops", "[TOOL_CALLS]oops", []),
        ("mistral", "an [array] of [TOO", "an [array] of [TOO", []),
    ],
)
def test_calls_are_read_and_text_is_left(form, text, shown, calls):
    assert read(parser_for(form, parallel=True), text) == (shown, calls)
    assert read(parser_for(form, parallel=True), *text) == (shown, calls)  # character by character


texts = st.one_of(
    st.text(alphabet=' \n<>{}[];/tol_caTOLCALS"x', max_size=40),
    st.lists(
        st.sampled_from(
            [
                "<tool_call>",
                "</tool_call>",
                "[TOOL_CALLS]",
                "<|python_tag|>",
                '{"name": "f"}',
                '[{"name": "g"}]',
                " ",
                "hi",
                ";",
                "<tool_",
            ]
        ),
        max_size=8,
    ).map("".join),
)


@settings(max_examples=400)
@given(text=texts, cuts=st.lists(st.integers(0, 60), max_size=8), form=st.sampled_from(FORMATS))
def test_where_the_text_is_cut_makes_no_difference(text, cuts, form):
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[start:end] for start, end in pairwise(places)]
    assert read(parser_for(form, parallel=True), *pieces) == read(parser_for(form, parallel=True), text)


@given(text=texts, form=st.sampled_from(FORMATS))
def test_an_answer_without_calls_comes_out_as_it_was(text, form):
    shown, calls = read(parser_for(form, parallel=True), text)
    if not calls:
        assert shown == text


arguments = st.dictionaries(
    st.text(max_size=5),
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists, max_leaves=5),
    max_size=3,
)


@given(
    calls=st.lists(st.tuples(st.sampled_from(["f", "g"]), arguments), min_size=1, max_size=3),
    form=st.sampled_from(FORMATS),
)
def test_calls_written_in_a_format_are_read_back(calls, form):
    bodies = [{"name": name, "arguments": values} for name, values in calls]
    text = {
        "hermes": "\n".join(f"<tool_call>\n{json.dumps(body)}\n</tool_call>" for body in bodies),
        "llama3_json": "; ".join(json.dumps(body) for body in bodies),
        "mistral": f"[TOOL_CALLS] {json.dumps(bodies)}",
    }[form]
    shown, got = read(parser_for(form, parallel=True), text)
    assert shown == ""
    assert [(name, json.loads(values)) for name, values in got] == calls


@pytest.mark.parametrize("parser", [HermesParser, RestOfAnswerParser, WholeAnswerParser])
def test_without_parallel_calls_the_first_one_stands_alone(parser):
    text = {
        HermesParser: '<tool_call>{"name": "f"}</tool_call><tool_call>{"name": "g"}</tool_call>',
        RestOfAnswerParser: '[TOOL_CALLS][{"name": "f"}, {"name": "g"}]',
        WholeAnswerParser: '{"name": "f"};{"name": "g"}',
    }[parser]
    assert read(parser(parallel=False), text) == ("", [("f", "{}")])


def test_a_named_call_streams_its_arguments():
    parser = NamedCallParser("f")
    assert parser.feed('{"x"') == [ToolCallDelta(0, "f", '{"x"')]
    assert parser.feed(": 1}") == [ToolCallDelta(0, None, ": 1}")]
    assert parser.close() == []
    assert NamedCallParser("f").close() == [ToolCallDelta(0, "f", "")]


def test_calls_are_numbered():
    pieces = HermesParser().feed('<tool_call>{"name": "f"}</tool_call><tool_call>{"name": "g"}</tool_call>')
    assert [piece.index for piece in pieces] == [0, 1]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "1",
        '"f"',
        '{"name": 1}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": "x"}',
        '{"name": "f", "arguments": {"x": NaN}}',
        "[" * 100_000,
    ],
)
def test_what_is_no_call_is_none(text):
    assert read_calls(text) is None


def test_arguments_written_as_json_inside_json_are_unpacked():
    assert read_calls('{"name": "f", "arguments": "{\\"x\\": 1}"}') == [("f", '{"x": 1}')]


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ('{% if tools %}<tool_call>\n{"name": <function-name>}\n</tool_call>{% endif %}', "hermes"),
        ("<tool_call>\n<function=example>", None),
        ('<|start_header_id|>{"name": function name, "parameters": dictionary}', "llama3_json"),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", "mistral"),
        ("{{ tools }}", None),
        ("", None),
    ],
)
def test_the_chat_template_shows_the_format(template, form):
    assert tool_format(template) == form


def test_grammars_of_forced_calls_are_valid_also_with_references():
    schema = {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/Point"}},
        "$defs": {"Point": {"type": "integer"}},
    }
    check_grammar(named_call_grammar(schema), param="tools")
    check_grammar(named_call_grammar(None), param="tools")
    check_grammar(required_call_grammar([("f", schema), ("g", None)]), param="tools")
