from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_server.ensembles.errors import ConfigError, RequestError
from ensemble_server.server.batch.source.template import PromptTemplate


@pytest.mark.parametrize(
    ("source", "columns", "prompt"),
    [
        ("Q: {{ question }}\n", {"question": "Why <b>?"}, "Q: Why <b>?"),
        ("{{ row['my column'] }}", {"my column": "é"}, "é"),
        ("{{ row }}", {"row": "R"}, "R"),
        ("{{ options[1] }} of {{ options | length }}", {"options": ["a", "b"]}, "b of 2"),
        ("[{{ nothing }}]", {"nothing": None}, "[]"),
        ("{% if hint is defined %}{{ hint }}{% else %}no hint{% endif %}", {}, "no hint"),
        ("{{ hint | default('none') }}", {}, "none"),
        ("{{ row.items }} {{ items }}", {"items": "apples"}, "apples apples"),
        (
            "{{ row.keys }}{{ row.values }}{{ row.get }}{{ row.copy }}",
            dict.fromkeys(["keys", "values", "get", "copy"], 1),
            "1111",
        ),
        ("{{ meta.update }}", {"meta": {"update": "daily"}}, "daily"),
        ("{{ range }} {{ dict }}", {"range": "R", "dict": "D"}, "R D"),
        ("{% for key, value in row.items() %}{{ key }}={{ value }};{% endfor %}", {"a": 1, "b": 2}, "a=1;b=2;"),
        ("{{ q.upper() }} {{ '{}'.format(q) }} {{ ', '.join(row.keys()) }}", {"q": "why"}, "WHY why q"),
    ],
)
def test_columns_become_a_prompt(source: str, columns: dict[str, Any], prompt: str) -> None:
    assert PromptTemplate(source).render(columns) == prompt


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("{{ question }}", "no column 'question' (there are: q, options)"),
        ("{{ row['my question'] }}", "no column 'my question' (there are: q, options)"),
        ("{{ question.text }}", "no column 'question'"),
        ("{% for word in question %}{% endfor %}", "no column 'question'"),
        ("{{ options.c }}", "no key 'c' (there are: a)"),
        ("{{ q / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ q.__class__.__mro__ }}", "SecurityError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ options.clear() }}", "SecurityError"),
        ("{{ row.items }}", "there is no column or key 'items'"),
        ("{{ 'a' ~ options.keys }}", "there is no column or key 'keys'"),
        ("{{ options.values | upper }}", "there is no column or key 'values'"),
        ("{{ range }}", "there is no column or key 'range'"),
    ],
)
def test_a_row_that_a_template_cannot_use_is_an_error_that_says_why(source: str, error: str) -> None:
    with pytest.raises(RequestError) as caught:
        PromptTemplate(source, name="t.j2").render({"q": 1, "options": {"a": 1}})
    assert str(caught.value).startswith("t.j2: ")
    assert error in str(caught.value)


def test_a_template_is_a_file_or_the_text_itself(tmp_path: Path) -> None:
    file = tmp_path / "prompt.j2"
    file.write_text("In a file: {{ q }}\n", encoding="utf-8")
    assert PromptTemplate.read(str(file)).render({"q": 1}) == "In a file: 1"
    assert PromptTemplate.read("Inline: {{ q }}").render({"q": 1}) == "Inline: 1"


def test_what_is_neither_a_file_nor_a_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--template: 'prompt.txt' is neither a file .* nor a text"):
        PromptTemplate.read("prompt.txt", name="--template")
    with pytest.raises(ConfigError, match="--system, line 2: not a Jinja template"):
        PromptTemplate.read("a\n{{ b", name="--system")
    file = tmp_path / "latin.j2"
    file.write_bytes(b"caf\xe9 {{ q }}")
    with pytest.raises(ConfigError, match="must be UTF-8 text, byte 3 is not"):
        PromptTemplate.read(str(file))


@given(st.text())
def test_the_text_of_a_column_is_never_read_as_a_template(text: str) -> None:
    assert PromptTemplate("{{ q }}").render({"q": text}) == text
