from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.metrics import MetricWrapperBase

from ensemble_server.ensembles.base import MemberUsage, Usage
from ensemble_server.server.engines.engine import StepStats
from ensemble_server.server.metrics import Metrics


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"ensemble:{name}", labels)


def step(num_running=3, num_waiting=2):
    return StepStats(0.04, num_running, num_waiting, {"base": 3, "code": 2}, {"base": 12, "code": 2})


def test_a_step_is_counted_member_by_member():
    metrics = Metrics()
    metrics.observe_step(step())
    metrics.observe_step(step(num_running=1, num_waiting=0))
    assert value(metrics, "member_tokens_total", member="base") == 24
    assert value(metrics, "member_tokens_total", member="code") == 4
    assert value(metrics, "step_duration_seconds_sum") == pytest.approx(0.08)
    assert value(metrics, "batch_size_sum") == 10
    assert value(metrics, "batch_size_bucket", le="4.0") == 0
    assert value(metrics, "num_requests_running") == 1
    assert value(metrics, "num_requests_waiting") == 0


def test_what_the_prefix_cache_spares_is_counted():
    metrics = Metrics()
    for num_bytes in (100, 250):
        metrics.observe_step(replace(step(), num_cached_tokens={"base": 32}, prefix_cache_bytes=num_bytes))
    assert value(metrics, "prefix_cache_hits_total", member="base") == 64
    assert value(metrics, "prefix_cache_bytes") == 250


def test_members_that_began_a_text_anew_are_counted():
    metrics = Metrics()
    metrics.observe_step(replace(step(), num_restarts={"base": 2}))
    metrics.observe_step(replace(step(), num_restarts={"base": 1, "code": 0}))
    assert value(metrics, "lattice_restarts_total", member="base") == 3
    assert value(metrics, "lattice_restarts_total", member="code") == 0


def test_drafts_are_counted_by_where_they_came_from():
    metrics = Metrics()
    metrics.observe_step(replace(step(), num_drafted={"text": 5}, num_accepted={"text": 3}))
    metrics.observe_step(replace(step(), num_drafted={"text": 2}))
    assert value(metrics, "drafted_tokens_total", source="text") == 7
    assert value(metrics, "accepted_tokens_total", source="text") == 3


def test_the_gauges_fall_to_zero_when_the_last_request_ends():
    metrics = Metrics()
    with metrics.live_request():
        with metrics.live_request():
            metrics.observe_step(replace(step(), kv_cache_bytes=4096))
        assert value(metrics, "num_requests_running") == 3
        assert value(metrics, "kv_cache_bytes") == 4096
    assert value(metrics, "kv_cache_bytes") == 0
    assert value(metrics, "num_requests_running") == 0
    assert value(metrics, "num_requests_waiting") == 0


def test_an_answer_counts_its_tokens_and_its_members():
    metrics = Metrics()
    metrics.observe_usage("mix", Usage(10, 5, {"base": MemberUsage(10, 5), "code": MemberUsage(12, 5)}))
    assert value(metrics, "prompt_tokens_total", model="mix") == 10
    assert value(metrics, "completion_tokens_total", model="mix") == 5
    assert value(metrics, "member_answer_tokens_total", member="code", kind="prompt") == 12


def test_the_first_token_is_timed_apart_from_those_between():
    metrics = Metrics()
    clock = metrics.token_clock("mix")
    for choice in ("a", "b", "a", "b", "a"):
        clock.tick(choice)
    assert value(metrics, "time_to_first_token_seconds_count", model="mix") == 1
    assert value(metrics, "inter_token_latency_seconds_count", model="mix") == 3


def test_generations_are_metered_from_their_beginning_to_their_end_whatever_it_is():
    metrics = Metrics()
    answered, failed = metrics.generation_meter(), metrics.generation_meter()
    answered.began("mix")
    failed.began("mix")
    answered.token(0, 0)
    answered.token(0, 0)
    metrics.observe_step(step())
    failed.ended(None)
    assert value(metrics, "num_requests_running") == 3
    answered.ended(Usage(10, 2, {"base": MemberUsage(10, 2)}))
    assert value(metrics, "num_requests_running") == 0
    assert value(metrics, "completion_tokens_total", model="mix") == 2
    assert value(metrics, "inter_token_latency_seconds_count", model="mix") == 1


