"""One model in our engine and in others: transformers in a plain loop, llama.cpp, and vLLM. Prompt and decode apart.

Each engine is a process with an interpreter of its own (`benchmarks.peer_workers`). All are loaded at once and only one
works at a time: at each number of streams every engine runs in every repeat, in a new order, and ratios are taken
within a repeat, so that a busy machine slows all of them. CPU time is that of the engine's whole process, which other
work on the machine disturbs less than wall time. Reading the prompts ends when all streams have their first token.

llama.cpp loads what `benchmarks.gguf_writing` makes of the same checkpoint, in float32, float16 and q8_0. Before
anything is timed, all engines go on with one prompt: how many tokens are those of the first engine, and how far are the
log-probabilities of its likeliest from the others'. An engine that is not there is named and left out.

    python -m benchmarks.peers [--repeats 5] [--tokens 32] [--streams 1 4 16] [--threads 2] [--json FILE]
        [--llama-python PATH] [--vllm-python PATH]

`--llama-python`: an interpreter with `llama-cpp-python`, which is compiled when it is installed, in minutes:

    python -m venv llama && llama/bin/pip install llama-cpp-python && ... --llama-python llama/bin/python

`--vllm-python`: that of `make vllm-env`, .venv-vllm/bin/python, is taken by itself.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, get_args

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.gguf_writing import Precision, write_gguf
from benchmarks.peer_workers import ENGINES
from benchmarks.subjects import Subject, add_options

ROOT = Path(__file__).parent.parent
VLLM_PYTHON = str(ROOT / ".venv-vllm" / "bin" / "python")
PHASES = ("prompt", "decode")
OURS = "ours"
FIRST = "plain loop"
NUM_CHECKED = 12  # tokens that all engines write before anything is timed

Question = dict[str, Any]
Figures = dict[str, dict[str, list[float]]]  # engine -> "decode@4 cpu" -> milliseconds per token, one for each repeat


class PeerLost(Exception):
    """The engine is not there, or not any more; the text says why."""


@dataclass(frozen=True)
class Recipe:
    """How to start an engine: the interpreter, what of `peer_workers.ENGINES`, and what that is told."""

    python: str
    kind: str
    told: Mapping[str, Any]
    threads: int

    @property
    def command(self) -> list[str]:
        return [self.python, "-m", "benchmarks.peer_workers", self.kind, json.dumps(self.told)]


class Peer:
    """An engine that has loaded. `about`: what it says that it is."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[str]) -> None:
        self._process, self._errors = process, errors
        said = self._next()
        if "missing" in said:
            raise PeerLost(said["missing"])
        self.about: str = said["about"]

    def ask(self, question: Question) -> dict[str, Any]:
        assert self._process.stdin is not None, "it was opened with a pipe"
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except OSError as exc:
            raise PeerLost(self._last_words()) from exc
        return self._next()

    def _next(self) -> dict[str, Any]:
        assert self._process.stdout is not None, "it was opened with a pipe"
        line = self._process.stdout.readline()
        if not line:
            raise PeerLost(self._last_words())
        return json.loads(line)

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        return f"it ended with {code}: {lines[-1] if lines else 'it said nothing'}"


