"""All that docs/performance.md says of speed, on one GPU, with one command, in a quarter of an hour; a table of ratios.

    python -m benchmarks.gpu [--model MODEL] [--dtype bfloat16] [--minutes 15] [--out FOLDER] [--vllm-python PATH]

Every part is one of the other benchmarks in a process of its own, with the model, dtype and device that are given here:
an end of one, or what it leaves on the device, does not touch the others. Parts come in order of what they are worth;
one that would begin after the time is over is left out, one that is not done by then is ended, and what it had written
counts. Whatever is missing is named below the table. `--quick` does the least of everything, to see that all works
before a device is paid for; with `--device cpu` it runs on any machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.peers import VLLM_PYTHON, has_package
from benchmarks.subjects import BASE, Subject, add_options

ROOT = Path(__file__).parent.parent

# What each part is told besides the model; its name is that of its module.
FULL = {
    "decode": ["--repeats", "3", "--tokens", "64"],
    "peers": ["--repeats", "3", "--tokens", "64", "--prompt-tokens", "512"],
    "http": ["--repeats", "3", "--tokens", "64"],
    "vllm": ["--repeats", "3", "--tokens", "64"],
    "scaling": ["--repeats", "5", "--steps", "8", "--clock", "wall"],
    "speculation": ["--repeats", "3", "--tokens", "64"],
}
_LEAST = ["--repeats", "1", "--tokens", "4"]
QUICK = {
    "decode": [*_LEAST, "--streams", "1", "2", "--members", "2"],
    "peers": [*_LEAST, "--streams", "1", "2", "--prompt-tokens", "16"],
    "http": [*_LEAST, "--streams", "1", "2"],
    "vllm": [*_LEAST, "--batches", "1", "--arms", "single", "two"],
    "scaling": [
        *("--repeats", "1", "--steps", "1", "--clock", "wall", "--sweeps", "rows", "adapters", "separate", "context"),
        *("--rows", "1", "2", "--adapters", "1", "2", "--separate", "1", "2", "--context", "16", "32"),
        *("--more-rows", "2"),
    ],
    "speculation": [*_LEAST, "--streams", "1", "--members", "2", "--kinds", "text"],
}


@dataclass(frozen=True)
class Row:
    """Of the table. `ratio`: of speeds, to that of `against`: median, lowest and highest."""

    what: str
    streams: int
    tokens_per_s: float | None
    ratio: Sequence[float]
    against: str

    def __str__(self) -> str:
        speed = "" if self.tokens_per_s is None else f"{self.tokens_per_s:.1f}"
        middle, *ends = (f"{value:.2f}" for value in self.ratio)
        told = f"{middle}x" + (f" ({ends[0]} to {ends[1]})" if ends else "")
        return f"| {self.what} | {self.streams} | {speed} | {told} | {self.against} |"


@dataclass(frozen=True)
class Part:
    """`command`: ends with the file that it writes, JSON. `rows`: what the table says of that file's content.
    `lacks`: why it cannot run here; empty if it can."""

    name: str
    command: Sequence[str]
    rows: Callable[[Any], Iterator[Row]]
    lacks: str = ""


def of_decode(results: Any) -> Iterator[Row]:
    for title, block in results.items():
        kind, count = title.split()
        what = "one model" if count == "1" else f"{count} members" + (" on one base" if kind == "adapters" else "")
        for streams, row in block["engine"].items():
            yield Row(what, int(streams), row["tokens_per_s"], row["against_loop"], "plain loop over them")
            if count != "1":
                slower = row["cost_in_singles"]
                inverse = [1 / slower[0], 1 / slower[2], 1 / slower[1]]
                yield Row(what, int(streams), row["tokens_per_s"], inverse, "one of them alone")


def of_peers(results: Any) -> Iterator[Row]:
    figures = results["ms_per_token"]
    ours = figures.get("ours", {})
    for name, row in figures.items():
        for column in row:
            phase, rest = column.split("@")
            streams, clock = rest.split()
            if name == "ours" or clock != "wall" or column not in ours:
                continue
            ratios = [theirs / mine for theirs, mine in zip(row[column], ours[column], strict=True)]
            speed = 1000 / statistics.median(ours[column])
            spread = [statistics.median(ratios), min(ratios), max(ratios)]
            yield Row(f"one model, {phase} alone", int(streams), speed, spread, name)


def of_http(results: Any) -> Iterator[Row]:
    for streams, row in results.items():
        ratio = [row["http_against_engine"], *row["http_against_engine_spread"]]
        yield Row("4 members on one base, over HTTP", int(streams), row["http_tokens_per_s"], ratio, "engine alone")


def of_speculation(results: Any) -> Iterator[Row]:
    for title, arms in results.items():
        members, kind, streams = title.split(", ")
        for name, row in arms.items():
            if name in ("text", "member"):
                what = f"{members}, {kind}, drafts of `{name}`"
                yield Row(what, int(streams.split()[0]), row["tokens_per_s"], [row["against_off"]], "no drafts")


def of_scaling(results: Any) -> Iterator[Row]:
    for sweep, records in results.items():
        for record in records:
            first = next(other for other in records if sweep == "rows" or other["rows"] == record["rows"])
            if record is first:
                continue
            ratios = [
                theirs / mine * record["rows"] / first["rows"]
                for theirs, mine in zip(first["wall"], record["wall"], strict=True)
            ]
            what = f"steps of {record['members']} members ({sweep}), context {record['context']}"
            if record["num_shared"]:
                what += f", {record['num_shared']} of it shared"
            speed = 1000 * record["rows"] / statistics.median(record["wall"])
            against = f"{first['members']} members, {first['rows']} rows, context {first['context']}"
            spread = [statistics.median(ratios), min(ratios), max(ratios)]
            yield Row(what, record["rows"], speed, spread, against)


def of_vllm(results: Any) -> Iterator[Row]:
    from benchmarks.vllm import ARMS

    for title, runs in results.items():
        arm, batch = title.split("@")
        single = results.get(f"single@{batch}")
        if arm == "single" or single is None:
            continue
        ratios = [one["wall_s"] / mine["wall_s"] for one, mine in zip(single, runs, strict=True)]
        spread = [statistics.median(ratios), min(ratios), max(ratios)]
        yield Row(f"inside vLLM: {ARMS[arm]}", int(batch), None, spread, "one model inside vLLM")


def parts_of(subject: Subject, out: Path, vllm_python: str, *, quick: bool) -> list[Part]:
    """In the order in which they run."""
    given = ["--model", subject.model, "--dtype", subject.dtype, "--device", subject.device]
    some = QUICK if quick else FULL

    def part(name: str, rows: Callable[[Any], Iterator[Row]], *options: str, of: str = "", lacks: str = "") -> Part:
        command = [of or sys.executable, "-m", f"benchmarks.{name}", *options, *some[name]]
        return Part(name, [*command, "--json", str(out / f"{name}.json")], rows, lacks)

    engines = ["--vllm-python", vllm_python, "--peers", "plain loop", "ours", "vLLM"]
    no_vllm = "" if has_package(vllm_python, "vllm") else f"{vllm_python} has no vLLM; --vllm-python names another"
    not_demo = "" if subject.model == BASE else f"its members are the demo's experts, which are made for {BASE}"
    return [
        part("decode", of_decode, *given),
        part("peers", of_peers, *given, *engines),
        part("http", of_http, "--config", str(out / "http.yaml")),
        part("vllm", of_vllm, *given, of=vllm_python, lacks=no_vllm),
        part("scaling", of_scaling, *given),
        part("speculation", of_speculation, *given, lacks=not_demo),
    ]


def write_config(subject: Subject, out: Path, config: Path) -> None:
    """Four members on one base, and their average, for the server."""
    models = {
        name: model.model_dump(exclude_unset=True)
        for name, model in subject.adapted(out.absolute() / "adapters", 4).items()
    }
    if Path(subject.model).exists():  # from where this runs; the config would look in its own folder
        models["base"]["path"] = str(Path(subject.model).absolute())
    mix = {"method": "probability_average", "members": list(models)}
    config.write_text(yaml.safe_dump({"models": {**models, "mix": mix}, "engine": {"kind": "transformers"}}))


def run_parts(parts: Sequence[Part], out: Path, seconds: float) -> tuple[list[Row], list[str]]:
    """The table's rows, and of each part that did not run to its end, why."""
    until, rows, missing = time.monotonic() + seconds, [], []
    for part in parts:
        left = until - time.monotonic()
        if part.lacks or left <= 0:
            missing.append(f"{part.name}: left out, {part.lacks or 'the time was over'}")
            continue
        result = Path(part.command[-1])
        result.unlink(missing_ok=True)
        started = time.monotonic()
        problem = _ran(part, out, left)
        print(f"{part.name}: {time.monotonic() - started:.0f} s{f', {problem}' if problem else ''}", flush=True)
        if problem:
            missing.append(f"{part.name}: {problem}")
        if result.exists():
            rows += part.rows(json.loads(result.read_bytes()))
    return rows, missing


