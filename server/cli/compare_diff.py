"""`ensemble compare --diff A B`: two results of comparisons, what changed and whether that is more than chance."""

from __future__ import annotations

from pathlib import Path

import typer


def print_difference(first: Path, second: Path) -> None:
    """Print what changed from `first` to `second`. Raises `ConfigError` if one of them holds no results."""
    from ensemble_server.server.compare.analysis.two_runs import compare_runs, read_run
    from ensemble_server.server.compare.report import words

    found = compare_runs(read_run(first), read_run(second))
    for line in found.notes:
        typer.echo(line)
    for change in found.changes:
        digits = 4 if change.measure.startswith("text") else 3
        line = f"{change.arm}, {change.measure}: {change.before:.{digits}f} → {change.after:.{digits}f}"
        line += f" ({words.signed(change.after - change.before, digits)})"
        if change.difference is not None:
            compared = change.difference
            line += f", {compared.verdict} ({words.interval(compared.ci, digits, is_signed=True)}), "
            line += f"{compared.wins} items better, {compared.losses} worse"
        if change.reason:
            line += f"; {change.reason}"
        typer.echo(line)
        if change.flipped:
            typer.echo(f"    items that changed: {', '.join(change.flipped)}")
    if not found.changes:
        typer.echo("no arm has a figure on the same measure in both")
