"""Records as rows of items: what was asked, what was right, and what every arm made of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

from ensemble_server.server.compare.analysis.pairing import has_figures, has_scores, same_items, same_texts
from ensemble_server.server.compare.kept.items import ItemCell, ItemRow, ItemTable
from ensemble_server.server.compare.kept.records import ArmRecord, ItemRecord
from ensemble_server.server.compare.measures.documents import Documents
from ensemble_server.server.compare.measures.task_files import rows_of
from ensemble_server.server.compare.measures.task_measure import Task
from ensemble_server.server.compare.planning.blocks import TaskSource

MAX_FIELD_CHARS = 80  # longer values are texts, not something to cut slices by
BETWEEN_SAMPLES = "\n\n--- another sample ---\n\n"


def read_fields(sources: Sequence[TaskSource]) -> dict[str, dict[str, dict[str, str]]]:
    """Task -> item -> the short values of its row. Raises `ConfigError` if a file cannot be read."""
    return {
        source.name: {
            str(row.get("id", number)): {
                key: str(value)
                for key, value in row.items()
                if key != "id" and isinstance(value, str | int | float) and len(str(value)) <= MAX_FIELD_CHARS
            }
            for number, (_, row) in enumerate(islice(rows_of(Path(source.data)), source.limit))
        }
        for source in sources
    }


def item_tables(
    records: Sequence[ArmRecord],
    texts: Mapping[str, Documents],
    tasks: Mapping[str, Task],
    fields: Mapping[str, Mapping[str, Mapping[str, str]]],
) -> list[ItemTable]:
    """A table for each text and each task that an arm has a figure on. Arms that were given something else than the
    first of them have no cells. Tasks of lm-evaluation-harness have no prompts here."""
    tables = [_of_text(name, documents, records) for name, documents in texts.items()]
    of_harness = dict.fromkeys(name for record in records for name in record.tasks if name not in tasks)
    tables += [_of_task(name, tasks.get(name), records, fields.get(name, {})) for name in (*tasks, *of_harness)]
    return [table for table in tables if table is not None]


def _of_text(name: str, documents: Documents, records: Sequence[ArmRecord]) -> ItemTable | None:
    having = [record for record in records if has_figures(record, name)]
    having = [
        record
        for record in having
        if same_texts(record.text[name], having[0].text[name]) and len(record.text[name].nats) == len(documents)
    ]
    if not having:
        return None
    rows = [
        ItemRow(
            f"document {index}",
            text,
            "",
            {
                record.name: ItemCell(nats / math.log(2) / size)
                for record in having
                if (nats := record.text[name].nats[index]) is not None and (size := record.text[name].num_bytes[index])
            },
        )
        for index, text in enumerate(documents.texts)
    ]
    return ItemTable(f"text {name}", "bits per byte", False, [record.name for record in having], rows)


def _of_task(
    name: str, task: Task | None, records: Sequence[ArmRecord], fields: Mapping[str, Mapping[str, str]]
) -> ItemTable | None:
    having = [record for record in records if has_scores(record, name)]
    having = [record for record in having if same_items(record.tasks[name], having[0].tasks[name])]
    if not having:
        return None
    prompts = {} if task is None else {item.id: item.prompt for item in task.items}
    first = having[0].tasks[name]
    rows = [
        ItemRow(
            item.id,
            prompts.get(item.id, ""),
            item.reference,
            {record.name: _cell(record.tasks[name].items[index]) for record in having},
            fields.get(item.id, {}),
        )
        for index, item in enumerate(first.items)
    ]
    return ItemTable(f"task {name}", first.metric, first.higher_is_better, [record.name for record in having], rows)


def _cell(item: ItemRecord) -> ItemCell:
    answers = [answer for answer in item.answers if answer is not None]
    return ItemCell(
        item.score, BETWEEN_SAMPLES.join(item.outputs), ", ".join(dict.fromkeys(answers)) or None, item.error
    )
