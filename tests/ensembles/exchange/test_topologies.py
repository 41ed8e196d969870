from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_server.ensembles.exchange.topologies import (
    TOPOLOGIES,
    Hears,
    custom,
    debate,
    memory,
    relay,
    report,
    who_hears_whom,
)

sizes = st.integers(2, 40)
names_of_topologies = st.sampled_from(sorted(TOPOLOGIES))


def reached_from(hears: Hears, listener: int) -> set[int]:
    """Everyone whose solution can get to `listener`, over any number of rounds."""
    reached, frontier = {listener}, [listener]
    while frontier:
        for other in set(hears[frontier.pop()]) - reached:
            reached.add(other)
            frontier.append(other)
    return reached


@pytest.mark.parametrize(
    ("name", "hears"),
    [
        ("memory", ((1, 2), (0, 2), (0, 1))),
        ("report", ((1, 2), (0,), (0,))),
        ("relay", ((2,), (0,), (1,))),
        ("debate", ((1, 2), (2,), (1,))),
    ],
)
def test_three_participants_are_as_in_the_paper(name: str, hears: Hears) -> None:
    assert TOPOLOGIES[name](3) == hears


def test_two_participants_hear_each_other_in_every_topology() -> None:
    assert {topology(2) for topology in TOPOLOGIES.values()} == {((1,), (0,))}


def test_a_debate_of_seven_is_two_debates_under_one_parent() -> None:
    assert debate(7) == ((1, 2), (2, 3, 4), (1, 5, 6), (4,), (3,), (6,), (5,))


def test_a_child_without_sibling_debates_with_its_parent() -> None:
    assert debate(4) == ((1, 2), (2, 3), (1,), (1,))


@given(names_of_topologies, sizes)
def test_everyone_hears_someone_and_nobody_itself_nor_anyone_twice(name: str, n: int) -> None:
    hears = TOPOLOGIES[name](n)
    assert len(hears) == n
    for own, others in enumerate(hears):
        assert others
        assert own not in others
        assert len(set(others)) == len(others)
        assert set(others) <= set(range(n))


@given(names_of_topologies, sizes)
def test_every_solution_gets_to_the_first_participant(name: str, n: int) -> None:
    assert reached_from(TOPOLOGIES[name](n), 0) == set(range(n))


@given(sizes)
def test_what_is_read_per_round_is_what_the_docs_promise(n: int) -> None:
    read = {topology: sum(map(len, topology(n))) for topology in (memory, report, relay)}
    assert read == {memory: n * (n - 1), report: 2 * (n - 1), relay: n}
    assert sum(map(len, debate(n))) == 2 * (n - 1)  # each but the root is heard by its parent, and hears one beside it


def test_a_map_says_who_hears_whom_in_any_order() -> None:
    assert custom(["a", "b", "c"], {"c": ["b", "a"], "a": ["c"]}) == ((2,), (), (1, 0))
    assert who_hears_whom({"a": ["b"]}, ["a", "b"]) == ((1,), ())
    assert who_hears_whom("relay", ["a", "b"]) == ((1,), (0,))


@pytest.mark.parametrize(
    ("heard", "reason"),
    [
        ({"a": ["bob"]}, r"'bob', which is no participant; did you mean 'bo'\? \(participants: a, bo\)"),
        ({"zed": ["a"]}, "'zed', which is no participant"),
        ({"a": ["a"]}, "'a' cannot hear itself"),
        ({"a": ["bo", "bo"]}, "twice"),
        ({"a": []}, "nobody hears anybody"),
        ({}, "nobody hears anybody"),
    ],
)
def test_a_map_that_makes_no_sense_is_refused(heard: dict[str, list[str]], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        custom(["a", "bo"], heard)
