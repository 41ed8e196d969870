from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("without_figures")

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


def test_every_item_is_written_as_csv(ensemble, plan, tmp_path):
    run = ensemble("compare", plan, "--out", tmp_path / "out", "--csv", tmp_path / "items.csv")
    assert run.code == 0 and "items.csv: " in run.out
    lines = (tmp_path / "items.csv").read_text(encoding="utf-8")
    assert lines.startswith("measure,item,arm,score,") and "text verse,document 0,red," in lines
    assert (tmp_path / "out" / "items.html").stat().st_size > 1000

    same = ensemble("compare", "--diff", tmp_path / "out", tmp_path / "out" / "results.json")
    assert same.code == 0
    assert "base, text verse: " in same.out and "(0.0000), " in same.out and "0 items better, 0 worse" in same.out


def test_a_dry_run_says_what_it_takes_and_writes_nothing(ensemble, plan, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    run = ensemble("compare", plan, "--dry-run", "--out", tmp_path / "out")
    assert run.code == 0 and sorted(tmp_path.rglob("*")) == before
    assert "text verse: " in run.out and "documents, 440 bytes" in run.out
    assert "base  single model, the baseline: reads " in run.out and "writes up to 0" in run.out
    assert "2 arms, " in run.out and "0 to pay" in run.out and "nothing written" in run.out


def test_a_dry_run_adds_up_what_remote_models_cost(ensemble, plan, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(
        config.read_text(encoding="utf-8").replace(
            "engine:",
            "  far: {url: 'http://127.0.0.1:9/v1', completion_price_per_million: 1000000}\n"
            "  vote: {method: majority, members: [far], samples: 3, answer: number}\nengine:",
        ),
        encoding="utf-8",
    )
    (tmp_path / "sums.jsonl").write_text('{"q": "1 + 1?", "answer": 2}\n{"q": "2 + 2?", "answer": 4}\n')
    plan.write_text(
        "config: config.yaml\nbaseline: far\narms: [far, vote]\ncost: {concurrency: []}\n"
        "tasks: [{name: sums, data: sums.jsonl, metric: number, template: '{{ q }}', max_tokens: 5}]\n",
        encoding="utf-8",
    )
    run = ensemble("compare", plan, "--dry-run")
    assert "far   remote model, the baseline: reads " in run.out and "writes up to 10;" in run.out
    assert "about 0 seconds, 10 to pay" in run.out and "writes up to 30; about 0 seconds, 30 to pay" in run.out
    unpriced = config.read_text(encoding="utf-8").replace(", completion_price_per_million: 1000000", "")
    config.write_text(unpriced, encoding="utf-8")
    run = ensemble("compare", plan, "--dry-run")
    assert run.out.count("price not known") == 2 and "a price that is not known" in run.out, "which is not nothing"


def test_a_proposed_plan_loads_and_names_what_is_to_be_filled_in(ensemble, plan, tmp_path):
    from ensemble_server.server.compare.planning.plan import load_plan

    config = tmp_path / "config.yaml"
    text = config.read_text(encoding="utf-8").replace("nowhere", "red").replace("  broken:", "  green:")
    config.write_text(
        text.replace("engine:", "  mix: {method: probability_average, members: [base, red]}\nengine:"), encoding="utf-8"
    )
    run = ensemble("compare", "--init", config)
    assert run.code == 0
    assert "single models: base, red, green" in run.out and "ensembles: mix" in run.out
    assert "merges: merge-linear, merge-task-arithmetic" in run.out and "To be filled in" in run.out
    written = load_plan(tmp_path / "compare.yaml")
    assert list(written.arms) == ["base", "red", "green", "mix", "merge-linear", "merge-task-arithmetic"]
    assert written.file.baseline == "base" and written.file.tasks[0].name == "compare-questions"
    assert (tmp_path / "compare.yaml").read_text(encoding="utf-8").count("FILL IN") >= 4
    again = ensemble("compare", "--init", config)
    assert again.code == 1 and "is there already" in again.err
    assert ensemble("compare", tmp_path / "compare.yaml", "--dry-run").code == 0


def test_a_config_is_no_plan_and_a_plan_no_config(ensemble, plan, tmp_path):
    config = tmp_path / "config.yaml"
    run = ensemble("compare", config, "--out", tmp_path / "out")
    assert run.code == 1 and f"ensemble compare --init {config}" in run.err
    run = ensemble("models", plan)
    assert run.code == 1 and f"ensemble compare {plan} --out FOLDER" in run.err and "config.yaml" in run.err


def test_called_without_a_plan_is_exit_code_2_and_names_the_way_to_one(ensemble, tmp_path):
    run = ensemble("compare", "--out", tmp_path / "out")
    assert run.code == 2 and "--init" in run.err
    assert ensemble("compare", tmp_path / "none.yaml", "--out", tmp_path / "out").code == 2
