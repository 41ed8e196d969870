"""The demo as shipped: real weights, three experts, and what the theory promises of them on every test text."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from ensemble_server.ensembles.base import Answer, GenerationRequest, Sampling, collect
from ensemble_server.ensembles.pooling import posterior
from ensemble_server.server.api.app import create_app
from ensemble_server.server.api.serve import listening
from ensemble_server.server.config.loading import load_config
from ensemble_server.server.hosting import Hosting
from ensemble_server.server.metrics import Metrics
from tests.docs.snippets import snippets

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

ROOT = Path(__file__).parent.parent
MEMBERS = ("base", "code", "jargon", "shakespeare")
NUM_BYTES = 3000


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def demo() -> AsyncIterator[Hosting]:
    async with Hosting.open(load_config(ROOT / "configs" / "demo.yaml")) as hosting:
        yield hosting


async def scored(demo: Hosting, model: str, text: str, **overrides: object) -> Answer:
    request = GenerationRequest(prompt=text, sampling=Sampling(max_tokens=0), prompt_logprobs=0, overrides=overrides)
    return await collect(demo.models[model], request)


def losses(answer: Answer) -> np.ndarray:
    """-log p of each token but the first, in nats."""
    return -np.array([token.logprob for token in answer.prompt.tokens[1:]])


@pytest.mark.parametrize("domain", ["code", "jargon", "shakespeare"])
async def test_posterior_weights_keep_their_promise_on_every_test_text(demo, domain):
    text = (ROOT / "data" / "text" / f"{domain}_test.txt").read_text(encoding="utf-8")[:NUM_BYTES]
    alone = {name: losses(await scored(demo, name, text)) for name in MEMBERS}
    best = min(loss.sum() for loss in alone.values())
    for share in (0.0, 0.01):
        mixed = losses(await scored(demo, "adaptive", text, share=share))
        bound = posterior.loss_bound(1 / len(MEMBERS), len(mixed), share)
        assert share or bound == pytest.approx(np.log(len(MEMBERS)))
        assert mixed.sum() <= best + bound + 1e-2  # rounding, over about a thousand tokens
    assert min(alone, key=lambda name: alone[name].sum()) == domain, "the expert is best at home"


async def test_the_mixture_is_the_mean_of_what_the_members_say_alone(demo):
    text = "def main():\n    What is a hacker? ROMEO: O, she doth teach"
    logprobs = {name: -losses(await scored(demo, name, text)) for name in MEMBERS}
    mean = np.log(np.mean([np.exp(values) for values in logprobs.values()], axis=0))
    assert -losses(await scored(demo, "mix", text)) == pytest.approx(mean, abs=1e-3)


async def test_four_members_of_one_base_share_its_weights(demo):
    backbones = {id(demo.models[name].host._members[name].backbone) for name in MEMBERS}
    assert len(backbones) == 1


async def test_greedy_answers_stream_and_repeat(demo):
    request = GenerationRequest(
        messages=({"role": "user", "content": "What is the capital of France?"},),
        sampling=Sampling(temperature=0, max_tokens=24),
    )
    answer = await collect(demo.models["mix"], request)
    assert "Paris" in answer.text
    again = await collect(demo.models["mix"], replace(request, explain=True))
    assert again.text == answer.text
    assert set(again.choices[0].tokens[0].members) == set(MEMBERS)


async def test_structured_output_on_the_real_vocabulary(demo):
    from ensemble_server.ensembles.base import Grammar

    schema = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
    schema["additionalProperties"] = False
    request = GenerationRequest(
        messages=({"role": "user", "content": "Which city is the capital of France? Answer in JSON."},),
        sampling=Sampling(temperature=0, max_tokens=40, grammar=Grammar("json_schema", json.dumps(schema))),
    )
    assert json.loads((await collect(demo.models["adaptive"], request)).text)["city"] in ("Paris", "Rome")


async def test_the_tool_loop_that_the_page_shows(demo, capsys):
    [code] = [snippet.text for snippet in snippets(ROOT / "docs" / "tools.md") if snippet.kind == "python"]
    app = create_app(demo, metrics=Metrics())
    scope: dict = {}
    async with listening(app, demo.config.server.model_copy(update={"port": 0})) as port:
        await asyncio.to_thread(exec, code.replace("8000", str(port)), scope)
    assert scope["call"].function.name == "weather"
    assert json.loads(scope["call"].function.arguments).keys() == {"city"}
    assert capsys.readouterr().out.strip()
