"""Whether what is fitted on is other text than what is measured: by content, whatever the files are called."""

from __future__ import annotations

import pytest

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.compare.measures.documents import Documents
from ensemble_server.server.compare.measures.task_measure import Item, Task
from ensemble_server.server.compare.planning.held_out import check_held_out, check_held_out_rows, shared_sequences


def words(start: int, stop: int) -> str:
    return " ".join(f"w{number}" for number in range(start, stop))


def test_the_share_counts_sequences_of_thirteen_words() -> None:
    assert shared_sequences([words(0, 100)], [words(0, 100)]) == 1
    assert shared_sequences([words(0, 100)], [words(200, 300)]) == 0
    assert shared_sequences([words(0, 12)], [words(0, 12)]) == 0  # too short to tell
    # Of the 88 sequences of 100 words, those from word 0 to 37 stand in the first 50 words.
    assert shared_sequences([words(0, 100)], [words(0, 50)]) == 38 / 88


def test_case_punctuation_and_line_ends_do_not_hide_a_copy() -> None:
    assert shared_sequences([words(0, 50)], [words(0, 50).upper().replace(" ", ",\n")]) == 1


def test_texts_without_spaces_are_read_sign_by_sign() -> None:
    text = "春眠不覚暁処処聞啼鳥夜来風雨声花落知多少"
    assert shared_sequences([text], [text[3:]]) == (len(text) - 3 - 12) / (len(text) - 12)


def test_a_copy_under_another_name_is_refused_and_a_quotation_is_said() -> None:
    texts = {"a": Documents((words(0, 400) + " ", words(400, 800)), is_continuous=True)}
    with pytest.raises(ConfigError, match="100% of a stand in the texts that are fitted on"):
        check_held_out(texts, {"b": Documents((words(0, 800),), is_continuous=True)})
    quoted = {"b": Documents((words(1000, 2000), words(0, 50)), is_continuous=False)}
    told = check_held_out(texts, quoted)
    assert told is not None and f"at most {38 / 788:.1%} stand there, too (a)" in told
    with pytest.raises(ConfigError, match="max_overlap"):
        check_held_out(texts, quoted, max_share=0.01)
    assert check_held_out(texts, {}) is None


def test_a_sequence_across_a_cut_counts() -> None:
    parts = {"a": Documents((words(0, 7) + " ", words(7, 14)), is_continuous=True)}
    with pytest.raises(ConfigError):
        check_held_out(parts, {"b": Documents((words(0, 7) + " " + words(7, 14),), is_continuous=True)})


def test_questions_that_stand_in_both_files_of_a_task_are_counted() -> None:
    def task(*prompts: str) -> Task:
        return Task("t", tuple(Item(str(n), prompt, ("1",)) for n, prompt in enumerate(prompts)), "number")

    test = {"t": task("One?", "Two?", "Three?")}
    check_held_out_rows(test, {"t": task("Four?")})
    with pytest.raises(ConfigError, match="2 of its 3 questions stand in its `dev` rows"):
        check_held_out_rows(test, {"t": task("two? ", "ONE?")})
