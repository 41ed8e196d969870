"""The line of the best ensemble against the best merge, from records that are written by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ensemble_server.server.compare.analysis.statistics import compute_results
from ensemble_server.server.compare.kept.records import ArmRecord, Records
from ensemble_server.server.compare.planning.blocks import Arm, PlanFile, StatisticsSettings, TaskSource, TextSource
from tests.server.compare.analysis.test_statistics import task_record, text_record

KINDS = {"base": "member", "far": "remote", "mix": "ensemble", "vote": "ensemble", "linear": "merge", "ties": "merge"}


@pytest.fixture
def file() -> PlanFile:
    return PlanFile(
        config="c.yaml",
        baseline="base",
        arms=tuple(Arm(name=name) for name in KINDS),
        text={"one": TextSource(path="one.txt"), "two": TextSource(path="two.txt")},
        tasks=(TaskSource(name="sums", data="s.jsonl", metric="number", template="x"),),
        statistics=StatisticsSettings(resamples=500),
    )


def results_of(file: PlanFile, folder: Path, gains: dict[str, float], num_right: dict[str, int]):
    rng = np.random.default_rng(0)
    base = rng.normal(1.5, 0.2, 40)
    records = Records(folder)
    for name, kind in KINDS.items():
        record = ArmRecord(name=name, kind=kind, model=name)
        if name in gains:
            costs = base - gains[name] + rng.normal(0, 0.01, 40)
            record.text = {"one": text_record(costs), "two": text_record(costs[::-1])}
        if name in num_right:
            record.tasks = {"sums": task_record([1.0] * num_right[name] + [0.0] * (60 - num_right[name]))}
        records.save(record)
    return compute_results(file, list(KINDS), records)


def test_the_best_ensemble_stands_against_the_best_merge_and_the_best_single_model(file, tmp_path):
    gains = {"base": 0.0, "mix": 0.1, "linear": 0.04, "ties": 0.05}
    num_right = {"base": 20, "far": 30, "vote": 45, "ties": 22}
    found = {
        (one.measure, one.kind, one.other_kind): one
        for one in results_of(file, tmp_path, gains, num_right).best_of_kinds
    }
    texts = found["mean text", "ensemble", "merge"]
    assert (texts.arm, texts.other, texts.verdict) == ("mix", "ties", "better")
    assert texts.difference == pytest.approx(-0.05, abs=0.01) and texts.ci[1] < 0
    assert texts.num_pairs == 2 and 0.95 < texts.level < 0.975 + 1e-9
    tasks = found["mean task", "ensemble", "member"]
    assert (tasks.arm, tasks.other, tasks.higher_is_better) == ("vote", "far", True)
    assert tasks.difference == pytest.approx(0.25) and tasks.ci[0] > 0
    assert ("text one", "ensemble", "merge") in found and ("task sums", "merge", "member") in found


def test_a_contrast_of_which_one_side_has_no_figure_is_left_out(file, tmp_path):
    results = results_of(file, tmp_path, {"base": 0.0, "linear": 0.1}, {})
    assert {(one.kind, one.other_kind) for one in results.best_of_kinds} == {("merge", "member")}


def test_the_interval_pays_for_the_choice(file, tmp_path):
    """The same pair alone has a narrower interval than among others to choose from."""
    gains = {"base": 0.0, "mix": 0.1, "vote": 0.02, "linear": 0.04, "ties": 0.05}
    among = results_of(file, tmp_path / "many", gains, {}).best_of_kinds[0]
    alone = results_of(file, tmp_path / "one", {"mix": 0.1, "ties": 0.05, "base": 0.0}, {}).best_of_kinds[0]
    assert among.num_pairs == 4 and alone.num_pairs == 1 and alone.level == 0.95
    assert among.level > 0.95
