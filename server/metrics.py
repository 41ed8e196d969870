"""What Prometheus can ask: how long answers take, how full the engine is, and how many tokens each member forwards.

Names follow vLLM's, with `ensemble:` in front. Times are in seconds. Labels are names in the config and never come
from clients, so their number is bounded.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from ensemble_server.ensembles.base import Usage
    from ensemble_server.server.engines.engine import StepStats

FIRST_TOKEN_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
STEP_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2, 5)
REQUEST_BUCKETS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
REJECTIONS = {401: "key", 403: "origin", 413: "size", 429: "queue", 503: "unready"}  # what a status says
BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """All of one server's metrics, in a registry of their own, so that several servers fit into one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._num_live = 0
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token", ["model"], FIRST_TOKEN_BUCKETS
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Between two pieces of one choice", ["model"], STEP_BUCKETS
        )
        self.request_duration = self._histogram(
            "request_duration_seconds", "From a request's arrival to its end", ["model"], REQUEST_BUCKETS
        )
        self.step_duration = self._histogram("step_duration_seconds", "One step of the engine", [], STEP_BUCKETS)
        self.batch_size = self._histogram("batch_size", "Rows (request x member) in one step", [], BATCH_BUCKETS)
        self.num_requests_running = self._gauge("num_requests_running", "Sequences in the engine's last step")
        self.num_requests_waiting = self._gauge("num_requests_waiting", "Sequences that waited during the last step")
        self.requests = self._counter("requests_total", "HTTP requests, by status", ["model", "status"])
        self.rejections = self._counter("rejections_total", "Requests that were turned away, by reason", ["reason"])
        self.stage_duration = self._histogram(
            "stage_duration_seconds",
            "Stages of answers: `queue`, `prefill`, `decode`; `prompt` is the first two where the engine does not tell "
            "them apart; `answer` all of an answer whose prompt is read elsewhere, `vote` its part of choosing",
            ["model", "stage"],
            REQUEST_BUCKETS,
        )
        self.key_requests = self._counter("key_requests_total", "Requests of a key, and its rows of batches", ["key"])
        self.key_refusals = self._counter(
            "key_refusals_total", "What a key was refused for its limits, by limit", ["key", "limit"]
        )
        self.key_tokens = self._counter("key_tokens_total", "Tokens of a key's answers", ["key", "kind"])
        self.key_streams = self._gauge("key_streams", "Answers that stream to a key", ["key"])
        self.key_upload_bytes = self._counter("key_upload_bytes_total", "Bytes that a key has uploaded", ["key"])
        self.members_asked = self._counter("members_asked_total", "Members that finished answers asked", ["model"])
        self.members_silent = self._counter("members_silent_total", "Those of them that did not answer", ["model"])
        self.member_silence = self._histogram(
            "member_silence_seconds",
            "How long an ensemble waited for a member that then gave no answer",
            ["model", "member"],
            REQUEST_BUCKETS,
        )
        self.prompt_tokens = self._counter("prompt_tokens_total", "Prompt tokens of finished answers", ["model"])
        self.completion_tokens = self._counter("completion_tokens_total", "Tokens of finished answers", ["model"])
        self.member_tokens = self._counter(
            "member_tokens_total", "Tokens, prompt and generated, that the engine put through a member", ["member"]
        )
        self.lattice_restarts = self._counter(
            "lattice_restarts_total",
            "How often a member that is averaged over text could not write it, and began anew",
            ["member"],
        )
        self.drafted_tokens = self._counter(
            "drafted_tokens_total", "Tokens that members read ahead, by where the drafts came from", ["source"]
        )
        self.accepted_tokens = self._counter("accepted_tokens_total", "Those of them that were drawn, too", ["source"])
        self.prefix_cache_hits = self._counter(
            "prefix_cache_hits_total", "Prompt tokens that the prefix cache spared a member", ["member"]
        )
        self.prefix_cache_bytes = self._gauge("prefix_cache_bytes", "What the prefix cache holds")
        self.kv_cache_bytes = self._gauge(
            "kv_cache_bytes", "KV caches of what the engine works on; that of prefixes comes on top"
        )
        self.member_answer_tokens = self._counter(
            "member_answer_tokens_total", "Tokens that a member read and wrote for finished answers", ["member", "kind"]
        )

        self.batches = self._gauge("batches", "Batches that have not ended, by status", ["status"])
        self.batch_rows = self._gauge("batch_rows", "Rows of these batches, by what became of them", ["state"])
        for state in ("pending", "completed", "failed"):
            self.batch_rows.labels(state)  # none yet is a number, too

    def observe_step(self, stats: StepStats) -> None:
        """The engine's report after each step. May be called from its thread."""
        self.step_duration.observe(stats.duration_s)
        self.batch_size.observe(sum(stats.num_rows.values()))
        self.num_requests_running.set(stats.num_running)
        self.num_requests_waiting.set(stats.num_waiting)
        for member, num_tokens in stats.num_tokens.items():
            self.member_tokens.labels(member).inc(num_tokens)
        for member, num_tokens in stats.num_cached_tokens.items():
            self.prefix_cache_hits.labels(member).inc(num_tokens)
        for member, num_restarts in stats.num_restarts.items():
            self.lattice_restarts.labels(member).inc(num_restarts)
        for source, num_tokens in stats.num_drafted.items():
            self.drafted_tokens.labels(source).inc(num_tokens)
            self.accepted_tokens.labels(source).inc(stats.num_accepted.get(source, 0))
        self.prefix_cache_bytes.set(stats.prefix_cache_bytes)
        self.kv_cache_bytes.set(stats.kv_cache_bytes)

    def observe_request(self, model: str, status: int, duration_s: float, refusal: str = "") -> None:
        """The end of an HTTP request. `model` is "" where it asked for none or for one that is not served. `refusal`:
        why it was turned away, where that is more than its status says."""
        self.requests.labels(model, str(status)).inc()
        if reason := refusal or REJECTIONS.get(status):
            self.rejections.labels(reason).inc()
        if model:
            self.request_duration.labels(model).observe(duration_s)

    def observe_usage(self, model: str, usage: Usage) -> None:
        """The end of a successful generation."""
        self.prompt_tokens.labels(model).inc(usage.prompt_tokens)
        self.completion_tokens.labels(model).inc(usage.completion_tokens)
        for member, used in usage.members.items():
            self.member_answer_tokens.labels(member, "prompt").inc(used.prompt_tokens)
            self.member_answer_tokens.labels(member, "completion").inc(used.completion_tokens)

    def observe_batches(self, num_batches: Mapping[str, int], *, pending: int, completed: int, failed: int) -> None:
        """After a change of the batches that have not ended: how many in each status, 0 too, and all their rows."""
        for status, number in num_batches.items():
            self.batches.labels(status).set(number)
        for state, num_rows in (("pending", pending), ("completed", completed), ("failed", failed)):
            self.batch_rows.labels(state).set(num_rows)

    @contextmanager
    def live_request(self) -> Iterator[None]:
        """While a request is being answered. An idle engine reports no steps, so its gauges are set to zero here."""
        self._num_live += 1
        try:
            yield
        finally:
            self._num_live -= 1
            if not self._num_live:
                self.num_requests_running.set(0)
                self.num_requests_waiting.set(0)
                self.kv_cache_bytes.set(0)

    def token_clock(self, model: str) -> TokenClock:
        return TokenClock(self.time_to_first_token.labels(model), self.inter_token_latency.labels(model))

    def generation_meter(self) -> GenerationMeter:
        return GenerationMeter(self)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, meaning: str, labels: list[str], buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"ensemble:{name}", meaning, labels, registry=self.registry, buckets=buckets)

    def _gauge(self, name: str, meaning: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(f"ensemble:{name}", meaning, labels, registry=self.registry)

    def _counter(self, name: str, meaning: str, labels: list[str]) -> Counter:
        return Counter(f"ensemble:{name}", meaning, labels, registry=self.registry)


class TokenClock:
    """Times the pieces of one request's choices from the moment it is made."""

    def __init__(self, first_token: Histogram, inter_token: Histogram) -> None:
        self._first_token = first_token
        self._inter_token = inter_token
        self._started = time.perf_counter()
        self._last: dict[Hashable, float] = {}

    def tick(self, choice: Hashable) -> None:
        """A piece of `choice` is there."""
        now = time.perf_counter()
        if choice in self._last:
            self._inter_token.observe(now - self._last[choice])
        elif not self._last:
            self._first_token.observe(now - self._started)
        self._last[choice] = now


class GenerationMeter:
    """Observes one body's generations (`requests.generation.Observer`) for the metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._model = ""
        self._running = ExitStack()
        self._is_read = False

    def began(self, model: str) -> None:
        self._model = model
        self._clock = self._metrics.token_clock(model)
        self._stage_began = time.perf_counter()
        self._running.enter_context(self._metrics.live_request())

    def read(self, num_tokens: int = 0, waited_s: float | None = None) -> None:
        """Of several prompts the first one counts."""
        if self._is_read:
            return
        self._is_read = True
        if waited_s is None:
            self._end_stage("prompt")
            return
        self._metrics.stage_duration.labels(self._model, "queue").observe(waited_s)
        self._stage_began += waited_s
        self._end_stage("prefill")

    def token(self, prompt: int, choice: int) -> None:
        self._clock.tick((prompt, choice))

    def silent(self, ensemble: str, member: str, after_s: float) -> None:
        self._metrics.member_silence.labels(ensemble, member).observe(after_s)

    def chose(self, ensemble: str, took_s: float) -> None:
        self._metrics.stage_duration.labels(ensemble, "vote").observe(took_s)

    def done(self, num_members: int, turnout: int) -> None:
        self._metrics.members_asked.labels(self._model).inc(num_members)
        self._metrics.members_silent.labels(self._model).inc(max(0, num_members - turnout))

    def ended(self, usage: Usage | None) -> None:
        self._running.close()
        if usage is not None:
            self._end_stage("decode" if self._is_read else "answer")
            self._metrics.observe_usage(self._model, usage)

    def _end_stage(self, stage: str) -> None:
        now = time.perf_counter()
        self._metrics.stage_duration.labels(self._model, stage).observe(max(0.0, now - self._stage_began))
        self._stage_began = now
