from __future__ import annotations

import pytest

from ensemble_server.ensembles.base import Mixture, collect
from ensemble_server.server.engines.transformers_engine.choice import generator
from ensemble_server.server.engines.transformers_engine.engine import TransformersEngine
from tests.server.engines.transformers_engine.test_engine import ask, text_of
from tests.server.engines.transformers_engine.test_numerics import OnEngine

MIX = Mixture({"llama": 1, "deep": 1})


async def test_a_stop_string_before_min_tokens_is_ordinary_text(engine: TransformersEngine) -> None:
    (whole,) = await text_of(engine, MIX, ask(max_tokens=30, seed=5, min_tokens=20))
    stop = whole[2:7]
    assert whole.count(stop) == 1
    assert await text_of(engine, MIX, ask(max_tokens=30, seed=5, stop=(stop,), min_tokens=20)) == [whole]


async def test_what_was_held_back_for_a_stop_string_comes_at_the_end(engine: TransformersEngine) -> None:
    (whole,) = await text_of(engine, MIX, ask(max_tokens=12, seed=5))
    answer = await collect(OnEngine(engine, MIX), ask(max_tokens=12, seed=5, stop=(whole[-2:] + "never said",)))
    assert (answer.text, answer.choices[0].finish_reason) == (whole, "length")


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**80])
def test_any_integer_is_a_seed_and_choices_draw_apart(seed: int) -> None:
    assert generator(seed, 0).initial_seed() == generator(seed, 0).initial_seed()
    assert generator(seed, 0).initial_seed() != generator(seed, 1).initial_seed()


def test_without_a_seed_no_two_are_alike() -> None:
    assert generator(None, 0).initial_seed() != generator(None, 0).initial_seed()
