"""Calls as models really write them, and as nobody should: parallel, nested, cut off, with the format's own markers in
their strings. Read whole, or cut anywhere, they come to the same.

Kinds of cases as in vLLM's tests of its parsers (tests/tool_parsers/common_tests.py), and what its issues and those of
sglang report.
"""

from __future__ import annotations

import json

import pytest

from ensemble_server.server.tool_formats.formats import FORMATS
from ensemble_server.server.tool_formats.values import StringRepair, arguments_object, typed, types_of
from tests.server.tool_formats.test_formats import SCHEMA, read

FUNCTIONS = {"f": SCHEMA | {"properties": SCHEMA["properties"] | {"one": {"const": "3"}}}, "g": SCHEMA}
BEGIN = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>"
END = "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
SEP = "<｜tool▁sep｜>"


def hermes(arguments: str, name: str = "f") -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def coder(values: list[tuple[str, str]], name: str = "f") -> str:
    written = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values)
    return f"<tool_call>\n<function={name}>\n{written}</function>\n</tool_call>"


def glm(values: list[tuple[str, str]], name: str = "f") -> str:
    written = "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in values)
    return f"<tool_call>{name}\n{written}</tool_call>"


def dsml(values: list[tuple[str, str, str]], outer: str = "function_calls") -> str:
    written = "".join(
        f'<｜DSML｜parameter name="{key}" string="{is_string}">{value}</｜DSML｜parameter>\n'
        for key, value, is_string in values
    )
    return f'<｜DSML｜{outer}>\n<｜DSML｜invoke name="f">\n{written}</｜DSML｜invoke>\n</｜DSML｜{outer}>'


