"""Members of different vocabularies in one average: numbers against plain transformers, and what clients rely on."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ensemble_server.ensembles.base import Answer, GenerationRequest, Grammar, Mixture, Sampling, collect
from ensemble_server.ensembles.errors import MemberError, RequestError, UnsupportedError
from ensemble_server.ensembles.spelling.lattice import History
from ensemble_server.server.engines.shared.choice_text import joined
from ensemble_server.server.engines.transformers_engine.backbone import Backbone
from ensemble_server.server.engines.transformers_engine.byte_choice import ByteChoice
from ensemble_server.server.engines.transformers_engine.byte_prompt import healed
from ensemble_server.server.engines.transformers_engine.speller import Speller
from ensemble_server.server.weights.spelled_vocabulary import spelled_vocabulary
from tests.server.engines.transformers_engine.families import Families, PlainLattice, asked, expected_logprobs
from tests.server.engines.transformers_engine.test_numerics import OnEngine
from tests.thinned import first_fast

TOLERANCE_NATS = 1e-3
PROMPT = "The quick brown fo"
MIXTURES = {
    "arithmetic": Mixture({"llama": 1, "gemma": 2}),
    "geometric with a negative weight": Mixture({"llama": 1, "qwen": 1, "gemma": -0.5}, "geometric"),
    "posterior": Mixture({"gemma": 1, "qwen": 1, "llama": 1}, "posterior", 0.05),
    "an adapter and its base beside another family": Mixture({"red": 1, "llama": 1, "gemma": 1}),
    "by bytes though of one vocabulary": Mixture({"llama": 1, "red": 2}, vocabulary="bytes"),
}


async def ask(engine, mixture: Mixture, request: GenerationRequest | None = None, **options: object) -> Answer:
    return await collect(OnEngine(engine, mixture), request or asked(**options))


def plain_lattices(families: Families, mixture: Mixture, prompt: str = PROMPT) -> list[PlainLattice]:
    """Of every member, at the end of the prompt."""
    lattices = []
    for name in mixture.weights:
        member = families.members[name]
        ids = member.surface.encode(prompt)
        head, tail = healed(prompt.encode(), spelled_vocabulary(member).token_bytes, ids)
        lattice = families.lattice(name, head)
        for byte in tail:
            lattice.feed(byte)
        lattices.append(lattice)
    return lattices


def check(families: Families, mixture: Mixture, answer: Answer, prompt: str = PROMPT) -> None:
    """Every piece against plain forwards of whole texts."""
    lattices = plain_lattices(families, mixture, prompt)
    choice = answer.choices[0]
    text = b"".join(token.bytes for token in choice.tokens)
    first = np.array([view.weight for view in choice.tokens[0].members.values()])
    expected, weights = expected_logprobs(mixture, lattices, text, first)
    at = 0
    for token in choice.tokens:
        end = at + len(token.bytes)
        assert token.logprob == pytest.approx(expected[at:end].sum(), abs=TOLERANCE_NATS)
        assert [view.weight for view in token.members.values()] == pytest.approx(weights[:, at], abs=TOLERANCE_NATS)
        at = end


@pytest.mark.parametrize("mixture", MIXTURES.values(), ids=MIXTURES)
async def test_pieces_have_the_probability_that_plain_forwards_give_them(mixed, families, mixture):
    answer = await ask(mixed, mixture, explain=True, max_tokens=4)
    check(families, mixture, answer)
    assert answer.done.vocabulary == "bytes"


@pytest.mark.parametrize("name", first_fast(["posterior", "arithmetic", "geometric with a negative weight"]))
async def test_alternatives_have_the_probability_that_plain_forwards_give_them(mixed, families, name):
    """Those of the pool, and each member's own; the text is what it is without them."""
    mixture = MIXTURES[name]
    answer = await ask(mixed, mixture, explain=True, top_logprobs=3, explain_top=2, max_tokens=4)
    plain = await ask(mixed, mixture, max_tokens=4)
    assert answer.choices[0].token_ids == plain.choices[0].token_ids
    check(families, mixture, answer)
    names = list(mixture.weights)
    alone = [Mixture({name: 1}, mixture.pool) for name in names]
    lattices, num_checked = plain_lattices(families, mixture), 0
    for token in answer.choices[0].tokens:
        weights = np.array([view.weight for view in token.members.values()])
        own_tops = [view.top for view in token.members.values()]
        for top, num in ((token.top, 3), *((own, 2) for own in own_tops)):
            assert 0 < len(top) <= num
            logprobs = [other.logprob for other in top]
            assert logprobs == sorted(logprobs, reverse=True) and np.exp(logprobs).sum() < 1 + 1e-5
            for other in top:
                assert other.bytes.decode(errors="replace") == other.text
        for other in (one for one in token.top if one.bytes != b"<|im_end|>"):
            forks = [one.fork() for one in lattices]
            expected, _ = expected_logprobs(mixture, forks, other.bytes, weights)
            assert other.logprob == pytest.approx(expected.sum(), abs=TOLERANCE_NATS)
            num_checked += len(other.bytes) > 1
        for one, own, single in zip(lattices, own_tops, alone, strict=True):
            for other in (one for one in own if one.bytes != b"<|im_end|>"):
                expected, _ = expected_logprobs(single, [one.fork()], other.bytes, np.ones(1))
                assert other.logprob == pytest.approx(expected.sum(), abs=TOLERANCE_NATS)
        for byte in token.bytes:
            for one in lattices:
                one.feed(byte)
    assert num_checked > 1


