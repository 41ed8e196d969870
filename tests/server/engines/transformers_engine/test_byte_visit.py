"""Texts that members of different vocabularies read to be judged by them, against plain forwards and by themselves."""

from __future__ import annotations

import asyncio
from typing import Literal

import numpy as np
import pytest
import torch

from ensemble_server.ensembles.base import Mixture, collect
from ensemble_server.ensembles.errors import ContextLengthError, ModelLoadError, RequestError, UnsupportedError
from ensemble_server.ensembles.pooling import learned_share, posterior
from ensemble_server.ensembles.spelling import END
from ensemble_server.ensembles.spelling.given_text import GivenText
from ensemble_server.server.engines.transformers_engine.engine import TransformersEngine
from ensemble_server.server.weights.spelled_vocabulary import spelled_vocabulary
from tests.server.engines.transformers_engine.families import Families, asked, expected_logprobs
from tests.server.engines.transformers_engine.test_numerics import OnEngine
from tests.thinned import first_fast

TOLERANCE_NATS = 1e-3
TEXT = "The quick 数 and\n\ncafé."


class Seen:
    rows: torch.Tensor
    targets: torch.Tensor

    def __call__(self, rows: torch.Tensor, targets: torch.Tensor) -> None:
        self.rows, self.targets = rows.clone(), targets.clone()


def plain(families: Families, name: str, text: str) -> tuple[int, np.ndarray]:
    """-> where the member's expectations begin, and the evidence for each byte from there on, by plain forwards."""
    member = families.members[name]
    token_bytes = spelled_vocabulary(member).token_bytes
    ids = member.surface.encode(text)
    begin = ids[:1]
    begins_at = len(token_bytes[ids[0]])
    given = GivenText(families.distribution(name, begin), text.encode()[begins_at:])
    given.follow(ids[1:], token_bytes)
    while given.wanted:
        for history in list(given.wanted):
            given.give(history, families.distribution(name, [*begin, *history.tokens()]))
        given.settle()
    return begins_at, given.evidence()


@pytest.mark.parametrize("prefill_chunk", [7])
async def test_every_byte_has_the_evidence_that_plain_forwards_give_it(families, prefill_chunk):
    names, seen = ("llama", "gemma", "red"), Seen()
    with families.running(prefill_chunk=prefill_chunk) as engine:
        answer, _ = await asyncio.gather(
            collect(OnEngine(engine, Mixture({"llama": 1})), asked(max_tokens=5)),
            engine.visit_bytes(names, TEXT, seen),
        )
    assert len(answer.choices[0].token_ids) == 5
    expected = [plain(families, name, TEXT) for name in names]
    begin = max(begins_at for begins_at, _ in expected)
    assert bytes(seen.targets.tolist()) == TEXT.encode()[begin:]
    assert seen.rows.shape == (3, len(TEXT.encode()) - begin, 257)
    found = seen.rows.gather(2, seen.targets[None, :, None].expand(3, -1, 1))[..., 0].numpy()
    for row, (begins_at, evidence) in zip(found, expected, strict=True):
        assert row == pytest.approx(evidence[begin - begins_at :], abs=TOLERANCE_NATS)
    assert seen.rows.exp().sum(-1).numpy() == pytest.approx(1, abs=0.2)  # but for the evidence in it
    assert (seen.rows[..., END] > -np.inf).any()


async def scored(engine: TransformersEngine, mixture: Mixture, prompt: str | tuple[int, ...] = TEXT, **options: object):
    return await collect(OnEngine(engine, mixture), asked(prompt, max_tokens=0, prompt_logprobs=0, **options))


