"""Results from records that are written by hand: no model is needed to know what they should say."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from ensemble_server.server.compare.analysis.statistics import compute_results
from ensemble_server.server.compare.kept.records import (
    ArmRecord,
    CostRecord,
    Failure,
    ItemRecord,
    Records,
    TaskRecord,
    TextRecord,
)
from ensemble_server.server.compare.kept.results import Results
from ensemble_server.server.compare.measures.text_measure import TextScores
from ensemble_server.server.compare.planning.blocks import Arm, PlanFile, StatisticsSettings, TaskSource, TextSource
from ensemble_server.server.compare.report.contents import contents
from ensemble_server.server.compare.running.measuring import text_record_of

NUM_DOCUMENTS = 30


def text_record(costs: np.ndarray, sha256: str = "same") -> TextRecord:
    """Documents of 1000 bytes with these bits per byte."""
    return TextRecord(
        inputs="",
        items_sha256=sha256,
        nats=(costs * 1000 * np.log(2)).tolist(),
        num_bytes=[1000.0] * len(costs),
        num_tokens=[250.0] * len(costs),
    )


def task_record(scores: list[float], *, prompts: str = "p", errors: int = 0) -> TaskRecord:
    items = [
        ItemRecord(
            id=str(index),
            score=score,
            outputs=["x"],
            answers=["x" if score else None],
            sample_scores=[score],
            prompt_sha256=prompts,
            error="broke" if index < errors else None,
        )
        for index, score in enumerate(scores)
    ]
    return TaskRecord(inputs="", items_sha256="same", metric="number", items=items)


@pytest.fixture
def file() -> PlanFile:
    return PlanFile(
        config="c.yaml",
        baseline="base",
        arms=tuple(Arm(name=name) for name in ("base", "good", "same", "vague", "bad")),
        text={"one": TextSource(path="one.txt"), "two": TextSource(path="two.txt")},
        tasks=(TaskSource(name="sums", data="s.jsonl", metric="number", template="x"),),
        statistics=StatisticsSettings(resamples=1000),
    )


@pytest.fixture
def records(tmp_path: Path) -> Records:
    rng = np.random.default_rng(0)
    base = rng.normal(1.5, 0.2, NUM_DOCUMENTS)
    noise = rng.normal(0, 1, NUM_DOCUMENTS)
    noise -= noise.mean()
    arms = {
        "base": base,
        "good": base - 0.1 + 0.01 * noise,
        "same": base + 0.001 * noise,
        "vague": base + 0.2 * noise,
        "bad": base + 0.1 + 0.01 * noise,
    }
    records = Records(tmp_path)
    for name, costs in arms.items():
        record = ArmRecord(name=name, kind="member", model=name)
        record.text = {"one": text_record(costs), "two": text_record(costs[::-1])}
        record.tasks = {"sums": task_record([1.0] * 10 + [0.0] * 30)}
        records.save(record)
    return Records(tmp_path)


ARMS = ["base", "good", "same", "vague", "bad"]


def test_the_four_verdicts(file, records):
    results = compute_results(file, ARMS, records)
    verdicts = {name: results.arms[name].text["one"].against_baseline.verdict for name in ARMS[1:]}
    assert verdicts == {"good": "better", "same": "no difference shown", "vague": "inconclusive", "bad": "worse"}
    vague = results.arms["vague"].text["one"].against_baseline
    assert vague.detectable > file.statistics.margin_bpb, "it says what would have been seen"
    assert results.arms["good"].mean_text.against_baseline.verdict == "better"
    assert results.arms["base"].text["one"].against_baseline is None


def test_figures_are_ratios_of_sums(file, records):
    results = compute_results(file, ARMS, records)
    record = records.get("base").text["one"]
    text = results.arms["base"].text["one"]
    assert text.bpb == pytest.approx(sum(record.nats) / np.log(2) / sum(record.num_bytes))
    assert text.perplexity == pytest.approx(np.exp(sum(record.nats) / sum(record.num_tokens)))
    assert (text.num_documents, text.num_bytes, text.num_tokens) == (30, 30_000, 7500)


def test_p_values_are_adjusted_over_all_arms_of_a_measure(file, records):
    results = compute_results(file, ARMS, records)
    differences = [results.arms[name].text["one"].against_baseline for name in ARMS[1:]]
    smallest = min(differences, key=lambda difference: difference.p)
    assert smallest.p_holm == pytest.approx(min(1.0, 4 * smallest.p))


def test_the_same_records_and_seed_give_the_same_results(file, records):
    assert compute_results(file, ARMS, records) == compute_results(file, ARMS, records)


def test_failed_and_missing_rows_count_as_wrong_and_are_shown(file, records):
    record = records.get("good")
    record.tasks["sums"] = task_record([0.0] * 4 + [1.0] * 12 + [0.0] * 24, errors=4)
    task = compute_results(file, ARMS, records).arms["good"].tasks["sums"]
    assert (task.score, task.num_items, task.num_failed, task.num_missing) == (0.3, 40, 4, 24)
    difference = task.against_baseline
    assert (difference.test, difference.wins, difference.losses) == ("mcnemar", 6, 4)
    assert difference.difference == pytest.approx(2 / 40)


@pytest.mark.parametrize("change", ["documents", "prompts"])
def test_an_arm_that_was_given_something_else_is_not_compared(file, records, change):
    record = records.get("good")
    if change == "documents":
        record.text["one"] = record.text["one"].model_copy(update={"items_sha256": "other"})
    else:
        record.tasks["sums"] = task_record([1.0] * 40, prompts="others")
    arm = compute_results(file, ARMS, records).arms["good"]
    assert "not those of the baseline" in arm.error
    part = arm.text["one"] if change == "documents" else arm.tasks["sums"]
    assert part.against_baseline is None


def test_a_failed_arm_keeps_its_row_and_its_reason(file, records):
    records.get("bad").failure = Failure(stage="load", message="no weights")
    assert compute_results(file, ARMS, records).arms["bad"].error == "load: no weights"


def test_pass_at_k_is_the_mean_over_items(file, records):
    source = TaskSource(
        name="sums", data="s.jsonl", metric="number", template="x", temperature=1, samples=2, pass_at=(1, 2)
    )
    file = file.model_copy(update={"tasks": (source,)})
    for name in ARMS:
        items = [
            ItemRecord(id="a", score=0.5, sample_scores=[1.0, 0.0], answers=["1", "2"]),
            ItemRecord(id="b", score=0.0, sample_scores=[0.0, 0.0], answers=["1", "2"]),
        ]
        records.get(name).tasks["sums"] = TaskRecord(inputs="", items_sha256="s", metric="number", items=items)
    assert compute_results(file, ARMS, records).arms["base"].tasks["sums"].pass_at_k == {1: 0.25, 2: 0.5}


def test_costs_are_medians_of_the_rounds(file, records):
    records.get("base").cost = CostRecord(inputs="", tokens_per_s={"1": [10.0, 30.0, 20.0]}, ttft_s=[0.2, 0.1, 0.4])
    records.get("good").cost = CostRecord(inputs="", tokens_per_s={"1": [5.0, 15.0, 8.0]})
    cost = compute_results(file, ARMS, records).arms["base"].cost
    assert (cost.tokens_per_s["1"].median, cost.ttft_s.median) == (20.0, 0.2)
    assert (cost.tokens_per_s["1"].ci, cost.tokens_per_s["1"].range) == (None, (10.0, 30.0)), "3 rounds: no interval"
    ratio = compute_results(file, ARMS, records).arms["good"].cost.speed_ratio["1"]
    assert ratio.values == pytest.approx((0.5, 0.5, 0.4)) and not cost.speed_ratio
    records.get("base").cost = CostRecord(inputs="", tokens_per_s={"1": [10.0, 30.0, 20.0, 15.0, 25.0, 21.0]})
    assert compute_results(file, ARMS, records).arms["base"].cost.tokens_per_s["1"].ci == (10.0, 30.0)


def test_what_nobody_knows_is_not_zero(file, records):
    records.get("base").cost = CostRecord(inputs="", tokens_per_s={"1": [10.0]})
    cost = compute_results(file, ARMS, records).arms["base"].cost
    assert (cost.weights_bytes, cost.kv_bytes, cost.forward_tokens_per_answer_token) == (None, None, None)


def test_where_low_is_better_a_lower_score_wins(file, records):
    for name, scores in (("base", [2.0] * 40), ("good", [1.0] * 39 + [3.0])):
        record = task_record(scores).model_copy(update={"higher_is_better": False, "metric": "word_error_rate"})
        records.get(name).tasks["sums"] = record
    difference = compute_results(file, ["base", "good"], records).arms["good"].tasks["sums"].against_baseline
    assert (difference.verdict, difference.wins, difference.losses) == ("better", 39, 1)


def test_with_one_text_the_mean_is_that_text(file, records):
    file = file.model_copy(update={"text": {"one": file.text["one"]}})
    arm = compute_results(file, ARMS, records).arms["good"]
    assert arm.mean_text.value == pytest.approx(arm.text["one"].bpb)
    assert arm.mean_text.against_baseline == arm.text["one"].against_baseline


def test_a_text_that_an_arm_cannot_have_is_left_out_of_every_mean_and_named(file, records):
    records.get("vague").text["two"] = TextRecord(inputs="", items_sha256="", skipped="its context is too short")
    results = compute_results(file, ARMS, records)
    assert results.mean_over["text"] == ("one",)
    assert results.left_out["text two"] == "vague has no figure: its context is too short"
    assert all(results.arms[name].mean_text.value == results.arms[name].text["one"].bpb for name in ARMS)


def test_an_arm_that_answered_nothing_is_not_called_equal(file, records):
    for name in ("base", "good"):
        records.get(name).tasks["sums"] = task_record([0.0] * 40)
    verdict = compute_results(file, ARMS, records).arms["good"].tasks["sums"].against_baseline.verdict
    assert verdict == "nothing was answered"


def test_six_questions_answered_alike_are_too_few_for_a_verdict(file, records):
    for name in ARMS:
        records.get(name).tasks["sums"] = task_record([1.0] * 3 + [0.0] * 3)
    difference = compute_results(file, ARMS, records).arms["good"].tasks["sums"].against_baseline
    assert (difference.verdict, difference.detectable) == ("too few items", None), "4 arms: 4 * 2 / 2^6 > 5%"
    assert difference.ci == pytest.approx((-0.390, 0.390), abs=1e-3)


def skipped(reason: str = "gives no probabilities") -> TextRecord:
    return TextRecord(inputs="", items_sha256="", skipped=reason)


def of(tmp_path: Path, figures: dict[str, dict], **plan) -> Results:
    """Arms -> what they have of `text` or `tasks`, the first being the baseline."""
    records = Records(tmp_path)
    for name, found in figures.items():
        records.save(ArmRecord(name=name, kind="member", model=name, **found))
    arms = tuple(Arm(name=name) for name in figures)
    clusters = plan.pop("clusters", None)
    file = PlanFile(
        config="c.yaml", baseline=arms[0].name, arms=arms, statistics=StatisticsSettings(resamples=500), **plan
    )
    return compute_results(file, list(figures), Records(tmp_path), clusters=clusters)


TWO_TEXTS = {"one": TextSource(path="one.txt"), "two": TextSource(path="two.txt")}
COSTS = np.linspace(1, 2, 12)


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        (
            {"a": {"one": text_record(COSTS), "two": skipped()}, "b": {"one": skipped(), "two": text_record(COSTS)}},
            "Texts: there is no mean that arms could be ranked by; the texts one by one are below. The mean leaves out "
            "one: b has no figure: gives no probabilities. The mean leaves out two: a has no figure: gives no "
            "probabilities.",
        ),
        (
            {"a": {"one": text_record(COSTS)}, "b": {"one": skipped()}, "c": {"one": skipped()}},
            "Texts: only a has a figure, 1.500 bits per byte (*). Without a figure: b and c (gives no probabilities).",
        ),
        (
            {"a": {"one": skipped()}, "b": {"one": text_record(COSTS)}, "c": {"one": text_record(COSTS + 1)}},
            "Texts: b has the best mean, 1.500 bits per byte (*). Nothing is compared with a, which has no mean. "
            "Without a figure: a (gives no probabilities).",
        ),
        (
            {"a": {"one": text_record(COSTS)}, "b": {"one": text_record(COSTS)}},
            "Texts: a and b have the best mean, 1.500 bits per byte (*). No difference from a shown: b.",
        ),
        (
            {"a": {"one": skipped()}, "b": {"one": skipped("no tokenizer")}},
            "Texts: no arm has a figure. Without a figure: a (gives no probabilities). Without a figure: b (no "
            "tokenizer).",
        ),
    ],
)
def test_the_first_sentence_is_true_where_figures_are_missing(tmp_path, figures, said):
    names = dict.fromkeys(text for texts in figures.values() for text in texts)
    plan = {name: TWO_TEXTS[name] for name in names}
    results = of(tmp_path, {name: {"text": texts} for name, texts in figures.items()}, text=plan)
    found = re.sub(r"byte \([^)]*\)", "byte (*)", contents(results).summary[0])
    assert found == said


def test_the_mean_says_over_how_many_texts_it_is(tmp_path):
    figures = {
        "a": {"text": {"one": text_record(COSTS), "two": text_record(COSTS)}},
        "b": {"text": {"one": text_record(COSTS), "two": skipped()}},
    }
    ranking = contents(of(tmp_path, figures, text=TWO_TEXTS)).quality[0]
    assert ranking.explanation.startswith("Mean bits per byte over 1 text, without two; lower is better.")


def test_a_task_of_several_on_which_nothing_was_answered_is_named(tmp_path):
    tasks = tuple(TaskSource(name=name, data="s.jsonl", metric="number", template="x") for name in ("sums", "words"))
    half = [1.0, 0.0] * 10
    figures = {
        "a": {"tasks": {"sums": task_record(half), "words": task_record(half)}},
        "b": {"tasks": {"sums": task_record([0.0] * 20), "words": task_record([1.0] * 20)}},
    }
    summary = contents(of(tmp_path, figures, tasks=tasks)).summary[0]
    assert "Nothing of sums was answered by b; the mean counts that as wrong." in summary


def test_shares_of_right_answers_are_never_known_exactly(tmp_path):
    """Six of six, in the mean as in the task; and four passages of fifty questions, all right."""
    task = TaskSource(name="sums", data="s.jsonl", metric="number", template="x")
    six = of(tmp_path / "six", {"a": {"tasks": {"sums": task_record([1.0] * 6)}}}, tasks=(task,)).arms["a"]
    assert six.mean_tasks.ci == six.tasks["sums"].ci == pytest.approx((0.610, 1.0), abs=1e-3)
    passages = {"task sums": [str(n // 50) for n in range(200)]}
    many = of(tmp_path / "many", {"a": {"tasks": {"sums": task_record([1.0] * 200)}}}, tasks=(task,), clusters=passages)
    assert many.arms["a"].tasks["sums"].ci[0] < 0.5
    assert many.tasks["sums"].clusters == tuple(n // 50 for n in range(200))


def test_bits_of_a_broken_model_are_a_figure_still(tmp_path):
    figures = {"a": {"text": {"one": text_record(COSTS)}}, "b": {"text": {"one": text_record(COSTS * 1000)}}}
    results = of(tmp_path, figures, text={"one": TWO_TEXTS["one"]})
    results.save(tmp_path / "results.json")
    broken = Results.load(tmp_path / "results.json").arms["b"].text["one"]
    assert broken.perplexity is None and broken.bpb == pytest.approx(1500)
    assert results.arms["a"].text["one"].ci[0] >= 0


@pytest.mark.parametrize(
    ("nats", "num_tokens", "reason"),
    [
        ([1.0, np.nan], 5.0, "document 1 .*NaN"),
        ([np.inf, 1.0], 5.0, "document 0 .*infinitely"),
        ([0, 0], 0.0, "no token"),
    ],
)
def test_what_is_no_number_is_no_figure_and_costs_no_other_one(nats, num_tokens, reason):
    """JSON has no word for it: the arm's whole record could not be read again."""
    scores = TextScores(np.array(nats), np.full(2, 9.0), np.full(2, num_tokens))
    record = ArmRecord(name="a", text={"one": text_record_of(scores, "", ""), "two": text_record(COSTS)})
    again = ArmRecord.model_validate_json(record.model_dump_json())
    assert re.search(reason, again.text["one"].skipped) and again.text["two"].nats
