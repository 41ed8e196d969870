from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_server.ensembles.exchange.agreement import confidence_of, judge, merge_alike, replay
from ensemble_server.ensembles.exchange.topologies import TOPOLOGIES, memory
from ensemble_server.ensembles.exchange.transcript import Participant, Reply, Round, Settings, State, Transcript

NAMES = ("ann", "bob", "cas")


def settings(**changes: Any) -> Settings:
    names = changes.pop("names", NAMES)
    weights = changes.pop("weights", {})
    hears = changes.pop("hears", memory(len(names)))
    fields: dict[str, Any] = {
        "participants": [Participant(name=name, model=name, weight=weights.get(name, 1)) for name in names],
        "topology": None,
        "hears": {name: [names[other] for other in heard] for name, heard in zip(names, hears, strict=True)},
        "answer": "number",
        "text_threshold": None,
        "max_rounds": 5,
        "stop": ["unanimity"],
        "final": "confidence",
        "token_budget": None,
        "time_budget_s": None,
    }
    return Settings.model_validate(fields | changes)


def said(*answers: str | None, names: tuple[str, ...] = NAMES, **changes: Any) -> Round:
    """said("18", None, ...): the names' answers in one round; "" is silence, None an abstention."""
    replies = {
        name: Reply(text=f"{name} thinks {answer}", answer=answer)
        for name, answer in zip(names, answers, strict=True)
        if answer != ""
    }
    silent = {name: "it failed" for name, answer in zip(names, answers, strict=True) if answer == ""}
    return Round(replies=replies, silent=silent, **changes)


def outcome(state: State) -> tuple[str | None, str | None, str]:
    return state.stop, state.answer, state.spokesperson


# --- confidence ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "confidence"),
    [
        (["18"], 1.0),
        (["18", "20"], 0.5),
        (["18", "20", "18"], 2 / 3),
        (["18", "18", "20", "20"], 0.5),
        (["18", None], 0.5),
        ([None, None], 0.0),
    ],
)
def test_confidence_is_the_share_of_the_most_frequent_answer(answers: list[str | None], confidence: float) -> None:
    assert confidence_of(answers) == confidence


@given(st.lists(st.sampled_from(["a", "b", None]), min_size=1))
def test_confidence_lies_between_nothing_and_certainty(answers: list[str | None]) -> None:
    assert 0 <= confidence_of(answers) <= 1
    assert (confidence_of(answers) == 1) == (len(set(answers)) == 1 and answers[0] is not None)


# --- stops --------------------------------------------------------------------------------------------------------


def test_unanimity_stops_already_after_everyones_own_answer() -> None:
    state = judge(settings(), [said("18", "18", "18")])
    assert outcome(state) == ("unanimity", "18", "ann")
    assert state.speaking == ()


def test_an_abstention_prevents_unanimity_but_silence_does_not() -> None:
    assert judge(settings(), [said("18", "18", None)]).stop is None
    assert judge(settings(), [said("18", "18", "")]).stop == "unanimity"


def test_a_majority_is_more_than_half_of_those_who_spoke() -> None:
    rules = settings(stop=["majority"])
    assert outcome(judge(rules, [said("20", "18", "18")])) == ("majority", "18", "bob")
    assert judge(rules, [said("18", "20", None)]).stop is None
    assert judge(rules, [said("18", "20", "")]).stop is None
    assert judge(rules, [said("", "18", "18")]).stop == "majority"


def test_a_majority_is_one_of_weights() -> None:
    rules = settings(stop=["majority"], weights={"ann": 3})
    assert outcome(judge(rules, [said("20", "18", "18")])) == ("majority", "20", "ann")
    assert judge(settings(stop=["majority"], weights={"ann": 2}), [said("20", "18", "18")]).stop is None  # half of four


def test_who_repeats_an_answer_leaves_and_is_still_heard_and_counted() -> None:
    rules = settings(stop=["repeat"])
    first = judge(rules, [said("18", "20", None)])
    assert first.speaking == NAMES
    rounds = [said("18", "20", None), said("18", "22", None)]
    assert judge(rules, rounds).speaking == ("bob", "cas")  # two abstentions are no repetition
    rounds.append(said("24", "18", names=("bob", "cas")))
    assert judge(rules, rounds).speaking == ("bob", "cas")
    rounds.append(said("24", "18", names=("bob", "cas")))
    state = judge(rules, rounds)
    # confidences: ann 2/2; bob 2/4 (24); cas 2/4 (18)
    assert outcome(state) == ("all_left", "18", "ann")
    assert state.votes == {"18": 1.5, "24": 0.5}


