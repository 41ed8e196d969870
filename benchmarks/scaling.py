"""How a decode step grows with rows, members and context.

A step is what each new token of each row costs: the forward of every member, the pool of their distributions, and the
likeliest token. A file apart from `benchmarks.decode`, which times whole answers: caches are filled with random numbers
here, since reading 4,096 tokens for each of several rows would take minutes, and how long attention takes does not
depend on them. What an engine does around a step is not in it.

Within each sweep all points take turns in a new order in every repeat, and ratios to the sweep's first point are taken
within a repeat. Weights and caches are read from memory, not from a processor's cache: each step reads more than
fits there. CPU time is the process's.

    python -m benchmarks.scaling [--repeats 5] [--steps 2] [--sweeps rows ...] [--json FILE] [--figure FILE.svg]
    python -m benchmarks.scaling --read FILE --figure FILE.svg
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import re
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.subjects import Subject, add_options, load_as_in_use
from ensemble_server.ensembles.pooling import arithmetic
from ensemble_server.server.engines.transformers_engine.attention import Span
from ensemble_server.server.engines.transformers_engine.backbone import Backbone
from ensemble_server.server.engines.transformers_engine.kv_cache import LayerSlices, RowCache
from ensemble_server.server.engines.transformers_engine.members import Member

MAX_CONTEXT = 8192
SWEEPS = {
    "rows": "rows of one member",
    "adapters": "members that are adapters of one base",
    "separate": "members with weights of their own",
    "context": "tokens of context, one member",
    "shared": "16 rows of one member behind the same tokens, read by each row or once for all",
}


@dataclass(frozen=True)
class Point:
    """`context`: tokens that each row looks at, the step's own included. `num_shared`: of them, in memory once."""

    members: int = 1
    rows: int = 1
    context: int = 128
    num_shared: int = 0


@dataclass(frozen=True)
class Extent:
    """How far the sweeps go."""

    rows: Sequence[int] = (1, 2, 4, 8, 16, 32, 64)
    adapters: Sequence[int] = (1, 2, 4, 8)
    separate: Sequence[int] = (1, 2, 4)
    context: Sequence[int] = (128, 512, 1024, 2048, 4096)
    more_rows: int = 16  # at which members are measured, too
    context_rows: int = 4  # at which contexts are measured, too
    num_shared: int = 1400

    def points(self, sweep: str) -> list[Point]:
        """The first is what the others are compared with."""
        if sweep == "rows":
            return [Point(rows=rows) for rows in self.rows]
        if sweep in ("adapters", "separate"):
            counts = self.adapters if sweep == "adapters" else self.separate
            return [Point(members=members, rows=rows) for rows in (1, self.more_rows) for members in counts]
        if sweep == "context":
            return [Point(rows=rows, context=context) for rows in (1, self.context_rows) for context in self.context]
        context = self.num_shared + 16
        return [Point(rows=16, context=context, num_shared=num_shared) for num_shared in (0, self.num_shared)]


@dataclass
class Rows:
    """Rows of caches for members, filled with random numbers when they are first wanted, and kept.

    `longest`: of the contexts that will be asked for. All rows hold the same numbers, each in memory of its own.
    """

    members: Sequence[Member]
    longest: int
    _numbers: dict[Backbone, LayerSlices] = field(default_factory=dict)
    _shared: dict[Backbone, RowCache] = field(default_factory=dict)
    _caches: dict[tuple[str, int, int], RowCache] = field(default_factory=dict)

    def spans(self, point: Point) -> list[list[Span]]:
        """One token each, of each row, of each of the point's members."""
        return [
            [Span(self._cache(member, row, point), [100 + row], 1, member.adapter) for row in range(point.rows)]
            for member in self.members[: point.members]
        ]

    def _cache(self, member: Member, row: int, point: Point) -> RowCache:
        key = (member.name, row, point.num_shared)
        if key not in self._caches:
            self._caches[key] = self._beginning(member.backbone, point.num_shared)
            self._caches[key].append([self._random(member.backbone)], self.longest)
        cache = self._caches[key]
        # What is forgotten stays in the buffers and can be known again: no writing, which would warm them up.
        cache.truncate(cache.num_shared)
        cache.commit(point.context - 1 - cache.num_shared)
        return cache

    def _beginning(self, backbone: Backbone, num_shared: int) -> RowCache:
        if not num_shared:
            return RowCache()
        if backbone not in self._shared:
            self._shared[backbone] = RowCache()
            self._shared[backbone].append([self._random(backbone)], num_shared)
        return self._shared[backbone].fork()

    def _random(self, backbone: Backbone) -> LayerSlices:
        """Keys and values, shaped as the layers of the model want them."""
        if backbone not in self._numbers:
            probe = RowCache()
            backbone.forward([Span(probe, [1], 1)])
            self._numbers[backbone] = {
                layer: (self._like(keys), self._like(values)) for layer, (keys, values) in probe.copy_of(0, 1).items()
            }
        return self._numbers[backbone]

    def _like(self, one: torch.Tensor) -> torch.Tensor:
        return torch.randn(one.shape[0], self.longest, one.shape[2]).to(one)


