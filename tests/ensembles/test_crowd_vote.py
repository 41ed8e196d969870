from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
from pydantic import ValidationError

from ensemble_server.ensembles.base import Delta, Done, GenerationRequest, Grammar, MemberUsage, Sampling, collect
from ensemble_server.ensembles.crowd_vote import hold_vote
from ensemble_server.ensembles.errors import (
    ContextLengthError,
    MemberError,
    ModelLoadError,
    RequestError,
    TurnoutError,
    UnsupportedError,
)
from ensemble_server.ensembles.method import Services
from ensemble_server.ensembles.registry import method_class

REQUEST = GenerationRequest(messages=({"role": "user", "content": "Where is the cat?"},), explain=True)
VOTE = {"method": "crowd_vote"}


async def test_the_answer_most_like_the_others_wins(talker: Callable, compose: Callable) -> None:
    ann, bob, cas = talker("ann", "a dog"), talker("bob", "the cat is here"), talker("cas", "the cat is there")
    dan = talker("dan", "the cat is here now")
    answer = await collect(compose(VOTE, [ann, bob, cas, dan]), REQUEST)
    assert answer.text == "the cat is here"
    assert answer.choices[0].finish_reason == "stop"
    trace = answer.done.trace
    # F of ROUGE-L by hand: bob-cas 2*3/(4+4) = 3/4; bob-dan 2*4/(4+5) = 8/9; cas-dan 2*3/(4+5) = 2/3
    assert trace["scores"] == pytest.approx([0, 3 / 4 + 8 / 9, 3 / 4 + 2 / 3, 8 / 9 + 2 / 3])
    assert trace["margin"] == pytest.approx(3 / 4 - 2 / 3)
    assert [candidate["member"] for candidate in trace["candidates"]] == ["ann", "bob", "cas", "dan"]
    assert trace["winner"] == 1
    assert trace["blend"] == {"rouge_l_word": 1.0}
    json.dumps(trace, allow_nan=False)


async def test_reply_streams_as_one_piece_with_the_winners_finish_reason(talker: Callable, compose: Callable) -> None:
    crowd = compose(VOTE, [talker("ann", "same words", finish_reason="length"), talker("bob", "same words")])
    events = [event async for event in crowd.generate(replace(REQUEST, explain=False))]
    assert events[0] == Delta(0, "same words", finish_reason="length")
    assert isinstance(events[1], Done)
    assert events[1].trace is None
    assert len(events) == 2


async def test_ties_go_to_the_first_member(talker: Callable, compose: Callable) -> None:
    answer = await collect(compose(VOTE, [talker("ann", "x y"), talker("bob", "p q"), talker("cas", "u v")]), REQUEST)
    assert answer.text == "x y"
    assert answer.done.trace["ties"] == [[0, 1, 2]]
    assert answer.done.trace["margin"] == 0


async def test_blend_is_the_weighted_sum_of_its_similarities(talker: Callable, compose: Callable) -> None:
    members = [talker("ann", "ab"), talker("bob", "ba"), talker("cas", "c")]
    config = VOTE | {"similarity": {"embedding": 2, "rouge_l_char": 0.5}}
    trace = (await collect(compose(config, members), REQUEST)).done.trace
    # letters a, b: cosine 1 between ann and bob; their LCS of characters is 1 of 2 and 2, F = 1/2
    assert trace["scores"] == pytest.approx([2 * 1 + 0.5 * 0.5] * 2 + [0])
    assert trace["similarity"]["embedding"][0] == pytest.approx([1, 1, 0], abs=1e-6)
    assert trace["similarity"]["rouge_l_char"][0] == [1, 0.5, 0]


async def test_every_member_is_sampled_with_seeds_of_its_own_that_repeat(talker: Callable, compose: Callable) -> None:
    def ask() -> tuple[list, object]:
        members = [talker("ann", "x"), talker("bob", "x")]
        return members, compose(VOTE | {"samples": 3}, members)

    seeds = []
    for _ in range(2):
        members, crowd = ask()
        await collect(crowd, replace(REQUEST, sampling=Sampling(seed=7)))
        seeds.append([request.sampling.seed for member in members for request in member.requests])
    assert len(set(seeds[0])) == 6
    assert seeds[0] == seeds[1]


async def test_without_a_seed_members_draw_their_own(talker: Callable, compose: Callable) -> None:
    ann = talker("ann", "x")
    await collect(compose(VOTE, [ann]), REQUEST)
    assert ann.requests[0].sampling.seed is None


async def test_a_lone_candidate_wins(talker: Callable, compose: Callable) -> None:
    answer = await collect(compose(VOTE, [talker("ann", "alone")]), REQUEST)
    assert answer.text == "alone"
    assert answer.done.trace["scores"] == [0]
    assert answer.done.trace["margin"] == 0


