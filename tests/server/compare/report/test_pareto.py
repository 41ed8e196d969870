from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ensemble_server.server.compare.report.pareto import pareto_front

POINTS = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=2), st.tuples(st.integers(0, 5), st.integers(0, 5)))


def test_what_is_worse_and_dearer_is_not_on_the_front() -> None:
    assert pareto_front({"a": (1, 5), "b": (2, 3), "c": (3, 4)}) == ["a", "b"]


def test_equal_points_are_on_the_front_together() -> None:
    assert pareto_front({"a": (1, 1), "b": (1, 1), "c": (1, 2)}) == ["a", "b"]


@given(POINTS)
def test_every_point_off_the_front_is_beaten_by_one_on_it(points: dict[str, tuple[int, int]]) -> None:
    front = pareto_front(points)
    assert bool(front) == bool(points)
    for name, (cost, loss) in points.items():
        beaten = [other for other in front if points[other][0] <= cost and points[other][1] <= loss]
        assert name in front or beaten
    costs = [points[name] for name in front]
    assert costs == sorted(costs)
