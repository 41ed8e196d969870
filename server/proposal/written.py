"""A proposal as a YAML file with comments, ready to be served and to be edited."""

from __future__ import annotations

import textwrap
from typing import Any

import yaml

from ensemble_server.server.proposal.proposal import Entry, Proposal

WIDTH = 110


def as_yaml(proposal: Proposal) -> str:
    """`load_config` reads from it what `proposal.as_config` gives."""
    lines = ["# Written by `ensemble init`. What else a key may say: configs/README.md of the project", ""]
    lines += [line for note in proposal.notes for line in _comment(note, indent=0)]
    if proposal.notes:
        lines.append("")
    lines.append("models:")
    for index, entry in enumerate((*proposal.members, *proposal.ensembles)):
        if index:
            lines.append("")
        lines += [*_comment(entry.comment, indent=2), f"  {_entry(entry)}"]
    if proposal.engine:
        lines += ["", *_comment(proposal.engine_comment, indent=0), f"engine: {_flow(proposal.engine)}"]
    lines += ["", "server: {host: 127.0.0.1, port: 8000}"]
    return "\n".join(lines) + "\n"


def _entry(entry: Entry) -> str:
    return f"{_flow(entry.name)}: {_flow(entry.keys)}"


def _flow(value: Any) -> str:
    """On one line: {path: ./base, dtype: float32}"""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    return text.strip().removesuffix("...").strip()


def _comment(text: str, *, indent: int) -> list[str]:
    margin = " " * indent + "# "
    return textwrap.wrap(text, WIDTH, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False)
