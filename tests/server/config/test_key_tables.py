from __future__ import annotations

from pathlib import Path

import pytest

from ensemble_server.ensembles.method import MethodConfig
from ensemble_server.ensembles.registry import METHODS, method_class
from ensemble_server.server.config.key_tables import BLOCKS, table, with_tables

README = Path(__file__).parents[3] / "configs" / "README.md"


def test_the_readmes_tables_are_those_of_the_code() -> None:
    written = README.read_text(encoding="utf-8")
    assert written == with_tables(written), "configs/README.md is not up to date; run `make reference`"


def test_every_block_and_every_method_has_its_place_in_the_readme() -> None:
    written = README.read_text(encoding="utf-8")
    for name in [*BLOCKS, "methods"]:
        assert f"<!-- keys: {name} -->" in written
    for method in METHODS:
        assert f"### `{method}`" in written


@pytest.mark.parametrize("name", METHODS)
def test_every_key_of_a_method_is_explained(name: str) -> None:
    own = {
        key: field
        for key, field in method_class(name).Config.model_fields.items()
        if key not in MethodConfig.model_fields
    }
    assert [key for key, field in own.items() if not field.description] == []


@pytest.mark.parametrize("name", BLOCKS)
def test_every_key_of_a_block_is_explained_and_its_numbers_have_a_unit(name: str) -> None:
    bare_numbers = {"max_retries", "port"}
    for row in table(BLOCKS[name]).splitlines()[2:]:
        _, key, value, unit, _, meaning, _ = (cell.strip() for cell in row.split("|"))
        assert meaning
        assert unit or "number" not in value or key.strip("`") in bare_numbers, key


def test_text_around_the_tables_is_kept() -> None:
    readme = "before\n<!-- keys: engine -->\nold\n<!-- end -->\nafter\n"
    written = with_tables(readme)
    assert written.startswith("before\n<!-- keys: engine -->\n\n| key | value | unit | default | meaning |")
    assert "| `max_batch` | whole number | sequences | `32` |" in written
    assert "old" not in written
    assert written.endswith("\n<!-- end -->\nafter\n")
    assert with_tables(written) == written
