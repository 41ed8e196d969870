import pytest
from sacrebleu.metrics.chrf import CHRF

from ensemble_server.server.compare.measures.task_metrics import judge, unreadable_reference


@pytest.mark.parametrize(
    ("metric", "output", "references", "answer", "score"),
    [
        ("exact_match", "The answer is: The Eiffel Tower.", ["eiffel tower"], "eiffel tower", 1),
        ("exact_match", "Louvre", ["Eiffel Tower", "the louvre"], "louvre", 1),
        ("exact_match", "The Eiffel Tower in Paris", ["Eiffel Tower"], "eiffel tower in paris", 0),
        ("number", "So 3 + 4 = 7. The answer is $1,200.50", ["1200.5"], "1200.5", 1),
        ("number", "no idea", ["3"], None, 0),
        ("number", "3", ["4", "#### 3"], "3", 1),
        ("choice", "The answer is (B).", ["B"], "B", 1),
        ("yes_no", "No, it is not.", ["true"], "no", 0),
        ("rouge_l", "the cat sat", ["the cat sat on the mat"], "the cat sat", 2 * 1 * 0.5 / 1.5),
        ("rouge_l", "the cat", ["a dog", "The cat!"], "the cat", 1),
        ("rouge_l", " \n", ["a dog"], None, 0),
        ("regex", "It was in 1969, July.", [r"in (\d{4})"], "1969", 1),
        ("regex", "It was long ago.", [r"\d{4}", "(?i)LONG"], "long", 1),
        ("regex", "It was long ago.", [r"\d{4}"], None, 0),
        ("regex", "a" * 40, ["(a|aa)+$b"], None, 0),
        ("json", '```json\n{"b": 1.0, "a": [true]}\n```', ['{"a": [true], "b": 1}'], '{"a": [true], "b": 1}', 1),
        ("json", 'So it is {"a": 1}, I think.', ['{"a": true}'], '{"a": 1}', 0),
        ("json", "[1, 2", ["[1, 2]"], None, 0),
        ("judge", "Paris", [""], "Paris", 0),
        ("chrf", "the cat sat", ["the cat sat"], "the cat sat", 1),
        ("chrf", "", ["the cat sat"], None, 0),
    ],
)
def test_an_output_is_judged_by_what_it_answers(metric, output, references, answer, score):
    assert judge(metric, output, references) == (answer, pytest.approx(score))


def test_chrf_is_that_of_sacrebleu():
    expected = CHRF().sentence_score("the cat sat there", ["the cat sat on the mat", "a cat"]).score / 100
    assert 0 < expected < 1
    assert judge("chrf", "the cat sat there", ["the cat sat on the mat", "a cat"])[1] == pytest.approx(expected)


def test_references_that_nothing_could_match_are_found():
    assert unreadable_reference("number", ["3", "three"]) == "three"
    assert unreadable_reference("number", ["3"]) is None
    assert unreadable_reference("rouge_l", ["a", " "]) == " "
    assert unreadable_reference("regex", ["a+", "(a"]) == "(a"
    assert unreadable_reference("json", ['{"a": 1}', "{a: 1}"]) == "{a: 1}"
