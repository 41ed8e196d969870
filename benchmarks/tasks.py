"""What an ensemble is worth on tasks that its members can do: runs of `ensemble batch`, and votes over them.

    python -m benchmarks.tasks --out tasks                                     # everything; hours on two cores
    python -m benchmarks.tasks --out tasks --runs half,sampled --tasks svamp --items 50
    python -m benchmarks.tasks --out tasks --dry-run                           # only says the commands
    ensemble compare configs/compare-tasks.yaml --out compare-tasks            # the verdicts

Every run is one job over several models, item after item: killed at any moment, all models have answered the same first
items, but for those that were in work. It goes on where it was when the same command comes again, also with more items.
Votes and choices by likelihood are made of the samples that are there, merges (of about 2.5 GB each, in `$MERGED`, by
default `merged`) before they answer. `times.jsonl` has the seconds of each run, and
those of its processor: on a busy machine only the latter say much.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "tasks.yaml"


@dataclass(frozen=True)
class Task:
    data: Path
    template: Path
    answer: str  # as `ensemble vote --answer` takes it
    max_tokens: int


@dataclass(frozen=True)
class Run:
    """Models of `configs/tasks.yaml`, loaded together. Where they give several samples, `VOTES` are taken over them."""

    models: tuple[str, ...]
    options: tuple[str, ...] = ("--temperature", "0")
    votes: tuple[str, ...] = ()
    merge: str | None = None  # a recipe in configs/tasks, by which the model is made if it is not there


CHOICE = ROOT / "configs/tasks/choice.txt"
TASKS = {
    "gsm8k": Task(ROOT / "data/tasks/gsm8k_test_200.jsonl", ROOT / "configs/tasks/number.txt", "number", 320),
    "svamp": Task(ROOT / "data/tasks/svamp_150.jsonl", ROOT / "configs/tasks/number.txt", "number", 256),
    "svamp-direct": Task(ROOT / "data/tasks/svamp_150.jsonl", ROOT / "configs/tasks/direct.txt", "number", 32),
    "aqua": Task(ROOT / "data/tasks/aqua_dev_120.jsonl", CHOICE, "choice", 320),
    "dates": Task(ROOT / "data/tasks/bbh_date_understanding_120.jsonl", CHOICE, "choice", 320),
    "order": Task(ROOT / "data/tasks/bbh_logical_deduction_120.jsonl", CHOICE, "choice", 320),
}
SAMPLED = ("--temperature", "0.7", "--samples", "5", "--set", "logprobs=true")
RUNS = {
    "half": Run(("half",)),
    "sampled": Run(("half",), SAMPLED, votes=("majority", "by-probability", "crowd", "likeliest")),
    "pair": Run(("big", "average")),
    "tuned": Run(("math", "options", "tuned-average")),
    "tuned-posterior": Run(("tuned-posterior",)),
    "math-sampled": Run(("math",), SAMPLED, votes=("majority",)),
    "linear": Run(("linear",), merge="linear"),
    "ties": Run(("ties",), merge="ties"),
    "dare": Run(("dare",), merge="dare"),
    "widen": Run(("widen",), merge="widen"),
    "proxy": Run(("tuned-proxy",)),
    "pools": Run(("posterior", "contrast")),
    "alone": Run(("corrected",)),
    "talk": Run(("talk",)),
    "small": Run(("smol",)),
}
POLLS = {"half+tuned": ("half", "math", "options")}  # runs, and the models of theirs that vote, one answer each
VOTES = {
    "majority": ("--answer", "{answer}"),
    "by-probability": ("--answer", "{answer}", "--by-probability"),
    "crowd": ("--similarity", "rouge_l_word=1"),
    "likeliest": ("--likeliest",),
}


@dataclass
class Bench:
    """`out`: where all files are. `num_items`: the first so many rows of a task."""

    out: Path
    num_items: int
    is_dry: bool = False
    merged: Path = field(default_factory=lambda: Path(os.environ.get("MERGED", ROOT / "merged")))

    def run(self, name: str, task_name: str) -> None:
        run, task = RUNS[name], TASKS[task_name]
        output = self.out / f"{name}.{task_name}.jsonl"
        source = self.out / f"{task_name}.jsonl"
        if run.merge is not None and not (self.merged / run.merge).is_dir():
            recipe = ROOT / "configs" / "tasks" / f"{run.merge}.yml"
            made = self.merged / run.merge
            self._call(["ensemble", "merge", str(recipe), "--config", str(CONFIG), "--out", str(made)], of=made.name)
        command = ["ensemble", "batch", str(source), "-o", str(output), "-c", str(CONFIG)]
        command += ["--model", ",".join(run.models), "--template", str(task.template)]
        command += ["--max-tokens", str(task.max_tokens), *run.options]
        self._call([*command, "--extend"], of=output.name)  # of a finished job it writes the answers again
        for vote in run.votes:
            options = [option.format(answer=task.answer) for option in VOTES[vote]]
            voted = self.out / f"{name}.{vote}.{task_name}.jsonl"
            self._call(["ensemble", "vote", str(output), *options, "-o", str(voted)], of=voted.name)

    def poll(self, name: str, task_name: str) -> None:
        """The majority over models of several runs, where all of these are there."""
        parts = [self.out / f"{run}.{task_name}.jsonl" for run in name.split("+")]
        if not self.is_dry and not all(part.is_file() for part in parts):
            print(f"{name}: not all of {', '.join(part.name for part in parts)} are there", flush=True)
            return
        answers, voted = self.out / f"{name}.{task_name}.jsonl", self.out / f"{name}.majority.{task_name}.jsonl"
        if not self.is_dry:
            lines = [line for part in parts for line in part.read_text(encoding="utf-8").splitlines(keepends=True)]
            answers.write_text("".join(line for line in lines if _model_of(line) in POLLS[name]), encoding="utf-8")
        self._call(
            ["ensemble", "vote", str(answers), "--answer", TASKS[task_name].answer, "-o", str(voted)], of=voted.name
        )

    def write_rows(self, task_name: str) -> None:
        rows = TASKS[task_name].data.read_text(encoding="utf-8").splitlines(keepends=True)
        if not self.is_dry:
            self.out.mkdir(parents=True, exist_ok=True)
            (self.out / f"{task_name}.jsonl").write_text("".join(rows[: self.num_items]), encoding="utf-8")

    def _call(self, command: list[str], *, of: str) -> None:
        print(shlex.join(command), flush=True)
        if self.is_dry:
            return
        began, processor = time.monotonic(), _processor_s()
        code = subprocess.run(command, check=False).returncode
        spent = {"seconds": time.monotonic() - began, "processor_s": _processor_s() - processor}
        with (self.out / "times.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"output": of, "exit": code, **spent}) + "\n")
        if code not in (0, 3):  # 3: some rows have no answer, and count as wrong
            raise SystemExit(code)


def _model_of(line: str) -> str | None:
    return ((json.loads(line).get("response") or {}).get("body") or {}).get("model")


def _processor_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def named(text: str | None, known: dict[str, object]) -> Iterator[str]:
    for name in known if text is None else text.split(","):
        if name not in known:
            raise SystemExit(f"there is no {name!r}; known: {', '.join(known)}")
        yield name


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", help=f"default: {','.join([*RUNS, *POLLS])}")
    parser.add_argument("--tasks", help=f"default: {','.join(TASKS)}")
    parser.add_argument("--items", type=int, default=1000, help="the first so many questions of a task; default: all")
    parser.add_argument("--dry-run", action="store_true", help="say the commands, and run none")
    options = parser.parse_args()
    bench = Bench(options.out, options.items, options.dry_run)
    for task_name in named(options.tasks, {**TASKS}):
        bench.write_rows(task_name)
        for name in named(options.runs, {**RUNS, **POLLS}):
            (bench.run if name in RUNS else bench.poll)(name, task_name)


if __name__ == "__main__":
    main()
