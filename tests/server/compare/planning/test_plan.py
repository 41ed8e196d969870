"""The plan of a comparison: what it may hold, and what is told of one that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.compare.planning.plan import load_plan

CONFIGS = Path(__file__).parents[4] / "configs"
CONFIG = """
models:
  base: {path: org/base}
  code: {base: base, adapter: code}
"""
GOOD = """
config: config.yaml
baseline: base
arms:
  - base
  - code
  - {name: mean, merge: {merge_method: linear, models: [{model: base, parameters: {weight: 1}}]}}
  - {name: mix, ensemble: {method: probability_average, members: [base, code], weights: fitted}}
text: {a: a.txt, b: {path: b.txt, bytes: 100}, s: {switching: [a, b]}}
fit: {a: {path: train.txt, tail: 0.05}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.txt", "b.txt", "train.txt", "rows.jsonl"):
        (tmp_path / name).write_text("text\n", encoding="utf-8")
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    return tmp_path


def written(folder: Path, plan: str) -> Path:
    (folder / "plan.yaml").write_text(plan, encoding="utf-8")
    return folder / "plan.yaml"


def problems(folder: Path, plan: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_plan(written(folder, plan))
    return str(caught.value)


def test_a_good_plan_is_read_without_loading_anything(folder: Path) -> None:
    plan = load_plan(written(folder, GOOD))
    assert list(plan.arms) == ["base", "code", "mean", "mix"]
    assert plan.arms["base"].is_of_config and not plan.arms["mix"].is_of_config
    assert plan.file.text["a"].path == str(folder / "a.txt")
    assert (plan.file.text["s"].switching, plan.file.text["s"].piece_bytes) == (("a", "b"), 380)
    assert plan.extended({"mix": {"method": "majority", "members": ["base"]}}).models["mix"].samples == 5


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("compare-*.yaml")), ids=lambda file: file.name)
def test_every_shipped_plan_is_sound(file: Path) -> None:
    plan = load_plan(file)
    assert plan.file.baseline in plan.arms


def test_every_problem_is_told_at_once_with_the_nearest_right_key(folder: Path) -> None:
    told = problems(
        folder,
        """
config: config.yaml
baseline: bas
windw: 5
arms:
  - base
  - coed
  - {name: x, ensemble: {method: majority, members: [base], weights: fitted}}
  - {name: y, ensemble: {method: probability_average, members: [base, cod]}}
  - {name: z, merge: {merge_method: liner, models: [{model: base}]}}
text: {a: missing.txt, s: {switching: [a, c]}}
""",
    )
    for expected in (
        "unknown key 'windw'; did you mean 'window'?",
        "baseline: there is no arm 'bas'; did you mean 'base'?",
        "there is no model 'coed'",
        "did you mean 'code'?",
        "arms.2.ensemble: only weights and share of a probability_average can be fitted",
        "'x' is chosen or fitted on held-out text, but `fit` is empty",
        "arms.3.ensemble: refers to an unknown model 'cod'",
        "there is no method 'liner'; did you mean 'linear'?",
        "text.a: there is no file",
        "text.s.switching: there is no file text 'c'",
    ):
        assert expected in told


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("  - code", "  - base"), "'base' is listed 2 times"),
        (("train.txt, tail", "a.txt, tail"), "is a test text, too"),
        (("text: {a: a.txt, b: {path: b.txt, bytes: 100}, s: {switching: [a, b]}}", ""), "nothing is measured"),
        (("weights: fitted", "pool: posterior, weights: fitted"), "write share: fitted"),
        (("weights: fitted", "share: fitted"), "belongs to the posterior pool"),
        (("name: mix", "name: code2, merge: x.yml"), "takes one of `merge`, `ensemble` and `choose`"),
        (("name: mean", "name: code"), "is a model of the config, too"),
        (("fit:", "window: 64\nstride: 64\nfit:"), "stride: must be below window"),
        (("fit:", "replicates: {one: {cod: {path: x}}}\nfit:"), "no model 'cod' to replace; did you mean 'code'?"),
        (("fit:", "cost_matched: {}\nfit:"), "needs a task with `dev` data"),
        (("tail: 0.05", "tail: 5"), "must be less than 1"),
        (("fit:", "window: 5000\nfit:"), "window: 5000 tokens do not fit into the config's engine.max_context, 4096"),
    ],
)
def test_settings_that_go_against_each_other_are_refused(folder: Path, change: tuple[str, str], told: str) -> None:
    assert change[0] in GOOD
    assert told in problems(folder, GOOD.replace(*change))


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ("metric: number, template: x, samples: 2", "several samples need a temperature above 0"),
        ("metric: number, template: x, pass_at: [2]", "pass_at 2 needs as many samples"),
        ("metric: numbr, template: x", "did you mean 'number'?"),
        ("metric: number, template: x, dev: rows.jsonl", "is the test data itself"),
        ("metric: number, templat: x, template: y", "did you mean 'template'?"),
    ],
)
def test_tasks_are_checked(folder: Path, task: str, told: str) -> None:
    assert told in problems(folder, GOOD + f"tasks: [{{name: t, data: rows.jsonl, {task}}}]\n")


def test_numeric_is_another_word_for_number(folder: Path) -> None:
    plan = load_plan(written(folder, GOOD + "tasks: [{name: t, data: rows.jsonl, metric: numeric, template: x}]\n"))
    assert plan.file.tasks[0].metric == "number"


def test_recorded_answers_belong_to_a_task_and_to_no_other_source(folder: Path) -> None:
    plan = """
config: config.yaml
baseline: base
arms: [{name: base, answers: {rows: a.jsonl}}, {name: b, answers: {rowz: b.jsonl}}]
tasks: [{name: rows, data: rows.jsonl, metric: number, template: "{{ question }}"}]
"""
    assert "arms.1.answers: there is no task 'rowz'; did you mean 'rows'?" in problems(folder, plan)
    arms = load_plan(written(folder, plan.replace("rowz", "rows"))).arms
    assert arms["base"].is_recorded and not arms["base"].is_of_config and arms["base"].variants == ()
    assert arms["b"].answers["rows"].path == str(folder / "b.jsonl")
    both = plan.replace("rowz: b.jsonl}", "rows: b.jsonl}, merge: x.yml")
    assert "its `answers` are there already" in problems(folder, both)
    assert "`kind` belongs to `answers`" in problems(folder, plan.replace("answers: {rowz: b.jsonl}", "kind: member"))