def _ran(part: Part, out: Path, seconds: float) -> str:
    """What went wrong, if something did. What the part prints goes into a file in `out`."""
    log = out / f"{part.name}.log"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    with log.open("w") as said:
        # A group of its own: its servers and workers end with it.
        process = subprocess.Popen(
            part.command, env=environment, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"ended when the time was over, see {log}"
        finally:
            _end_group(process)
    return "" if code == 0 else f"it ended with {code}, see {log}"


def _end_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def report(subject: Subject, rows: Sequence[Row], missing: Sequence[str]) -> str:
    import torch

    device = "CPU"
    if torch.cuda.is_available() and not subject.device.startswith("cpu"):
        device = torch.cuda.get_device_name()
    lines = [
        f"{device}, torch {torch.__version__}, {subject}",
        "",
        "| what | streams | tokens/s | as fast as | against |",
        "| --- | --- | --- | --- | --- |",
        *map(str, rows),
    ]
    if missing:
        lines += ["", "Not run, or not to the end:", "", *(f"- {one}" for one in missing)]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.set_defaults(dtype="bfloat16", device="cuda")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder of results and logs")
    vllm_python = VLLM_PYTHON if Path(VLLM_PYTHON).exists() else sys.executable
    parser.add_argument("--vllm-python", default=vllm_python, help="interpreter with vLLM; default: %(default)s")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="only these")
    parser.add_argument("--quick", action="store_true", help="the least of everything, to see that it works")
    options = parser.parse_args()
    subject, out = Subject.of(options), options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    parts = parts_of(subject, out, options.vllm_python, quick=options.quick)
    if options.parts:
        if unknown := set(options.parts) - {part.name for part in parts}:
            parser.error(f"--parts: no {', '.join(sorted(unknown))}; known: {', '.join(part.name for part in parts)}")
        parts = [part for part in parts if part.name in options.parts]
    write_config(subject, out, out / "http.yaml")
    rows, missing = run_parts(parts, out, 60 * options.minutes)
    told = report(subject, rows, missing)
    (out / "table.md").write_text(told, encoding="utf-8")
    print(f"\n{told}")


if __name__ == "__main__":
    main()
