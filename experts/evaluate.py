"""Bits per byte of the base model and of each expert on every domain's test text, as two Markdown tables.

    python experts/evaluate.py

The adapters are loaded as saved, onto a float32 base. `bits_per_byte.py` states the scoring rule and the intervals.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

import torch
from bits_per_byte import Interval, WindowScores, bootstrap_bpb, bootstrap_difference, score_windows
from peft import PeftModel
from train import BASE, DOMAINS, ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from ensemble_server.server.weights.checkpoints import resolve_checkpoint

EXPERTS = ROOT / "experts"


def main() -> None:
    settings = parse_arguments()
    torch.set_num_threads(settings.threads)
    checkpoint = resolve_checkpoint(BASE, relative_to=ROOT)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = load_experts(checkpoint)

    scores: dict[tuple[str, str], WindowScores] = {}
    for domain in DOMAINS:
        text = (ROOT / f"data/text/{domain}_test.txt").read_text(encoding="utf-8")
        for name in ("base", *DOMAINS):
            with select_expert(model, name):
                scores[name, domain] = score_windows(model, tokenizer, text, window=settings.window)
            print(f"{name} on {domain}: {scores[name, domain].bpb:.4f}", flush=True)

    report = report_tables(scores, settings.window)
    settings.out.write_text(report, encoding="utf-8")
    print(report)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure the experts against their base.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--window", type=int, default=512, help="tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=EXPERTS / "RESULTS.md")
    return parser.parse_args()


def load_experts(checkpoint: Path) -> PeftModel:
    """One float32 base that carries every expert's adapter under its domain's name."""
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    first, *others = DOMAINS
    model = PeftModel.from_pretrained(base, EXPERTS / first, adapter_name=first)
    for domain in others:
        model.load_adapter(EXPERTS / domain, adapter_name=domain)
    return model.eval()


def select_expert(model: PeftModel, name: str) -> contextlib.AbstractContextManager[None]:
    """Within the returned context `model` is the expert `name`, or the bare base for "base"."""
    if name == "base":
        return model.disable_adapter()
    model.set_adapter(name)
    return contextlib.nullcontext()


def report_tables(scores: dict[tuple[str, str], WindowScores], window: int) -> str:
    """Two Markdown tables: the figures, and their paired differences to the base; 95% intervals in brackets."""
    figures = {
        name: [format_cell(scores[name, domain].bpb, bootstrap_bpb(scores[name, domain])) for domain in DOMAINS]
        for name in ("base", *DOMAINS)
    }
    differences = {
        name: [format_difference(scores[name, domain], scores["base", domain]) for domain in DOMAINS]
        for name in DOMAINS
    }
    return f"""# Bits per byte on the test texts

Written by `python experts/evaluate.py`: windows of {window} tokens, float32; in brackets the 95% bootstrap interval
over windows. Lower is better.

{markdown_table(figures)}
Difference to the base on the same windows (paired intervals; below zero the expert is better):

{markdown_table(differences)}"""


def markdown_table(rows: dict[str, list[str]]) -> str:
    """One row per model, one column per domain's test text."""
    lines = [["model", *(f"{domain}_test" for domain in DOMAINS)], ["---"] * (len(DOMAINS) + 1)]
    lines += [[name, *cells] for name, cells in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def format_difference(scores: WindowScores, base_scores: WindowScores) -> str:
    return format_cell(scores.bpb - base_scores.bpb, bootstrap_difference(scores, base_scores), sign="+")


def format_cell(value: float, interval: Interval, sign: str = "") -> str:
    """`0.746 [0.712, 0.781]`; with `sign="+"` positive numbers carry their sign."""
    return f"{value:{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"


if __name__ == "__main__":
    main()
