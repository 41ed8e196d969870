"""An inventory of a config on the screen: a table where there is room for one, else a paragraph per model; or JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ensemble_server.server.inventory import Inventory, Item
from ensemble_server.server.weights.footprint import as_bytes, as_count

TABLE_WIDTH = 110  # columns; in less, paths would be folded into stripes of a few letters


def print_table(inventory: Inventory) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 160)  # a pipe has no width of its own; cells should not wrap there
    if console.width >= TABLE_WIDTH:
        console.print(_table(inventory))
    else:
        console.print(Text(str(inventory.source), style="bold"))
        for item in inventory.items:
            _print_paragraph(console, item)
        console.print()
    console.print(
        f"Weights: {as_bytes(inventory.weights_bytes)} in all. KV cache: above for one sequence of full context; "
        f"at most {as_bytes(inventory.kv_bytes)} with {inventory.max_batch} of them (engine.max_batch) on every member "
        f"at once{'.' if inventory.kv_cache_bytes is None else ', or what engine.kv_cache_mb allows.'}"
    )


def as_json(inventory: Inventory) -> str:
    models = [
        {
            "name": item.name,
            "kind": item.kind,
            "listed": item.is_listed,
            "made_of": item.made_of,
            "settings": item.settings,
            "parameters": item.size and item.size.num_parameters,
            "weights_bytes": item.size and item.size.num_bytes,
            "kv_cache_bytes": item.size and item.size.kv_bytes,
            "context": item.size and item.size.context,
            "vocabulary": item.vocabulary,
            "averaged_over": item.averaged_over,
        }
        for item in inventory.items
    ]
    total = {
        "weights_bytes": inventory.weights_bytes,
        "kv_cache_bytes": inventory.kv_bytes,
        "max_batch": inventory.max_batch,
    }
    whole = {"source": str(inventory.source), "models": models, "total": total, "problems": list(inventory.problems)}
    return json.dumps(whole, indent=2, ensure_ascii=False, default=str)


def _table(inventory: Inventory) -> Table:
    table = Table(title=str(inventory.source), title_justify="left", title_style="bold")
    for header in ("model", "kind", "made of", "settings"):
        table.add_column(header, overflow="fold")
    for header in ("parameters", "weights", "KV cache", "context"):
        table.add_column(header, justify="right", no_wrap=True)
    for item in inventory.items:
        size = item.size
        numbers = (
            [as_count(size.num_parameters), as_bytes(size.num_bytes), as_bytes(size.kv_bytes), str(size.context)]
            if size
            else []
        )
        cells = [_name(item), _kind(item), item.made_of, _settings(item.settings), *numbers]
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _print_paragraph(console: Console, item: Item) -> None:
    console.print()
    console.print(Text.assemble((_name(item), "bold"), f"  {_kind(item)}"))
    lines = [item.made_of, _settings(item.settings)]
    if (size := item.size) is not None:
        lines.append(
            f"{as_count(size.num_parameters)} parameters, {as_bytes(size.num_bytes)}; KV cache "
            f"{as_bytes(size.kv_bytes)}, context {size.context}"
        )
    for line in filter(None, lines):
        console.print(Padding(Text(line, overflow="fold"), (0, 0, 0, 2)))


def _name(item: Item) -> str:
    return item.name if item.is_listed else f"{item.name} (hidden)"


def _kind(item: Item) -> str:
    """What is averaged is told where it is not the tokens that all members share."""
    return f"{item.kind} over bytes" if item.averaged_over == "bytes" else item.kind


def _settings(settings: Mapping[str, Any]) -> str:
    """{"pool": "posterior", "share": 0.01} -> "pool=posterior share=0.01" """
    return " ".join(f"{key}={_shortened(str(value))}" for key, value in settings.items())


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 40 else line[:39] + "…"
