"""Texts scored in one pass of the members, against the engine's scoring of prompts and the experts' rule."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from ensemble_server.ensembles.base import GenerationRequest, Sampling, collect
from ensemble_server.ensembles.errors import ConfigError, EngineDeadError
from ensemble_server.server.compare.measures.documents import Documents
from ensemble_server.server.compare.measures.text_measure import NotScored, TextScores, measure_text
from ensemble_server.server.compare.measures.windows import cut_windows
from ensemble_server.server.config.gates import identity
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.hosting import Hosting
from tests.conftest import SAMPLE, make_model
from tests.gates import a_gate
from tests.thinned import first_fast

TEXT = Documents(tuple(SAMPLE[start : start + 150] for start in range(0, 600, 150)), is_continuous=True)
WINDOW = 24
POOLS = {
    "even": {"pool": "arithmetic", "members": ["llama", "red", "deep"]},
    "uneven": {"pool": "arithmetic", "members": {"llama": 1, "red": 0, "deep": 5}},
    "product": {"pool": "geometric", "members": ["llama", "red"]},
    "contrast": {"pool": "geometric", "members": {"llama": 1, "red": 0.7, "blue": -0.5}},
    "bayes": {"pool": "posterior", "members": ["llama", "red", "deep"], "share": 0},
    "adaptive": {"pool": "posterior", "members": {"llama": 1, "red": 3}, "share": 0.05},
    "learnt": {"pool": "posterior", "members": {"llama": 1, "red": 3}, "share": "auto"},
}


def config_of(tiny: dict[str, Path], **more: dict):
    models = {
        "llama": {"path": str(tiny["llama"]), "dtype": "float32"},
        "red": {"base": "llama", "adapter": str(tiny["red"])},
        "blue": {"base": "llama", "adapter": str(tiny["blue"])},
        "deep": {"path": str(tiny["deep"]), "dtype": "float32"},
    }
    pools = {name: {"method": "probability_average", **pool} for name, pool in POOLS.items()}
    return parse_config({"models": models | pools | more}, source=Path("config.yaml"))


async def scored_by_prompts(hosting: Hosting, name: str, *, stride: int | None = None) -> TextScores:
    """The same figures by asking the engine for each window as a prompt."""
    nats, num_bytes, num_tokens = np.zeros((3, len(TEXT)))
    for window in cut_windows(hosting.surface(name), TEXT, window=WINDOW, stride=stride):
        request = GenerationRequest(prompt=window.token_ids, prompt_logprobs=0, sampling=Sampling(max_tokens=0))
        answer = await collect(hosting.models[name], request)
        scored = answer.prompt.tokens[window.first_scored :]
        for token, document, size in zip(scored, window.documents, window.num_bytes, strict=True):
            nats[document] -= token.logprob
            num_bytes[document] += size
            num_tokens[document] += 1
    return TextScores(nats, num_bytes, num_tokens)


@pytest.mark.parametrize("stride", first_fast([9, None]))
async def test_one_pass_gives_what_the_server_gives_for_each_window_as_a_prompt(tiny, stride) -> None:
    async with Hosting.open(config_of(tiny)) as hosting:
        arms = {name: name for name in ("llama", "red", *POOLS)}
        scores = await measure_text(hosting, arms, TEXT, window=WINDOW, stride=stride)
        assert list(scores) == list(arms)
        for name in arms:
            expected = await scored_by_prompts(hosting, name, stride=stride)
            np.testing.assert_allclose(scores[name].nats, expected.nats, rtol=1e-4, err_msg=name)
            np.testing.assert_array_equal(scores[name].num_bytes, expected.num_bytes)
            np.testing.assert_array_equal(scores[name].num_tokens, expected.num_tokens)
        assert len({round(found.bits_per_byte, 6) for found in scores.values()}) == len(arms)


@pytest.mark.slow
async def test_selective_averages_are_scored_by_their_rule(tiny) -> None:
    """A threshold of 0 is the average, one out of reach the main member, and all are what prompts are given."""
    even = {"method": "probability_average", "members": ["llama", "red", "deep"]}
    bayes = even | {"pool": "posterior", "share": 0.05}
    rules = {
        "all": even | {"when": {"disagree": 0}},
        "none": even | {"when": {"entropy": 100}},
        "unsure": even | {"when": {"entropy": 5.4}},
        "apart": even | {"when": {"disagree": 0.1}},
        "bayes-unsure": bayes | {"when": {"entropy": 5.4}},
        "bayes-apart": bayes | {"when": {"disagree": 0.1}},
    }
    async with Hosting.open(config_of(tiny, **rules)) as hosting:
        arms = {name: name for name in ("llama", "even", *rules)}
        scores = await measure_text(hosting, arms, TEXT, window=WINDOW)
        for name in rules:
            expected = await scored_by_prompts(hosting, name)
            np.testing.assert_allclose(scores[name].nats, expected.nats, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(scores["all"].nats, scores["even"].nats, rtol=1e-6)
    np.testing.assert_allclose(scores["none"].nats, scores["llama"].nats, rtol=1e-6)


async def test_gated_averages_are_scored_as_prompts_are(tiny) -> None:
    bayes = {"method": "probability_average", "members": ["llama", "red", "deep"], "pool": "posterior", "share": 0.05}
    models = config_of(tiny).models
    named = {name: identity(models, name, Path().absolute()) for name in bayes["members"]}
    gate = a_gate(dict.fromkeys(bayes["members"], 1), identities=named).model_dump()
    async with Hosting.open(config_of(tiny, bayes=bayes, gated=bayes | {"gate": gate})) as hosting:
        scores = await measure_text(hosting, {"bayes": "bayes", "gated": "gated"}, TEXT, window=WINDOW)
        expected = await scored_by_prompts(hosting, "gated")
    np.testing.assert_allclose(scores["gated"].nats, expected.nats, rtol=1e-4)
    assert abs(scores["gated"].nats - scores["bayes"].nats).min() > 0.01


async def test_members_are_read_once_for_all_arms(tiny) -> None:
    read = 0

    def count(stats) -> None:
        nonlocal read
        read += sum(stats.num_tokens.values())

    async with Hosting.open(config_of(tiny), on_step=count) as hosting:
        windows = cut_windows(hosting.surface("llama"), TEXT, window=WINDOW)
        await measure_text(
            hosting, {name: name for name in ("llama", "red", "product", "adaptive")}, TEXT, window=WINDOW
        )
    assert read == 2 * sum(len(window.token_ids) - 1 for window in windows)  # the last token predicts nothing


async def test_a_single_member_costs_what_transformers_says(tiny) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny["llama"], dtype=torch.float32)
    async with Hosting.open(config_of(tiny)) as hosting:
        text = "".join(TEXT.texts)
        ids = hosting.surface("llama").encode(text, add_special_tokens=False)
        found = (await measure_text(hosting, {"a": "llama"}, TEXT, window=WINDOW))["a"]
        first = len(hosting.surface("llama").bytes_of(ids[0]))
    nats = 0.0
    for start in range(0, len(ids) - 1, WINDOW - 1):
        window = torch.tensor(ids[start : start + WINDOW])
        with torch.inference_mode():
            logits = model(window[None]).logits[0, :-1, :320]  # the tokenizer's; the rest is padding
        nats += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    assert found.nats.sum() == pytest.approx(nats, rel=1e-4)
    assert found.num_bytes.sum() == len(text.encode()) - first
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / (len(text.encode()) - first), rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(nats / (len(ids) - 1)), rel=1e-4)


async def test_documents_of_their_own_do_not_see_each_other(tiny) -> None:
    async with Hosting.open(config_of(tiny)) as hosting:
        both = Documents(TEXT.texts[:2], is_continuous=False)
        scores = (await measure_text(hosting, {"a": "even"}, both, window=200))["a"]
        for index, text in enumerate(both.texts):
            alone = Documents((text,), is_continuous=False)
            one = (await measure_text(hosting, {"a": "even"}, alone, window=200))["a"]
            assert one.nats[0] == pytest.approx(scores.nats[index], rel=1e-5)
            assert scores.num_bytes[index] < len(text.encode())  # nothing predicts a document's first token
        joined = (await measure_text(hosting, {"a": "even"}, Documents(both.texts, True), window=200))["a"]
        assert joined.nats[1] != pytest.approx(scores.nats[1], rel=1e-5)


async def test_members_of_other_vocabularies_are_scored_in_a_pass_of_their_own(tiny, tmp_path) -> None:
    other = make_model(tmp_path / "other", seed=7, extra=("<|more|>",))
    async with Hosting.open(config_of(tiny, other={"path": str(other), "dtype": "float32"})) as hosting:
        heard = []
        arms = {name: name for name in ("even", "other", "llama")}
        scores = await measure_text(hosting, arms, TEXT, window=WINDOW, on_progress=lambda *done: heard.append(done))
        alone = await measure_text(hosting, {"x": "other"}, TEXT, window=WINDOW)
    np.testing.assert_allclose(scores["other"].nats, alone["x"].nats, rtol=1e-5)
    assert heard == [(done, len(heard)) for done in range(1, len(heard) + 1)]


async def test_text_level_ensembles_say_why_they_have_no_figure(tiny) -> None:
    crowd = {"method": "crowd_vote", "members": ["llama", "red"], "similarity": {"rouge_l_word": 1}}
    remote = {"url": "http://127.0.0.1:9/v1"}
    async with Hosting.open(config_of(tiny, crowd=crowd, remote=remote)) as hosting:
        scores = await measure_text(
            hosting, {"crowd": "crowd", "remote": "remote", "llama": "llama"}, TEXT, window=WINDOW
        )
    assert "texts, which have no token ids in common" in scores["crowd"].reason
    assert "gives text, not probabilities" in scores["remote"].reason
    assert isinstance(scores["llama"], TextScores)


async def test_a_context_smaller_than_the_window_is_a_reason_not_an_error(tiny) -> None:
    async with Hosting.open(config_of(tiny)) as hosting:
        scores = await measure_text(hosting, {"a": "even"}, TEXT, window=1000)
    assert scores["a"] == NotScored("its context holds 512 tokens, the window is 1000; choose a smaller window")


@pytest.mark.parametrize(("window", "stride"), [(1, None), (10, 10), (10, 0)])
async def test_windows_that_cannot_be_are_refused(tiny, window, stride) -> None:
    async with Hosting.open(config_of(tiny)) as hosting:
        with pytest.raises(ConfigError, match=r"window|stride"):
            await measure_text(hosting, {"a": "llama"}, TEXT, window=window, stride=stride)


async def test_an_engine_that_is_gone_is_an_error(tiny) -> None:
    async with Hosting.open(config_of(tiny)) as hosting:
        pass
    with pytest.raises(EngineDeadError):
        await measure_text(hosting, {"a": "llama"}, TEXT, window=WINDOW)
