"""`ensemble compare --init`: a plan for a config, to be filled in."""

from __future__ import annotations

from pathlib import Path

import typer


def init_plan(config: Path, plan: Path) -> None:
    """Write it and say what is to be filled in. Raises `ConfigError` if the config cannot be compared."""
    from ensemble_server.server.compare.planning.proposed import write_proposed_plan

    written = write_proposed_plan(config, plan)
    for kind, names in written.arms.items():
        if names:
            typer.echo(f"{kind}: {', '.join(names)}")
    for reason in written.left_out:
        typer.echo(f"- {reason}")
    typer.echo(
        f"\nWrote {written.plan}. It runs as it is on {written.questions.name}, a few sums that decide nothing. "
        "To be filled in there:\n"
        "- tasks: questions that you care about, some hundred of them (`data`, `metric`, `template`)\n"
        "- text: texts of your domain that no model was trained on, and `fit`, others of the kind\n"
        "- statistics: the smallest differences that matter to you\n\n"
        f"  ensemble compare {written.plan} --dry-run          # what it will take\n"
        f"  ensemble compare {written.plan} --out comparison   # measure, and write the report"
    )