@contextmanager
def started(recipe: Recipe) -> Iterator[Peer]:
    """Raises `PeerLost` where it does not come up. It has ended when the block has."""
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": str(recipe.threads),
    }
    with tempfile.TemporaryFile("w+") as errors:
        try:
            process = subprocess.Popen(
                recipe.command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        except OSError as exc:
            raise PeerLost(f"{recipe.python} does not run: {exc.strerror}") from exc
        with process:
            try:
                yield Peer(process, errors)
                assert process.stdin is not None, "it was opened with a pipe"
                process.stdin.close()
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                pass
            finally:
                process.kill()


@dataclass(frozen=True)
class Shape:
    """How much is read and written. `streams`: the numbers of them that are measured."""

    streams: Sequence[int] = (1, 4, 16)
    num_prompt_tokens: int = 64
    num_tokens: int = 32

    @property
    def num_context(self) -> int:
        """With some room: vLLM and llama.cpp round it."""
        return (self.num_prompt_tokens + max(self.num_tokens, NUM_CHECKED) + 31) // 32 * 32


def recipes(
    subject: Subject, shape: Shape, threads: int, llama_python: str, vllm_python: str, folder: Path
) -> dict[str, Recipe]:
    """By name. `folder`: where llama.cpp's files will be, see `write_llama_file`."""
    checkpoint, most = str(subject.checkpoint.absolute()), max(shape.streams)
    same = {"checkpoint": checkpoint, "dtype": subject.dtype}
    placed = {**same, "device": subject.device}
    on_gpu = {"num_streams": most, "num_context": shape.num_context, "gpu": subject.device.startswith("cuda")}
    made = {
        FIRST: Recipe(sys.executable, "loop", placed, threads),
        OURS: Recipe(sys.executable, "ours", {**placed, "weights": "exact", "num_streams": most}, threads),
        "ours, weights: full": Recipe(
            sys.executable, "ours", {**placed, "weights": "full", "num_streams": most}, threads
        ),
    }
    for precision in get_args(Precision):
        told = {"file": str(folder / f"{precision}.gguf"), "num_threads": threads, **on_gpu}
        made[f"llama.cpp {precision}"] = Recipe(llama_python, "llama.cpp", told, threads)
    made["vLLM"] = Recipe(vllm_python, "vllm", {**same, **on_gpu}, threads)
    return made


def has_package(python: str, package: str) -> bool:
    look = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
    paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    try:
        ended = subprocess.run([python, "-c", look, package], env={**os.environ, "PYTHONPATH": paths}, check=False)
    except OSError:
        return False
    return ended.returncode == 0


def write_llama_file(checkpoint: Path, file: Path) -> None:
    """Named after its precision; unless it is there. Raises `ValueError` where the checkpoint is no plain llama."""
    if file.exists():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".unfinished")
    precision: Any = file.stem
    write_gguf(checkpoint, unfinished, precision)
    unfinished.rename(file)


def prompts_of(ids: Sequence[int], count: int, num_tokens: int, begin: int = 0) -> list[list[int]]:
    """`count` pieces of a text, none of which begins as another does."""
    starts = [(begin + stream) * num_tokens for stream in range(count)]
    return [[ids[(start + at) % len(ids)] for at in range(num_tokens)] for start in starts]


def compare(peers: dict[str, Peer], ids: Sequence[int], shape: Shape) -> dict[str, str]:
    """What each engine makes of the same prompt, against the first of them. Who is lost is taken out of `peers`."""
    question = {
        "prompts": prompts_of(ids, 1, shape.num_prompt_tokens),
        "num_tokens": NUM_CHECKED,
        "likeliest": True,
    }
    answers, found = {}, {}
    for name in list(peers):
        try:
            answers[name] = peers[name].ask(question)
        except PeerLost as exc:
            found[name] = str(exc)
            del peers[name]
    if not answers:
        return found
    first, reference = next(iter(answers.items()))
    known = dict(reference["likeliest"])
    for name, answer in answers.items():
        pairs = zip(answer["written"][0], reference["written"][0], strict=True)
        num_equal = next((at for at, (ours, theirs) in enumerate(pairs) if ours != theirs), NUM_CHECKED)
        moved = [abs(logprob - known[token]) for token, logprob in answer["likeliest"] if token in known]
        distance = f"{max(moved):.1e}" if moved else "unknown"
        found[name] = (
            f"{peers[name].about}; of {NUM_CHECKED} tokens the first {num_equal} as {first}; "
            f"log-probabilities of the likeliest {len(moved)} within {distance}"
        )
    return found


