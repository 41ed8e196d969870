"""Against plain transformers: the labels' log-probabilities by one forward of the whole text each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from pydantic import TypeAdapter

from ensemble_server.ensembles.errors import DeadlineError, RequestError, UnknownModelError, UnsupportedError
from ensemble_server.server.config.loading import parse_config
from ensemble_server.server.hosting import Hosting
from ensemble_server.server.requests.classify import Classification, Priors
from ensemble_server.server.requests.classify import classify as classify_body
from ensemble_server.server.requests.classify_body import ClassifyBody
from ensemble_server.server.requests.errors import BodyError, checked
from ensemble_server.server.requests.protocol import ParameterCheck
from ensemble_server.server.requests.terms import Terms
from tests.reference import member_logprobs, pooled

PROMPT = "The quick brown fox is"
LABELS = ["good", "bad", "a question"]
CHAT = [{"role": "user", "content": "Is the fox quick?"}]


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def hosting(tiny: dict[str, Path]) -> AsyncIterator[Hosting]:
    models = {
        "base": {"path": str(tiny["llama"])},
        "red": {"base": "base", "adapter": str(tiny["red"])},
        "polite": {"base": "base", "system_prompt": "Be polite."},
        "far": {"url": "http://127.0.0.1:9/v1"},
        "mix": {"method": "probability_average", "members": {"base": 1, "red": 3}},
        "views": {"method": "probability_average", "members": ["base", "polite"]},
        "crowd": {"method": "crowd_vote", "members": {"base": 1, "red": 3}},
        "nested": {"method": "majority", "members": ["crowd", "mix"]},
        "with_far": {"method": "crowd_vote", "members": ["base", "far"]},
        "routed": {"method": "routing", "members": {"base": {"positive_prompts": ["x"]}}},
    }
    config = parse_config({"models": models, "engine": {"max_context": 256}}, source=Path("/config.yaml"))
    async with Hosting.open(config) as hosting:
        yield hosting


async def classify(
    hosting: Hosting, body: dict[str, Any], *, deadline_s: float | None = None, priors: Priors | None = None
) -> Classification:
    """As a row of a batch is classified."""
    parsed = checked(TypeAdapter(ClassifyBody), body)
    ParameterCheck(is_strict=True).ignored(parsed)
    terms = Terms("req-1", 0, lambda: "", priority=1, deadline_s=deadline_s)
    return await classify_body(hosting, parsed, terms, Priors() if priors is None else priors)


def reference(
    hosting: Hosting,
    tiny: dict[str, Path],
    members: dict[str, float],
    start: Sequence[int],
    texts: Sequence[Sequence[int]],
) -> np.ndarray:
    """Softmax over the labels of the sums of the arithmetic pool's log-probabilities after `start`."""
    folders = {"base": (tiny["llama"], None), "red": (tiny["llama"], tiny["red"])}
    sums = []
    for ids in texts:
        logprobs = np.stack([member_logprobs(*folders[name], ids, 320) for name in members])
        mixed, _ = pooled("arithmetic", logprobs, list(members.values()), ids)
        sums.append(sum(mixed[place - 1, ids[place]] for place in range(len(start), len(ids))))
    powers = np.exp(np.array(sums) - max(sums))
    return powers / powers.sum()


