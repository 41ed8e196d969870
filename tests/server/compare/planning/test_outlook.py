"""What is told of a plan before anything is measured."""

from __future__ import annotations

import pytest

from ensemble_server.ensembles.comparison.power import items_for_any_verdict
from ensemble_server.server.compare.measures.documents import Documents
from ensemble_server.server.compare.measures.task_measure import Item, Task
from ensemble_server.server.compare.planning.blocks import PlanFile
from ensemble_server.server.compare.planning.outlook import outlooks, shared_beginnings


def plan(num_arms: int, **task) -> PlanFile:
    source = {"name": "t", "data": "rows.jsonl", "metric": "number", "template": "Answer. {{ question }}", **task}
    arms = [f"arm{number}" for number in range(num_arms)]
    return PlanFile.model_validate({"config": "c.yaml", "baseline": "arm0", "arms": arms, "tasks": [source]})


def documents(num: int) -> dict[str, Documents]:
    return {"text": Documents(("x",) * num, is_continuous=True)}


def task(*prompts: str) -> dict[str, Task]:
    return {"t": Task("t", tuple(Item(str(n), prompt, ("1",)) for n, prompt in enumerate(prompts)), "number")}


def test_what_a_verdict_takes_stands_beside_what_there_is() -> None:
    told = outlooks(plan(21), documents(4), task(*map(str, range(9))), {})
    assert [(one.measure, one.num_items, one.num_needed) for one in told] == [("text text", 4, 5), ("task t", 9, 10)]
    assert all(one.is_hopeless for one in told)
    assert items_for_any_verdict(20, alpha=0.05) == 10  # 2 / 2^10 · 20 = 0.039, 2 / 2^9 · 20 = 0.078
    assert "4 documents; a verdict takes 5" in told[0].sentence
    assert "9 questions; it takes 10 to call an arm better beside 19 other arms" in told[1].sentence
    assert "189 for no difference within 0.02" in told[1].sentence


def test_more_arms_take_more_items() -> None:
    few, many = (outlooks(plan(num), documents(20), task("1"), {}) for num in (2, 21))
    assert few[1].num_needed == 6 < many[1].num_needed
    assert not few[0].is_hopeless and "standard deviations" in few[0].sentence


def test_clusters_are_what_counts() -> None:
    groups = {"text text": list("aabbcc"), "task t": list("aab")}
    told = outlooks(plan(2), documents(6), task("1", "2", "3"), groups)
    assert [one.num_items for one in told] == [3, 2]
    assert "6 documents in 3 clusters" in told[0].sentence


@pytest.mark.parametrize(
    ("prompts", "settings", "is_warned"),
    [
        (["Answer. " + f"passage {number // 5} " * 30 + str(number) for number in range(20)], {}, True),
        (["Answer. " + f"passage {number // 5} " * 30 + str(number) for number in range(20)], {"cluster": "p"}, False),
        (["Answer. " + f"passage {number} " * 30 for number in range(20)], {}, False),
        (["Answer. short"] * 20, {}, False),
        (["x" * 300 + str(number) for number in range(20)], {"template": "x" * 300 + "{{ question }}"}, False),
    ],
)
def test_prompts_that_share_long_beginnings_are_warned_of(prompts, settings, is_warned) -> None:
    found = list(shared_beginnings(plan(2, **settings), task(*prompts)))
    assert bool(found) == is_warned
    if is_warned:
        assert "20 of 20 prompts" in found[0] and "4 beginnings, the commonest 5 times" in found[0]