def measure(
    peers: dict[str, Peer],
    ids: Sequence[int],
    shape: Shape,
    repeats: int,
    seconds: float = math.inf,
    keep: Callable[[Figures], None] = lambda figures: None,
) -> tuple[Figures, dict[str, str]]:
    """The figures, and who was lost on the way, with the reason. A first, shorter round warms up; when `seconds` are
    over no repeat begins but the first. `keep` gets what there is after each."""
    figures: Figures = {name: {} for name in peers}
    lost: dict[str, str] = {}
    until = time.monotonic() + seconds
    for repeat in range(repeats + 1):
        if repeat > 1 and time.monotonic() > until:
            break
        for count in random.sample(list(shape.streams), len(shape.streams)):
            question = {
                "prompts": prompts_of(ids, count, shape.num_prompt_tokens, begin=repeat),
                "num_tokens": shape.num_tokens if repeat else 2,
            }
            num_tokens = {"prompt": count * shape.num_prompt_tokens, "decode": count * (shape.num_tokens - 1)}
            for name in random.sample(list(peers), len(peers)):
                try:
                    answer = peers[name].ask(question)
                except PeerLost as exc:
                    lost[name] = str(exc)
                    del peers[name], figures[name]
                    continue
                for phase in PHASES if repeat else ():
                    for clock in ("cpu", "wall"):
                        per_token = 1000 * answer[phase][f"{clock}_s"] / num_tokens[phase]
                        figures[name].setdefault(f"{phase}@{count} {clock}", []).append(per_token)
        if repeat:
            keep(figures)
    return figures, lost


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median, and lowest to highest."""
    middle, low, high = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} to {high})" if len(values) > 1 else middle


def table(figures: Figures, streams: Sequence[int], clock: str, against: str | None = None) -> str:
    """Milliseconds per token; or how many times as long as `against` each engine takes, within each repeat."""
    columns = [f"{phase}@{count} {clock}" for phase in PHASES for count in streams]
    heads = [f"{phase}, {count}" for phase in PHASES for count in streams]
    lines = ["| engine | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    for name, row in figures.items():
        cells = []
        for column in columns:
            if against is None:
                cells.append(spread(row[column]))
            else:
                pairs = zip(row[column], figures[against][column], strict=True)
                cells.append(spread([theirs / ours for theirs, ours in pairs], 2))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.set_defaults(device="cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="new ones of each stream; default: %(default)s")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="of each stream; default: %(default)s")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of each engine; default: the cores")
    parser.add_argument("--llama-python", default=sys.executable, help="interpreter with llama-cpp-python")
    parser.add_argument("--vllm-python", default=VLLM_PYTHON, help="interpreter with vLLM; default: %(default)s")
    parser.add_argument("--gguf", type=Path, help="folder that keeps llama.cpp's files; default: thrown away")
    parser.add_argument("--peers", nargs="+", metavar="NAME", help="only these engines, as the tables call them")
    parser.add_argument("--minutes", type=float, default=math.inf, help="after which no further repeat begins")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    subject = Subject.of(options)
    shape = Shape(options.streams, options.prompt_tokens, options.tokens)
    if shape.num_tokens < 2:
        parser.error(f"--tokens must be at least 2, got {shape.num_tokens}: the first is part of reading the prompt")
    with ExitStack() as stack:
        folder: Path = (options.gguf or Path(stack.enter_context(tempfile.TemporaryDirectory()))).absolute()
        chosen = recipes(subject, shape, options.threads, options.llama_python, options.vllm_python, folder)
        if options.peers:
            if unknown := set(options.peers) - set(chosen):
                parser.error(f"--peers: there is no {', '.join(sorted(unknown))}; known: {', '.join(chosen)}")
            chosen = {name: chosen[name] for name in chosen if name in options.peers}
        run(subject, shape, chosen, options.repeats, stack, 60 * options.minutes, options.json)


def run(
    subject: Subject,
    shape: Shape,
    chosen: Mapping[str, Recipe],
    repeats: int,
    stack: ExitStack,
    seconds: float = math.inf,
    file: Path | None = None,
) -> dict[str, Any]:
    """Prints the tables. `stack`: ends the processes. `file`: gets the figures after each repeat."""
    from transformers import AutoTokenizer

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    ids: list[int] = AutoTokenizer.from_pretrained(subject.checkpoint)(text, verbose=False)["input_ids"]
    left_out: dict[str, str] = {}
    peers: dict[str, Peer] = {}
    for name, recipe in chosen.items():
        if not has_package(recipe.python, ENGINES[recipe.kind][1]):
            left_out[name] = f"{recipe.python} has no {ENGINES[recipe.kind][1]}"
            continue
        try:
            if recipe.kind == "llama.cpp":
                write_llama_file(subject.checkpoint, Path(recipe.told["file"]))
            peers[name] = stack.enter_context(started(recipe))
        except (PeerLost, ValueError) as exc:
            left_out[name] = str(exc)
    about = compare(peers, ids, shape)
    results: dict[str, Any] = {"about": about, "left_out": left_out}

    def keep(figures: Figures) -> None:
        if file is not None:
            file.write_text(json.dumps({**results, "ms_per_token": figures}, indent=2) + "\n")

    print(f"{subject}, {shape.num_prompt_tokens} tokens of prompt and {shape.num_tokens} new ones per stream")
    for name, said in about.items():
        print(f"- {name}: {said}" + ("" if name in peers else "; left out"), flush=True)
    figures, lost = measure(peers, ids, shape, repeats, seconds, keep)
    left_out.update(lost)
    keep(figures)
    for name, reason in left_out.items():
        print(f"- {name} left out: {reason}")
    for clock, title in (("cpu", "CPU"), ("wall", "Wall")):
        told = table(figures, shape.streams, clock)
        print(f"\n{title} milliseconds per token, medians with lowest to highest:\n\n{told}")
        if OURS in figures and len(figures) > 1:
            print(f"\nIn times of ours:\n\n{table(figures, shape.streams, clock, against=OURS)}")
    return {**results, "ms_per_token": figures}


if __name__ == "__main__":
    main()
