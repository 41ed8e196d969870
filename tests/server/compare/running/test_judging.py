"""A model of the config as the judge of a task, and the win rates that follow. Tiny models, real hosting."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from ensemble_server.ensembles.comparison.bradley_terry import bradley_terry
from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.compare.kept.records import Records
from ensemble_server.server.compare.planning.plan import load_plan
from ensemble_server.server.compare.run import run_comparison
from tests.server.compare.test_run import Heard, write_files

PLAN = """
config: config.yaml
baseline: base
arms: [base, other, mix]
tasks: [{name: essays, data: sums.jsonl, metric: judge, judge: JUDGE, template: "{{ question }}", chat: false,
  max_tokens: 8}]
cost: {concurrency: []}
statistics: {resamples: 200}
"""


def written(folder: Path, tiny: dict[str, Path], text: str) -> Path:
    """`other` has weights of its own: adapters of tiny models mostly answer as their base does."""
    plan = write_files(folder, tiny, text)
    config = folder / "config.yaml"
    other = f"models:\n  other: {{path: {tiny['qwen']}, dtype: float32}}"
    config.write_text(config.read_text(encoding="utf-8").replace("models:", other), encoding="utf-8")
    return plan


def run(plan: Path, out: Path):
    heard = Heard()
    return asyncio.run(run_comparison(load_plan(plan), out, heard)), heard.stages


def test_a_judge_prefers_answers_in_pairs_and_asks_once(tmp_path, tiny):
    plan = written(tmp_path, tiny, PLAN.replace("JUDGE", "red"))
    results, stages = run(plan, tmp_path / "out")
    assert "task essays: red judges base, other, mix" in stages
    records = Records(tmp_path / "out")
    items = {arm: records.get(arm).tasks["essays"].items for arm in results.arms}
    for base, other, mix in zip(*items.values(), strict=True):
        assert base.preferences["other"] + other.preferences["base"] == pytest.approx(1)
        assert base.score == pytest.approx(np.mean([base.preferences["other"], base.preferences["mix"]]))
        assert base.score + other.score + mix.score == pytest.approx(1.5), "one and a half wins are shared by three"
        assert base.outputs == other.outputs or 0 < base.preferences["other"] < 1
    assert any(one.outputs != two.outputs for one, two in zip(items["base"], items["other"], strict=True)), (
        "else no game"
    )
    assert sum(arm.tasks["essays"].score for arm in results.arms.values()) == pytest.approx(1.5)

    preferences = np.array(
        [[[item.preferences.get(other, 0.5) for item in items[arm]] for other in items] for arm in items]
    )
    expected = bradley_terry(preferences, seed=0, level=0.95)
    rates = results.win_rates["task"]
    assert [rates[arm].log_strength for arm in items] == pytest.approx([one.log_strength for one in expected])
    assert rates["base"].num_items == 6 and rates["base"].ci[0] <= rates["base"].log_strength <= rates["base"].ci[1]
    assert "Win rates" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")

    again, stages = run(plan, tmp_path / "out")
    assert again.arms == results.arms and not [stage for stage in stages if stage.startswith("task")]
    plan.write_text(plan.read_text().replace("judge: red", "judge: red, criterion: shorter"))
    _, stages = run(plan, tmp_path / "out")
    assert [stage for stage in stages if stage.startswith("task")] == ["task essays: red judges base, other, mix"]


def test_a_judge_that_cannot_be_loaded_costs_the_task_its_figure_alone(tmp_path, tiny):
    results, _ = run(written(tmp_path, tiny, PLAN.replace("JUDGE", "broken")), tmp_path / "out")
    assert results.arms["other"].error is None and not results.arms["other"].tasks
    assert "judge 'broken'" in results.arms["other"].skipped["task essays"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("judge: JUDGE", "judge: rde"), "there is no model 'rde'.*did you mean 'red'"),
        (("judge: JUDGE, ", ""), "the two go together"),
        (("metric: judge", "metric: number"), "the two go together"),
        (("judge: JUDGE", "judge: red, dev: sums_dev.jsonl"), "leave `samples` and `dev` out"),
    ],
)
def test_a_plan_that_no_judge_can_follow_is_refused(tmp_path, tiny, change, message):
    plan = written(tmp_path, tiny, PLAN.replace(*change).replace("JUDGE", "red"))
    with pytest.raises(ConfigError, match=message):
        load_plan(plan)


@pytest.mark.slow
def test_an_answer_that_is_missing_loses_without_a_judge(tmp_path, tiny):
    from ensemble_server.server.compare.running.judging import _by_default

    assert _by_default(["a", None, "a"]).tolist() == [[0.5, 1, 0.5], [0, 0.5, 0], [0.5, 1, 0.5]]
    rows = [json.dumps({"question": "x"})]
    written(tmp_path, tiny, PLAN.replace("JUDGE", "red"))
    (tmp_path / "sums.jsonl").write_text("\n".join(rows), encoding="utf-8")
    results, _ = run(tmp_path / "plan.yaml", tmp_path / "out")
    assert results.arms["base"].tasks["essays"].num_items == 1, "an item without an answer of its own is fine"