def encoded(hosting: Hosting, prompt: str, labels: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    surface = hosting.surface("base")
    assert surface is not None
    return surface.encode(prompt), [surface.encode(f"{prompt} {label}") for label in labels]


@pytest.mark.parametrize(("model", "members"), [("base", {"base": 1.0}), ("mix", {"base": 1.0, "red": 3.0})])
async def test_labels_are_scored_as_plain_transformers_score_them(
    hosting: Hosting, tiny: dict[str, Path], model: str, members: dict[str, float]
) -> None:
    found = await classify(hosting, {"model": model, "prompt": PROMPT, "labels": LABELS})
    expected = reference(hosting, tiny, members, *encoded(hosting, PROMPT, LABELS))
    assert list(found.probabilities) == LABELS
    assert list(found.probabilities.values()) == pytest.approx(expected, abs=1e-5)
    assert found.label == LABELS[int(expected.argmax())]


async def test_labels_of_one_token_are_read_from_one_distribution(hosting: Hosting, tiny: dict[str, Path]) -> None:
    surface = hosting.surface("base")
    assert surface is not None
    start = surface.encode(PROMPT)
    after = member_logprobs(tiny["llama"], None, start, 320)[-1]
    likely = [int(token_id) for token_id in np.argsort(-after) if surface.decode([int(token_id)]).isalpha()][:3]
    labels = [surface.decode([token_id]) for token_id in likely]
    found = await classify(hosting, {"model": "base", "prompt": PROMPT, "labels": labels, "separator": ""})
    powers = np.exp(after[likely])
    assert list(found.probabilities.values()) == pytest.approx(powers / powers.sum(), abs=1e-5)
    assert found.usage.prompt_tokens == len(start)  # read once


async def test_unlikely_labels_of_one_token_are_scored_all_the_same(hosting: Hosting, tiny: dict[str, Path]) -> None:
    surface = hosting.surface("base")
    assert surface is not None
    start = surface.encode(PROMPT)
    after = member_logprobs(tiny["llama"], None, start, 320)[-1]
    rare = [int(token_id) for token_id in np.argsort(after) if surface.decode([int(token_id)]).isascii()]
    rare = [token_id for token_id in rare if surface.decode([token_id]).isalnum()][:2]
    labels = [surface.decode([token_id]) for token_id in rare]
    found = await classify(hosting, {"model": "base", "prompt": PROMPT, "labels": labels, "separator": ""})
    powers = np.exp(after[rare] - after[rare].max())
    assert list(found.probabilities.values()) == pytest.approx(powers / powers.sum(), abs=1e-5)


async def test_a_chat_is_scored_after_the_assistants_turn_opens(hosting: Hosting, tiny: dict[str, Path]) -> None:
    surface = hosting.surface("base")
    assert surface is not None
    labels = ["Yes", "No"]
    start = surface.render(CHAT)
    texts = [surface.encode(surface.render_text(CHAT) + label, add_special_tokens=False) for label in labels]
    found = await classify(hosting, {"model": "base", "messages": CHAT, "labels": labels})
    assert list(found.probabilities.values()) == pytest.approx(
        reference(hosting, tiny, {"base": 1.0}, start, texts), abs=1e-5
    )


async def test_tokens_that_span_the_border_are_scored_from_where_all_labels_depart(
    hosting: Hosting, tiny: dict[str, Path]
) -> None:
    surface = hosting.surface("base")
    assert surface is not None
    prompt, labels = "The quick brown ", ["fox", "lazy dog"]
    texts = [surface.encode(prompt + label) for label in labels]
    start = surface.encode(prompt)
    assert texts[0][: len(start)] != start, "tokens here begin with a space"
    found = await classify(hosting, {"model": "base", "prompt": prompt, "labels": labels, "separator": ""})
    shared = start[:-1]
    assert all(ids[: len(shared)] == shared for ids in texts)
    assert list(found.probabilities.values()) == pytest.approx(
        reference(hosting, tiny, {"base": 1.0}, shared, texts), abs=1e-5
    )


async def test_token_ids_are_a_prompt_too_and_input_another_name(hosting: Hosting) -> None:
    surface = hosting.surface("base")
    assert surface is not None
    as_text = await classify(hosting, {"model": "base", "input": PROMPT, "labels": LABELS})
    ids = surface.encode(PROMPT)
    as_ids = await classify(hosting, {"model": "base", "prompt": ids, "labels": LABELS, "separator": " "})
    assert as_ids.probabilities == pytest.approx(as_text.probabilities, abs=1e-5)


async def test_a_longer_label_gains_by_normalising(hosting: Hosting) -> None:
    body = {"model": "base", "prompt": PROMPT, "labels": LABELS}
    plain, tokens, num_bytes = [
        (await classify(hosting, {**body, "normalise": rule})).probabilities["a question"]
        for rule in ("sum", "tokens", "bytes")
    ]
    assert plain < tokens
    assert plain < num_bytes


async def test_an_ensemble_of_texts_averages_its_members_with_its_weights(hosting: Hosting) -> None:
    body = {"prompt": PROMPT, "labels": LABELS}
    base, red = [(await classify(hosting, {**body, "model": name})).probabilities for name in ("base", "red")]
    found = await classify(hosting, {**body, "model": "crowd"})
    assert found.probabilities == pytest.approx({label: (base[label] + 3 * red[label]) / 4 for label in LABELS})
    assert found.members == {"base": pytest.approx(base), "red": pytest.approx(red)}
    only_base = await classify(hosting, {**body, "model": "crowd", "ensemble": {"weights": {"base": 1}}})
    assert only_base.probabilities == pytest.approx(base)
    nested = await classify(hosting, {**body, "model": "nested"})
    assert nested.members["crowd"] == pytest.approx(found.probabilities)


async def test_a_mixture_takes_weights_and_pool_from_the_request(hosting: Hosting) -> None:
    body = {"prompt": PROMPT, "labels": LABELS}
    red = await classify(hosting, {**body, "model": "red"})
    found = await classify(hosting, {**body, "model": "mix", "ensemble": {"weights": {"red": 1}, "pool": "geometric"}})
    assert found.probabilities == pytest.approx(red.probabilities, abs=1e-5)


async def test_the_probabilities_after_a_content_free_prompt_are_divided_out(hosting: Hosting) -> None:
    body = {"model": "crowd", "labels": LABELS}
    free = {"prompt": "The N/A is"}
    members = {}
    for name in ("base", "red"):
        plain = (await classify(hosting, {**body, "model": name, "prompt": PROMPT})).probabilities
        prior = (await classify(hosting, {**body, "model": name, **free})).probabilities
        ratio = {label: plain[label] / prior[label] for label in LABELS}
        members[name] = {label: ratio[label] / sum(ratio.values()) for label in LABELS}
    bodies = [{**body, "prompt": PROMPT, "content_free": free}] * 3
    priors = Priors()
    found = await asyncio.gather(*(classify(hosting, one, priors=priors) for one in bodies))
    assert found[0].members["base"] == pytest.approx(members["base"], rel=1e-4)
    assert found[0].members["red"] == pytest.approx(members["red"], rel=1e-4)
    assert found[0].probabilities == found[1].probabilities == found[2].probabilities
    same = await classify(hosting, {**body, **free, "content_free": free})
    assert same.probabilities == pytest.approx(dict.fromkeys(LABELS, 1 / 3), rel=1e-4)


async def test_what_is_shown_is_json_with_the_label_and_each_members_view(hosting: Hosting) -> None:
    shown = (await classify(hosting, {"model": "crowd", "prompt": PROMPT, "labels": LABELS})).shown()
    assert shown["object"] == "classification"
    assert shown["model"] == "crowd"
    assert shown["label"] in LABELS
    assert set(shown["members"]) == {"base", "red"}
    assert shown["usage"]["total_tokens"] == shown["usage"]["prompt_tokens"] > 0


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"model": "far"}, UnsupportedError, "'far' is remote"),
        ({"model": "with_far"}, UnsupportedError, "'far' is remote"),
        ({"model": "routed"}, UnsupportedError, "routing"),
        ({"model": "nobody"}, UnknownModelError, "nobody"),
        ({"model": "views", "prompt": None, "messages": CHAT}, UnsupportedError, "different views"),
        ({"ensemble": {"weights": {"nobody": 1}}, "model": "crowd"}, RequestError, "nobody"),
        ({"ensemble": {"weights": {"base": 0}}, "model": "crowd"}, RequestError, "one above zero"),
        ({"ensemble": {"samples": 3}, "model": "crowd"}, RequestError, "samples"),
        ({"lables": ["a"]}, RequestError, "did you mean 'labels'"),
        ({"content_free": {"promt": "x", "prompt": "x"}}, RequestError, "content_free.promt"),
        ({"prompt": ""}, RequestError, "no token of the prompt"),
    ],
)
async def test_what_cannot_be_classified_is_refused_by_name(
    hosting: Hosting, changes: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        await classify(hosting, {"model": "base", "prompt": PROMPT, "labels": LABELS, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": ["one"]},
        {"labels": ["a", "a"]},
        {"labels": ["a", " "]},
        {"labels": "a,b"},
        {"messages": CHAT},
        {"prompt": None},
        {"normalise": "words"},
        {"prompt": []},
    ],
)
async def test_a_body_that_is_no_classification_is_refused(hosting: Hosting, changes: dict[str, Any]) -> None:
    with pytest.raises(BodyError):
        await classify(hosting, {"model": "base", "prompt": PROMPT, "labels": LABELS, **changes})


async def test_a_deadline_that_is_over_is_an_error(hosting: Hosting) -> None:
    with pytest.raises(DeadlineError):
        await classify(hosting, {"model": "base", "prompt": PROMPT, "labels": LABELS}, deadline_s=0)