def step(rows: Rows, point: Point) -> list[int]:
    """-> the likeliest token of each row"""
    of_backbones: dict[Backbone, list[Span]] = {}  # members of one base are forwarded together
    for member, spans in zip(rows.members[: point.members], rows.spans(point), strict=True):
        of_backbones.setdefault(member.backbone, []).extend(spans)
    of_members = [
        logprobs
        for backbone, spans in of_backbones.items()
        for logprobs in torch.cat(backbone.forward(spans)).split(point.rows)
    ]
    with torch.inference_mode():
        weights = torch.ones(point.members, point.rows, device=of_members[0].device)
        return arithmetic.pool(of_members, weights).argmax(-1).tolist()


def timed(rows: Rows, point: Point, num_steps: int) -> dict[str, float]:
    """Milliseconds of a step, mean of `num_steps`, after the caches have been made."""
    rows.spans(point)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(num_steps):
        step(rows, point)
    return {
        "cpu": 1000 * (time.process_time() - cpu) / num_steps,
        "wall": 1000 * (time.perf_counter() - wall) / num_steps,
    }


def measure(members: Sequence[Member], points: Sequence[Point], repeats: int, num_steps: int) -> list[dict[str, Any]]:
    """One record for each point: the point, and milliseconds of each repeat. A first round warms up."""
    rows = Rows(members, max(point.context for point in points))
    records: list[dict[str, Any]] = [{**asdict(point), "cpu": [], "wall": []} for point in points]
    for repeat in range(repeats + 1):
        for place in random.sample(range(len(points)), len(points)):
            found = timed(rows, points[place], num_steps if repeat else 1)
            for clock in ("cpu", "wall") if repeat else ():
                records[place][clock].append(found[clock])
    return records


