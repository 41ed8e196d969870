"""What the benchmark of tasks asks for, and what it counts as the cost of a question."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tasks import RUNS, TASKS, Bench
from benchmarks.tasks_report import SIZES, cost_of
from ensemble_server.server.compare.merges.recipes import read_recipe
from ensemble_server.server.compare.planning.blocks import AnswersSource
from ensemble_server.server.config.loading import load_config

ROOT = Path(__file__).parents[2]


def answered(model: str, num_choices: int, *, of: str = "a", **members: tuple[int, int]) -> dict[str, Any]:
    usage = {name: {"prompt_tokens": read, "completion_tokens": written} for name, (read, written) in members.items()}
    body = {"model": model, "choices": [{}] * num_choices, "usage": {}, "ensemble": {"usage": usage}}
    return {"custom_id": of, "response": {"body": body}}


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


def test_a_merge_is_made_before_it_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench = Bench(tmp_path / "out", 10, is_dry=True, merged=tmp_path / "merged")
    bench.run("ties", "svamp")
    merge, batch = capsys.readouterr().out.splitlines()
    assert merge.startswith(f"ensemble merge {ROOT / 'configs/tasks/ties.yml'} ") and "--model ties" in batch
    (tmp_path / "merged" / "ties").mkdir(parents=True)
    bench.run("ties", "svamp")
    assert len(capsys.readouterr().out.splitlines()) == 1


@pytest.mark.parametrize("name", [run.merge for run in RUNS.values() if run.merge is not None])
def test_the_recipe_of_a_merge_names_models_of_the_config(name: str, tmp_path: Path) -> None:
    models = load_config(ROOT / "configs" / "tasks.yaml").models
    recipe = read_recipe(ROOT / "configs" / "tasks" / f"{name}.yml", folder=tmp_path)
    assert {reference.written for reference in recipe.references} <= set(models)


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


def test_a_poll_of_several_runs_costs_what_all_that_vote_read_and_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = [answered("half", 1, of=row, half=(10, 2)) for row in ("a", "b")]
    tuned = [answered(model, 1, math=(10, 4)) for model in ("math", "options", "tuned-average")]
    for name, rows in (("half", half), ("tuned", tuned)):
        (tmp_path / f"{name}.svamp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    bench = Bench(tmp_path, 10)
    monkeypatch.setattr(bench, "_call", lambda command, of: None)
    bench.poll("half+tuned", "svamp")
    voted = AnswersSource.model_construct(path=str(tmp_path / "half+tuned.majority.svamp.jsonl"), system=None)
    assert cost_of(voted, 1, is_one_sample=False).work == pytest.approx(12 + 14 + 14)
