"""`ensemble compress`: a fine-tune as its base and a small delta. Exit codes: 0 done, 1 failed, 2 called wrongly."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from ensemble_server.server.deltas.compress import Compressed
    from ensemble_server.server.deltas.difference import Difference
    from ensemble_server.server.weights.delta_folder import DeltaMethod


def compress(
    finetune: Annotated[str, typer.Argument(metavar="FINETUNE", help="A model folder or hub id.")],
    base: Annotated[str, typer.Option("--base", "-b", help="The model that it was tuned from: a folder or hub id.")],
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method", "-m", help="svd, delta-come, bitdelta or dare; several to compare them.", show_default="svd"
        ),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            help="Bytes, as a part of what the changed matrices take in 16 bits; several to compare them.",
            show_default="1/16",
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Text that it should be good at: errors are weighed by it."),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Other text, on which what is lost is measured."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for the delta; must not exist, or be empty.")
    ] = None,
    embeddings: Annotated[
        Literal["keep", "base"], typer.Option(help="Keep the fine-tune's embeddings and head, or take the base's.")
    ] = "keep",
    vectors: Annotated[
        Literal["keep", "base"], typer.Option(help="Keep the fine-tune's norms and biases, or take the base's.")
    ] = "keep",
    max_tokens: Annotated[int, typer.Option(min=512, help="That are read of each text.")] = 8192,
    seed: Annotated[int, typer.Option(min=0, help="Of dare, which draws random numbers.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
) -> None:
    """Compress a full fine-tune into a small delta on its base, and say what is lost.

    Without --out nothing is written: methods and budgets are compared. With it, in a config:
    models: {math: {base: base, delta: deltas/math}}
    """
    from fractions import Fraction

    from ensemble_server.server.deltas.compress import Plan, check_method, compressed, parse_budget
    from ensemble_server.server.deltas.difference import difference
    from ensemble_server.server.weights.checkpoints import resolve_checkpoint

    methods: list[DeltaMethod] = [check_method(name, is_calibrated=calibrate is not None) for name in method or ["svd"]]
    budgets: list[Fraction] = [parse_budget(one) for one in budget or ["1/16"]]
    plans = [Plan(name, part) for name in methods for part in budgets]
    if out is not None and len(plans) > 1:
        raise typer.BadParameter(
            "one method and one budget are written; leave it out to compare several", param_hint="--out"
        )
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise typer.BadParameter(f"{out} is there already and not empty", param_hint="--out")
    here = Path.cwd()
    with _progress() as say:
        changed = difference(
            resolve_checkpoint(finetune, relative_to=here),
            resolve_checkpoint(base, relative_to=here),
            embeddings=embeddings,
            vectors=vectors,
            on_stage=say,
        )
        found = list(
            compressed(changed, plans, calibrate=calibrate, text=text, max_tokens=max_tokens, seed=seed, on_stage=say)
        )
        notes = list(_notes(changed))
        if out is not None:
            say("writing")
            notes += _written(found[0], changed, out, base=base, finetune=finetune)
    if as_json:
        whole = {"finetune": finetune, "base": base, "deltas": [one.facts() for one in found], "notes": notes}
        typer.echo(json.dumps(whole, indent=2, ensure_ascii=False))
        return
    _print_table(found)
    for note in notes:
        typer.echo(f"- {note}")


def _notes(changed: Difference) -> Iterator[str]:
    num_kept = len(changed.kept)
    if num_kept:
        num_bytes = sum(kept.numel() * kept.element_size() for kept in changed.kept.values())
        yield f"{num_kept} other weights (norms, biases, embeddings) are kept as they are: {num_bytes} bytes"
    if changed.left:
        yield f"{len(changed.left)} other weights that the fine-tune has changed stay the base's"


def _written(one: Compressed, changed: Difference, out: Path, *, base: str, finetune: str) -> list[str]:
    """Write it; -> what is to be known of it."""
    from ensemble_server.server.deltas.writing import CHAT_TEMPLATE, write_delta
    from ensemble_server.server.weights.delta_folder import read_card

    own = changed.finetune_surface.chat_template
    template = own if own != changed.surface.chat_template else None
    write_delta(one, changed, out, base=_named(base), finetune=_named(finetune), chat_template=template)
    name = out.name.replace(" ", "-")
    notes = [f"wrote {out}. In a config: models: {{{name}: {{base: NAME_OF_THE_BASE, delta: {out.absolute()}}}}}"]
    if template is not None:
        notes.append(f"its chat template is not its base's: add chat_template: {out.absolute() / CHAT_TEMPLATE}")
    if read_card(out).is_adapter:
        notes.append("it is a LoRA adapter, and runs as `adapter:` too, here and in vLLM")
    elif one.plan.method == "svd":
        notes.append("with --vectors base --embeddings base it would be a LoRA adapter, which vLLM runs, too")
    return notes


def _named(model: str) -> str:
    path = Path(model).expanduser()
    return str(path.absolute()) if path.exists() else model


def _print_table(found: Sequence[Compressed]) -> None:
    from rich.console import Console
    from rich.table import Table

    from ensemble_server.server.weights.footprint import as_bytes

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)
    table = Table()
    for header in ("method", "budget", "matrices", "kept", "bits/weight", "KL", "KL p99", "same argmax", "bits/byte"):
        table.add_column(header, justify="left" if header == "method" else "right", no_wrap=True)
    table.add_column("spread")
    for one in found:
        loss = one.loss
        measured = ("-",) * 4
        if loss is not None:
            measured = (f"{loss.kl_mean:.4f}", f"{loss.kl_p99:.3f}", f"{loss.same_argmax:.1%}", f"{loss.bpb:.4f}")
        bits = 8 * one.matrices_bytes / one.num_weights
        sizes = as_bytes(one.matrices_bytes), as_bytes(one.kept_bytes), f"{bits:.3f}"
        table.add_row(one.plan.method, str(one.plan.budget), *sizes, *measured, one.spread)
    console.print(table)
    if (loss := found[0].loss) is not None:
        console.print(
            f"On {loss.num_tokens} tokens. Bits per byte: fine-tune {loss.finetune_bpb:.4f}, base {loss.base_bpb:.4f}. "
            f"KL in nats per token, from the fine-tune; that of the base is {loss.base_kl_mean:.4f}."
        )


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Says each stage on standard error: a spinner on a terminal, a line each elsewhere."""
    if not sys.stderr.isatty():
        yield lambda stage: typer.echo(stage, err=True)
        return
    from rich.console import Console

    with Console(stderr=True).status("looking for the models") as status:
        yield lambda stage: status.update(stage)