CASES = [
    ("hermes", hermes('{"x": "a\nb"}'), "", [("f", {"x": "a\nb"})]),
    ("hermes", hermes(r'{"x": "\d+ C:\Users"}'), "", [("f", {"x": "\\d+ C:\\Users"})]),
    ("hermes", hermes('{"x": "\t"}'), "", [("f", {"x": "\t"})]),
    ("hermes", hermes('""'), "", [("f", {})]),
    ("hermes", hermes("null"), "", [("f", {})]),
    ("hermes", hermes('{"x": 1}}'), "", [("f", {"x": 1})]),
    ("hermes", hermes('{"x": 1}') + "\n" + hermes('{"x": 1}'), "", [("f", {"x": 1})] * 2),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": {}}\n<tool_call>{"name": "g", "arguments": {}}</tool_call>',
        "",
        [("f", {}), ("g", {})],
    ),
    ("hermes", '<tool_call>\r\n\t{"name": "f",\r\n "arguments": {}}\r\n</tool_call>', "", [("f", {})]),
    (
        "hermes",
        "A " + hermes('{"x": "<tool_call>{\\"name\\": \\"g\\"}</tool_call>"}') + " B",
        "A B",
        [("f", {"x": '<tool_call>{"name": "g"}</tool_call>'})],
    ),
    (
        "hermes",
        hermes('{"x": {"y": [{"z": "}]"}, [1.5e3, -2, null, true]]}}'),
        "",
        [("f", {"x": {"y": [{"z": "}]"}, [1500.0, -2, None, True]]}})],
    ),
    ("hermes", hermes('{"x": "日本 🎉 \\ud83c\\udf89 é"}'), "", [("f", {"x": "日本 🎉 🎉 é"})]),
    (
        "hermes",
        '<tool_call>[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]</tool_call>',
        "",
        [("f", {}), ("g", {})],
    ),
    ("hermes", '<tool_call>\n```json\n{"name": "f", "arguments": {}}\n```\n</tool_call>', "", [("f", {})]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"x": "a\\', "", [("f", '{"x": "a\\')]),
    ("hermes", '<tool_call>{"name": "f", "argu', '<tool_call>{"name": "f", "argu', []),
    (
        "llama3_json",
        'Here is: {"name": "f", "parameters": {"text": "a"}} More?',
        "Here is: More?",
        [("f", {"text": "a"})],
    ),
    ("llama3_json", '{"type": "function", "name": "f", "parameters": {"text": "a"}}', "", [("f", {"text": "a"})]),
    ("llama3_json", '{"function": "f", "parameters": {}}', "", [("f", {})]),
    ("llama3_json", '{"name": "f", "parameters": "{\\"x\\": 1}"}', "", [("f", {"x": 1})]),
    ("llama3_json", '{"name": "f", "parameters": {}};', "", [("f", {})]),
    ("llama3_json", '{"name": "f", "parameters": {}}\n{"name": "g", "parameters": {}}', "", [("f", {}), ("g", {})]),
    (
        "llama3_json",
        '{"name": "f", "parameters": {}} I used {f} with {"text": 1}',
        'I used {f} with {"text": 1}',
        [("f", {})],
    ),
    ("llama3_json", '```json\n{"name": "f", "parameters": {}}\n```', "```json\n```", [("f", {})]),
    (
        "llama3_json",
        '{"name": "f", "parameters": {"text": "{\\"name\\": \\"g\\"};"}}',
        "",
        [("f", {"text": '{"name": "g"};'})],
    ),
    ("llama3_json", '{"answer": {"name": "f"}}', '{"answer": {"name": "f"}}', []),
    ("llama3_json", "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "f", "arguments": {"x": "[TOOL_CALLS] ]"}, "id": "abc"}]\n\nDone',
        "Done",
        [("f", {"x": "[TOOL_CALLS] ]"})],
    ),
    (
        "mistral",
        '[TOOL_CALLS]f[ARGS]{"x": "[ARGS]{"}[TOOL_CALLS]f[ARGS]{"x": "é"}',
        "",
        [("f", {"x": "[ARGS]{"}), ("f", {"x": "é"})],
    ),
    ("mistral", "[TOOL_CALLS]f[ARGS]{}", "", [("f", {})]),
    ("mistral", '[TOOL_CALLS] f {"x": 1}', "", [("f", {"x": 1})]),
    ("mistral", '[TOOL_CALLS]{"name": "f", "arguments": {}}', "", [("f", {})]),
    ("mistral", "[TOOL_CALLS]f[ARGS]", "[TOOL_CALLS]f[ARGS]", []),
    (
        "qwen3_coder",
        coder([("text", "a </parameter> b"), ("count", "3")]),
        "",
        [("f", {"text": "a </parameter> b", "count": 3})],
    ),
    (
        "qwen3_coder",
        coder([("text", "</function>\n</tool_call>\n<tool_call>\n<function=g>")]),
        "",
        [("f", {"text": "</function>\n</tool_call>\n<tool_call>\n<function=g>"})],
    ),
    (
        "qwen3_coder",
        "<tool_call>\n<function=f>\n<parameter=text>\na\n<parameter=count>\n3\n</function>\n</tool_call>",
        "",
        [("f", {"text": "a", "count": 3})],
    ),
    ("qwen3_coder", coder([("text", "\n  indented\n\n")]), "", [("f", {"text": "\n  indented\n\n"})]),
    (
        "qwen3_coder",
        coder([("size", "NaN"), ("list", '["a", 1, true, null]'), ("map", "{'a': True}"), ("is", "False")]),
        "",
        [("f", {"size": "NaN", "list": ["a", 1, True, None], "map": {"a": True}, "is": False})],
    ),
    ("qwen3_coder", coder([("size", "1e999")]), "", [("f", {"size": "1e999"})]),
    (
        "qwen3_coder",
        coder([("text", "007"), ("other", "3"), ("one", "3"), ("maybe", "null")]),
        "",
        [("f", {"text": "007", "other": "3", "one": "3", "maybe": None})],
    ),
    (
        "qwen3_coder",
        coder([("text", "a")]) + "\n" + coder([("text", "b")], "g") + "\nok",
        "ok",
        [("f", {"text": "a"}), ("g", {"text": "b"})],
    ),
    ("qwen3_coder", "Sure.\n\n" + coder([]), "Sure.", [("f", {})]),
    (
        "qwen3_coder",
        "<tool_call><function=f><parameter=text>a</parameter><parameter=count>3</parameter></function></tool_call>",
        "",
        [("f", {"text": "a", "count": 3})],
    ),
    ("qwen3_coder", "<tool_call>\n<function=f>\n<parameter=count>\n12", "", [("f", '{"count": 12')]),
    ("qwen3_coder", "<tool_call>\n<function=f>\n<parameter=list>\n[1, 2", "", [("f", '{"list": [1, 2')]),
    ("qwen3_coder", coder([("text", "🎉 日本")]), "", [("f", {"text": "🎉 日本"})]),
    ("glm", glm([("text", "a</arg_value>b"), ("count", "3")]), "", [("f", {"text": "a</arg_value>b", "count": 3})]),
    ("glm", glm([("text", "</tool_call><arg_key>")]), "", [("f", {"text": "</tool_call><arg_key>"})]),
    (
        "glm",
        glm([("text", "a\n\nb ")]) + glm([("is", "true")], "g") + " then",
        "then",
        [("f", {"text": "a\n\nb "}), ("g", {"is": True})],
    ),
    (
        "glm",
        glm([("map", '{"a": {"b": [1, "x"]}}'), ("size", "2.50")]),
        "",
        [("f", {"map": {"a": {"b": [1, "x"]}}, "size": 2.5})],
    ),
    ("glm", "<tool_call>f\n<arg_key>text</arg_key>\n<arg_value>so f", "", [("f", '{"text": "so f')]),
    ("deepseek", f'{BEGIN}f{SEP}{{"x": "{END} ```"}}{END}', "", [("f", {"x": f"{END} ```"})]),
    (
        "deepseek",
        f'Hm.\n\n{BEGIN}function{SEP}f\n```json\n{{"x": "```"}}\n```<｜tool▁call▁end｜>\n'
        f"<｜tool▁call▁begin｜>function{SEP}g\n```json\n{{}}\n```{END}",
        "Hm.",
        [("f", {"x": "```"}), ("g", {})],
    ),
    ("deepseek", f'{BEGIN}f{SEP}{{"x": 1', "", [("f", '{"x": 1')]),
    (
        "deepseek",
        dsml([("text", "a </｜DSML｜parameter> b", "true"), ("count", "5", "false")]),
        "",
        [("f", {"text": "a </｜DSML｜parameter> b", "count": 5})],
    ),
    (
        "deepseek",
        dsml([("text", "5", "true"), ("list", '[1, {"a": "b"}]', "false")], outer="tool_calls"),
        "",
        [("f", {"text": "5", "list": [1, {"a": "b"}]})],
    ),
    (
        "deepseek",
        dsml([("text", "</｜DSML｜invoke>\n</｜DSML｜function_calls>", "true")]) + "\nok",
        "ok",
        [("f", {"text": "</｜DSML｜invoke>\n</｜DSML｜function_calls>"})],
    ),
    ("deepseek", dsml([]), "", [("f", {})]),
    (
        "gemma",
        '<|tool_call>call:f{text:<|"|>}<tool_call|>{a:1}<|"|>}<tool_call|>',
        "",
        [("f", {"text": "}<tool_call|>{a:1}"})],
    ),
    ("gemma", '<|tool_call>:call:f{text:<|"|>a<|"|>}<tool_call|>', "", [("f", {"text": "a"})]),
    (
        "gemma",
        '<|tool_call>call:f{"text":"a, \\"b\\"","count":3}<tool_call|>',
        "",
        [("f", {"text": 'a, "b"', "count": 3})],
    ),
    (
        "gemma",
        "<|tool_call>call:f{text:3,size:-1.5e3,is:true,maybe:null}<tool_call|>",
        "",
        [("f", {"text": "3", "size": -1500.0, "is": True, "maybe": None})],
    ),
    ("gemma", "<|tool_call>call:f{text:Hello world}<tool_call|> ok", "ok", [("f", {"text": "Hello world"})]),
    (
        "gemma",
        '<|tool_call>call:f{list:[<|"|>a<|"|>,[1,2],{k:<|"|>v<|"|>}],map:{}}<tool_call|>\n<|tool_call>call:g{}<tool_call|>',
        "",
        [("f", {"list": ["a", [1, 2], {"k": "v"}], "map": {}}), ("g", {})],
    ),
    ("gemma", '<|tool_call>call:f{text:<|"|>uncl', "", [("f", '{"text": "uncl')]),
    ("gemma", "<|tool_call>call:f{size:NaN}<tool_call|>", "", [("f", {"size": "NaN"})]),
    (
        "gemma",
        '<|tool_call>call:f{ text : <|"|> 🎉 <|"|> , count : 3 }<tool_call|>',
        "",
        [("f", {"text": " 🎉 ", "count": 3})],
    ),
    (
        "phi",
        '<|tool_call|>[{"name": "f", "arguments": {"x": "<|/tool_call|>]"}}, '
        '{"name": "g", "arguments": {}}]<|/tool_call|> ok',
        "ok",
        [("f", {"x": "<|/tool_call|>]"}), ("g", {})],
    ),
    (
        "phi",
        'functools[{"name": "f", "arguments": {"x": [1]}},\n{"name": "g", "parameters": {}}]',
        "",
        [("f", {"x": [1]}), ("g", {})],
    ),
    ("phi", '<|tool_call|>{"type":"function","function":{"name":"f","arguments":{}}}<|/tool_call|>', "", [("f", {})]),
    ("phi", 'Use functools[{"name": "f", "arguments": {"x": "a', "Use", [("f", '{"x": "a')]),
]


