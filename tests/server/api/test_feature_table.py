"""The table itself. That it tells the truth is seen in test_hosted_models.py, on both engines."""

from __future__ import annotations

import pytest

from tests.server.api.feature_table import FEATURES, PROBES, rows


def test_every_feature_of_the_table_is_probed_and_no_other() -> None:
    assert [row.name for row in FEATURES] == list(PROBES)


@pytest.mark.parametrize("row", FEATURES, ids=lambda row: row.name)
def test_every_cell_says_yes_or_what_is_refused(row) -> None:
    for cell in row.cells.values():
        assert cell.startswith("yes") or (cell.startswith("refused (`") and cell.endswith("`)")), cell


def test_a_table_with_other_columns_is_not_read() -> None:
    with pytest.raises(AssertionError):
        rows("<!-- features -->\n| a | b |\n|---|---|\n<!-- end -->")
