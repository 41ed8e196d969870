"""Whole comparisons of tiny models: what fails, what is kept, what is measured again."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.server.compare.kept.results import Results
from ensemble_server.server.compare.planning.plan import load_plan
from ensemble_server.server.compare.run import claimed, report_again, run_comparison
from ensemble_server.server.hosting import Hosting

pytestmark = pytest.mark.usefixtures("without_figures")

ROOT = Path(__file__).parents[3]
PLAN = """
config: config.yaml
baseline: base
arms:
  - red
  - base
  - mix
  - crowd
  - broken
  - {name: posterior, choose: [
      {label: never, ensemble: {method: probability_average, members: [base, red], pool: posterior}},
      {label: often, ensemble: {method: probability_average, members: [base, red], pool: posterior, share: 0.1}}]}
text: {verse: verse.txt, mixed: {switching: [verse, code], piece_bytes: 60}, code: code.txt}
fit: {held: {path: train.txt, tail: 0.3}}
tasks:
  - {name: sums, data: sums.jsonl, metric: number, template: "{{ question }}", max_tokens: 3, dev: sums_dev.jsonl}
  - {name: drawn, data: sums.jsonl, metric: number, template: "{{ question }}", max_tokens: 3, temperature: 1,
     samples: 2, pass_at: [1, 2]}
window: 48
document_bytes: 100
cost: {concurrency: [1, 2], max_tokens: 2, prompt_tokens: 4, repeats: 2}
statistics: {resamples: 200}
"""


class Heard:
    """Keeps the stages that it is told of."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def progress(self, done: int, total: int) -> None:
        assert 0 < done <= total

    @property
    def measured(self) -> list[str]:
        return [stage for stage in self.stages if stage.startswith(("text", "task", "cost"))]


def write_files(folder: Path, tiny: dict[str, Path], plan: str = PLAN) -> Path:
    """A plan beside its config and its data. Returns the plan's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(
        f"""
models:
  base: {{path: {tiny["llama"]}, dtype: float32}}
  red: {{base: base, adapter: {tiny["red"]}}}
  broken: {{base: base, adapter: nowhere}}
  mix: {{method: probability_average, members: [base, red]}}
  crowd: {{method: crowd_vote, members: [base, red], similarity: {{rouge_l_word: 1}}}}
