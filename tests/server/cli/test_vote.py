from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ensemble_server.server.batch.votes.reports import NUM_ROWS_AT_ONCE
from tests.conftest import make_embedder

DATA = Path(__file__).parents[3] / "data" / "crowd"


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_row_elects_the_answer_most_like_the_others(ensemble: Callable, tmp_path: Path) -> None:
    rows = [
        {"id": "cat", "prompt": "Where?", "candidates": ["a dog", "the cat is here", "the cat is there"]},
        {"id": 7, "candidates": [{"text": "x", "system": "s1", "extra": 1}, {"text": "x", "system": "s2"}]},
    ]
    run = ensemble("vote", write_lines(tmp_path / "in.jsonl", rows), "-o", tmp_path / "out.jsonl")
    assert (run.code, run.err) == (0, "2 rows voted, 0 failed\n")
    cat, seven = read_lines(tmp_path / "out.jsonl")
    # words in common, by hand: the three sentences share nothing with "a dog"; 3 of 4 words between the other two
    assert cat == {
        "id": "cat",
        "winner": 1,
        "text": "the cat is here",
        "scores": [0.0, 0.75, 0.75],
        "margin": 0.0,
        "ties": [[1, 2]],
    }
    assert seven == {
        "id": 7,
        "winner": 0,
        "text": "x",
        "system": "s1",
        "scores": [1.0, 1.0],
        "margin": 0.0,
        "ties": [[0, 1]],
    }


