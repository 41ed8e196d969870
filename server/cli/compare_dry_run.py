"""`ensemble compare --dry-run`: what a plan will take, before anything is loaded, asked or written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ensemble_server.server.compare.planning.blocks import Arm
    from ensemble_server.server.compare.planning.plan import Plan


def dry_run(plan: Plan) -> None:
    """Print arms, items, tokens, hours and money. Raises `ConfigError` if texts or tasks cannot be read."""
    from ensemble_server.server.compare.arms.forecast import forecasts, this_machines_speed, total_hours, total_money
    from ensemble_server.server.compare.planning.sources import read_tasks, read_texts
    from ensemble_server.server.compare.report.words import KINDS

    file = plan.file
    texts = read_texts(file.text, min_bytes=file.document_bytes)
    held_out = read_texts(file.fit, min_bytes=file.document_bytes)
    tasks = read_tasks(file.tasks)
    for name, documents in texts.items():
        num_bytes = sum(len(text.encode()) for text in documents.texts)
        typer.echo(f"text {name}: {len(documents)} documents, {num_bytes:,} bytes")
    for name, task in tasks.items():
        samples = f", {task.num_samples} samples each" if task.num_samples > 1 else ""
        typer.echo(f"task {name}: {len(task.items)} items{samples}, {task.metric}")
    for source in file.tasks:
        if source.judge is not None:
            num_pairs = len(tasks[source.name].items) * len(file.arms) * (len(file.arms) - 1)
            typer.echo(f"task {source.name}: {source.judge} judges up to {num_pairs:,} times; not counted below")
    if file.lm_eval is not None:
        typer.echo(f"lm_eval {', '.join(file.lm_eval.tasks)}: not counted below")
    if (num_merges := sum(one.merge is not None for arm in file.arms for one in arm.variants)) > 0:
        typer.echo(f"merges: {num_merges}, but for those that the cache has already")
    if any(source.dev is not None for source in file.tasks):
        typer.echo("cost-matched arms: as many samples as an ensemble's cost buys; not counted below")
    found = forecasts(plan, texts, held_out, tasks, this_machines_speed())
    width = max(len(arm.name) for arm in file.arms)
    typer.echo("")
    for arm in file.arms:
        if arm.is_recorded:
            typer.echo(f"{arm.name:<{width}}  answers that are there already")
    for one in found:
        takes = "size not known" if one.hours is None else f"about {_duration(one.hours)}"
        money = ", price not known" if one.money is None else f", {one.money:.4g} to pay" if one.money else ""
        baseline = ", the baseline" if one.arm == file.baseline else ""
        choice = _choice(next(arm for arm in file.arms if arm.name == one.arm))
        typer.echo(
            f"{one.arm:<{width}}  {KINDS[one.kind]}{baseline}{choice}: reads {one.num_read:,} tokens, writes up to "
            f"{one.num_written:,}; {takes}{money}"
        )
    hours, money = total_hours(found), total_money(found)
    typer.echo(
        f"\n{len(found)} arms, {sum(one.num_read + one.num_written for one in found):,} tokens at most, "
        f"{'hours not known' if hours is None else f'about {_duration(hours)} on this machine'}, "
        f"{'a price that is not known' if money is None else f'{money:.4g} to pay'}. "
        "An order of magnitude: arms on the same weights read a text together, answers are mostly shorter than they "
        "may be; making merges and loading come on top. Nothing was started and nothing written."
    )


def _choice(arm: Arm) -> str:
    return f", the best of {len(arm.variants)}" if len(arm.variants) > 1 else ""


def _duration(hours: float) -> str:
    """0.5 -> "30 minutes" """
    if hours >= 1:
        return f"{hours:.1f} hours"
    minutes = hours * 60
    return f"{minutes:.0f} minutes" if minutes >= 2 else f"{minutes * 60:.0f} seconds"