def test_stages_and_turnout_are_counted_once_per_body():
    metrics = Metrics()
    meter = metrics.generation_meter()
    meter.began("crowd")
    meter.read()
    meter.read()  # a second prompt of the same body
    meter.done(num_members=3, turnout=2)
    meter.done(num_members=3, turnout=3)
    meter.ended(Usage())
    assert value(metrics, "stage_duration_seconds_count", model="crowd", stage="prompt") == 1
    assert value(metrics, "stage_duration_seconds_count", model="crowd", stage="decode") == 1
    assert value(metrics, "members_asked_total", model="crowd") == 6
    assert value(metrics, "members_silent_total", model="crowd") == 1


def test_the_wait_for_a_place_is_a_stage_of_its_own_where_the_engine_tells_it():
    metrics = Metrics()
    meter = metrics.generation_meter()
    meter.began("mix")
    time.sleep(0.002)
    meter.read(12, waited_s=0.001)
    meter.ended(Usage())
    stages = {
        name: value(metrics, "stage_duration_seconds_sum", model="mix", stage=name)
        for name in ("queue", "prefill", "decode")
    }
    assert stages["queue"] == 0.001
    assert stages["prefill"] >= 0.001
    assert stages["decode"] is not None
    assert value(metrics, "stage_duration_seconds_count", model="mix", stage="prompt") is None


def test_what_reads_no_prompt_here_has_one_stage_and_choosing_is_a_part_of_it():
    metrics = Metrics()
    meter = metrics.generation_meter()
    meter.began("crowd")
    meter.silent("crowd", "away", 1.5)
    meter.chose("crowd", 0.25)
    meter.ended(Usage())
    assert value(metrics, "stage_duration_seconds_count", model="crowd", stage="answer") == 1
    assert value(metrics, "stage_duration_seconds_sum", model="crowd", stage="vote") == 0.25
    assert value(metrics, "member_silence_seconds_sum", model="crowd", member="away") == 1.5


def test_every_metric_is_explained_to_operators_and_no_other():
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    table = page.partition("<!-- metrics -->")[2].partition("<!-- end -->")[0]
    rows = re.findall(r"^\| `(ensemble:\w+)` \|([^|]*)\| ", table, re.MULTILINE)
    told = {name.removesuffix("_total"): tuple(re.findall(r"`(\w+)`", labels)) for name, labels in rows}
    metrics = Metrics()
    names = {collector.describe()[0].name: tuple(collector._labelnames) for collector in vars(metrics).values()
             if isinstance(collector, MetricWrapperBase)}  # fmt: skip
    assert set(names) == {metric.name for metric in metrics.registry.collect()}
    assert told == names


def test_a_refusal_with_a_reason_of_its_own_is_counted_by_it():
    metrics = Metrics()
    metrics.observe_request("mix", 429, 0.001, "tokens")
    assert value(metrics, "rejections_total", reason="tokens") == 1
    assert value(metrics, "rejections_total", reason="queue") is None


@pytest.mark.parametrize(
    ("status", "reason"), [(401, "key"), (403, "origin"), (413, "size"), (429, "queue"), (503, "unready")]
)
def test_who_is_turned_away_is_counted_with_the_reason(status, reason):
    metrics = Metrics()
    for each in (status, 200, 400):
        metrics.observe_request("", each, 0.001)
    assert value(metrics, "rejections_total", reason=reason) == 1


def test_requests_are_counted_by_status_and_timed_by_model():
    metrics = Metrics()
    metrics.observe_request("mix", 200, 0.3)
    metrics.observe_request("", 404, 0.001)
    assert value(metrics, "requests_total", model="mix", status="200") == 1
    assert value(metrics, "requests_total", model="", status="404") == 1
    assert value(metrics, "request_duration_seconds_sum", model="mix") == pytest.approx(0.3)


def test_two_servers_in_one_process_count_apart():
    one, other = Metrics(), Metrics()
    one.observe_step(step())
    assert value(other, "step_duration_seconds_count") == 0


def test_steps_may_be_reported_from_other_threads():
    metrics = Metrics()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: metrics.observe_step(step()), range(200)))
    assert value(metrics, "member_tokens_total", member="base") == 2400


def test_the_text_is_what_prometheus_reads():
    from prometheus_client.parser import text_string_to_metric_families

    metrics = Metrics()
    metrics.observe_step(step())
    names = {family.name for family in text_string_to_metric_families(metrics.text().decode())}
    assert {"ensemble:step_duration_seconds", "ensemble:batch_size", "ensemble:member_tokens"} <= names
