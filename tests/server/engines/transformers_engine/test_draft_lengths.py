"""Costs that are made up: a forward takes one second, and so much for every token."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ensemble_server.server.engines.transformers_engine.attention import Span
from ensemble_server.server.engines.transformers_engine.draft_lengths import Outlook, Plan, TextDraft, Writer
from ensemble_server.server.engines.transformers_engine.kv_cache import RowCache
from ensemble_server.server.engines.transformers_engine.scheduler import Work

BIG, SMALL = "big", "small"  # backbones
CHEAP, DEAR = 0.01, 1.0  # seconds per token


def step(num_choices: int, *, backbones: tuple[str, ...] = (BIG,), background: int = 0, reading: int = 0) -> list[Work]:
    def spans(num_tokens: int) -> Any:
        return [(SimpleNamespace(backbone=name), Span(RowCache(), [0] * num_tokens, 1)) for name in backbones]

    def work(index: int) -> Work:
        job: Any = SimpleNamespace(priority=int(index >= num_choices - background))
        choice: Any = object()
        return Work(job, choice, spans(1))

    job: Any = SimpleNamespace(priority=0)
    prompts = [Work(job, None, spans(reading))] if reading else []
    return [work(i) for i in range(num_choices)] + prompts


def best(
    work: list[Work],
    texts: list[TextDraft],
    writers: list[Writer] = [],  # noqa: B006  never changed
    *,
    per_token: float = CHEAP,
    fixed: dict[str, float] | None = None,
    num_spare: float = np.inf,
) -> Plan:
    fixed = fixed or {BIG: 1.0, SMALL: 0.1}

    def costs_of(backbone: Any) -> Any:
        return SimpleNamespace(seconds=lambda num_tokens: fixed[backbone] * (1 + per_token * np.asarray(num_tokens)))

    return Outlook(work, costs_of, num_spare).best(texts, writers, 7)


def text(index: int, *chances: float) -> TextDraft:
    return TextDraft(index, [1] * len(chances), chances)


def lengths(plan: Plan) -> list[int]:
    return [length for _, length in plan.texts]


def test_all_of_a_likely_draft_is_read_where_tokens_cost_little():
    assert lengths(best(step(1), [text(0, 0.9, 0.8, 0.7)])) == [3]


def test_none_is_read_where_a_token_costs_as_much_as_a_step():
    assert lengths(best(step(1), [text(0, 0.9, 0.8, 0.7)], per_token=100.0)) == [0]


def test_the_length_is_that_of_most_tokens_per_second():
    chances = [0.8, 0.5, 0.2, 0.1, 0.05]
    speeds = [(1 + sum(chances[:n])) / (1 + 0.2 * (1 + n)) for n in range(6)]
    plan = best(step(1), [text(0, *chances)], per_token=0.2)
    assert lengths(plan) == [int(np.argmax(speeds))]
    assert plan.speed == pytest.approx(max(speeds))


def test_choices_share_what_a_step_can_bear_by_their_chances():
    plan = best(step(3), [text(0, 0.9, 0.8, 0.02), text(1, 0.02), text(2, 0.7)], per_token=0.1)
    assert lengths(plan) == [2, 0, 1]


def test_a_prompt_in_the_same_step_makes_drafts_no_more_welcome():
    chances = [0.3, 0.1]
    alone = best(step(1), [text(0, *chances)], per_token=0.2)
    beside = best(step(1, reading=500), [text(0, *chances)], per_token=0.2)
    assert lengths(alone) == lengths(beside)


def test_background_choices_stay_within_what_is_spare():
    work = step(2, background=1)
    drafts = [text(0, 0.5, 0.4), text(1, 0.9, 0.8, 0.7)]
    assert lengths(best(work, drafts)) == [2, 3]
    assert lengths(best(work, drafts, num_spare=2)) == [2, 2]
    assert lengths(best(work, drafts, num_spare=0)) == [2, 0]


def test_a_light_member_writes_ahead_of_a_heavy_one():
    work = step(1, backbones=(SMALL, BIG))
    plan = best(work, [], [Writer(0, 0, 0.9, 20)])
    seconds = [0.1 * (1 + n) * 1.01 + 1 + CHEAP * (1 + n) for n in range(8)]
    speeds = [(1 + sum(0.9 ** (i + 1) for i in range(n))) / seconds[n] for n in range(8)]
    assert (plan.length, plan.speed) == (int(np.argmax(speeds)), pytest.approx(max(speeds)))
    assert plan.length > 2


def test_a_member_that_is_not_right_writes_nothing():
    assert best(step(1, backbones=(SMALL, BIG)), [], [Writer(0, 0, 0.02, 20)]).writers == ()


def test_a_draft_ends_where_the_answer_must():
    work = step(1, backbones=(SMALL, BIG))
    long, short = (best(work, [], [Writer(0, 0, 0.9, room)]) for room in (20, 1))
    assert short.speed < long.speed
    assert [writer.length(short.length) for writer in short.writers] == [1]


def test_each_choice_takes_the_better_of_text_and_member():
    work = step(2, backbones=(SMALL, BIG))
    texts = [text(0, 0.99, 0.98, 0.97), text(1, 0.1)]
    plan = best(work, texts, [Writer(0, 0, 0.8, 20), Writer(1, 0, 0.8, 20)])
    assert [writer.index for writer in plan.writers] == [1]
    assert [(draft.index, length) for draft, length in plan.texts] == [(0, 3)]
