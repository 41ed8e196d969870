"""Reading tool calls out of text: the formats, the pieces, and that cutting the text elsewhere changes nothing."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ensemble_server.ensembles.base import ToolCall, ToolCallDelta
from ensemble_server.server.tool_formats.formats import FORMATS, format_in
from ensemble_server.server.tool_formats.json_calls import BareReader, HermesReader, MistralReader, NamedReader
from ensemble_server.server.tool_formats.values import typed, types_of

NAMES = list(FORMATS)
SCHEMA = {
    "properties": {
        "text": {"type": "string"},
        "other": {"anyOf": [{"type": "string"}]},
        "count": {"type": "integer"},
        "maybe": {"type": ["string", "null"]},
        "list": {"type": "array"},
        "map": {"type": "object"},
        "is": {"type": "boolean"},
        "size": {"type": "number"},
    }
}
FUNCTIONS = {"f": SCHEMA, "g": SCHEMA, "get_weather": SCHEMA}


def reader_of(form, functions=FUNCTIONS, **options):
    return FORMATS[form].reader(functions, **options)


def read(reader, *texts):
    """(text, calls) of a whole answer that comes in pieces."""
    pieces = [piece for text in texts for piece in reader.feed(text)] + reader.close()
    text = "".join(piece for piece in pieces if isinstance(piece, str))
    calls = []
    for piece in pieces:
        if isinstance(piece, ToolCallDelta):
            if piece.name is not None:
                assert piece.index == len(calls)
                calls.append([piece.name, ""])
            calls[piece.index][1] += piece.arguments
    return text, [tuple(call) for call in calls]


DEEPSEEK = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"
DEEPSEEK_END = "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"


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
        (
            "hermes",
            '<tool_call>{"name": "f", "arguments": {"x": "</tool_call>"}}',
            "",
            [("f", '{"x": "</tool_call>"}')],
        ),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": 1}</tool_call>', "", [("f", '{"x": 1}')]),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"x": "on', "", [("f", '{"x": "on')]),
        ("hermes", '<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>', "", [("f", '{"x": 1}')]),
        ("hermes", '<tool_call>{"id": "1", "name": "f", "arguments": {}, "x": [{}]}</tool_call>', "", [("f", "{}")]),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>', "", [("f", '{"x": 1}')]),
        ("hermes", "<tool_call>no call</tool_call>", "<tool_call>no call</tool_call>", []),
        ("hermes", 'x <tool_call>hm <tool_call>{"name": "f"}</tool_call>', "x <tool_call>hm", [("f", "{}")]),
        ("hermes", "a < b <tool", "a < b <tool", []),
        ("hermes", "plain \n", "plain \n", []),
        ("hermes", "", "", []),
        ("llama3_json", '{"name": "f", "parameters": {"x": "é"}}', "", [("f", '{"x": "é"}')]),
        ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {}}', "", [("f", "{}")]),
        ("llama3_json", 'Well. <|python_tag|>{"name": "f", "parameters": {}}', "Well.", [("f", "{}")]),
        ("llama3_json", '{"name": "f"}; {"name": "g"}', "", [("f", "{}"), ("g", "{}")]),
        ("llama3_json", '{"type": "function", "function": {"name": "f", "parameters": {}}}', "", [("f", "{}")]),
        ("llama3_json", '{"name": "Oslo"}', '{"name": "Oslo"}', []),
        ("llama3_json", '{"x": 1}', '{"x": 1}', []),
        ("llama3_json", '{"name": "f"', '{"name": "f"', []),
        ("llama3_json", "  {not json", "  {not json", []),
        ("llama3_json", "I say {x}", "I say {x}", []),
        ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"x": [1]}}]', "", [("f", '{"x": [1]}')]),
        ("mistral", 'Sure. [TOOL_CALLS][{"name": "f"}, {"name": "g"}]', "Sure.", [("f", "{}"), ("g", "{}")]),
        ("mistral", '[TOOL_CALLS]f[ARGS]{"x": 1}[TOOL_CALLS]g{}', "", [("f", '{"x": 1}'), ("g", "{}")]),
        ("mistral", '[TOOL_CALLS]f[CALL_ID]a1b2c3d4e[ARGS]{"x": 1}', "", [("f", '{"x": 1}')]),
        ("mistral", "[TOOL_CALLS]oops", "[TOOL_CALLS]oops", []),
        ("mistral", "an [array] of [TOO", "an [array] of [TOO", []),
        (
            "qwen3_coder",
            "I look.\n<tool_call>\n<function=f>\n<parameter=text>\na\n\n b\n</parameter>\n<parameter=count>\n3\n"
            "</parameter>\n</function>\n</tool_call>",
            "I look.",
            [("f", '{"text": "a\\n\\n b", "count": 3}')],
        ),
        ("qwen3_coder", "<function=g>\n</function>\n</tool_call>", "", [("g", "{}")]),
        ("qwen3_coder", "<tool_call><function=f><parameter=text>\nso f", "", [("f", '{"text": "so f')]),
        ("qwen3_coder", "<tool_call>{}</tool_call>", "<tool_call>{}</tool_call>", []),
        ("qwen3_coder", "use <function=", "use <function=", []),
        (
            "glm",
            "<tool_call>f\n<arg_key>text</arg_key>\n<arg_value>3</arg_value>\n<arg_key>list</arg_key>\n"
            "<arg_value>[1, 2]</arg_value>\n</tool_call>",
            "",
            [("f", '{"text": "3", "list": [1, 2]}')],
        ),
        (
            "glm",
            "<tool_call>f<arg_key>is</arg_key><arg_value>true</arg_value></tool_call>ok",
            "ok",
            [("f", '{"is": true}')],
        ),
        ("glm", "<tool_call>g</tool_call>", "", [("g", "{}")]),
        ("glm", "<tool_call>some words</tool_call>", "<tool_call>some words</tool_call>", []),
        (
            "deepseek",
            f'{DEEPSEEK}f<｜tool▁sep｜>{{"x": 1}}<｜tool▁call▁end｜><｜tool▁call▁begin｜>'
            f"g<｜tool▁sep｜>{{}}{DEEPSEEK_END}",
            "",
            [("f", '{"x": 1}'), ("g", "{}")],
        ),
        (
            "deepseek",
            f'Yes.{DEEPSEEK}function<｜tool▁sep｜>f\n```json\n{{"x": 1}}\n```{DEEPSEEK_END}',
            "Yes.",
            [("f", '{"x": 1}')],
        ),
        (
            "deepseek",
            '<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n<｜DSML｜parameter name="text" string="true">a"b'
            '</｜DSML｜parameter>\n<｜DSML｜parameter name="count" string="false">5</｜DSML｜parameter>\n'
            "</｜DSML｜invoke>\n</｜DSML｜function_calls>",
            "",
            [("f", '{"text": "a\\"b", "count": 5}')],
        ),
        ("deepseek", f"{DEEPSEEK}no", f"{DEEPSEEK}no", []),
        (
            "gemma",
            '<|tool_call>call:f{text:<|"|>a, {b}<|"|>,count:3,map:{k:[<|"|>v<|"|>,null]}}<tool_call|>',
            "",
            [("f", '{"text": "a, {b}", "count": 3, "map": {"k": ["v", null]}}')],
        ),
        (
            "gemma",
            "<start_function_call>call:f{text:<escape>3<escape>,count:<escape>3<escape>}<end_function_call>",
            "",
            [("f", '{"text": "3", "count": 3}')],
        ),
        ("gemma", "<|tool_call>call me", "<|tool_call>call me", []),
        ("phi", '<|tool_call|>[{"name": "f", "arguments": {"x": 1}}]<|/tool_call|>', "", [("f", '{"x": 1}')]),
        ("phi", 'functools[{"name": "f", "arguments": {"x": 1}}]', "", [("f", '{"x": 1}')]),
        ("phi", "import functools\n@functools.cache", "import functools\n@functools.cache", []),
        ("phi", "functools[0]", "functools[0]", []),
    ],
)
def test_calls_are_read_and_text_is_left(form, text, shown, calls):
    assert read(reader_of(form), text) == (shown, calls)
    assert read(reader_of(form), *text) == (shown, calls)  # character by character


PARTS = [
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "<|python_tag|>",
    '{"name": "f"}',
    '{"name": "f", "arguments": {"text": "a',
    '[{"name": "g"}]',
    "<function=f>",
    "<parameter=text>",
    "</parameter>",
    "</function>",
    "<arg_key>",
    "</arg_key>",
    "<arg_value>",
    "</arg_value>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜DSML｜function_calls>",
    '<｜DSML｜invoke name="f">',
    '<｜DSML｜parameter name="text" string="true">',
    "</｜DSML｜parameter>",
    "<|tool_call>",
    "call:f{",
    'text:<|"|>',
    "}<tool_call|>",
    "<|tool_call|>",
    "functools[",
    "]",
    "f",
    " ",
    "\n",
    "hi",
    ";",
    "<tool_",
    "<",
]
texts = st.one_of(
    st.text(alphabet=' \n<>{}[];/tol_caTOLCALS"x', max_size=40),
    st.lists(st.sampled_from(PARTS), max_size=10).map("".join),
)
cuts = st.lists(st.integers(0, 200), max_size=12)


def cut(text, at):
    places = sorted({min(place, len(text)) for place in at} | {0, len(text)})
    return [text[start:end] for start, end in pairwise(places)]


@pytest.mark.slow
@settings(max_examples=500)
@given(text=texts, at=cuts, form=st.sampled_from(NAMES))
def test_where_the_text_is_cut_makes_no_difference(text, at, form):
    whole = read(reader_of(form), text)
    assert read(reader_of(form), *cut(text, at)) == whole
    assert read(reader_of(form), *text) == whole


@settings(max_examples=300)
@given(text=texts, form=st.sampled_from(NAMES))
def test_an_answer_without_calls_comes_out_as_it_was(text, form):
    shown, calls = read(reader_of(form), text)
    if not calls:
        assert shown == text


@given(text=st.text(max_size=80), at=cuts, form=st.sampled_from(NAMES))
def test_ordinary_text_is_never_eaten(text, at, form):
    assert read(reader_of(form), *cut(text, at)) == (text, [])


plain = st.text(st.characters(codec="utf-8", exclude_characters='<>|｜[]"\r', exclude_categories=["Cs"]), max_size=12)
numbers = st.integers() | st.floats(allow_nan=False, allow_infinity=False)
inner = st.recursive(
    st.none() | st.booleans() | numbers | plain,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.sampled_from(["a", "b_c"]), values, max_size=2),
    max_leaves=5,
)
arguments = st.fixed_dictionaries(
    {},
    optional={
        "text": plain,
        "other": plain,
        "count": st.integers(),
        "maybe": st.none(),
        "list": st.lists(inner, max_size=3),
        "map": st.dictionaries(st.sampled_from(["a", "b_c"]), inner, max_size=2),
        "is": st.booleans(),
        "size": numbers,
    },
)


@settings(max_examples=400)
@given(
    calls=st.lists(st.tuples(st.sampled_from(["f", "g", "get_weather"]), arguments), min_size=1, max_size=3),
    before=st.sampled_from(["", "I look it up.", "So: "]),
    at=cuts,
    form=st.sampled_from(NAMES),
)
def test_calls_written_in_a_format_are_read_back(calls, before, at, form):
    text = before + FORMATS[form].written([ToolCall(name, json.dumps(values)) for name, values in calls])
    shown, got = read(reader_of(form), *cut(text, at))
    assert shown == before.rstrip()
    assert [(name, json.loads(values)) for name, values in got] == calls


@pytest.mark.parametrize("form", NAMES)
def test_without_parallel_calls_the_first_one_stands_alone(form):
    text = FORMATS[form].written([ToolCall("f", '{"text": "a"}'), ToolCall("g", '{"text": "b"}')])
    assert read(reader_of(form, parallel=False), text) == ("", [("f", '{"text": "a"}')])
    assert read(reader_of(form, parallel=False), *text) == ("", [("f", '{"text": "a"}')])


@pytest.mark.parametrize("form", NAMES)
def test_arguments_come_as_they_are_written(form):
    """Every format hands out the function and the first argument before the second one is there."""
    text = FORMATS[form].written([ToolCall("f", '{"text": "a long text", "count": 12345}')])
    reader = reader_of(form)
    pieces = reader.feed(text[: text.index("count") - 1])
    assert pieces[0].name == "f"
    assert "a long text" in "".join(piece.arguments for piece in pieces)


@pytest.mark.parametrize("form", ["hermes", "llama3_json", "mistral", "phi", "deepseek", "qwen3_coder", "glm"])
def test_a_long_text_comes_piece_by_piece(form):
    text = FORMATS[form].written([ToolCall("f", json.dumps({"text": "word " * 50}))])
    reader = reader_of(form)
    sizes = [sum(len(piece.arguments) for piece in reader.feed(part)) for part in cut(text, range(0, 999, 10))]
    assert sum(size > 0 for size in sizes) > 15


@pytest.mark.parametrize("reader", [HermesReader, MistralReader, BareReader])
def test_what_functions_there_are_need_not_be_known(reader):
    text = {HermesReader: '<tool_call>{"name": "h"}', MistralReader: "[TOOL_CALLS]h{}", BareReader: '{"name": "h"}'}
    assert read(reader(None), text[reader]) == ("", [("h", "{}")])


def test_a_named_call_streams_its_arguments():
    parser = NamedReader("f")
    assert parser.feed('{"x"') == [ToolCallDelta(0, "f", '{"x"')]
    assert parser.feed(": 1}") == [ToolCallDelta(0, None, ": 1}")]
    assert parser.close() == []
    assert NamedReader("f").close() == [ToolCallDelta(0, "f", "")]


def test_calls_are_numbered():
    pieces = HermesReader().feed('<tool_call>{"name": "f"}</tool_call><tool_call>{"name": "g"}</tool_call>')
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
        '{"arguments": {"x": NaN}, "name": "f"}',
        "[" * 100_000,
    ],
)
def test_what_is_no_call_is_text(text):
    assert read(BareReader(), text) == (text, [])


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ('{% if tools %}<tool_call>\n{"name": <function-name>}\n</tool_call>{% endif %}', "hermes"),
        ("<tool_call>\n<function=example>", "qwen3_coder"),
        ("<tool_call>{function-name}<arg_key>{arg-key-1}</arg_key>", "glm"),
        ('<|start_header_id|>{"name": function name, "parameters": dictionary}', "llama3_json"),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", "mistral"),
        ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", "deepseek"),
        ("<｜DSML｜function_calls>", "deepseek"),
        ("<start_function_call>call:", "gemma"),
        ("<|tool_call>call:", "gemma"),
        ("<|tool|>{{ message['tools'] }}<|/tool|>", "phi"),
        ("{{ tools }}", None),
        ("", None),
    ],
)
def test_the_chat_template_shows_the_format(template, form):
    assert format_in(template) == form


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("3", {"type": "string"}, "3"),
        ("3", {"type": "integer"}, 3),
        ("3", {"type": "number"}, 3),
        ("3", {"type": ["string", "null"]}, "3"),
        ("null", {"type": ["string", "null"]}, None),
        ("3", {"enum": ["3", "4"]}, "3"),
        ("3", None, 3),
        ("three", {"type": "integer"}, "three"),
        ("True", {"type": "boolean"}, True),
        ('{"a": [1]}', {"type": "object"}, {"a": [1]}),
    ],
)
def test_a_bare_value_is_what_the_schema_says(text, schema, value):
    assert typed(text, schema) == value


def test_types_that_a_schema_leaves_open_are_not_guessed():
    assert types_of({"anyOf": [{"type": "string"}, {"$ref": "#/x"}]}) == set()
    assert types_of({"anyOf": [{"type": "string"}, {"type": "null"}]}) == {"string", "null"}
