import json

import pytest

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.compare.measures.task_files import read_task
from ensemble_server.server.compare.measures.task_measure import Item


def written(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def test_templates_make_prompts_and_answers_of_a_rows_fields(tmp_path):
    data = written(tmp_path / "t.jsonl", {"id": "x", "q": "1+1", "a": 2}, "\n", {"q": "2+2", "a": "4"})
    task = read_task("sums", data, metric="number", template="Q: {{ q }}\nA:", answer="{{ a }}", max_tokens=8)
    assert task.items == (Item("x", "Q: 1+1\nA:", ("2",)), Item("1", "Q: 2+2\nA:", ("4",)))
    assert (task.name, task.metric, task.max_tokens) == ("sums", "number", 8)


def test_a_list_of_answers_makes_each_of_them_right(tmp_path):
    data = written(tmp_path / "t.jsonl", {"q": "who", "answer": ["Ann", "Anna"]})
    assert read_task("who", data, metric="exact_match", template="{{ q }}").items[0].references == ("Ann", "Anna")


@pytest.mark.parametrize("answer", ["B", 1, "nine"])
def test_the_right_option_is_given_by_letter_number_or_text(tmp_path, answer):
    data = written(tmp_path / "t.jsonl", {"q": "?", "options": ["seven", "nine"], "answer": answer})
    item = read_task("c", data, metric="multiple_choice", template="{{ q }}").items[0]
    assert item == Item("0", "?", ("nine",), ("seven", "nine"))


def test_only_the_first_rows_are_read_if_a_limit_says_so(tmp_path):
    data = written(tmp_path / "t.jsonl", *({"q": str(n), "answer": n} for n in range(5)), "broken")
    assert len(read_task("c", data, metric="number", template="{{ q }}", limit=3).items) == 3


@pytest.mark.parametrize(
    ("rows", "metric", "message"),
    [
        (["{}x\n"], "number", "line 1: is not JSON"),
        (["[]\n"], "number", "line 1: must be an object"),
        ([], "number", "has no rows"),
        ([{"q": "a", "answer": 1}, {"answer": 1}], "number", r"line 2: .*no column 'q'"),
        ([{"q": " ", "answer": 1}], "number", "line 1: the prompt is blank"),
        ([{"q": "a", "answer": []}], "number", "line 1: has no right answer"),
        ([{"q": "a", "answer": "three"}], "number", "line 1: no answer that number could match is found in 'three'"),
        (
            [{"id": 1, "q": "a", "answer": 1}, {"id": "1", "q": "b", "answer": 1}],
            "number",
            "line 2: the id '1' is taken",
        ),
        ([{"q": "a", "answer": "A"}], "multiple_choice", "line 1: multiple choice needs a list of options"),
        ([{"q": "a", "answer": "C", "choices": ["x", "y"]}], "multiple_choice", "line 1: the answer 'C' is none of"),
        ([{"q": "a", "answer": "A", "choices": ["x", "x"]}], "multiple_choice", "line 1: choices must hold"),
        ([{"q": "a", "answer": "A", "choices": "xy"}], "multiple_choice", "line 1: choices must be a list"),
    ],
)
def test_rows_that_cannot_be_asked_are_refused_with_their_line(tmp_path, rows, metric, message):
    data = written(tmp_path / "t.jsonl", *rows)
    with pytest.raises(ConfigError, match=message):
        read_task("t", data, metric=metric, template="{{ q }}")
