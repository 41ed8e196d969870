"""Students as arms of a comparison, beside their controls."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.compare.kept.results import Results
from ensemble_server.server.compare.planning.plan import load_plan
from ensemble_server.server.compare.run import run_comparison
from ensemble_server.server.distill.arm import distilled_entry

pytestmark = pytest.mark.usefixtures("without_figures")

PLAN = """\
config: config.yaml
baseline: taught-control
arms:
  - adaptive
  - name: taught
    distill: {ensemble: adaptive, student: llama, text: [learnt.txt], window: 32, steps: 2, top_k: 8, init: merge}
text: {prose: measured.txt}
window: 48
document_bytes: 100
cost: {concurrency: []}
statistics: {resamples: 200}
"""


class Heard:
    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def progress(self, done: int, total: int) -> None:
        assert done <= total


@pytest.fixture
def plan(config_file: Path) -> Path:
    for name, word in (("learnt", "row"), ("measured", "line")):
        text = "".join(f"{name} {word} {number}: to be, or not to be.\n\n" for number in range(30))
        config_file.with_name(f"{name}.txt").write_text(text)
    file = config_file.with_name("plan.yaml")
    file.write_text(PLAN)
    return file


def run(plan: Path, **more: object) -> tuple[Results, Heard]:
    heard = Heard()
    out = plan.with_name("out")
    return asyncio.run(run_comparison(load_plan(plan), out, heard, **{"distiller": distilled_entry} | more)), heard


@pytest.mark.slow
def test_a_student_is_measured_beside_its_control_and_taught_once(plan: Path) -> None:
    results, heard = run(plan)
    assert {name: arm.error for name, arm in results.arms.items()} == dict.fromkeys(
        ["adaptive", "taught", "taught-control"]
    )
    assert results.arms["taught"].kind == "distilled"
    assert results.arms["taught-control"].kind == "member"
    assert "llama taught by adaptive" in results.arms["taught"].description
    assert results.arms["taught"].text["prose"].against_baseline is not None
    assert any("taught: trained 2 of 2 steps" in stage for stage in heard.stages)
    assert any(found.kind == "ensemble" and found.other_kind == "distilled" for found in results.best_of_kinds)
    again, heard = run(plan)
    assert not any("trained" in stage or "reads" in stage for stage in heard.stages)
    assert again.arms["taught"].text == results.arms["taught"].text


def test_arms_that_differ_in_what_the_teacher_says_share_a_control(plan: Path) -> None:
    again = "  - name: other\n    distill: {target: min_ce, level: token, clm: 0.3, " + PLAN.partition("distill: {")[2]
    more = "  - {name: more, distill: {ensemble: adaptive, student: llama, text: [learnt.txt]}}\n"
    last = again.partition("text: {prose")[0] + more
    plan.write_text(PLAN.replace("text: {prose", last + "text: {prose"))
    assert [arm.name for arm in load_plan(plan).file.arms] == [
        "adaptive",
        "taught",
        "taught-control",
        "other",
        "more",
        "more-control",
    ]


def test_without_someone_who_teaches_the_arm_alone_fails(plan: Path) -> None:
    results, _ = run(plan, distiller=None)
    assert results.arms["adaptive"].error is None
    assert "nothing here can teach it" in str(results.arms["taught"].error)
    assert results.arms["taught"].kind == "distilled"


def test_what_cannot_be_taught_fails_alone_with_the_reason(plan: Path) -> None:
    plan.write_text(PLAN.replace("student: llama", "student: llama, rank: 2"))
    results, _ = run(plan)
    assert results.arms["adaptive"].error is None
    assert "`rank` is 2; give at least 7" in str(results.arms["taught"].error)


def test_a_student_that_learns_from_what_is_measured_is_refused(plan: Path) -> None:
    text = " ".join(f"word{number}" for number in range(200))
    for name in ("learnt", "measured"):
        plan.with_name(f"{name}.txt").write_text(f"{text}\n{text}\n")
    with pytest.raises(ConfigError, match=r"arms taught: .* 100% of prose stand in what its student learns from"):
        run(plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("steps: 2", "steps: 2, minutes: 3"), "in a comparison `steps` or `epochs` decide"),
        (
            ("student: llama", "student: lama"),
            r"arms.1.distill.student: there is no model 'lama'; did you mean 'llama'",
        ),
        (("learnt.txt", "nothing.txt"), "arms.1.distill.text: there is no file"),
        (("steps: 2", "step: 2"), "did you mean 'steps'"),
        (
            ("name: taught", "name: taught\n    merge: x.yml"),
            "it is taught by `distill`; take `merge`, `ensemble` and `choose` out",
        ),
        (("- adaptive", "- {name: taught-control, ensemble: {}}"), "'taught-control' is listed 2 times"),
    ],
)
def test_a_wrong_arm_is_told_before_anything_runs(plan: Path, change: tuple[str, str], message: str) -> None:
    plan.write_text(PLAN.replace(*change))
    with pytest.raises(ConfigError, match=message):
        load_plan(plan)
