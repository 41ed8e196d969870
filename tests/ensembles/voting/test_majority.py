from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_server.ensembles.voting.majority import PENDING, agreement, is_decided, num_to_decide, plurality, tally


def test_the_most_frequent_answer_wins() -> None:
    assert plurality(["7", "8", None, "8"], [1, 1, 1, 1]) == "8"
    assert tally(["7", "8", None, "8"], [1, 1, 1, 1]) == {"7": 1, "8": 2}


def test_ties_go_to_the_answer_given_first() -> None:
    assert plurality([None, "7", "8", "8", "7"], [1] * 5) == "7"


def test_weights_count() -> None:
    assert plurality(["7", "8", "8"], [2.5, 1, 1]) == "7"


def test_sums_that_differ_by_rounding_are_ties() -> None:
    assert plurality(["7", "8", "8", "8"], [0.3, 0.1, 0.1, 0.1]) == "7"


def test_all_abstaining_elects_nobody() -> None:
    assert plurality([None, None], [1, 1]) is None
    assert agreement({}) == 0


def test_agreement_is_the_winners_share_of_cast_votes() -> None:
    assert agreement(tally(["7", "8", None, "8"], [1, 1, 1, 1])) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        (["7", "7", "7", PENDING, PENDING], True),  # 3 of 5
        (["7", "7", PENDING, PENDING], True),  # a tie at worst, and 7 was first
        ([PENDING, "7", "7", PENDING], False),  # the first could be a rival, and tie as the earlier
        (["7", "8", "7", PENDING], True),
        (["8", "7", "7", PENDING], False),  # 8 could tie, as the earlier
        ([PENDING], False),
        ([None, PENDING], False),
        ([None, None], True),
        (["7", None, None, PENDING], True),  # one vote against one, and 7 was first
    ],
)
def test_decided_as_soon_as_the_rest_cannot_change_the_winner(votes: list, expected: bool) -> None:
    assert is_decided(votes, [1.0] * len(votes)) is expected


@given(
    st.lists(
        st.tuples(st.sampled_from(["7", "8", None, PENDING]), st.sampled_from([1.0, 2.0, 0.5])), min_size=1, max_size=6
    )
)
def test_decided_exactly_if_no_completion_changes_the_winner(ballots: list[tuple]) -> None:
    votes, weights = [vote for vote, _ in ballots], [weight for _, weight in ballots]
    pending = [index for index, vote in enumerate(votes) if vote is PENDING]
    winners = set()
    for completion in product(["7", "8", "9", "10", None], repeat=len(pending)):
        complete = list(votes)
        for index, vote in zip(pending, completion, strict=True):
            complete[index] = vote
        winners.add(plurality(complete, weights))
    assert is_decided(votes, weights) == (len(winners) == 1)


@pytest.mark.parametrize(
    ("votes", "expected"),
    [
        ([PENDING] * 8, 4),  # four alike: the other four could draw level, but came later
        ([PENDING] * 5, 3),
        (["7", PENDING, PENDING, PENDING], 1),
        (["7", "8", PENDING, PENDING, PENDING], 2),
        ([None, PENDING, PENDING], 1),
        (["7", "7", PENDING], 0),
        (["7", "8"], 0),
        ([PENDING], 1),
    ],
)
def test_a_vote_needs_no_fewer_answers_than_would_decide_it(votes: list, expected: int) -> None:
    assert num_to_decide(votes, [1.0] * len(votes)) == expected


@given(st.lists(st.sampled_from(["7", "8", "9", None]), min_size=1, max_size=9))
def test_asking_in_the_fewest_steps_elects_whom_all_answers_elect(answers: list) -> None:
    votes = [PENDING] * len(answers)
    weights = [1.0] * len(answers)
    num_asked = 0
    while size := num_to_decide(votes, weights):
        assert not is_decided(votes, weights)
        votes[num_asked : num_asked + size] = answers[num_asked : num_asked + size]
        num_asked += size
    assert plurality(votes, weights) == plurality(answers, weights)
