"""The table and the figure of docs/results-tasks.md: what each arm got right, and what a question cost it.

    python -m benchmarks.tasks_report compare-tasks [--plan configs/compare-tasks.yaml] [--figure FILE.svg [--task T]]

Costs are counted from the batches that the plan names: tokens that members read and wrote for a question, and the same
weighed by the members' sizes, in tokens of the smaller one. A vote costs what its samples cost.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensemble_server.server.compare.kept.pairs import Pairs
from ensemble_server.server.compare.kept.results import ArmResult, Results
from ensemble_server.server.compare.planning.blocks import AnswersSource
from ensemble_server.server.compare.planning.plan import load_plan
from ensemble_server.server.compare.report import words
from ensemble_server.server.compare.report.figures import COLOURS, INK, MARKERS, STYLE
from ensemble_server.server.compare.report.pareto import pareto_front

ROOT = Path(__file__).parent.parent
UNIT = "half"
TUNED = ("math", "options", "linear", "ties", "dare", "widen")  # of the size of `UNIT`
SIZES = {"half": 0.494, "big": 1.544, "smol": 0.135, **dict.fromkeys(TUNED, 0.494)}  # billions of parameters


@dataclass(frozen=True)
class Cost:
    """Of one question, a mean. `work`: tokens that went through weights, in tokens of `UNIT`."""

    num_read: float
    num_written: float
    work: float


def cost_of(source: AnswersSource, num_items: int, *, is_one_sample: bool) -> Cost:
    """From the batch that gave the answers, or whose samples were voted on. `is_one_sample`: of those that it has."""
    path = Path(source.path)
    run, *_, task = path.name.removesuffix(".jsonl").split(".")
    spent: dict[str, list[float]] = {}
    asked: set[str] = set()
    for line in path.with_name(f"{run}.{task}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        body: Mapping[str, Any] = (row.get("response") or {}).get("body") or {}
        if "usage" not in body or (source.system is not None and body["model"] != source.system):
            continue
        if row["custom_id"] not in asked and len(asked) == num_items:
            continue  # of several runs in one file each has its rows after those of the one before
        asked.add(row["custom_id"])
        share = len(body["choices"]) if is_one_sample else 1
        for member, usage in body["ensemble"]["usage"].items():
            both = spent.setdefault(member, [0.0, 0.0])
            both[0] += usage["prompt_tokens"]
            both[1] += usage["completion_tokens"] / share
    read, written = (sum(both[place] for both in spent.values()) / len(asked) for place in (0, 1))
    work = sum(SIZES[member] / SIZES[UNIT] * sum(both) for member, both in spent.items()) / len(asked)
    return Cost(read, written, work)


def table(results: Results, pairs: Pairs, task: str, arms: Sequence[str], costs: Mapping[str, Cost]) -> str:
    """Of `arms`, which were to do the task: each against the plan's baseline, or against the first where that has not
    done it."""
    having = [name for name, arm in results.arms.items() if task in arm.tasks]
    baseline = results.baseline if results.baseline in having else having[0]
    differences = pairs.of.get(baseline, {}).get(f"task {task}", {})
    lines = [
        f"| arm | what it is | right, 95% interval | against {baseline} | p (Holm) | verdict | read + written | work |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in arms:
        arm = results.arms[name]
        if task not in arm.tasks:
            lines.append(f"| {name} | {arm.description} | not run | | | | | |")
            continue
        found, cost = arm.tasks[task], costs[name]
        difference = differences.get(name, found.against_baseline)
        against = ("", "", "")
        if difference is not None and name != baseline:
            gain = f"{words.signed(difference.difference)} [{words.interval(difference.ci, is_signed=True)}]"
            against = (gain, words.p_value(difference.p_holm), difference.verdict)
        right = f"{words.number(found.score)} [{words.interval(found.ci)}]"
        tokens = f"{cost.num_read:.0f} + {cost.num_written:.0f}"
        lines.append(f"| {name} | {arm.description} | {right} | {' | '.join(against)} | {tokens} | {cost.work:.0f} |")
    return "\n".join(lines)


def figure(arms: Mapping[str, ArmResult], task: str, costs: Mapping[str, Cost], file: Path) -> None:
    """What was right of a task against the work, with the Pareto front."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    points = {name: (cost.work, arms[name].tasks[task]) for name, cost in costs.items()}
    front = pareto_front({name: (work, -found.score) for name, (work, found) in points.items()})
    with rc_context(STYLE):
        canvas = Figure(figsize=(8, 4.6), layout="constrained")
        axes = canvas.subplots()
        steps = [(points[name][0], points[name][1].score) for name in front]
        axes.plot(*zip(*steps, strict=True), drawstyle="steps-post", color=INK, linewidth=1, linestyle=(0, (4, 3)))
        for name, (work, found) in points.items():
            kind = arms[name].kind
            low, high = found.ci or (found.score, found.score)
            bars = [[found.score - low], [high - found.score]]
            axes.errorbar(
                work, found.score, yerr=bars, marker=MARKERS[kind], color=COLOURS[kind], elinewidth=0.8, linestyle=""
            )
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        canvas.draw_without_rendering()
        lowest: dict[bool, float] = {}  # of the labels to the left and to the right of their points
        for name, (work, found) in sorted(points.items(), key=lambda point: -point[1][1].score):
            is_left = any(work < other <= 1.3 * work and arms[name].kind == "member" for other, _ in points.values())
            height = axes.transData.transform((work, found.score))[1] * 72 / canvas.dpi
            placed = min(height, lowest.get(is_left, math.inf) - 12)
            lowest[is_left] = placed
            axes.annotate(
                name,
                (work, found.score),
                xytext=(-7 if is_left else 7, placed - height),
                textcoords="offset points",
                ha="right" if is_left else "left",
                va="center",
                fontsize=9,
                fontweight="bold" if name in front else "normal",
            )
        axes.set_xlabel("work for a question, in tokens of the 0.5B model (left is cheaper)")
        axes.set_ylabel("share of questions answered right")
        canvas.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, facecolor="white")
    file.write_text(re.sub(r"[ \t]+$", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("results", type=Path, help="folder of the comparison")
    parser.add_argument("--plan", type=Path, default=ROOT / "configs" / "compare-tasks.yaml")
    parser.add_argument("--figure", type=Path, help="where the figure goes")
    parser.add_argument("--task", help="that the figure shows; default: the first of the plan")
    options = parser.parse_args()
    results = Results.model_validate_json((options.results / "results.json").read_bytes())
    pairs = Pairs.load(options.results) or Pairs(num_resamples=0)
    plan = load_plan(options.plan)
    of_tasks: dict[str, dict[str, Cost]] = {}
    for task in results.tasks:
        wanted = [name for name, arm in plan.arms.items() if task in arm.answers]
        costs = {}
        for name in wanted:
            arm, source = results.arms[name], plan.arms[name].answers[task]
            if task in arm.tasks:
                num_items = arm.tasks[task].num_items
                costs[name] = cost_of(source, num_items, is_one_sample=arm.kind == "member")
        print(f"{task}:\n\n{table(results, pairs, task, wanted, costs)}\n")
        of_tasks[task] = costs
    if options.figure is not None:
        task = options.task or next(iter(of_tasks))
        if task not in of_tasks:
            parser.error(f"there is no task {task!r}; known: {', '.join(of_tasks)}")
        figure(results.arms, task, of_tasks[task], options.figure)


if __name__ == "__main__":
    main()