async def test_prompts_are_scored_piece_by_piece(mixed, families):
    weights = {"llama": 1, "gemma": 3}
    answer = await scored(mixed, Mixture(weights))
    evidence = {name: plain(families, name, TEXT) for name in weights}
    begin = max(begins_at for begins_at, _ in evidence.values())
    rows = np.stack([row[begin - begins_at :] for begins_at, row in evidence.values()])
    pooled = np.log((np.array([[0.25], [0.75]]) * np.exp(rows)).sum(0))
    tokens = answer.prompt.tokens
    assert [token.token_id for token in tokens] == list(answer.prompt.token_ids)
    assert b"".join(token.bytes for token in tokens) == TEXT.encode()
    at = 0
    for token in tokens:
        end = at + len(token.bytes)
        if at < begin:
            assert token.logprob is None
        else:
            assert token.logprob == pytest.approx(pooled[at - begin : end - begin].sum(), abs=TOLERANCE_NATS)
        at = end
    assert answer.choices[0].finish_reason == "length"


async def test_the_posterior_pool_loses_no_more_than_its_bound(mixed):
    weights = {"llama": 1, "gemma": 1, "qwen": 1}

    async def loss(mixture: Mixture) -> float:
        answer = await scored(mixed, mixture)
        return -sum(token.logprob for token in answer.prompt.tokens[1:])

    alone = []
    for name in weights:  # over the same bytes: those that the first member's first token leaves
        seen = Seen()
        await mixed.visit_bytes(("llama", "gemma", "qwen"), TEXT, seen)
        index = list(weights).index(name)
        alone.append(-float(seen.rows[index].gather(1, seen.targets[:, None]).sum()))
    for share in (0.0, 0.05):
        bound = posterior.loss_bound(1 / 3, len(TEXT.encode()), share)
        assert await loss(Mixture(weights, "posterior", share)) <= min(alone) + bound + TOLERANCE_NATS


async def test_a_learnt_share_loses_no_more_than_its_bound_to_the_best_of_its_grid(mixed):
    weights = {"llama": 1, "gemma": 1}

    async def loss(share: float | Literal["auto"]) -> float:
        answer = await scored(mixed, Mixture(weights, "posterior", share))
        return -sum(token.logprob for token in answer.prompt.tokens if token.logprob is not None)

    best = min([await loss(share) for share in learned_share.GRID])
    assert await loss("auto") <= best + learned_share.loss_bound(len(TEXT.encode())) + TOLERANCE_NATS


async def test_an_answer_has_the_probability_that_scoring_it_gives(mixed):
    """Rows that were drawn from against the evidence of the text that is there."""
    mixture, prompt = (
        Mixture({"llama": 1, "gemma": 1}),
        "T",
    )  # one way to spell it: answers follow a prompt as it was read
    answer = (await collect(OnEngine(mixed, mixture), asked(prompt, max_tokens=10))).choices[0]
    text = answer.text.removesuffix("\N{REPLACEMENT CHARACTER}")  # max_tokens may cut a character
    again = await scored(mixed, mixture, prompt + text)
    at, found = 0, 0.0
    for token in again.prompt.tokens:
        found += token.logprob if at >= len(prompt.encode()) else 0.0
        at += len(token.bytes)
    at, drawn, num_pieces = 0, 0.0, 0
    for token in answer.tokens:
        at += len(token.bytes)
        if at <= len(text.encode()):
            drawn, num_pieces = drawn + token.logprob, num_pieces + 1
    assert num_pieces > 5
    assert found == pytest.approx(drawn, abs=0.1 * num_pieces)  # random models are sure of odd ways to spell


