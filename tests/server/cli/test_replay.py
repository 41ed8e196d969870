from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ensemble_server.ensembles.exchange.agreement import judge
from ensemble_server.ensembles.exchange.transcript import Participant, Reply, Round, Settings
from tests.server.cli.conftest import Run

SETTINGS = Settings(
    participants=(Participant(name="ann", model="base"), Participant(name="bob", model="code")),
    topology="memory",
    hears={"ann": ("bob",), "bob": ("ann",)},
    answer="number",
    text_threshold=None,
    max_rounds=3,
    stop=("unanimity",),
    final="confidence",
    token_budget=None,
    time_budget_s=None,
)


@pytest.fixture
def trace() -> dict[str, Any]:
    """ann and bob disagree, then agree on 18."""
    rounds = [
        Round(replies={name: Reply(text=f"{name}: {answer}", answer=answer) for name, answer in said.items()})
        for said in ({"ann": "18", "bob": "20"}, {"ann": "18", "bob": "18"})
    ]
    states = [judge(SETTINGS, rounds[: index + 1]) for index in range(len(rounds))]
    return {
        "settings": SETTINGS.model_dump(mode="json"),
        "rounds": [round_.model_dump(mode="json") for round_ in rounds],
        "states": [state.model_dump(mode="json") for state in states],
    }


def saved(folder: Path, value: Any) -> Path:
    file = folder / "transcript.json"
    file.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return file


def test_a_replay_shows_the_rounds_the_stop_and_the_answer(
    ensemble: Callable[..., Run], tmp_path: Path, trace: dict[str, Any]
) -> None:
    run = ensemble("replay", saved(tmp_path, trace))
    assert run.code == 0
    assert "memory topology, stop: unanimity" in run.out
    assert "20 (1.00)" in run.out  # bob in round 0
    assert "18 (0.50)" in run.out  # bob in round 1
    assert "Stopped by unanimity after round 1. Votes: 18: 1.50. Answer: 18, in the words of ann:\n\nann: 18" in run.out


def test_a_whole_response_with_several_choices_is_read_too(
    ensemble: Callable[..., Run], tmp_path: Path, trace: dict[str, Any]
) -> None:
    response = {"choices": [{"message": {"content": "18"}}], "ensemble": {"trace": {"choices": [trace, trace]}}}
    run = ensemble("replay", "--json", saved(tmp_path, response))
    assert run.code == 0
    first, second = (json.loads(line) for line in run.out.splitlines())
    assert first == second
    assert (first["stop"], first["rounds"], first["answer"], first["text"]) == ("unanimity", 2, "18", "ann: 18")


def test_a_transcript_that_does_not_follow_exits_with_1_and_says_why(
    ensemble: Callable[..., Run], tmp_path: Path, trace: dict[str, Any]
) -> None:
    trace["rounds"][0]["replies"]["bob"]["answer"] = "18"
    run = ensemble("replay", saved(tmp_path, trace))
    assert run.code == 1
    assert "differs: stops after round 0 (unanimity), but 2 rounds are recorded" in run.err
    assert "Stopped by unanimity after round 0." in run.out


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("{", "is no JSON"),
        ({"choices": []}, 'holds no transcript; save the trace of an answer to a request with "ensemble"'),
        ({"settings": {}, "rounds": [], "states": []}, "the transcript is not whole: settings.participants"),
    ],
)
def test_a_file_without_a_transcript_is_an_error(
    ensemble: Callable[..., Run], tmp_path: Path, value: Any, reason: str
) -> None:
    run = ensemble("replay", saved(tmp_path, value))
    assert run.code == 1
    assert reason in run.err
    assert run.err.startswith("error: ")
