"""`pairs.json`: every arm against every other one, so that a reader may choose the baseline. The report reads it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, ValidationError

from ensemble_server.server.compare.kept.results import Difference, Part
from ensemble_server.server.disk.whole_file import write_whole

PAIRS_FILE = "pairs.json"


class Pairs(Part):
    """baseline -> measure ("text NAME", "task NAME", "mean text", "mean task") -> arm -> its difference from that one.

    Adjusted by Holm over the arms of each measure, as the plan's own baseline is. That one is not in here: its
    differences are in `results.json`. `num_resamples`: of the bootstrap, fewer than there.
    """

    num_resamples: int
    of: Mapping[str, Mapping[str, Mapping[str, Difference]]] = Field(default_factory=dict)

    def save(self, folder: Path) -> None:
        write_whole(folder / PAIRS_FILE, self.model_dump_json().encode() + b"\n")

    @classmethod
    def load(cls, folder: Path) -> Pairs | None:
        """None if there are none, or of another version of this program."""
        try:
            return cls.model_validate_json((folder / PAIRS_FILE).read_bytes())
        except (OSError, ValidationError):
            return None
