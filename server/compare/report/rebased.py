"""The same results with another baseline."""

from __future__ import annotations

from collections.abc import Mapping

from ensemble_server.server.compare.kept.pairs import Pairs
from ensemble_server.server.compare.kept.results import ArmResult, Difference, Results


def by_baseline(results: Results, pairs: Pairs | None) -> dict[str, Results]:
    """baseline -> results, the plan's own first; the others in the order of the arms."""
    found = {results.baseline: results}
    for name in results.arms:
        if pairs is not None and name in pairs.of:
            found[name] = _rebased(results, name, pairs.of[name])
    return found


def _rebased(results: Results, baseline: str, differences: Mapping[str, Mapping[str, Difference]]) -> Results:
    def against(measure: str, arm: str) -> dict[str, Difference | None]:
        return {"against_baseline": differences.get(measure, {}).get(arm)}

    def of(name: str, arm: ArmResult) -> ArmResult:
        return arm.model_copy(
            update={
                "text": {
                    text: found.model_copy(update=against(f"text {text}", name)) for text, found in arm.text.items()
                },
                "tasks": {
                    task: found.model_copy(update=against(f"task {task}", name)) for task, found in arm.tasks.items()
                },
                "mean_text": arm.mean_text and arm.mean_text.model_copy(update=against("mean text", name)),
                "mean_tasks": arm.mean_tasks and arm.mean_tasks.model_copy(update=against("mean task", name)),
            }
        )

    return results.model_copy(
        update={"baseline": baseline, "arms": {name: of(name, arm) for name, arm in results.arms.items()}}
    )