@pytest.mark.slow
async def test_alternatives_are_told_of_every_choice_and_of_whoever_shares_its_steps(families):
    mixture = Mixture({"llama": 1, "gemma": 1})
    options = {"n": 3, "temperature": 1, "seed": 5, "max_tokens": 5, "top_logprobs": 4}
    with families.running(max_batch=4, prefill_chunk=4) as engine:
        answers = await asyncio.gather(
            ask(engine, mixture, **options), ask(engine, mixture, **options), ask(engine, Mixture({"llama": 1}))
        )
    for ours, theirs in zip(answers[0].choices, answers[1].choices, strict=True):
        assert ours.text == theirs.text and len(ours.tokens) == 5
        for token, twin in zip(ours.tokens, theirs.tokens, strict=True):
            assert [one.bytes for one in token.top] == [one.bytes for one in twin.top]
            assert [one.logprob for one in token.top] == pytest.approx([one.logprob for one in twin.top], abs=1e-4)
            same = [one.logprob for one in token.top if one.bytes == token.bytes]
            assert same == [token.logprob] or token.logprob <= min(one.logprob for one in token.top)


async def test_nobody_looks_farther_ahead_than_a_member_can_read(mixed, families, monkeypatch):
    """The answers are the same, with fewer alternatives."""
    mixture, options = Mixture({"llama": 1, "gemma": 1}), {"top_logprobs": 5, "max_tokens": 4}
    whole = await ask(mixed, mixture, **options)
    monkeypatch.setattr(Speller, "has_room_for", lambda speller, history: False)
    cut = await ask(mixed, mixture, **options)
    assert cut.choices[0].token_ids == whole.choices[0].token_ids
    for token, other in zip(cut.choices[0].tokens, whole.choices[0].tokens, strict=True):
        assert 0 < len(token.top) <= len(other.top)


async def test_a_learnt_share_follows_the_text_by_bytes(mixed):
    answer = await ask(mixed, Mixture({"gemma": 1, "llama": 1}, "posterior", "auto"), explain=True, max_tokens=8)
    weights = np.array([[view.weight for view in token.members.values()] for token in answer.choices[0].tokens])
    assert weights.sum(axis=1) == pytest.approx(np.ones(len(weights)))
    assert answer.done.vocabulary == "bytes" and np.ptp(weights[:, 0]) > 0


@pytest.mark.slow
async def test_requests_of_both_kinds_share_their_steps(families):
    """Chunked prefill, few places, background rows that pause: the same numbers."""
    with families.running(max_batch=3, prefill_chunk=4) as engine:
        tokens = Mixture({"llama": 1, "red": 1})
        jobs = [
            ask(engine, mixture, asked(explain=True, max_tokens=3, priority=place % 2))
            for place, mixture in enumerate(list(MIXTURES.values())[:2])
        ]
        answers = await asyncio.gather(*jobs, *(ask(engine, tokens, max_tokens=20) for _ in range(4)))
        alone = await ask(engine, tokens, max_tokens=20)
    for mixture, answer in zip(list(MIXTURES.values())[:2], answers[:2], strict=True):
        check(families, mixture, answer)
    for answer in answers[2:]:
        assert answer.choices[0].token_ids == alone.choices[0].token_ids
        assert answer.done.vocabulary == "tokens"