async def test_silent_members_are_named_and_the_vote_goes_on(talker: Callable, compose: Callable) -> None:
    members = [talker("ann", MemberError("ann", "gone")), talker("bob", "words"), talker("cas", "")]
    answer = await collect(compose(VOTE, members), REQUEST)
    assert answer.text == "words"
    assert answer.done.turnout == 1
    assert answer.done.trace["silent"] == [
        {"member": "ann", "sample": 0, "reason": "member 'ann': gone"},
        {"member": "cas", "sample": 0, "reason": "member 'cas': the answer is empty"},
    ]


async def test_too_small_a_turnout_is_an_error(talker: Callable, compose: Callable) -> None:
    members = [talker("ann", MemberError("ann", "gone")), talker("bob", "words")]
    with pytest.raises(TurnoutError, match="ann: member 'ann': gone"):
        await collect(compose(VOTE | {"min_turnout": 2}, members), REQUEST)


async def test_a_stalling_member_is_left_behind_after_its_time(talker: Callable, compose: Callable) -> None:
    stuck = talker("ann", "never", delay_s=float("inf"))
    crowd = compose(VOTE | {"member_timeout_s": 0.05}, [stuck, talker("bob", "words")])
    answer = await collect(crowd, REQUEST)
    assert answer.text == "words"
    assert "no answer within 0.05 s" in answer.done.trace["silent"][0]["reason"]
    assert stuck.num_running == 0


async def test_usage_adds_up_over_samples_and_nested_votes(talker: Callable, compose: Callable) -> None:
    ann, bob = talker("ann", "two words"), talker("bob", "one")
    inner = compose(VOTE | {"samples": 2}, [ann, bob], name="inner")
    outer = compose(VOTE, [inner, ann], name="outer")
    done = (await collect(outer, REQUEST)).done
    assert done.usage.members == {"ann": MemberUsage(30, 6), "bob": MemberUsage(20, 2)}
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (50, 8)
    assert done.members == ("inner", "ann")
    assert done.trace["candidates"][0]["trace"]["candidates"][0]["member"] == "ann"


async def test_heavier_members_pull_the_vote_as_if_they_were_several(talker: Callable, compose: Callable) -> None:
    texts = {"ann": "p q r", "bob": "a b c", "cas": "a b x"}
    members = [talker(name, text) for name, text in texts.items()]
    assert (await collect(compose(VOTE, members), REQUEST)).text == "a b c"
    weighted = VOTE | {"members": {"ann": 3, "bob": 1, "cas": 1}}
    assert (await collect(compose(weighted, members), REQUEST)).text == "p q r"


async def test_request_may_change_weights_samples_and_similarity(talker: Callable, compose: Callable) -> None:
    ann, bob = talker("ann", "x"), talker("bob", "y")
    overrides = {"weights": {"bob": 1}, "samples": 2, "similarity": ["rouge_l_char", "embedding"], "temperature": 0.5}
    done = (await collect(compose(VOTE, [ann, bob]), replace(REQUEST, overrides=overrides))).done
    assert (len(ann.requests), len(bob.requests)) == (0, 2)
    assert bob.requests[0].sampling.temperature == 0.5
    assert bob.requests[0].overrides == {}
    assert done.trace["blend"] == {"rouge_l_char": 1.0, "embedding": 1.0}


@pytest.mark.parametrize(
    ("overrides", "param", "message"),
    [
        ({"sample": 2}, "ensemble.sample", "did you mean 'samples'"),
        ({"samples": 0}, "ensemble.samples", "greater than or equal to 1"),
        ({"weights": {"zoe": 1}}, "ensemble.weights", "'zoe', which is no member"),
        ({"weights": {"ann": -1, "bob": 1}}, "ensemble", "no negative weight"),
        ({"weights": {"ann": "x"}}, "ensemble.weights.ann", "number"),
        ({"weights": 3}, "ensemble.weights", "map member names"),
        ({"similarity": "bleu"}, "ensemble.similarity.bleu", "rouge_l_word"),
        ({"min_turnout": 5}, "ensemble", "min_turnout is 5"),
    ],
)
async def test_wrong_overrides_are_refused_by_name(
    talker: Callable, compose: Callable, overrides: dict, param: str, message: str
) -> None:
    crowd = compose(VOTE, [talker("ann", "x"), talker("bob", "y")])
    with pytest.raises(RequestError, match=message) as caught:
        await collect(crowd, replace(REQUEST, overrides=overrides))
    assert caught.value.param.startswith(param)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"top_logprobs": 0}, "logprobs"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"sampling": Sampling(logit_bias={1: 2.0})}, "logit_bias"),
        ({"sampling": Sampling(stop_token_ids=(1,))}, "stop_token_ids"),
        ({"messages": None, "prompt": (1, 2)}, "prompt"),
        ({"truncate_prompt_tokens": 3}, "truncate_prompt_tokens"),
    ],
)
async def test_what_needs_tokens_is_refused_by_name(
    talker: Callable, compose: Callable, changes: dict, param: str
) -> None:
    with pytest.raises(UnsupportedError, match="crowd_vote") as caught:
        await collect(compose(VOTE, [talker("ann", "x")]), replace(REQUEST, **changes))
    assert caught.value.param == param