def test_bad_rows_are_reported_in_their_place_and_the_rest_goes_on(ensemble: Callable, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    lines = [
        b'{"id": 1, "candidates": ["a", "b"]}',
        b'{"id": 2, "candidates": []}',
        b"not json",
        b"",
        b'{"id": 3, "candidates": ["a", 5]}',
        b'{"id": 4}',
        b'{"id": 5, "candidates": [{"text": "a", "weight": -1}]}',
        b'{"id": 6, "candidates": ["\\ud83d"]}',
        b'{"id": 7, "candidates": [{"text": "a", "weight": NaN}]}',
        b'{"id": 8, "candidates": ["\xff"]}',
        b"[1]",
        b'{"candidates": ["a"]}',
    ]
    file.write_bytes(b"\n".join(lines))
    run = ensemble("vote", file, "-o", tmp_path / "out.jsonl")
    assert run.code == 3
    assert run.err == "2 rows voted, 9 failed\n"
    rows = read_lines(tmp_path / "out.jsonl")
    assert [row.get("id") for row in rows] == [1, 2, None, 3, 4, 5, None, None, None, None, 12]
    assert [row.get("line") for row in rows] == [None, 2, 3, 5, 6, 7, 8, 9, 10, 11, None]
    assert "candidates: List should have at least 1 item" in rows[1]["error"]
    assert "is not JSON" in rows[2]["error"]
    assert rows[3]["error"].startswith("candidates.1")
    assert "candidates: Field required" in rows[4]["error"]
    assert "candidates.0.weight" in rows[5]["error"]
    assert rows[10]["text"] == "a"


def test_candidates_come_from_standard_input_and_go_to_standard_output(
    ensemble: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stdin:
        buffer = io.BytesIO(b'{"id": 1, "candidates": ["a b", "a", "a b"]}\n')

    monkeypatch.setattr("sys.stdin", Stdin)
    run = ensemble("vote", "-")
    assert run.code == 0
    assert json.loads(run.out)["winner"] == 0


def test_one_text_file_per_system(ensemble: Callable, tmp_path: Path) -> None:
    (tmp_path / "ann.txt").write_text("the cat\nuno\u2028dos\n\n", encoding="utf-8")
    (tmp_path / "bob.txt").write_text("the cat sat\nuno\nx\n", encoding="utf-8")
    (tmp_path / "cas.txt").write_text("dogs\nuno\nx", encoding="utf-8")
    files = [tmp_path / f"{name}.txt" for name in ("ann", "bob", "cas")]
    run = ensemble("vote", "--systems", *files, "-o", tmp_path / "out.jsonl")
    assert run.code == 0
    rows = read_lines(tmp_path / "out.jsonl")
    assert [(row["id"], row["system"], row["text"]) for row in rows] == [
        (1, "ann", "the cat"),
        (2, "bob", "uno"),
        (3, "bob", "x"),
    ]
    assert rows[2]["scores"] == [0.0, 1.0, 1.0]


def test_systems_of_different_lengths_are_refused(ensemble: Callable, tmp_path: Path) -> None:
    (tmp_path / "ann.txt").write_text("a\nb\n", encoding="utf-8")
    (tmp_path / "bob.txt").write_text("a\n", encoding="utf-8")
    run = ensemble("vote", "--systems", tmp_path / "ann.txt", tmp_path / "bob.txt")
    assert run.code == 1
    assert "ann.txt has 2" in run.err
    assert "bob.txt has 1" in run.err


def test_systems_with_ids_are_matched_by_them(ensemble: Callable, tmp_path: Path) -> None:
    ann = write_lines(tmp_path / "ann.jsonl", [{"id": "p", "text": "x y"}, {"id": "q", "text": "u"}])
    bob = write_lines(tmp_path / "bob.jsonl", [{"id": "q", "text": "u v"}, {"id": "p", "text": "x y"}])
    cas = write_lines(tmp_path / "cas.jsonl", [{"id": "p", "text": "x"}])
    run = ensemble("vote", "--systems", ann, bob, cas, "--explain", "-o", tmp_path / "out.jsonl")
    assert run.code == 0
    p, q = read_lines(tmp_path / "out.jsonl")
    assert (p["id"], p["winner"], p["ties"]) == ("p", 0, [[0, 1]])
    assert (q["id"], q["incomparable"]) == ("q", {"rouge_l_word": [2]})
    run = ensemble("vote", "--systems", write_lines(tmp_path / "twice.jsonl", [{"id": 1, "text": "a"}] * 2))
    assert run.code == 1
    assert "an id stands on several lines" in run.err


def test_a_replay_of_written_scores_gives_the_same_rows(ensemble: Callable, tmp_path: Path) -> None:
    rows = [{"id": k, "candidates": [f"a b {k}", "a b", f"b {k} c", "d"]} for k in range(5)]
    source = write_lines(tmp_path / "in.jsonl", rows)
    both = "rouge_l_word=1,rouge_l_char_recall=0.5"
    assert ensemble("vote", source, "--similarity", both, "--explain", "-o", tmp_path / "full.jsonl").code == 0
    assert ensemble("vote", source, "--similarity", "rouge_l_char_recall", "-o", tmp_path / "direct.jsonl").code == 0
    replayed = tmp_path / "replayed.jsonl"
    run = ensemble("vote", "--scores", tmp_path / "full.jsonl", "--similarity", "rouge_l_char_recall", "-o", replayed)
    assert run.code == 0
    assert read_lines(replayed) == read_lines(tmp_path / "direct.jsonl")


def test_a_table_of_scores_is_replayed(ensemble: Callable, tmp_path: Path) -> None:
    table = tmp_path / "scores.csv"
    table.write_text(
        "id,candidate,reference,bleu,comet\n"
        "p,ann,bob,0.5,0.1\n"
        "p,ann,cas,0.25,0.1\n"
        "p,bob,cas,0.75,0.1\n"
        "q,ann,bob,0.5,0.1\n"
        "q,cas,bob,0.5,0.1\n"
        "r,ann,bob,high,0.1\n",
        encoding="utf-8",
    )
    run = ensemble("vote", "--scores", table, "--similarity", "bleu=2,comet=1", "-o", tmp_path / "out.jsonl")
    assert run.code == 3
    p, q, r = read_lines(tmp_path / "out.jsonl")
    assert (p["winner"], p["system"], p["text"]) == (1, "bob", None)
    assert p["scores"] == pytest.approx([2 * 0.75 + 0.2, 2 * 1.25 + 0.2, 2 * 1.0 + 0.2])
    assert q == {"id": "q", "line": 5, "error": "there is no bleu of 'ann' and 'cas'"}
    assert r == {"id": "r", "line": 7, "error": "line 7: bleu must be a number, got 'high'"}


def test_scores_of_an_unknown_similarity_fail_the_row(ensemble: Callable, tmp_path: Path) -> None:
    scores = write_lines(
        tmp_path / "scores.jsonl",
        [
            {"id": 1, "similarity": {"bleu": [[1, 0], [0, 1]]}},
            {"id": 2, "similarity": {"bleu": [[1, 0]]}},
            {"id": 3, "similarity": {"bleu": [[1]], "comet": [[1, 0], [0, 1]]}},
            {"id": 4, "similarity": {"bleu": [[1]]}, "candidates": ["a", "b"]},
        ],
    )
    run = ensemble("vote", "--scores", scores, "--similarity", "comet", "-o", tmp_path / "out.jsonl")
    assert run.code == 3
    errors = [row["error"] for row in read_lines(tmp_path / "out.jsonl")]
    assert errors == [
        "there are no scores of 'comet' to replay (there are: bleu)",
        "similarity: bleu must be a square matrix",
        "similarity: the matrices differ in size",
        "similarity: there are 2 candidates, but scores of 1",
    ]


def test_texts_are_embedded_once_for_many_rows(
    ensemble: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[list[str]] = []

    class CountingEmbedder:
        name = "counting"

        def __init__(self, path: str) -> None:
            assert path == "some-model"

        async def embed(self, texts: list[str]) -> np.ndarray:
            batches.append(list(texts))
            return np.eye(2, dtype=np.float32)[[len(text) % 2 for text in texts]]

    monkeypatch.setattr("ensemble_server.server.weights.embeddings.SentenceEmbedder", CountingEmbedder)
    rows = [{"id": k, "candidates": ["a", "bb", "ccc", "bb"]} for k in range(NUM_ROWS_AT_ONCE + 1)]
    source = write_lines(tmp_path / "in.jsonl", [*rows, {"id": "bad"}])
    run = ensemble("vote", source, "--similarity", "embedding", "--embedding", "some-model", "-o", tmp_path / "o.jsonl")
    assert run.code == 3
    assert batches == [["a", "bb", "ccc"], ["a", "bb", "ccc"]]
    assert read_lines(tmp_path / "o.jsonl")[0]["ties"] == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either files of answers or --scores"),
        (["a.jsonl", "b.jsonl"], "add --systems"),
        (["a.jsonl", "--similarity", "bleu"], "bleu"),
        (["a.jsonl", "--similarity", "embedding=much"], "'much' is no number"),
        (["a.jsonl", "--similarity", "embedding=0"], "greater than 0"),
        (["a.jsonl", "--prune", "2"], "--prune"),
        (["a.jsonl", "-o", "a.jsonl"], "would overwrite its own input"),
    ],
)
def test_wrong_calls_are_told_what_is_wrong(
    ensemble: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "a.jsonl", [{"id": 1, "candidates": ["a"]}])
    run = ensemble("vote", *arguments)
    assert run.code == 2
    assert message in run.err
    assert read_lines(tmp_path / "a.jsonl") == [{"id": 1, "candidates": ["a"]}]


def test_a_missing_file_is_one_line_and_exit_code_1(ensemble: Callable, tmp_path: Path) -> None:
    run = ensemble("vote", tmp_path / "nothing.jsonl")
    assert run.code == 1
    assert run.err.startswith("error: ")
    assert "nothing.jsonl" in run.err


def test_recorded_math_answers_are_voted_better_than_a_random_system(ensemble: Callable, tmp_path: Path) -> None:
    source = DATA / "crowd_gsm8k_4sys.jsonl"
    assert ensemble("vote", source, "-o", tmp_path / "out.jsonl").code == 0
    rows = [json.loads(line)["candidates"] for line in source.read_text(encoding="utf-8").splitlines()]
    elected = [
        candidates[row["winner"]]["quality"]
        for candidates, row in zip(rows, read_lines(tmp_path / "out.jsonl"), strict=True)
    ]
    assert np.mean(elected) > np.mean([candidate["quality"] for candidates in rows for candidate in candidates]) + 0.05


def test_the_output_of_a_batch_is_voted_on_by_custom_id(ensemble: Callable, tmp_path: Path) -> None:
    def line(custom_id: str, temperature: float, *texts: str) -> dict[str, Any]:
        body = {"model": "mix", "choices": [{"message": {"content": text}} for text in texts]}
        cell = {"temperature": temperature}
        return {"custom_id": custom_id, "response": {"body": body}, "error": None, "cell": cell}

    failed = {"custom_id": "c", "response": None, "error": {"message": "over-long prompt"}}
    rows = [line("a", 0.2, "a dog"), line("a", 0.7, "the cat is here", "the cat is there"), line("b", 0.2, "x"), failed]
    file = write_lines(tmp_path / "in.jsonl", rows)
    file.write_bytes(file.read_bytes() + b'{"custom_id": "d", "resp')
    run = ensemble("vote", file, "-o", tmp_path / "out.jsonl")
    assert (run.code, run.err) == (3, "2 rows voted, 2 failed\n")
    torn, first, second, third = read_lines(tmp_path / "out.jsonl")
    assert torn["line"] == 5
    assert (first["id"], first["winner"], first["text"]) == ("a", 1, "the cat is here")
    assert first["system"] == "mix temperature=0.7"
    assert (second["id"], second["text"]) == ("b", "x")
    assert third == {"id": "c", "line": 4, "error": "over-long prompt"}


def test_answers_are_counted_on_request(ensemble: Callable, tmp_path: Path) -> None:
    rows = [
        {"id": 1, "candidates": ["No idea", "So 17", {"text": "It is $18.00", "system": "b"}, "\\boxed{18}"]},
        {"id": 2, "candidates": [{"text": "x", "weight": 2}, "y"]},
        {"id": 3, "candidates": [{"text": "17", "weight": 3}, "18", "18"]},
        {"id": 4},
    ]
    file = write_lines(tmp_path / "in.jsonl", rows)
    run = ensemble("vote", file, "-o", tmp_path / "out.jsonl", "--answer", "number")
    assert (run.code, run.err) == (3, "3 rows voted, 1 failed\n")
    first, second, third, bad = read_lines(tmp_path / "out.jsonl")
    assert first == {
        "id": 1,
        "winner": 2,
        "text": "It is $18.00",
        "system": "b",
        "answer": "18",
        "votes": {"17": 1.0, "18": 2.0},
        "agreement": 2 / 3,
    }
    assert second == {"id": 2, "winner": 0, "text": "x", "answer": None, "votes": {}, "agreement": 0.0}
    assert (third["answer"], third["votes"]) == ("17", {"17": 3.0, "18": 2.0})
    assert "candidates" in bad["error"]
    assert ensemble("vote", file, "--answer", "number", "--explain").code == 2


def test_texts_are_compared_by_a_real_embedding_model(ensemble: Callable, tmp_path: Path) -> None:
    (tmp_path / "embedder").mkdir()
    folder = make_embedder(tmp_path / "embedder", ("cat", "dog", "sits", "runs"))
    source = write_lines(tmp_path / "in.jsonl", [{"id": 1, "candidates": ["dog runs", "cat sits", "cat sits"]}])
    run = ensemble("vote", source, "--similarity", "embedding", "--embedding", folder)
    assert run.code == 0, run.err
    assert json.loads(run.out)["winner"] == 1