def test_without_the_rule_nobody_leaves_by_repeating() -> None:
    assert judge(settings(stop=[]), [said("18", "20", "22")] * 3).speaking == NAMES


def test_who_falls_silent_is_not_asked_again_but_what_it_said_counts() -> None:
    state = judge(settings(), [said("18", "18", "20"), said("", "18", "20")])
    assert state.speaking == ("bob", "cas")
    assert state.votes == {"18": 2.0, "20": 1.0}


def test_who_hears_nobody_speaks_once() -> None:
    rules = settings(hears=((1,), (), (0, 1)))
    assert judge(rules, [said("1", "2", "3")]).speaking == ("ann", "cas")
    assert judge(rules, [said("1", "", "3")]).speaking == ("cas",)  # ann's only peer never said a thing


def test_the_last_round_stops() -> None:
    rules = settings(stop=[], max_rounds=2)
    round_ = said("18", "18", "20")
    assert [judge(rules, [round_] * count).stop for count in (1, 2, 3)] == [None, None, "max_rounds"]


def test_budgets_stop_between_rounds() -> None:
    round_ = said("1", "2", "3", num_tokens=40, elapsed_s=2.0)
    assert judge(settings(token_budget=43), [round_]).stop is None  # a token for each is left
    assert judge(settings(token_budget=42), [round_]).stop == "token_budget"
    assert judge(settings(time_budget_s=2.1), [round_]).stop is None
    assert judge(settings(time_budget_s=2.0), [round_]).stop == "time_budget"


# --- the answer ---------------------------------------------------------------------------------------------------


def test_votes_are_weighted_by_confidence_or_count_alike() -> None:
    rounds = [said("1", "2", "18"), said("3", "4", "18"), said("20", "20", "18")]
    # ann and bob each have three different answers: confidence 1/3; cas 3/3
    last = {"stop": [], "max_rounds": 2}
    assert outcome(judge(settings(**last), rounds)) == ("max_rounds", "18", "cas")
    assert outcome(judge(settings(**last, final="plurality"), rounds)) == ("max_rounds", "20", "ann")


def test_an_agreement_is_the_answer_though_the_vote_would_differ() -> None:
    rounds = [said("1", "2", "18"), said("3", "4", "18"), said("20", "20", "18")]
    assert outcome(judge(settings(stop=["majority"]), rounds)) == ("majority", "20", "ann")


def test_the_most_confident_of_those_who_have_the_answer_speaks() -> None:
    rounds = [said("20", "18", "18"), said("18", "18", "20")]
    assert outcome(judge(settings(stop=["majority"]), rounds[:1]))[2] == "bob"
    assert outcome(judge(settings(stop=["majority"]), rounds))[1:] == ("18", "bob")  # ann has it too, at 1/2


def test_a_tie_goes_to_the_answer_of_the_first() -> None:
    rules = settings(stop=[], max_rounds=1, names=("ann", "bob"), hears=memory(2))
    round_ = said("20", "18", names=("ann", "bob"))
    assert outcome(judge(rules, [round_, round_])) == ("max_rounds", "20", "ann")


def test_if_all_abstain_there_is_no_answer_and_the_first_who_spoke_speaks() -> None:
    rules = settings(max_rounds=1)
    assert outcome(judge(rules, [said("", None, None), said(None, None, names=NAMES[1:])])) == (
        "max_rounds",
        None,
        "bob",
    )


def test_an_answer_given_up_for_an_abstention_does_not_count() -> None:
    state = judge(settings(stop=[], max_rounds=1), [said("18", "20", "20"), said("18", None, None)])
    assert outcome(state) == ("max_rounds", "18", "ann")


answers = st.sampled_from(["1", "2", "3", None, ""])


@st.composite
def exchanges(draw: st.DrawFn) -> tuple[Settings, list[Round], list[State]]:
    """An exchange as the live method would hold it, with answers at random."""
    n = draw(st.integers(2, 5))
    names = tuple("abcde"[:n])
    rules = settings(
        names=names,
        hears=TOPOLOGIES[draw(st.sampled_from(sorted(TOPOLOGIES)))](n),
        stop=draw(st.sampled_from([[], ["unanimity"], ["majority"], ["repeat"], ["unanimity", "repeat"]])),
        final=draw(st.sampled_from(["confidence", "plurality"])),
        max_rounds=draw(st.integers(1, 4)),
        weights={name: draw(st.sampled_from([0.5, 1, 2])) for name in names},
        token_budget=draw(st.sampled_from([None, 25])),
    )
    first = draw(st.tuples(*[answers] * n).filter(lambda drawn: any(answer != "" for answer in drawn)))
    rounds = [said(*first, names=names, num_tokens=10)]
    states = [judge(rules, rounds)]
    while states[-1].stop is None:
        speaking = states[-1].speaking
        rounds.append(said(*draw(st.tuples(*[answers] * len(speaking))), names=speaking, num_tokens=10))
        states.append(judge(rules, rounds))
    return rules, rounds, states


