"""Answers that are there already: read from what batches, votes and other programs write, and judged as fresh ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ensemble_server.ensembles.errors import ConfigError, UnsupportedError
from ensemble_server.server.compare.measures.recorded_answers import Recorded, read_recorded, score_recorded
from ensemble_server.server.compare.measures.task_measure import Item, Task, item_score

SUMS = Task("sums", tuple(Item(name, f"{name}?", (answer,)) for name, answer in (("a", "4"), ("b", "9"))), "number")


def written(folder: Path, *rows: Any) -> Path:
    path = folder / "answers.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def answered(custom_id: str, *texts: str, num_tokens: int) -> dict[str, Any]:
    choices = [{"index": index, "message": {"content": text}} for index, text in enumerate(texts)]
    body = {"model": "red", "choices": choices, "usage": {"completion_tokens": num_tokens}}
    return {"custom_id": custom_id, "response": {"status_code": 200, "body": body}, "error": None}


def test_samples_of_a_batch_are_averaged_within_their_item(tmp_path: Path) -> None:
    failed = {"custom_id": "b", "response": None, "error": {"message": "too long"}}
    path = written(tmp_path, answered("a", "It is 4.", "So 5", num_tokens=7), failed)
    assert read_recorded(path)["a"] == Recorded(("It is 4.", "So 5"), 7)
    first, second = score_recorded(SUMS, read_recorded(path))
    assert (first.score, first.answers, first.completion_tokens) == (0.5, ("4", "5"), 7)
    assert (second.score, second.outputs, second.error) == (0.0, ("",), "too long")


def test_a_vote_and_any_rows_of_id_and_text_are_read(tmp_path: Path) -> None:
    path = written(tmp_path, {"id": "b", "winner": 1, "text": "\\boxed{9}"}, {"id": "a", "error": "has no text"})
    first, second = score_recorded(SUMS, read_recorded(path))
    assert (first.score, first.error, second.score, second.error) == (0.0, "has no text", 1.0, None)


def test_an_item_that_the_file_lacks_counts_as_wrong_and_says_so(tmp_path: Path) -> None:
    (_, missing) = score_recorded(SUMS, read_recorded(written(tmp_path, {"id": "a", "text": "4"})))
    assert (missing.score, missing.error) == (0.0, "no answer to it was recorded")


def test_items_have_the_hash_of_the_prompt_that_measured_ones_have(tmp_path: Path) -> None:
    scored = score_recorded(SUMS, read_recorded(written(tmp_path, {"id": "a", "text": "4"})))
    assert [one.prompt_sha256 for one in scored] == [
        item_score(SUMS, item, [_empty()]).prompt_sha256 for item in SUMS.items
    ]


def _empty() -> Any:
    from ensemble_server.server.compare.measures.task_measure import Sample

    return Sample("", None, 0.0, 0)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (({"id": "a", "text": "4"}, {"id": "a", "text": "5"}), r"line 2: the id 'a' stands there twice"),
        (({"id": "a"},), "line 1: must be a line of a batch output, or an object with `id` and `text`"),
        ((["a", "4"],), "is one JSON array|line 1: must be"),
    ],
)
def test_files_that_cannot_be_read_say_where(tmp_path: Path, rows: tuple[Any, ...], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        read_recorded(written(tmp_path, *rows))


def test_of_a_grid_one_systems_answers_are_taken(tmp_path: Path) -> None:
    cells = [{"model": "red", "temperature": 0.5}, {"model": "blue", "temperature": 0.5}]
    red = answered("a", "4", num_tokens=1) | {"cell": cells[0]}
    failed = {"custom_id": "a", "cell": cells[1], "response": None, "error": {"message": "too long"}}
    path = written(tmp_path, red, failed)
    assert read_recorded(path, "red temperature=0.5") == {"a": Recorded(("4",), 1)}
    assert read_recorded(path, "blue temperature=0.5") == {"a": Recorded((), 0, "too long")}
    with pytest.raises(ConfigError, match=r"has answers of blue temperature=0\.5, red temperature=0\.5; say whose"):
        read_recorded(path)
    with pytest.raises(ConfigError, match=r"has no answers of 'red' \(known: blue temperature=0\.5, red"):
        read_recorded(path, "red")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*nowhere\.jsonl"):
        read_recorded(tmp_path / "nowhere.jsonl")


def test_likelihoods_cannot_be_had_of_texts() -> None:
    with pytest.raises(UnsupportedError, match="likelihoods"):
        score_recorded(Task("sums", SUMS.items, "multiple_choice"), {})
