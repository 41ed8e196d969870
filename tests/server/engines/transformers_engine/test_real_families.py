"""SmolLM2 and a real model of another family: what rows are drawn from against the evidence of the text that is there.

The other model is not installed with anything: `OTHER=FILE.gguf pytest -m slow` names one (docs/vocabularies.md says
which packages carry Gemma 3 270M and Qwen2.5-Coder-0.5B).
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ensemble_server.ensembles.base import Mixture, collect
from ensemble_server.server.config.blocks import HostedModel
from ensemble_server.server.engines.transformers_engine.engine import TransformersEngine
from ensemble_server.server.engines.transformers_engine.members import load_members
from ensemble_server.server.weights.member_views import read_member_files
from tests.server.engines.transformers_engine.families import asked
from tests.server.engines.transformers_engine.test_numerics import OnEngine

PROMPT = "The river runs through the old town, past the market and"
PER_PIECE_NATS = 0.02


@pytest.mark.slow
@pytest.mark.skipif("OTHER" not in os.environ, reason="OTHER names no model of another family")
async def test_an_answer_has_the_probability_that_scoring_it_gives() -> None:
    models = {
        "smol": HostedModel(path="HuggingFaceTB/SmolLM2-135M-Instruct", dtype="float32"),
        "other": HostedModel(path=os.environ["OTHER"], dtype="float32"),
    }
    engine = TransformersEngine(load_members(models, read_member_files(models, relative_to=Path(), max_context=512)))
    engine.start()
    try:
        mixture = Mixture({"smol": 1.0, "other": 1.0})
        answer = (await collect(OnEngine(engine, mixture), asked(PROMPT, max_tokens=32, ignore_eos=True))).choices[0]
        again = await collect(OnEngine(engine, mixture), asked(PROMPT + answer.text, max_tokens=0, prompt_logprobs=0))
    finally:
        engine.stop()
    at, found, num_pieces = 0, 0.0, 0
    for token in again.prompt.tokens:
        if at >= len(PROMPT.encode()):
            found, num_pieces = found + token.logprob, num_pieces + 1
        at += len(token.bytes)
    assert b"".join(token.bytes for token in answer.tokens) == answer.text.encode()
    drawn = sum(token.logprob for token in answer.tokens)
    print(f"drawn {drawn:.4f}, scored {found:.4f} nats, {num_pieces} pieces")
    assert found == pytest.approx(drawn, abs=PER_PIECE_NATS * num_pieces)
