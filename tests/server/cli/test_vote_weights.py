"""Votes that weigh by system or by probability, judges and class probabilities, over saved outputs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parents[3] / "data" / "crowd"


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def batch_line(custom_id: str, model: str, text: str, *logprobs: float, **cell: Any) -> dict[str, Any]:
    choice: dict[str, Any] = {"message": {"content": text}}
    if logprobs:
        choice["logprobs"] = {"content": [{"token": "x", "logprob": value} for value in logprobs]}
    return {"custom_id": custom_id, "response": {"body": {"model": model, "choices": [choice]}}, "cell": cell}


def test_votes_weigh_by_system_or_by_model(ensemble: Callable, tmp_path: Path) -> None:
    lines = [
        batch_line("a", "mix", "17", temperature=0.2),
        batch_line("a", "mix", "17", temperature=0.7),
        batch_line("a", "base", "18"),
    ]
    file = write_lines(tmp_path / "out.jsonl", lines)

    def votes(*arguments: str | Path) -> dict[str, float]:
        return read_lines(ensemble("vote", file, "--answer", "number", *arguments).out)[0]["votes"]

    assert votes() == {"17": 2.0, "18": 1.0}
    assert votes("--weights", "mix=0.25") == {"17": 0.5, "18": 1.0}
    assert votes("--weights", "mix temperature=0.2=0,base=3") == {"17": 1.0, "18": 3.0}
    (tmp_path / "w.json").write_text('{"mix": 1, "mix temperature=0.7": 4}')
    assert votes("--weights", tmp_path / "w.json") == {"17": 5.0, "18": 1.0}
    row = read_lines(ensemble("vote", file, "--weights", "mix=0,base=1").out)[0]
    assert row["scores"] == [0.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ("eve=1", "weights: no row has a candidate of 'eve' (systems: ann)"),
        ("ann=much", "the weight of 'ann' must be a number, got 'much'"),
        ("ann=-1", "must be finite and not negative, got -1"),
        ("ann=0", "at least one weight must be above zero"),
        ("nowhere.json", "nowhere.json"),
    ],
)
def test_weights_that_make_no_sense_are_refused(ensemble: Callable, tmp_path: Path, weights: str, reason: str) -> None:
    file = write_lines(tmp_path / "c.jsonl", [{"id": 1, "candidates": [{"text": "x", "system": "ann"}, "y"]}])
    run = ensemble("vote", file, "--weights", weights)
    assert run.code == 1
    assert reason in run.err
    assert run.out == ""


@pytest.mark.slow
def test_fitted_weights_elect_better_than_equal_ones_on_recorded_answers(ensemble: Callable, tmp_path: Path) -> None:
    pool = DATA / "crowd_gsm8k_4sys.jsonl"
    gold = {row["id"]: row["answer"] for row in read_lines(pool.read_text(encoding="utf-8"))}
    saved = tmp_path / "weights.json"
    run = ensemble(
        "vote", pool, "--answer", "number", "--fit", pool, "--save-weights", saved, "-o", tmp_path / "fitted.jsonl"
    )
    assert run.code == 0
    assert "200 rows with a known answer" in run.err
    # as measured: 0.575 with fitted weights, 0.455 with all systems alike
    assert "0.575 right; all systems alike: 0.455; the best system by itself: 0.575" in run.err
    rows = read_lines((tmp_path / "fitted.jsonl").read_text())
    assert sum(row["answer"] == str(gold[row["id"]]) for row in rows) / len(rows) == pytest.approx(0.575)
    weights = json.loads(saved.read_text())
    assert max(weights, key=weights.get) == "175b_verification"
    again = ensemble("vote", pool, "--answer", "number", "--weights", saved)
    assert again.code == 0


def test_gold_that_cannot_be_used_is_named_with_its_line(ensemble: Callable, tmp_path: Path) -> None:
    file = write_lines(
        tmp_path / "c.jsonl", [{"id": k, "candidates": [{"text": "1", "system": "a"}]} for k in range(6)]
    )
    few = write_lines(tmp_path / "few.jsonl", [{"id": 1, "answer": 1}])
    run = ensemble("vote", file, "--answer", "number", "--fit", few)
    assert (run.code, "needs at least 5" in run.err or "at least 5 rows" in run.err) == (1, True)
    bad = write_lines(tmp_path / "bad.jsonl", [{"id": 1, "answer": 1}, {"id": 2, "answer": "none"}])
    run = ensemble("vote", file, "--answer", "number", "--fit", bad)
    assert run.code == 1
    assert "bad.jsonl, line 2: no answer of the kind number is found in 'none'" in run.err


def test_votes_weigh_by_the_probability_of_their_texts(ensemble: Callable, tmp_path: Path) -> None:
    lines = [
        batch_line("a", "mix", "17", -2.0, -4.0),
        batch_line("a", "mix", "17", -3.0),
        batch_line("a", "mix", "18", -0.5),
        batch_line("b", "mix", "17", -1.0),
        batch_line("b", "mix", "18"),
    ]
    run = ensemble("vote", write_lines(tmp_path / "o.jsonl", lines), "--answer", "number", "--by-probability")
    assert run.code == 3
    first, second = read_lines(run.out)
    assert first["votes"] == pytest.approx({"17": 2 * math.exp(-3), "18": math.exp(-0.5)})
    assert first["answer"] == "18"
    assert second["error"].startswith("candidate 1 has no log-probabilities; ask the batch for logprobs")
    candidates = [{"text": "17", "logprob": -1.0}, {"text": "18", "logprob": -0.1}]
    file = write_lines(tmp_path / "c.jsonl", [{"id": 1, "candidates": candidates}])
    assert read_lines(ensemble("vote", file, "--answer", "number", "--by-probability").out)[0]["answer"] == "18"


def test_the_likeliest_text_is_taken_and_a_blank_one_never(ensemble: Callable, tmp_path: Path) -> None:
    lines = [
        batch_line("a", "mix", "17", -2.0, -4.0),
        batch_line("a", "mix", "18", -0.5, -1.5),
        batch_line("a", "mix", "19", -1.5),
        batch_line("b", "mix", "17", -1.0),
        batch_line("b", "mix", "18"),
    ]
    file = write_lines(tmp_path / "o.jsonl", lines)
    run = ensemble("vote", file, "--likeliest")
    assert run.code == 3
    first, second = read_lines(run.out)
    assert (first["text"], first["scores"], first["margin"]) == ("18", pytest.approx([-3, -1, -1.5]), 0.5)
    assert second["error"].startswith("candidate 1 has no log-probabilities")
    candidates = [{"text": " "}, {"text": "17", "logprob": -9.0}]
    row = {"id": 1, "candidates": candidates}
    chosen, none = read_lines(
        ensemble("vote", write_lines(tmp_path / "c.jsonl", [row, row | {"candidates": [""]}]), "--likeliest").out
    )
    assert (chosen["winner"], chosen["scores"]) == (1, [None, -9.0])
    assert none["error"] == "has no text to choose from"
    assert (
        "compares likelihoods, which takes no --weights"
        in ensemble("vote", file, "--likeliest", "--weights", "mix=2").err
    )


def class_line(custom_id: str, model: str, **probabilities: float) -> dict[str, Any]:
    body = {"object": "classification", "model": model, "label": "?", "probabilities": probabilities}
    return {"custom_id": custom_id, "response": {"body": body}, "error": None}


def test_class_probabilities_of_separate_jobs_are_averaged(ensemble: Callable, tmp_path: Path) -> None:
    ann = write_lines(tmp_path / "ann.jsonl", [class_line("a", "m", x=0.9, y=0.1), class_line("b", "m", x=0.6, y=0.4)])
    failed = {"custom_id": "c", "response": None, "error": {"message": "too long"}}
    bob = write_lines(
        tmp_path / "bob.jsonl", [class_line("b", "m", x=0.2, y=0.8), class_line("a", "m", x=0.5, y=0.5), failed]
    )

    def run(pool: str, *more: str) -> dict[str, Any]:
        found = ensemble("vote", "--classes", pool, ann, bob, *more)
        assert found.code == 3
        return {row["id"]: row for row in read_lines(found.out)}

    rows = run("arithmetic")
    assert rows["a"] == {
        "id": "a",
        "label": "x",
        "probabilities": pytest.approx({"x": 0.7, "y": 0.3}),
        "jobs": ["ann", "bob"],
    }
    assert rows["b"]["probabilities"] == pytest.approx({"x": 0.4, "y": 0.6})
    assert rows["c"] == {"id": "c", "line": 3, "error": f"{bob}, line 3: too long"}
    assert run("arithmetic", "--weights", "bob=3")["a"]["probabilities"] == pytest.approx({"x": 0.6, "y": 0.4})
    x, y = math.sqrt(0.9 * 0.5), math.sqrt(0.1 * 0.5)
    assert run("geometric")["a"]["probabilities"] == pytest.approx({"x": x / (x + y), "y": y / (x + y)})
    # both jobs find "a" the likelier x of their two rows: ranks 2 and 1 of 2, over 3
    assert run("ranks")["a"]["probabilities"] == pytest.approx({"x": 2 / 3, "y": 1 / 3})


def test_jobs_of_one_file_are_told_apart_by_their_models(ensemble: Callable, tmp_path: Path) -> None:
    lines = [class_line("a", "m", x=0.9, y=0.1), class_line("a", "n", x=0.5, y=0.5)]
    row = read_lines(ensemble("vote", "--classes", "arithmetic", write_lines(tmp_path / "all.jsonl", lines)).out)[0]
    assert (row["jobs"], row["probabilities"]) == (["m", "n"], pytest.approx({"x": 0.7, "y": 0.3}))
    twice = write_lines(tmp_path / "twice.jsonl", [lines[0], lines[0]])
    run = ensemble("vote", "--classes", "arithmetic", twice)
    assert run.code == 1 and "twice.jsonl, line 2: m has the row 'a' twice" in run.err
    other = write_lines(tmp_path / "other.jsonl", [lines[0], class_line("a", "n", z=1.0)])
    assert "different labels" in read_lines(ensemble("vote", "--classes", "ranks", other).out)[0]["error"]
    texts = write_lines(tmp_path / "texts.jsonl", [batch_line("a", "m", "18")])
    error = read_lines(ensemble("vote", "--classes", "ranks", texts).out)[0]["error"]
    assert "is no output of a classify job" in error


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["c.jsonl", "--judge", "mix"], "needs --config"),
        (["c.jsonl", "--judge", "mix", "--answer", "number"], "choose in different ways"),
        (["c.jsonl", "--fit", "c.jsonl"], "goes with --answer"),
        (["c.jsonl", "--answer", "number", "--prune", "0.5"], "takes no --prune"),
        (["c.jsonl", "--save-weights", "w.json"], "takes no --save-weights"),
        (["c.jsonl", "--answer", "number", "--save-weights", "w.json"], "goes with --fit"),
        (["c.jsonl", "--classes", "ranks", "--similarity", "embedding"], "takes no --similarity"),
        (["c.jsonl", "--criterion", "shorter"], "takes no --criterion"),
        (["--classes", "ranks"], "give either files of answers"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    ensemble: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "c.jsonl", [{"id": 1, "candidates": ["a"]}])
    run = ensemble("vote", *arguments)
    assert run.code == 2
    assert reason in run.err


def test_a_judge_compares_saved_candidates(ensemble: Callable, tmp_path: Path, tiny: dict[str, Path]) -> None:
    config = tmp_path / "config.yaml"
    models = f"{{tiny: {{path: {tiny['llama']}}}, away: {{url: 'http://127.0.0.1:9/v1'}}}}"
    config.write_text(f"models: {models}\n", encoding="utf-8")
    rows = [
        {"id": 1, "prompt": "Who?", "candidates": ["a cat", {"text": "<think>b</think>a dog", "system": "b"}, "a cat"]},
        {"id": 2, "messages": [{"role": "user", "content": "Who?"}], "candidates": ["one"]},
        {"id": 3, "candidates": ["one", "two"]},
    ]
    file = write_lines(tmp_path / "c.jsonl", rows)
    run = ensemble("vote", file, "--judge", "tiny", "--config", config, "--explain", "-o", tmp_path / "out.jsonl")
    assert run.code == 3, run.err
    first, second, third = read_lines((tmp_path / "out.jsonl").read_text())
    assert first["num_judgements"] == 2
    assert first["scores"][0] == first["scores"][2]
    assert sum(first["scores"]) == pytest.approx(3.0)
    assert (second["winner"], second["scores"]) == (0, [0.0])
    assert third["error"].startswith("has no prompt")
    run = ensemble("vote", file, "--judge", "away", "--config", config)
    assert (run.code, "gives text, not next-token distributions" in run.err) == (1, True)
    run = ensemble("vote", file, "--judge", "tony", "--config", config)
    assert (run.code, "did you mean 'tiny'?" in run.err) == (1, True)
