"""Which of several models is not beaten by any other in quality and cost at once."""

from __future__ import annotations

from collections.abc import Mapping


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """points: name -> (cost, loss), both better when lower. Names of those that no other point beats, by rising cost.

    A point is beaten by one that is no worse in both and better in one.

    >>> pareto_front({"a": (1, 5), "b": (2, 3), "c": (3, 4)})
    ['a', 'b']
    """

    def is_beaten(name: str) -> bool:
        cost, loss = points[name]
        return any(
            other_cost <= cost and other_loss <= loss and (other_cost, other_loss) != (cost, loss)
            for other_cost, other_loss in points.values()
        )

    return sorted((name for name in points if not is_beaten(name)), key=lambda name: points[name])