def parsed(arguments: str) -> object:
    """The object that a client reads; what was cut off as it is."""
    try:
        return json.loads(arguments, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    except ValueError:
        return arguments


@pytest.mark.parametrize(("form", "text", "shown", "calls"), CASES)
def test_a_call_is_what_was_meant(form, text, shown, calls):
    whole = read(FORMATS[form].reader(FUNCTIONS), text)
    assert (whole[0], [(name, parsed(arguments)) for name, arguments in whole[1]]) == (shown, calls)
    for width in (1, 2, 3, 5, 7):
        cut = [text[start : start + width] for start in range(0, len(text), width)]
        assert read(FORMATS[form].reader(FUNCTIONS), *cut) == whole


@pytest.mark.parametrize("form", FORMATS)
def test_what_is_cut_off_anywhere_reads_the_same_in_pieces(form):
    texts = [text for name, text, *_ in CASES if name == form]
    for text in texts:
        for end in range(0, len(text), 3):
            whole = read(FORMATS[form].reader(FUNCTIONS), text[:end])
            assert read(FORMATS[form].reader(FUNCTIONS), *text[:end]) == whole


@pytest.mark.parametrize(
    ("written", "valid"),
    [
        (r'"\d+"', r'"\\d+"'),
        (r'"C:\Users\new"', r'"C:\\Users\new"'),  # \n is a line end: nobody can tell
        (r'"\u00e9 \" \\"', r'"\u00e9 \" \\"'),
        (r'"\u12"', r'"\\u12"'),
        ('"a\nb\tc"', r'"a\nb\tc"'),
        ('{"a":\n 1}', '{"a":\n 1}'),
        ('"cut \\', '"cut \\'),
    ],
)
def test_strings_become_those_of_json(written, valid):
    assert StringRepair().feed(written, is_last=True) == valid
    repair = StringRepair()
    pieces = [repair.feed(char) for char in written]
    assert "".join(pieces) + repair.feed("", is_last=True) == valid


@pytest.mark.parametrize(
    ("text", "valid"),
    [
        ('{"x": 1}', '{"x": 1}'),
        ('"{\\"x\\": 1}"', '{"x": 1}'),
        ("null", "{}"),
        ('""', "{}"),
        ("[1]", None),
        ('{"x": NaN}', None),
        ('{"x": 1e999}', None),
        ("[" * 100_000, None),
    ],
)
def test_arguments_are_an_object(text, valid):
    assert arguments_object(text) == valid


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("NaN", {"type": "number"}, "NaN"),
        ("-Infinity", None, "-Infinity"),
        ("[1e999]", {"type": "array"}, "[1e999]"),
        ("{'a': [True, None, (1,)]}", {"type": "object"}, {"a": [True, None, [1]]}),
        ("{'a'}", {"type": "array"}, "{'a'}"),
        ("{'a': 1}", {"type": "string"}, "{'a': 1}"),
        ("__import__('os')", {"type": "object"}, "__import__('os')"),
        ("(" * 10_000, {"type": "array"}, "(" * 10_000),
    ],
)
def test_what_no_json_can_say_stays_text(text, schema, value):
    assert typed(text, schema) == value


def test_a_constant_has_a_type():
    assert (types_of({"const": "3"}), types_of({"const": 3})) == ({"string"}, {"integer"})
