"""What files of votes may look like, and what is said of those that cannot be read."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

BOM = b"\xef\xbb\xbf"


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_byte_order_mark_is_no_part_of_a_row_or_an_answer(ensemble: Callable, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_bytes(BOM + b'{"id":1,"candidates":["a b","a b","x"]}\n')
    run = ensemble("vote", tmp_path / "c.jsonl")
    assert (run.code, read_lines(run.out)[0]["id"]) == (0, 1)
    # as `cat` of two such files leaves it, at the beginning of a line
    (tmp_path / "a.txt").write_bytes(BOM + b"yes\r\n" + BOM + b"no\r\n")
    (tmp_path / "b.txt").write_bytes(b"yes\nno\n")
    rows = read_lines(ensemble("vote", "--systems", tmp_path / "a.txt", tmp_path / "b.txt").out)
    assert [row["ties"] for row in rows] == [[[0, 1]], [[0, 1]]]
    assert [row["text"] for row in rows] == ["yes", "no"]
    (tmp_path / "s.csv").write_bytes(BOM + b"id,candidate,reference,bleu\np,ann,bob,0.5\n")
    run = ensemble("vote", "--scores", tmp_path / "s.csv")
    assert (run.code, read_lines(run.out)[0]["scores"]) == (0, [0.5, 0.5])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"ok\ncaf\xe9\n", "a.txt, line 2: is not UTF-8 (byte 0xe9); save the file as UTF-8"),
        ("ok\n".encode("utf-16"), "a.txt: is UTF-16; save it as UTF-8"),
        (gzip.compress(b"ok\n", mtime=0), "a.txt: is compressed; unpack it first"),
    ],
)
def test_a_system_file_that_is_no_utf8_is_named(
    ensemble: Callable, tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.txt").write_text("ok\nx\n")
    run = ensemble("vote", "--systems", tmp_path / "a.txt", tmp_path / "b.txt")
    assert run.code == 1
    assert reason in run.err and "Unicode" not in run.err


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'[{"id": 1, "candidates": ["a"]}]', "is one JSON array; write one object per line"),
        (b'[\n{"id": 1, "candidates": ["a"]}\n]', "is one JSON array"),
        ('{"id": 1, "candidates": ["a"]}'.encode("utf-16"), "is UTF-16"),
        (gzip.compress(b"{}", mtime=0), "is compressed"),
    ],
)
def test_a_file_that_holds_no_lines_of_json_is_named_once(
    ensemble: Callable, tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / "c.jsonl").write_bytes(content)
    run = ensemble("vote", tmp_path / "c.jsonl")
    assert run.code == 1
    assert f"c.jsonl: {reason}" in run.err


def test_bytes_that_are_no_utf8_cost_their_own_row(ensemble: Callable, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_bytes(b'{"id": 1, "candidates": ["a"]}\n{"id": 2, "candidates": ["caf\xe9"]}\n')
    run = ensemble("vote", tmp_path / "c.jsonl")
    assert run.code == 3
    assert read_lines(run.out)[1] == {"id": None, "line": 2, "error": "is not UTF-8: byte 0xe9 at place 30"}


def test_a_null_candidate_keeps_its_place_and_has_no_part(ensemble: Callable, tmp_path: Path) -> None:
    rows = [
        {"id": 1, "candidates": [None, "18", {"text": None, "system": "b"}, "18"]},
        {"id": 2, "candidates": [None, None]},
    ]
    file = write_lines(tmp_path / "c.jsonl", rows)
    run = ensemble("vote", file)
    assert run.code == 3
    first, second = read_lines(run.out)
    assert (first["winner"], first["text"], first["scores"]) == (1, "18", [0.0, 1.0, 0.0, 1.0])
    assert second == {"id": 2, "line": 2, "error": "has no text to vote on"}
    assert read_lines(ensemble("vote", file, "--answer", "number").out)[0]["votes"] == {"18": 2.0}
    ann = write_lines(tmp_path / "ann.jsonl", [{"id": 1, "text": None}])
    bob = write_lines(tmp_path / "bob.jsonl", [{"id": 1, "text": "x"}])
    cas = write_lines(tmp_path / "cas.jsonl", [{"id": 1, "text": "x"}])
    assert read_lines(ensemble("vote", "--systems", ann, bob, cas).out)[0]["winner"] == 1


@pytest.mark.parametrize("ending", ["ndjson", "json", "JSONL"])
def test_lines_of_json_are_no_texts_whatever_their_file_is_called(
    ensemble: Callable, tmp_path: Path, ending: str
) -> None:
    ann = write_lines(tmp_path / f"ann.{ending}", [{"id": 1, "text": "a b"}, {"id": 2, "text": "c"}])
    bob = write_lines(tmp_path / f"bob.{ending}", [{"id": 2, "text": "c"}, {"id": 1, "text": "a b"}])
    rows = read_lines(ensemble("vote", "--systems", ann, bob).out)
    assert [(row["id"], row["text"]) for row in rows] == [(1, "a b"), (2, "c")]


def test_a_pair_with_two_scores_is_an_error_of_its_row(ensemble: Callable, tmp_path: Path) -> None:
    (tmp_path / "s.csv").write_text("id,candidate,reference,bleu\np,a,b,0.5\np,a,b,0.6\n")
    run = ensemble("vote", "--scores", tmp_path / "s.csv")
    assert (run.code, read_lines(run.out)[0]["error"]) == (3, "line 3: a second bleu of 'a' and 'b'")


def test_the_only_similarity_of_scores_need_not_be_named(ensemble: Callable, tmp_path: Path) -> None:
    matrix = [[1, 0.2], [0.9, 1]]
    one = write_lines(tmp_path / "one.jsonl", [{"id": 1, "similarity": {"bleu": matrix}}])
    run = ensemble("vote", "--scores", one)
    assert (run.code, read_lines(run.out)[0]["winner"]) == (0, 1)
    both = {"bleu": matrix, "comet": matrix}
    two = write_lines(tmp_path / "two.jsonl", [{"id": 1, "similarity": both}])
    run = ensemble("vote", "--scores", two)
    assert run.code == 3
    assert read_lines(run.out)[0] == {
        "id": 1,
        "line": 1,
        "error": "there are scores of bleu, comet: say which with --similarity",
    }
    known = write_lines(tmp_path / "known.jsonl", [{"id": 1, "similarity": both | {"rouge_l_word": matrix}}])
    assert ensemble("vote", "--scores", known).code == 0


def test_scores_are_joined_with_texts_by_id(ensemble: Callable, tmp_path: Path) -> None:
    rows = [
        {
            "id": "p",
            "candidates": [
                {"text": "B", "system": "bob"},
                {"text": "A", "system": "ann"},
                {"text": "C", "system": "cas"},
            ],
        },
        {"id": 7, "candidates": ["x", "y"]},
        {"id": "gone", "candidates": ["x", "y"]},
        {"id": "other", "candidates": [{"text": "x", "system": "eve"}, {"text": "y", "system": "bob"}]},
        {"id": "more", "candidates": ["x", "y", "z"]},
    ]
    table = tmp_path / "scores.tsv"
    pairs = [
        "p\tann\tbob\t0.9",
        "p\tann\tcas\t0.8",
        "p\tbob\tcas\t0.1",
        "7\t0\t1\t0.5",
        "other\tann\tbob\t1",
        "more\t0\t1\t1",
    ]
    table.write_text("id\tcandidate\treference\tbleu\n" + "\n".join(pairs) + "\n")
    run = ensemble("vote", write_lines(tmp_path / "c.jsonl", rows), "--scores", table)
    assert run.code == 3
    p, seven, gone, other, more = read_lines(run.out)
    assert (p["winner"], p["text"], p["system"]) == (1, "A", "ann")
    assert p["scores"] == pytest.approx([1.0, 1.7, 0.9])
    assert (seven["text"], seven["scores"]) == ("x", [0.5, 0.5])
    assert gone == {"id": "gone", "line": 3, "error": f"{table} has no scores of it"}
    assert other["error"] == "its systems are eve, bob, but the scores are of ann, bob"
    assert more["error"] == "it has 3 candidates, but scores of 2"


def test_explained_scores_are_joined_with_weights_of_candidates(ensemble: Callable, tmp_path: Path) -> None:
    rows = [{"id": 1, "candidates": ["a b", "a b", "c d"]}]
    plain = write_lines(tmp_path / "c.jsonl", rows)
    ensemble("vote", plain, "--explain", "-o", tmp_path / "full.jsonl")
    heavy = write_lines(
        tmp_path / "heavy.jsonl", [{"id": 1, "candidates": ["a b", "a b", {"text": "c d", "weight": 5}]}]
    )
    joined = read_lines(ensemble("vote", heavy, "--scores", tmp_path / "full.jsonl").out)[0]
    assert joined == read_lines(ensemble("vote", heavy).out)[0]
    others = write_lines(tmp_path / "others.jsonl", [{"id": 1, "candidates": ["a", "b", "c"]}])
    assert read_lines(ensemble("vote", others, "--scores", tmp_path / "full.jsonl").out)[0]["error"] == (
        "the scores are of other texts"
    )


def test_a_torn_table_is_named_with_its_line(ensemble: Callable, tmp_path: Path) -> None:
    table = tmp_path / "scores.csv"
    table.write_text("id,candidate,reference,bleu\np,ann,bob,1\np,ann\n")
    run = ensemble("vote", "--scores", table)
    assert run.code == 1
    assert "scores.csv, line 3: has not as many columns as the first line" in run.err


def test_thoughts_in_recorded_texts_are_not_voted_on(ensemble: Callable, tmp_path: Path) -> None:
    candidates = ["<think>… the answer is 99 …</think> Janet makes $18", "so 99</think>It is 18.", "99"]
    file = write_lines(tmp_path / "c.jsonl", [{"id": 1, "candidates": candidates}])
    row = read_lines(ensemble("vote", file, "--answer", "number").out)[0]
    assert (row["votes"], row["text"]) == ({"18": 2.0, "99": 1.0}, candidates[0])