def members_of(subject: Subject, extent: Extent, sweeps: Sequence[str]) -> Iterator[tuple[str, list[Member]]]:
    """Each sweep with its members. All but `separate` use one base with all its adapters."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if together := [sweep for sweep in sweeps if sweep != "separate"]:
            most = max(extent.adapters) if "adapters" in together else 1
            members = list(load_as_in_use(subject.adapted(root, most), max_context=MAX_CONTEXT).values())
            for sweep in together:
                yield sweep, members
            del members
            gc.collect()
        if "separate" in sweeps:
            models = subject.separate(root, max(extent.separate))
            yield "separate", list(load_as_in_use(models, max_context=MAX_CONTEXT).values())


def ratios(record: Mapping[str, Any], first: Mapping[str, Any], clock: str) -> list[float]:
    return [ours / theirs for ours, theirs in zip(record[clock], first[clock], strict=True)]


def spread(values: Sequence[float], digits: int) -> str:
    middle, low, high = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({low} to {high})"


def table(sweep: str, records: Sequence[Mapping[str, Any]], clock: str) -> str:
    """Ratios are to the first point that has as many rows; in the sweep of rows, to its first."""
    lines = [
        f"| {SWEEPS[sweep]} | rows | ms of a step | in times of the first | ms for a token of a row |",
        "| --- | --- | --- | --- | --- |",
    ]
    for record in records:
        first = next(other for other in records if sweep == "rows" or other["rows"] == record["rows"])
        middle = statistics.median(record[clock])
        lines.append(
            f"| {value_of(sweep, record)} | {record['rows']} | {spread(record[clock], 1)} | "
            f"{spread(ratios(record, first, clock), 2)} | {middle / record['rows']:.1f} |"
        )
    return "\n".join(lines)


def value_of(sweep: str, record: Mapping[str, Any]) -> str:
    if sweep == "shared":
        return "once for all" if record["num_shared"] else "each row its own"
    return str(record[{"rows": "rows", "context": "context"}.get(sweep, "members")])


def draw(results: Mapping[str, Sequence[Mapping[str, Any]]], clock: str, file: Path) -> None:
    """One panel for rows, members and context each; bars are lowest to highest."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    from ensemble_server.server.compare.report.figures import COLOURS, MARKERS, STYLE

    panels = (("rows", ("rows",)), ("members", ("adapters", "separate")), ("context", ("context",)))
    labels = {"rows": "rows (1 member)", "members": "members", "context": "tokens of context (1 member)"}
    colours, markers = list(COLOURS.values()), list(MARKERS.values())
    with rc_context(STYLE):
        canvas = Figure(figsize=(10, 3.4), layout="constrained")
        for axes, (key, sweeps) in zip(canvas.subplots(1, 3), panels, strict=True):
            lines: dict[str, list[Mapping[str, Any]]] = {}
            for sweep in sweeps:
                for record in results.get(sweep, ()):
                    rows = f"{record['rows']} row" + ("s" if record["rows"] > 1 else "")
                    kind = {"adapters": "adapters", "separate": "own weights"}.get(sweep)
                    name = "" if key == "rows" else f"{kind}, {rows}" if kind else rows
                    lines.setdefault(name, []).append(record)
            places = sorted({record[key] for records in lines.values() for record in records})
            for number, (name, records) in enumerate(lines.items()):
                at = [record[key] for record in records]
                middle = [statistics.median(record[clock]) for record in records]
                low = [value - min(record[clock]) for value, record in zip(middle, records, strict=True)]
                high = [max(record[clock]) - value for value, record in zip(middle, records, strict=True)]
                axes.errorbar(
                    at,
                    middle,
                    yerr=[low, high],
                    label=name,
                    marker=markers[number],
                    color=colours[number],
                    linewidth=1,
                    elinewidth=0.8,
                )
            axes.set_xscale("log", base=2)
            axes.set_xticks(places, [f"{place:,}" for place in places])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_ylim(bottom=0)
            axes.set_xlabel(labels[key])
            if any(lines):
                axes.legend(frameon=False, fontsize=8)
        canvas.axes[0].set_ylabel(f"{'CPU ' if clock == 'cpu' else ''}milliseconds of a step")
        canvas.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, facecolor="white")
    file.write_text(re.sub(r"[ \t]+$", "", file.read_text(encoding="utf-8"), flags=re.MULTILINE), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="of each point in a repeat; default: %(default)s")
    parser.add_argument("--sweeps", nargs="+", choices=list(SWEEPS), default=list(SWEEPS))
    parser.add_argument("--rows", type=int, nargs="+", default=list(Extent.rows))
    parser.add_argument("--adapters", type=int, nargs="+", default=list(Extent.adapters))
    parser.add_argument("--separate", type=int, nargs="+", default=list(Extent.separate))
    parser.add_argument("--context", type=int, nargs="+", default=list(Extent.context))
    parser.add_argument("--more-rows", type=int, default=Extent.more_rows, help="at which members are measured, too")
    parser.add_argument("--clock", choices=["cpu", "wall"], help="of tables and figure; default: cpu, on a CPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--read", type=Path, help="what --json wrote, in place of measuring")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    results: dict[str, list[dict[str, Any]]] = {}
    clock: str = options.clock or "cpu"
    if options.read:
        results = json.loads(options.read.read_bytes())
        for sweep, records in results.items():
            print(f"\n{table(sweep, records, clock)}", flush=True)
    else:
        subject = Subject.of(options)
        extent = Extent(options.rows, options.adapters, options.separate, options.context, options.more_rows)
        print(f"{subject}, {torch.get_num_threads()} threads, torch {torch.__version__}")
        for sweep, members in members_of(subject, extent, options.sweeps):
            if options.clock is None and members[0].backbone.device.type != "cpu":
                clock = "wall"
            results[sweep] = measure(members, extent.points(sweep), options.repeats, options.steps)
            print(f"\n{table(sweep, results[sweep], clock)}", flush=True)
            if options.json:  # after each: an end in the middle leaves what is done
                options.json.write_text(json.dumps(results, indent=2) + "\n")
    if options.figure:
        draw(results, clock, options.figure)


if __name__ == "__main__":
    main()