@given(exchanges())
def test_every_exchange_ends_in_time_and_its_spokesperson_has_the_answer(
    exchange: tuple[Settings, list[Round], list[State]],
) -> None:
    rules, rounds, states = exchange
    assert len(rounds) <= rules.max_rounds + 1
    final = states[-1]
    history = [round_.replies[final.spokesperson] for round_ in rounds if final.spokesperson in round_.replies]
    assert history[-1].answer == final.answer
    assert all(0 <= confidence <= 1 for confidence in final.confidence.values())
    assert set(final.votes) == {
        reply.answer
        for name in final.confidence
        if (reply := [round_.replies[name] for round_ in rounds if name in round_.replies][-1]).answer is not None
    }


@given(exchanges())
def test_a_replay_from_json_gives_the_same_states(exchange: tuple[Settings, list[Round], list[State]]) -> None:
    rules, rounds, states = exchange
    written = Transcript(settings=rules, rounds=tuple(rounds), states=tuple(states)).model_dump_json()
    assert replay(Transcript.model_validate_json(written)) == (states, [])


# --- replays that differ ------------------------------------------------------------------------------------------


def transcript(rules: Settings, rounds: list[Round]) -> Transcript:
    states = [judge(rules, rounds[: index + 1]) for index in range(len(rounds))]
    return Transcript(settings=rules, rounds=tuple(rounds), states=tuple(states))


def test_a_replay_tells_what_differs() -> None:
    whole = transcript(settings(), [said("18", "18", "20"), said("18", "18", "18")])
    assert replay(whole)[1] == []

    other_answer = whole.model_copy(update={"rounds": (whole.rounds[0], said("18", "20", "18"))})
    _, differences = replay(other_answer)
    assert any("goes on after round 1" in difference for difference in differences)
    assert any("stop is None, recorded is 'unanimity'" in difference for difference in differences)

    too_long = transcript(settings(), [said("18", "18", "18"), said("18", "18", "18")])
    assert replay(too_long)[1] == ["stops after round 0 (unanimity), but 2 rounds are recorded"]

    out_of_turn = transcript(settings(stop=[]), [said("18", "18", ""), said("18", "18", "20")])
    assert replay(out_of_turn)[1][0] == "round 1: ann, bob, cas spoke, but it was the turn of ann, bob"


# --- texts that are alike -----------------------------------------------------------------------------------------


def similarity_of(places: list[float]) -> np.ndarray:
    """Texts as points on a line: 1 minus the distance."""
    return 1 - np.abs(np.subtract.outer(places, places))


def test_texts_alike_enough_take_the_spelling_of_the_first() -> None:
    texts = ["paris", "the city of paris", "lyon", "paris"]
    assert merge_alike(texts, similarity_of([0, 0.1, 0.8, 0]), 0.9) == ["paris", "paris", "lyon", "paris"]


def test_a_text_joins_the_most_similar_of_those_that_stand() -> None:
    assert merge_alike(["a", "b", "c"], similarity_of([0, 0.25, 0.2]), 0.78) == ["a", "b", "b"]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8, unique=True), st.floats(0.05, 1))
def test_what_stands_for_others_stands_for_itself(places: list[float], threshold: float) -> None:
    texts = [str(place) for place in places]
    merged = merge_alike(texts, similarity_of(places), threshold)
    assert all(merged[texts.index(text)] == text for text in merged)
    standing = sorted(float(text) for text in set(merged))
    assert all(1 - (right - left) < threshold for left, right in itertools.pairwise(standing))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8, unique=True), st.floats(0.05, 1))
def test_earlier_spellings_do_not_change_when_texts_are_added(places: list[float], threshold: float) -> None:
    texts = [str(place) for place in places]
    whole = merge_alike(texts, similarity_of(places), threshold)
    assert merge_alike(texts[:-1], similarity_of(places[:-1]), threshold) == whole[:-1]