@pytest.mark.parametrize("weights", [(1, 1), (3, 0.5)])
async def test_a_twin_with_shuffled_ids_changes_nothing(mixed, weights):
    alone = await ask(mixed, Mixture({"llama": 1}, vocabulary="bytes"))
    both = await ask(mixed, Mixture({"llama": weights[0], "twin": weights[1]}))
    assert both.choices[0].token_ids == alone.choices[0].token_ids
    for ours, theirs in zip(both.choices[0].tokens, alone.choices[0].tokens, strict=True):
        assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-5 * len(ours.bytes))


async def test_one_member_that_is_left_is_served_by_tokens(mixed):
    alone = await ask(mixed, Mixture({"gemma": 1}))
    assert alone.done.vocabulary is None
    assert len(alone.choices[0].token_ids) == 12


async def test_text_is_utf8_under_every_seed_and_seeds_repeat(mixed):
    mixture = Mixture({"llama": 1, "gemma": 1})

    async def sampled(seed: int) -> Answer:
        return await ask(mixed, mixture, temperature=1.5, seed=seed, n=2, prompt="数学 😀 é", max_tokens=6)

    answers = await asyncio.gather(*(sampled(seed) for seed in range(3)))
    again = await sampled(2)
    assert [choice.text for choice in again.choices] == [choice.text for choice in answers[2].choices]
    assert len({choice.text for answer in answers for choice in answer.choices}) > 3
    for answer in answers:
        for choice in answer.choices:
            data = b"".join(token.bytes for token in choice.tokens)
            assert data.decode(errors="ignore").encode() == data[: len(data.decode(errors="ignore").encode())]
            assert len(data) - len(data.decode(errors="ignore").encode()) < 4  # cut by max_tokens inside a character
            assert choice.text.removesuffix("\N{REPLACEMENT CHARACTER}") == data.decode(errors="ignore")


async def test_max_tokens_counts_pieces_of_the_surface(mixed, families):
    for mixture in (Mixture({"llama": 1, "gemma": 1}), Mixture({"gemma": 1, "llama": 1})):
        surface = families.members[next(iter(mixture.weights))].surface
        answer = await ask(mixed, mixture, max_tokens=7)
        choice = answer.choices[0]
        assert choice.finish_reason == "length"
        assert len(choice.token_ids) == len(choice.tokens) == answer.done.usage.completion_tokens == 7
        assert b"".join(map(surface.bytes_of, choice.token_ids)) == b"".join(token.bytes for token in choice.tokens)


def test_a_choice_that_ends_amid_another_spelling_shows_no_more_of_it(families):
    """What is out was spelled otherwise than what has won, and the first piece of the rest is the last one allowed."""
    member, text = families.members["llama"], b"abcdef"
    speller = SimpleNamespace(member=member, vocabulary=spelled_vocabulary(member), begins_at=0, lattice=None)
    mixture = Mixture({"llama": 1})
    choice = ByteChoice(
        0,
        asked(max_tokens=2),
        mixture,
        [speller],  # pyright: ignore[reportArgumentType]
        state=np.zeros((1, 1)),
        prior=np.ones(1),
        max_new_tokens=2,
        grammar=None,
        rereads=[],
    )
    choice._text += text
    choice._show(History(None, member.surface.encode("a")[0], 1, 1))
    whole = History(None, member.surface.encode("b")[0], 3, 1)  # ends behind what is out, begins before it
    choice._show(History(whole, member.surface.encode("d")[0], 6, 2))
    assert (choice.finish_reason, choice.num_generated) == ("length", 2)
    assert joined(choice._deltas).text == "ab"


async def test_stop_strings_end_the_text_across_pieces(mixed):
    mixture = Mixture({"llama": 1, "gemma": 1})
    text = (await ask(mixed, mixture, max_tokens=10)).choices[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 3]
    cut = (await ask(mixed, mixture, max_tokens=10, stop=(stop,))).choices[0]
    assert cut.text == text[: text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)


async def test_structured_output_holds(mixed):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "é"]}}}
    schema |= {"required": ["a", "b"], "additionalProperties": False}
    grammar = Grammar("json_schema", json.dumps(schema))
    mixture = Mixture({"llama": 1, "gemma": 1})
    answer = await ask(mixed, mixture, grammar=grammar, max_tokens=40, temperature=1, seed=0)
    choice = answer.choices[0]
    if choice.finish_reason == "stop":
        assert set(json.loads(choice.text)) == {"a", "b"}
    else:
        assert choice.text.lstrip().startswith("{")


