"""Which of several models is not beaten by any other in quality and cost at once."""

from __future__ import annotations

from collections.abc import Mapping


def pareto_front(
    points: Mapping[str, tuple[float, float]], ranges: Mapping[str, tuple[float, float]] | None = None
) -> list[str]:
    """points: name -> (cost, loss), both better when lower. Names of those that no other point beats, by rising cost.

    A point is beaten by one that is no worse in both and better in one. `ranges`: of costs that are known no better
    than that. Costs whose ranges meet are told apart by nothing, so the cheaper of two such points beats the other by
    its lower loss alone.

    >>> pareto_front({"a": (1, 5), "b": (2, 3), "c": (3, 4)})
    ['a', 'b']
    >>> pareto_front({"a": (1.0, 5), "b": (1.1, 5)}, {"a": (0.9, 1.2), "b": (1.0, 1.3)})
    ['a', 'b']
    """
    known = {name: (cost, cost) for name, (cost, _) in points.items()} | dict(ranges or {})

    def is_beaten(name: str) -> bool:
        cost, loss = points[name]
        for other, (other_cost, other_loss) in points.items():
            is_cheaper = known[other][1] < known[name][0]
            if other_cost <= cost and other_loss <= loss and (is_cheaper or other_loss < loss):
                return True
        return False

    return sorted((name for name in points if not is_beaten(name)), key=lambda name: points[name])
