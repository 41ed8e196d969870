from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

PLAN = """
config: config.yaml
baseline: base
arms: [base, red{more}]
text: {{verse: verse.txt}}
window: 32
document_bytes: 80
cost: {{concurrency: []}}
statistics: {{resamples: 100}}
"""


@pytest.fixture
def plan(tmp_path: Path, tiny: dict[str, Path]) -> Path:
    (tmp_path / "config.yaml").write_text(
        f"models:\n  base: {{path: {tiny['llama']}, dtype: float32}}\n  red: {{base: base, adapter: {tiny['red']}}}\n"
        "  broken: {base: base, adapter: nowhere}\nengine: {max_context: 64}\n",
        encoding="utf-8",
    )
    (tmp_path / "verse.txt").write_text("To be, or not to be.\n\n" * 20, encoding="utf-8")
    (tmp_path / "plan.yaml").write_text(PLAN.format(more=""), encoding="utf-8")
    return tmp_path / "plan.yaml"


def test_a_comparison_writes_results_and_reports_and_says_who_won(ensemble, plan, tmp_path):
    run = ensemble("compare", plan, "--out", tmp_path / "out")
    assert run.code == 0
    assert "red" in run.out and "bpb (" in run.out
    assert "text verse: base, red" in run.err
    for name in ("results.json", "report.md", "report.html"):
        assert (tmp_path / "out" / name).stat().st_size > 500
    data = json.loads((tmp_path / "out" / "results.json").read_bytes())
    assert data["provenance"]["command"].startswith("ensemble compare ")

    (tmp_path / "out" / "report.html").unlink()
    again = ensemble("compare", plan, "--out", tmp_path / "out", "--report-only")
    assert again.code == 0 and (tmp_path / "out" / "report.html").exists()
    assert again.out == run.out and again.err == ""


def test_some_failed_arms_are_exit_code_3(ensemble, plan, tmp_path):
    plan.write_text(PLAN.format(more=", broken"), encoding="utf-8")
    run = ensemble("compare", plan, "--out", tmp_path / "out")
    assert run.code == 3
    assert "broken: load: model 'broken'" in run.err


def test_a_wrong_plan_is_exit_code_1_and_one_line_for_each_problem(ensemble, plan, tmp_path):
    plan.write_text(PLAN.format(more=", rde") + "windo: 3\n", encoding="utf-8")
    run = ensemble("compare", plan, "--out", tmp_path / "out")
    assert run.code == 1
    assert "did you mean 'window'?" in run.err and "did you mean 'red'?" in run.err
    assert not (tmp_path / "out").exists()


def test_a_report_of_nothing_is_an_error_that_says_so(ensemble, plan, tmp_path):
    run = ensemble("compare", plan, "--out", tmp_path / "out", "--report-only")
    assert run.code == 1 and "holds no measured arms" in run.err


def test_called_without_a_folder_is_exit_code_2(ensemble, plan):
    assert ensemble("compare", plan).code == 2


def test_an_interrupt_is_exit_code_130_and_says_how_to_go_on(ensemble, plan, tmp_path, monkeypatch):
    def interrupted(coroutine):
        coroutine.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(asyncio, "run", interrupted)
    run = ensemble("compare", plan, "--out", tmp_path / "out")
    assert run.code == 130 and "the same command goes on" in run.err