engine: {{max_context: 256}}
""",
        encoding="utf-8",
    )
    verse = "".join(f"To be, or not to be the line {number}.\n\n" for number in range(40))
    code = "".join(f"def f{number}(x): return x + {number}\n\n" for number in range(40))
    (folder / "verse.txt").write_text(verse, encoding="utf-8")
    (folder / "code.txt").write_text(code, encoding="utf-8")
    (folder / "train.txt").write_text(code.replace("f", "g") + verse.replace("line", "row"), encoding="utf-8")
    rows = [json.dumps({"id": f"q{n}", "question": f"What is {n} + {n}?", "answer": 2 * n}) for n in range(6)]
    (folder / "sums.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "sums_dev.jsonl").write_text(json.dumps({"question": "1 + 1?", "answer": 2}), encoding="utf-8")
    (folder / "plan.yaml").write_text(plan, encoding="utf-8")
    return folder / "plan.yaml"


def run(plan: Path, out: Path) -> tuple[Results, Heard]:
    heard = Heard()
    results = asyncio.run(run_comparison(load_plan(plan), out, heard, command="ensemble compare plan.yaml"))
    return results, heard


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("comparison")


@pytest.fixture(scope="module")
def done(folder: Path, tiny: dict[str, Path]) -> tuple[Results, Heard]:
    """One whole comparison, for the tests that only look."""
    whole = run(write_files(folder, tiny), folder / "out")
    shutil.copy(folder / "out" / "results.json", folder / "as-written.json")  # later runs write theirs anew
    return whole


def test_every_arm_has_a_row_in_the_plans_order_and_added_ones_follow(done):
    results, _ = done
    assert list(results.arms)[:6] == ["red", "base", "mix", "crowd", "broken", "posterior"]
    assert all(arm.kind == "cost_matched" for arm in list(results.arms.values())[6:])


def test_an_arm_that_cannot_be_loaded_says_why_and_the_others_go_on(done):
    results, _ = done
    errors = {name: arm.error for name, arm in results.arms.items() if arm.error is not None}
    assert list(errors) == ["broken"]
    assert "adapter_config.json" in errors["broken"] and "'broken'" in errors["broken"]
    assert (results.arms["broken"].text, results.arms["broken"].kind) == ({}, "member")


def test_results_have_the_shape_that_is_promised(done, folder):
    results, _ = done
    data = json.loads((folder / "as-written.json").read_bytes())
    assert data["baseline"] == "base"
    verse = data["arms"]["mix"]["text"]["verse"]
    assert verse["ci"][0] < verse["bpb"] < verse["ci"][1]
    assert set(data["arms"]["mix"]["tasks"]) == {"sums", "drawn"}
    assert data["arms"]["mix"]["error"] is None and data["arms"]["base"]["text"]["verse"]["against_baseline"] is None
    assert Results.load(folder / "as-written.json") == results


def test_a_mixture_of_two_forwards_twice_what_a_member_does(done):
    results, _ = done
    single, mixed = (results.arms[name].cost for name in ("base", "mix"))
    ratio = mixed.forward_tokens_per_answer_token / single.forward_tokens_per_answer_token
    assert 1.5 < ratio < 2.5  # prompts differ a little in length
    assert mixed.kv_bytes == 2 * single.kv_bytes
    assert set(single.tokens_per_s) == {"1", "2"} and len(single.ttft_s.values) == 2


def test_what_a_text_level_ensemble_cannot_have_is_skipped_with_the_reason(done):
    crowd = done[0].arms["crowd"]
    assert set(crowd.skipped) == {"text verse", "text mixed", "text code"} and set(crowd.tasks) == {"sums", "drawn"}
    assert "texts" in crowd.skipped["text verse"] and crowd.error is None


def test_the_variant_with_the_fewest_bits_on_held_out_text_becomes_the_arm(done):
    posterior = done[0].arms["posterior"]
    candidates = posterior.chosen.candidates
    assert set(candidates) == {"never", "often"} and posterior.chosen.name == min(candidates, key=candidates.get)
    assert posterior.model == "posterior"


def test_differences_are_those_of_the_figures(done):
    results, _ = done
    for arm in ("red", "mix", "posterior"):
        for name, text in results.arms[arm].text.items():
            expected = text.bpb - results.arms["base"].text[name].bpb
            assert text.against_baseline.difference == pytest.approx(expected)
            assert text.against_baseline.p_holm >= text.against_baseline.p


def test_the_mean_leaves_out_the_text_that_switches(done):
    arm = done[0].arms["mix"]
    assert arm.mean_text.value == pytest.approx((arm.text["verse"].bpb + arm.text["code"].bpb) / 2)


def test_the_null_checks_run_on_texts_and_on_sampled_tasks(done):
    measures = {check.measure: check for check in done[0].null_checks}
    assert set(measures) == {"text verse", "text mixed", "text code", "task drawn"}
    shifted = measures["text verse"]
    assert "half a window later" in shifted.method and shifted.num_trials == 1
    assert 0 < shifted.largest_difference < 0.5, "other context, so other figures, and nearly the same ones"


@pytest.mark.slow
def test_the_best_member_gets_the_samples_that_the_ensembles_cost_buys(done):
    results, _ = done
    added = {name: arm for name, arm in results.arms.items() if arm.kind == "cost_matched"}
    best = next(iter(added.values())).members[0]
    assert f"{best}x2" in added and "mix" in added[f"{best}x2"].description
    assert all(arm.chosen.measure == "score" and set(arm.tasks) == {"sums", "drawn"} for arm in added.values())


def test_flips_show_what_the_members_of_a_mixture_gave_each_token(done):
    flips = [flip for flip in done[0].flips if flip.arm == "mix" and flip.measure == "text verse"]
    assert flips and all(set(token.members) == {"base", "red"} for flip in flips for token in flip.tokens)
    token = flips[0].tokens[5]
    assert min(token.members.values()) <= token.logprob <= max(token.members.values())


def test_what_is_measured_is_not_measured_again(done, folder, tiny):
    again, heard = run(write_files(folder, tiny), folder / "out")
    assert heard.measured == []
    assert again.arms == done[0].arms


@pytest.mark.slow
def test_a_changed_text_is_measured_again_and_nothing_else(folder, tiny, done, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "copy")
    plan = write_files(tmp_path / "copy", tiny, PLAN.replace("window: 48", "window: 48\ntitle: other"))
    with (tmp_path / "copy" / "code.txt").open("a", encoding="utf-8") as file:
        file.write("def last(): pass\n")
    _, heard = run(plan, tmp_path / "copy" / "out")
    assert heard.measured and all(stage.startswith(("text code", "text mixed")) for stage in heard.measured)


def test_another_baseline_is_a_matter_of_subtraction(in_this_process, tmp_path, tiny):
    plan = write_files(
        tmp_path,
        tiny,
        """
