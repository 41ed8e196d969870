"""What the benchmark of tasks asks for, and what it counts as the cost of a question."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tasks import RUNS, TASKS, Bench
from benchmarks.tasks_report import SIZES, cost_of
from ensemble_server.server.compare.planning.blocks import AnswersSource
from ensemble_server.server.config.loading import load_config

ROOT = Path(__file__).parents[2]


def answered(model: str, num_choices: int, **members: tuple[int, int]) -> dict[str, Any]:
    usage = {name: {"prompt_tokens": read, "completion_tokens": written} for name, (read, written) in members.items()}
    body = {"model": model, "choices": [{}] * num_choices, "usage": {}, "ensemble": {"usage": usage}}
    return {"custom_id": "a", "response": {"body": body}}


def test_every_model_and_file_of_the_runs_is_there() -> None:
    models = load_config(ROOT / "configs" / "tasks.yaml").models
    assert {model for run in RUNS.values() for model in run.models} <= set(models)
    assert all(task.data.is_file() and task.template.is_file() for task in TASKS.values())


def test_a_dry_run_says_the_commands_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench(tmp_path / "out", 10, is_dry=True)
    bench.write_rows("svamp")
    bench.run("sampled", "svamp")
    batch, majority, *_ = capsys.readouterr().out.splitlines()
    assert batch.startswith("ensemble batch ") and "--samples 5" in batch
    assert majority.startswith("ensemble vote ") and "--answer number" in majority
    assert not (tmp_path / "out").exists()


def test_an_average_costs_the_tokens_of_both_and_the_larger_counts_more(tmp_path: Path) -> None:
    lines = [answered("big", 1, big=(10, 2)), answered("mix", 1, half=(10, 4), big=(10, 4))]
    (tmp_path / "pair.sums.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    cost = cost_of(
        AnswersSource.model_construct(path=str(tmp_path / "pair.sums.jsonl"), system="mix"), 1, is_one_sample=False
    )
    assert (cost.num_read, cost.num_written) == (20, 8)
    assert cost.work == pytest.approx(14 * (1 + SIZES["big"] / SIZES["half"]))


def test_a_vote_costs_all_samples_and_one_sample_its_share_of_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "sampled.sums.jsonl").write_text(json.dumps(answered("half", 5, half=(10, 40))), encoding="utf-8")
    vote = AnswersSource.model_construct(path=str(tmp_path / "sampled.majority.sums.jsonl"), system=None)
    assert cost_of(vote, 1, is_one_sample=False).work == pytest.approx(50)
    sample = AnswersSource.model_construct(path=str(tmp_path / "sampled.sums.jsonl"), system=None)
    assert cost_of(sample, 1, is_one_sample=True).work == pytest.approx(18)