async def test_a_regular_expression_ends_the_text_where_it_is_complete(mixed):
    answer = await ask(mixed, Mixture({"llama": 1, "gemma": 1}), grammar=Grammar("regex", "(yes|no)!"))
    assert answer.choices[0].text in ("yes!", "no!")
    assert answer.choices[0].finish_reason == "stop"


async def test_a_prompt_may_end_inside_a_token(mixed):
    """Healing: what follows " th" may be the rest of a token that begins with it; without, it may not."""
    mixture = Mixture({"llama": 1, "gemma": 1})
    seen = [await ask(mixed, Mixture(mixture.weights, heals=heals), prompt="over th") for heals in (True, False)]
    assert seen[0].choices[0].tokens[0].logprob != seen[1].choices[0].tokens[0].logprob
    assert seen[0].prompt.token_ids == seen[1].prompt.token_ids


async def test_every_member_reads_its_own_rendering_of_a_chat(mixed, families):
    messages = ({"role": "user", "content": "Hello"},)
    request = GenerationRequest(messages=messages, sampling=Sampling(temperature=0, max_tokens=6))
    answer = await ask(mixed, Mixture({"llama": 1, "gemma": 1, "polite": 1}), request)
    for name, usage in answer.done.usage.members.items():
        assert usage.prompt_tokens == len(families.members[name].surface.render(messages))


async def test_prompts_of_token_ids_are_read_as_the_text_that_they_stand_for(mixed, families):
    mixture = Mixture({"llama": 1, "gemma": 1})
    surface = families.members["llama"].surface
    by_text = await ask(mixed, mixture)
    by_ids = await ask(mixed, mixture, prompt=tuple(surface.encode(PROMPT)))
    assert by_ids.choices[0].text == by_text.choices[0].text
    special = surface.tokenizer.convert_tokens_to_ids("<|im_start|>")
    with pytest.raises(RequestError, match=r"'<\|im_start\|>'.*stands for no text"):
        await ask(mixed, mixture, prompt=(special, 70, special))


async def test_a_text_that_one_member_cannot_write_does_not_end_the_request(families):
    restarts: Counter[str] = Counter()
    with families.running(on_step=lambda stats: restarts.update(stats.num_restarts)) as engine:
        answer = await ask(
            engine, Mixture({"narrow": 1, "llama": 1}), grammar=Grammar("regex", "a😀b{5}"), explain=True, max_tokens=20
        )
    assert {name: told["restarts"] for name, told in answer.done.trace["members"].items()} == dict(restarts)
    assert answer.choices[0].text == "a😀" + "b" * 5
    assert answer.done.trace["members"]["narrow"]["restarts"] >= 1
    assert answer.choices[0].tokens[-1].members["narrow"].weight > 0


async def test_usage_and_trace_tell_what_members_forwarded(mixed):
    answer = await ask(mixed, Mixture({"llama": 1, "gemma": 1}), explain=True)
    for told in answer.done.trace["members"].values():
        assert told["tokens"] >= told["rows"] > 0
        assert told["rows_per_token"] == pytest.approx(told["rows"] / 12, abs=1e-3)
        assert told["restarts"] == 0
    for token in answer.choices[0].tokens:
        assert token.entropy >= 0
        assert 0 <= token.disagreement <= np.log(2) + 1e-9


async def test_hanging_up_frees_the_place(families):
    with families.running(max_batch=1) as engine:
        events = engine.generate(Mixture({"llama": 1, "gemma": 1}), asked(max_tokens=200), method="x")
        async for _ in events:
            break
        await events.aclose()
        assert (await ask(engine, Mixture({"llama": 1}), max_tokens=2)).choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    "options",
    [
        {"logit_bias": {5: 1.0}},
        {"stop_token_ids": (5,)},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
    ],
    ids=lambda options: next(iter(options)),
)
async def test_what_is_about_token_ids_is_refused_by_name(mixed, options):
    with pytest.raises(UnsupportedError, match=next(iter(options))) as caught:
        await ask(mixed, Mixture({"llama": 1, "gemma": 1}), **options)
    assert caught.value.param == next(iter(options))


async def test_a_member_that_gives_nan_is_named(families, monkeypatch):
    forward = Backbone.forward
    sick = families.members["gemma"].backbone

    def poisoned(self, spans):
        rows = forward(self, spans)
        return [torch.full_like(row, torch.nan) for row in rows] if self is sick else rows

    with families.running() as engine:
        monkeypatch.setattr(Backbone, "forward", poisoned)
        with pytest.raises(MemberError, match=r"member 'gemma': .*NaN"):
            await ask(engine, Mixture({"llama": 1, "gemma": 1}))