config: config.yaml
baseline: base
arms:
  - base
  - red
  - name: merged
    merge: {merge_method: linear, dtype: float32, models: [
      {model: base, parameters: {weight: 0.5}}, {model: red, parameters: {weight: 0.5}}]}
text: {verse: verse.txt}
window: 48
document_bytes: 100
cost: {concurrency: []}
statistics: {resamples: 200}
""",
    )
    before, _ = run(plan, tmp_path / "out")
    plan.write_text(plan.read_text().replace("baseline: base", "baseline: merged"))
    after, heard = run(plan, tmp_path / "out")
    assert not heard.measured
    ours, theirs = before.arms["merged"].text["verse"], after.arms["base"].text["verse"]
    assert theirs.against_baseline.difference == pytest.approx(-ours.against_baseline.difference)
    assert after.arms["merged"].text["verse"].against_baseline is None


def test_the_report_is_written_again_without_a_model(done, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Hosting, "open", None)
    out = shutil.copytree(folder / "out", tmp_path / "out")
    (out / "results.json").unlink()
    again = report_again(load_plan(folder / "plan.yaml"), out)
    assert again.arms == done[0].arms and (out / "results.json").exists()


def test_two_comparisons_cannot_write_into_one_folder(tmp_path):
    with claimed(tmp_path), pytest.raises(ConfigError, match="another comparison"), claimed(tmp_path):
        pass


def test_replicates_measure_the_texts_with_other_members(tmp_path, tiny):
    plan = f"""
config: config.yaml
baseline: base
arms: [base, red, mix]
text: {{verse: verse.txt}}
window: 48
document_bytes: 100
cost: {{concurrency: []}}
statistics: {{resamples: 200}}
replicates:
  seed 1: {{red: {{base: base, adapter: {tiny["green"]}}}}}
  seed 2: {{red: {{base: base, adapter: {tiny["blue"]}}}}}
"""
    results, _ = run(write_files(tmp_path, tiny, plan), tmp_path / "out")
    spread = results.arms["mix"].replicates["verse"]
    assert list(spread.values) == ["main", "seed 1", "seed 2"] and len(set(spread.values.values())) == 3
    assert spread.values["main"] == results.arms["mix"].text["verse"].bpb
    assert spread.ci[0] < spread.mean < spread.ci[1] and spread.spread > 0
    assert len(set(results.arms["base"].replicates["verse"].values.values())) == 1


def stopped_once_something_is_measured(plan: Path, out: Path, by: signal.Signals) -> tuple[int, str]:
    """`ensemble compare` in a process of its own, sent `by` as soon as a text of an arm is on disk.

    -> its exit code, what it said on standard error
    """
    command = [sys.executable, "-m", "ensemble_server", "compare", str(plan), "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 240
    is_measured = False
    while not is_measured and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
        is_measured = any(b'"nats":[' in file.read_bytes() for file in (out / "arms").glob("*.json"))
    assert process.poll() is None and is_measured, "it ended before it could be stopped"
    process.send_signal(by)
    _, said = process.communicate(timeout=60)
    return process.returncode, said.decode()


@pytest.mark.slow
def test_a_killed_comparison_goes_on_with_the_arm_it_was_at(tmp_path, tiny):
    plan = write_files(tmp_path, tiny)
    out = tmp_path / "out"
    assert stopped_once_something_is_measured(plan, out, signal.SIGKILL)[0] == -signal.SIGKILL
    kept = json.loads((out / "arms" / "base.json").read_bytes())["text"]
    results, heard = run(plan, out)
    again = [stage for stage in heard.measured if not stage.endswith("(null check)")]  # a figure of its own
    for text in kept:
        assert not any(stage.startswith(f"text {text}: ") and "base" in stage for stage in again)
        assert json.loads((out / "arms" / "base.json").read_bytes())["text"][text] == kept[text]
    assert results.arms["mix"].error is None and set(results.arms["mix"].text) == {"verse", "mixed", "code"}


@pytest.mark.slow
def test_an_interrupted_comparison_ends_with_130_and_goes_on(tmp_path, tiny):
    plan = write_files(tmp_path, tiny)
    exit_code, said = stopped_once_something_is_measured(plan, tmp_path / "out", signal.SIGINT)
    assert exit_code == 130 and "the same command goes on from there" in said
    assert "Traceback" not in said
    results, _ = run(plan, tmp_path / "out")
    assert results.arms["mix"].error is None and set(results.arms["mix"].text) == {"verse", "mixed", "code"}


@pytest.mark.slow
def test_tasks_of_the_harness_are_compared_like_others(tmp_path, tiny):
    plan = """
