from __future__ import annotations

import math

from ensemble_server.server.engines.transformers_engine.pace import MIN_TOKENS, Pace


def test_nothing_is_held_back_before_the_first_interactive_request() -> None:
    pace = Pace()
    pace.observe_step(10.0, 600)
    assert pace.num_tokens == math.inf


def settled(pace: Pace, *, fixed_s: float, token_s: float, wanted: int) -> float:
    """Seconds of a step once the allowance has settled, on a machine whose steps cost `fixed_s + n · token_s`."""
    for _ in range(60):
        num_tokens = int(min(pace.num_tokens, wanted))
        pace.observe_step(fixed_s + num_tokens * token_s, num_tokens)
    return fixed_s + min(pace.num_tokens, wanted) * token_s


def test_steps_settle_at_the_time_that_a_prompt_takes() -> None:
    pace = Pace()
    pace.observe_reading(0.4)
    step_s = settled(pace, fixed_s=0.05, token_s=0.002, wanted=640)
    assert 0.3 <= step_s <= 0.4 * 1.25


def test_short_steps_are_left_alone() -> None:
    pace = Pace()
    pace.observe_reading(0.4)
    assert settled(pace, fixed_s=0.01, token_s=0.0001, wanted=640) == 0.01 + 640 * 0.0001


def test_the_allowance_follows_when_prompts_grow() -> None:
    pace = Pace()
    pace.observe_reading(0.1)
    short = settled(pace, fixed_s=0.02, token_s=0.002, wanted=640)
    for _ in range(30):
        pace.observe_reading(0.6)
    assert settled(pace, fixed_s=0.02, token_s=0.002, wanted=640) > 3 * short


def test_some_work_remains_where_every_step_is_longer_than_a_prompt() -> None:
    pace = Pace()
    pace.observe_reading(0.01)
    settled(pace, fixed_s=0.05, token_s=0.001, wanted=640)
    assert pace.num_tokens == MIN_TOKENS