@pytest.mark.parametrize("pool", first_fast(["arithmetic", "posterior"]))
async def test_alternatives_to_pieces_of_a_prompt_have_the_probability_of_their_bytes(mixed, families, pool):
    """At each piece against plain forwards of whole texts, at the weights that the text before it has left."""
    mixture = Mixture({"llama": 1, "gemma": 3}, pool, 0.05 if pool == "posterior" else 0.0)
    text = "The quick 数"
    plain_scores = (await scored(mixed, mixture, text)).prompt.tokens
    tokens = (await collect(OnEngine(mixed, mixture), asked(text, max_tokens=0, prompt_logprobs=3))).prompt.tokens
    assert [(one.token_id, one.logprob) for one in tokens] == [(one.token_id, one.logprob) for one in plain_scores]
    lattices, data = [], text.encode()
    token_bytes = [spelled_vocabulary(families.members[name]).token_bytes for name in mixture.weights]
    heads = [families.members[name].surface.encode(text)[:1] for name in mixture.weights]
    begins = [len(spelled[head[0]]) for spelled, head in zip(token_bytes, heads, strict=True)]
    begin = max(begins)
    for name, head, first in zip(mixture.weights, heads, begins, strict=True):
        lattices.append(families.lattice(name, head))
        for byte in data[first:begin]:
            lattices[-1].feed(byte)
    at, weights, num_told = 0, np.array([0.25, 0.75]), 0
    for token in tokens:
        end = at + len(token.bytes)
        if at < begin:
            assert token.top == () and token.logprob is None
            at = end
            continue
        assert 1 <= len(token.top) <= 3
        logprobs = [one.logprob for one in token.top]
        assert logprobs == sorted(logprobs, reverse=True)
        for one in token.top:
            if one.token_id == token.token_id and one.bytes == token.bytes:
                assert one.logprob == token.logprob
            elif one.token_id not in families.members["llama"].eos_ids:
                expected, _ = expected_logprobs(mixture, [lattice.fork() for lattice in lattices], one.bytes, weights)
                assert one.logprob == pytest.approx(expected.sum(), abs=TOLERANCE_NATS)
                num_told += 1
        _, path = expected_logprobs(mixture, lattices, data[at:end], weights)
        evidence = [lattice.lattice.evidence for lattice in lattices]
        weights = path[:, -1]
        if pool == "posterior":
            weights = posterior.update(weights, evidence, np.array([0.25, 0.75]), 0.05)
        at = end
    assert num_told > 10


@pytest.mark.slow
async def test_prompts_with_alternatives_may_be_continued(mixed):
    mixture = Mixture({"llama": 1, "gemma": 1})
    both = await collect(OnEngine(mixed, mixture), asked(max_tokens=4, prompt_logprobs=2, top_logprobs=2))
    alone = await collect(OnEngine(mixed, mixture), asked(max_tokens=4, top_logprobs=2))
    assert both.choices[0].tokens == alone.choices[0].tokens
    assert all(token.top for token in both.prompt.tokens[1:])


async def test_scored_prompts_may_be_continued(mixed):
    mixture = Mixture({"llama": 1, "gemma": 1})
    both = await collect(OnEngine(mixed, mixture), asked(max_tokens=4, prompt_logprobs=0))
    alone = await collect(OnEngine(mixed, mixture), asked(max_tokens=4))
    assert both.choices[0].text == alone.choices[0].text
    assert len(both.prompt.tokens) == len(both.prompt.token_ids)
    assert alone.prompt.tokens == ()


async def test_an_error_of_the_visitor_ends_its_own_call_alone(mixed):
    def broken(rows: torch.Tensor, targets: torch.Tensor) -> None:
        raise KeyError("my own")

    with pytest.raises(KeyError, match="my own"):
        await mixed.visit_bytes(("llama", "gemma"), TEXT, broken)
    await mixed.visit_bytes(("llama", "gemma"), TEXT, Seen())


async def test_a_member_that_cannot_read_a_conversation_is_named(mixed, families, monkeypatch):
    monkeypatch.setattr(families.members["gemma"].surface, "chat_template", None)
    messages = ({"role": "user", "content": "Hi"},)
    named = pytest.raises(UnsupportedError, match="member 'gemma' has no chat template")
    with named:
        await collect(OnEngine(mixed, Mixture({"llama": 1, "gemma": 1})), asked(prompt=None, messages=messages))
    with named:
        await mixed.visit_bytes(("llama", "gemma"), TEXT, Seen(), after=messages)


async def test_what_cannot_be_read_is_refused(mixed):
    with pytest.raises(ContextLengthError, match="its context holds 256"):
        await mixed.visit_bytes(("llama", "gemma"), "x y " * 200, Seen())
    with pytest.raises(RequestError, match="'llama' does not read this text byte for byte"):
        await mixed.visit_bytes(("llama", "gemma"), "a <|im_end|> b", Seen())
    with pytest.raises(ModelLoadError):
        await mixed.visit_logprobs(("llama", "gemma"), (5, 6, 7), Seen())