config: config.yaml
baseline: base
arms: [base, red, crowd]
lm_eval: {tasks: [tiny_choice], include_path: harness}
cost: {concurrency: []}
statistics: {resamples: 200}
"""
    file = write_files(tmp_path, tiny, plan)
    (tmp_path / "harness").mkdir()
    rows = [{"question": f"{n} + {n} is", "options": [f"{2 * n}", f"{n}"], "label": 0} for n in range(1, 7)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (tmp_path / "harness" / "tiny_choice.yaml").write_text(
        f"""
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{tmp_path / "rows.jsonl"}"}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
output_type: multiple_choice
doc_to_choice: "{{{{options}}}}"
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}]
""",
        encoding="utf-8",
    )
    results, _ = run(file, tmp_path / "out")
    base, red = (results.arms[name].tasks["tiny_choice"] for name in ("base", "red"))
    assert (base.num_items, base.metric.split(",")[0]) == (6, "acc")
    assert red.against_baseline.difference == pytest.approx(red.score - base.score)
    assert "task tiny_choice" in results.arms["crowd"].skipped
    _, heard = run(file, tmp_path / "out")
    assert heard.measured == [] and not any(stage.startswith("lm_eval") for stage in heard.stages)


@pytest.mark.slow
def test_weights_and_shares_are_fitted_on_held_out_text_once_for_all_pools(tmp_path, tiny):
    pool = "method: probability_average, members: [base, red]"
    plan = f"""
config: config.yaml
baseline: base
arms:
  - base
  - red
  - {{name: arithmetic, ensemble: {{{pool}, weights: fitted}}}}
  - {{name: geometric, ensemble: {{{pool}, pool: geometric, weights: fitted}}}}
  - {{name: posterior, ensemble: {{{pool}, pool: posterior, share: fitted}}}}
  - {{name: alone, ensemble: {{method: probability_average, members: [red], weights: fitted}}}}
text: {{train: train.txt}}
fit: {{verse: verse.txt, code: code.txt}}
window: 48
document_bytes: 100
cost: {{concurrency: []}}
statistics: {{resamples: 200}}
"""
    results, heard = run(write_files(tmp_path, tiny, plan), tmp_path / "out")
    readings = [stage for stage in heard.stages if stage.startswith("fitting")]
    assert readings == ["fitting arithmetic, geometric, posterior on held-out text", "fitting alone on held-out text"]
    arms = results.arms
    assert sum(arms["arithmetic"].weights.values()) == pytest.approx(1)
    assert arms["posterior"].weights is None and 0 <= arms["posterior"].share < 1
    assert "has one member" in arms["alone"].error
    bpb = {name: arm.text["train"].bpb for name, arm in arms.items() if arm.text}
    best = min(bpb["base"], bpb["red"])
    assert bpb["arithmetic"] < best + 0.05, "the held-out text is much like the test text here"
    _, heard = run(tmp_path / "plan.yaml", tmp_path / "out")
    assert not any(stage.startswith("fitting arithmetic") for stage in heard.stages), "decisions stand"


def test_answers_that_are_there_are_judged_beside_measured_ones_without_a_model(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(Hosting, "open", None)
    plan = """
config: config.yaml
baseline: base
arms:
  - {name: base, answers: {sums: base.jsonl}}
  - {name: voted, answers: {sums: voted.jsonl}, kind: ensemble, description: five of them}
  - {name: lost, answers: {sums: lost.jsonl}}
tasks: [{name: sums, data: sums.jsonl, metric: number, template: "{{ question }}"}]
"""
    path = write_files(tmp_path, tiny, plan)
    for name, shift in (("base", 1), ("voted", 0)):
        lines = [json.dumps({"id": f"q{n}", "text": f"It is {2 * n + shift}."}) for n in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    results, _ = run(path, tmp_path / "out")
    base, voted, lost = results.arms.values()
    assert (base.tasks["sums"].score, voted.tasks["sums"].score) == (0.0, 1.0)
    assert (base.kind, voted.kind, voted.description) == ("member", "ensemble", "five of them")
    assert voted.tasks["sums"].against_baseline.p_holm == pytest.approx(2 / 2**6)
    assert "there is no file" in lost.error
    assert "nothing tells what was asked: the answers of base, voted, lost." in " ".join(results.notes)
    (tmp_path / "lost.jsonl").write_text('{"id": "q0", "text": "0"}', encoding="utf-8")
    again, _ = run(path, tmp_path / "out")
    assert again.arms["lost"].error is None and again.arms["lost"].tasks["sums"].num_failed == 5
