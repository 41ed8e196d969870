"""Yesterday's results and today's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.compare.analysis.statistics import compute_pairs, compute_results
from ensemble_server.server.compare.analysis.two_runs import compare_runs, read_run
from ensemble_server.server.compare.kept.records import ArmRecord, Records
from ensemble_server.server.compare.planning.blocks import Arm, PlanFile, StatisticsSettings, TaskSource, TextSource
from tests.server.compare.analysis.test_statistics import task_record, text_record

ARMS = ("base", "mix", "third")


def written(folder: Path, right: dict[str, list[float]], *, shift: float = 0.0, versions: str = "1") -> PlanFile:
    """A folder with records and results. `shift`: of what `mix` pays for texts."""
    file = PlanFile(
        config="c.yaml",
        baseline="base",
        arms=tuple(Arm(name=name) for name in ARMS),
        text={"one": TextSource(path="one.txt")},
        tasks=(TaskSource(name="sums", data="s.jsonl", metric="number", template="x"),),
        statistics=StatisticsSettings(resamples=500),
    )
    rng = np.random.default_rng(0)
    base = rng.normal(1.5, 0.2, 40)
    noise = rng.normal(0, 0.01, 40)
    records = Records(folder)
    for name in ARMS:
        record = ArmRecord(name=name, kind="member", model=name)
        record.text = {"one": text_record(base + (shift + noise if name == "mix" else 0))}
        record.tasks = {"sums": task_record(right[name])}
        records.save(record)
    results = compute_results(file, ARMS, records, provenance={"versions": {"torch": versions}})
    results.save(folder / "results.json")
    return file


def test_an_arm_is_held_against_itself_item_by_item(tmp_path):
    half = [1.0, 0.0] * 20
    written(tmp_path / "old", {"base": half, "mix": half, "third": half})
    better = [1.0] * 30 + [0.0] * 10
    written(tmp_path / "new", {"base": half, "mix": better, "third": half}, shift=-0.1, versions="2")
    found = compare_runs(read_run(tmp_path / "old"), read_run(tmp_path / "new" / "results.json"))
    changes = {(one.arm, one.measure): one for one in found.changes}
    text = changes["mix", "text one"]
    assert text.after - text.before == pytest.approx(-0.1) and text.difference.verdict == "better"
    task = changes["mix", "task sums"]
    assert (task.difference.wins, task.difference.losses) == (15, 5)
    assert len(task.flipped) == 9 and task.flipped[-1] == "12 more"
    assert changes["base", "task sums"].difference.difference == 0 and changes["base", "task sums"].flipped == ()
    assert "versions torch: 1 → 2" in found.notes


def test_without_records_or_with_other_items_only_figures_stand_side_by_side(tmp_path):
    half = dict.fromkeys(ARMS, [1.0, 0.0] * 20)
    written(tmp_path / "old", half)
    written(tmp_path / "new", dict.fromkeys(ARMS, [1.0, 0.0] * 10))
    found = compare_runs(read_run(tmp_path / "old"), read_run(tmp_path / "new"))
    task = next(one for one in found.changes if one.measure == "task sums")
    assert task.difference is None and task.reason == "the items are not the same"
    for file in (tmp_path / "old" / "arms").iterdir():
        file.unlink()
    found = compare_runs(read_run(tmp_path / "old"), read_run(tmp_path / "new"))
    assert all(one.difference is None and "beside both files" in one.reason for one in found.changes)


def test_what_is_no_results_file_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"give a results\.json or its folder"):
        read_run(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is no results\.json of this version"):
        read_run(tmp_path)


def test_every_baseline_sees_the_same_pairs_from_its_side(tmp_path):
    right = {"base": [1.0, 0.0] * 20, "mix": [1.0] * 30 + [0.0] * 10, "third": [0.0] * 20 + [1.0] * 20}
    file = written(tmp_path, right, shift=-0.1)
    pairs = compute_pairs(file, ARMS, Records(tmp_path))
    assert set(pairs.of) == {"mix", "third"}
    results = read_run(tmp_path).results
    ours = results.arms["mix"].tasks["sums"].against_baseline
    theirs = pairs.of["mix"]["task sums"]["base"]
    assert (theirs.wins, theirs.losses) == (ours.losses, ours.wins)
    assert theirs.ci == pytest.approx((-ours.ci[1], -ours.ci[0])) and theirs.p == ours.p
    one, other = pairs.of["mix"]["mean text"]["third"], pairs.of["third"]["mean text"]["mix"]
    assert (one.verdict, other.verdict) == ("worse", "better")
    assert one.difference == pytest.approx(-other.difference) and one.p == other.p


def test_passages_are_told_apart_in_both_runs(tmp_path):
    """Twenty questions on each of two passages, of which one went better: no forty independent ones."""
    half = [1.0, 0.0] * 20
    passages = {"task sums": [str(n // 20) for n in range(40)]}
    for name, right in (("old", half), ("new", [1.0] * 20 + half[20:])):
        file = written(tmp_path / name, {"base": half, "mix": right, "third": half})
        compute_results(file, ARMS, Records(tmp_path / name), clusters=passages).save(tmp_path / name / "results.json")
    found = compare_runs(read_run(tmp_path / "old"), read_run(tmp_path / "new"))
    mix = next(one for one in found.changes if (one.arm, one.measure) == ("mix", "task sums"))
    assert mix.difference.test == "sign_flip" and mix.difference.verdict == "too few items"


def test_a_measure_that_only_one_of_them_has_is_named(tmp_path):
    written(tmp_path / "old", dict.fromkeys(ARMS, [1.0] * 40))
    file = written(tmp_path / "new", dict.fromkeys(ARMS, [1.0] * 40))
    fewer = file.model_copy(update={"tasks": ()})
    compute_results(fewer, ARMS, Records(tmp_path / "new")).save(tmp_path / "new" / "results.json")
    found = compare_runs(read_run(tmp_path / "old"), read_run(tmp_path / "new"))
    assert "measured only in the first: task sums" in found.notes