async def test_grammar_and_stops_reach_the_candidates(talker: Callable, compose: Callable) -> None:
    ann = talker("ann", "{}")
    sampling = Sampling(grammar=Grammar("json_object"), stop=("END",), max_tokens=5)
    await collect(compose(VOTE, [ann]), replace(REQUEST, sampling=sampling))
    assert ann.requests[0].sampling == sampling


async def test_a_request_that_no_member_can_take_is_the_clients_error(talker: Callable, compose: Callable) -> None:
    error = ContextLengthError("prompt too long", param="messages")
    with pytest.raises(ContextLengthError):
        await collect(compose(VOTE, [talker("ann", error), talker("bob", error)]), REQUEST)


async def test_several_choices_are_votes_of_their_own(talker: Callable, compose: Callable) -> None:
    def by_seed(request: GenerationRequest) -> str:
        return f"seed {request.sampling.seed}"

    def crowd() -> object:
        return compose(VOTE, [talker("ann", by_seed), talker("bob", by_seed)])

    seeded = replace(REQUEST, sampling=Sampling(seed=3))
    one, three = await collect(crowd(), seeded), await collect(crowd(), replace(seeded, n=3))
    texts = [choice.text for choice in three.choices]
    assert texts[0] == one.text
    assert len(set(texts)) == 3
    assert all(choice.finish_reason == "stop" for choice in three.choices)
    assert three.done.usage.completion_tokens == 3 * one.done.usage.completion_tokens
    assert len(three.done.trace["choices"]) == 3
    assert [choice.text for choice in (await collect(crowd(), replace(seeded, n=3))).choices] == texts


async def test_a_choice_that_fails_fails_the_request(talker: Callable, compose: Callable) -> None:
    crowd = compose(VOTE, [talker("ann", "fine", MemberError("ann", "gone"))])
    with pytest.raises(TurnoutError):
        await collect(crowd, replace(REQUEST, n=2))


async def test_samples_at_temperature_zero_are_warned_about(talker: Callable, compose: Callable) -> None:
    greedy = replace(REQUEST, sampling=Sampling(temperature=0))
    ann = talker("ann", "x")
    trace = (await collect(compose(VOTE | {"samples": 2}, [ann]), greedy)).done.trace
    assert "copies of one another" in trace["warnings"][0]
    trace = (await collect(compose(VOTE | {"samples": 2, "temperature": 0.8}, [ann]), greedy)).done.trace
    assert trace["warnings"] == []
    assert ann.requests[-1].sampling.temperature == 0.8


async def test_outliers_neither_win_nor_vote(talker: Callable, compose: Callable) -> None:
    texts = ["a b c", "a b c d", "a b d", "x y z"]
    members = [talker(f"m{k}", text) for k, text in enumerate(texts)]
    trace = (await collect(compose(VOTE | {"prune": 0.5}, members), REQUEST)).done.trace
    assert trace["outliers"] == [3]
    assert trace["ranking"][-1] == 3


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"samples": 0}, "greater than or equal to 1"),
        ({"members": {"ann": -1, "bob": 1}}, "no negative weight"),
        ({"members": {"ann": 0}}, "min_turnout is 1"),
        ({"members": ["ann"], "min_turnout": 2}, "min_turnout is 2"),
        ({"similarity": {"rouge_l_word": 0}}, "greater than 0"),
        ({"similarity": {}}, "at least 1 item"),
        ({"similarity": "rouge"}, "rouge_l_char"),
        ({"prune": 1.5}, "less than or equal to 1"),
        ({"sample": 2}, "Extra inputs"),
    ],
)
def test_wrong_configs_are_refused(config: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        method_class("crowd_vote").Config.model_validate(VOTE | {"members": ["ann", "bob"]} | config)


async def test_embedding_needs_an_embedder(talker: Callable) -> None:
    cls = method_class("crowd_vote")
    ann = talker("ann", "x")
    config = cls.Config(method="crowd_vote", members=["ann"], similarity="embedding")
    with pytest.raises(ModelLoadError, match="needs an embedding model"):
        cls("crowd", config, {"ann": ann}, Services())
    crowd = cls("crowd", cls.Config(method="crowd_vote", members=["ann"]), {"ann": ann}, Services())
    with pytest.raises(UnsupportedError, match="this server has none"):
        await collect(crowd, replace(REQUEST, overrides={"similarity": "embedding"}))


async def test_blank_texts_are_like_nothing_and_are_named(letter_embedder: object) -> None:
    vote = await hold_vote(["", "ab", " ", "ab"], {"embedding": 1.0, "rouge_l_word": 1.0}, embedder=letter_embedder)
    assert vote.report()["incomparable"] == {"embedding": [0, 2], "rouge_l_word": [0, 2]}
    assert vote.consensus.scores == pytest.approx([0, 2, 0, 2])
    assert vote.report()["equal_texts"] == [[0], [1, 3], [2]]
    assert vote.consensus.winner == 1


async def test_all_blank_elects_the_first() -> None:
    vote = await hold_vote(["", " "], {"rouge_l_char": 1.0})
    assert vote.consensus.winner == 0
    assert vote.consensus.scores.tolist() == [0, 0]
