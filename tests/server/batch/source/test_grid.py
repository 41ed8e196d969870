from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ensemble_server.server.batch.source.grid import Grid, parse_numbers, parse_seeds, parse_words


def test_cells_are_all_combinations_and_the_first_axis_varies_slowest() -> None:
    grid = Grid({"model": ("a", "b"), "seed": (0, 1)})
    assert grid.cells == (
        {"model": "a", "seed": 0},
        {"model": "a", "seed": 1},
        {"model": "b", "seed": 0},
        {"model": "b", "seed": 1},
    )
    assert [grid.cell_of(index)["model"] for index in range(6)] == ["a", "a", "b", "b", "a", "a"]


def test_a_grid_without_axes_has_one_empty_cell() -> None:
    assert Grid().cells == ({},)


def test_a_grid_refuses_equal_values_and_too_many_cells() -> None:
    with pytest.raises(ValueError, match=r"temperature: a value stands there twice: 0.2, 0.2"):
        Grid({"temperature": (0.2, 0.2)})
    with pytest.raises(ValueError, match="may have 10000 cells, this one has 1000000000"):
        Grid({axis: tuple(range(1000)) for axis in "abc"})


@pytest.mark.parametrize(("text", "seeds"), [("3", (3,)), ("0-3", (0, 1, 2, 3)), ("0-1, 7", (0, 1, 7)), ("5-5", (5,))])
def test_seeds_are_numbers_and_ranges(text: str, seeds: tuple[int, ...]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "3-1", "0-99999999", "-1", "1.5", "1,,2", "٣", str(2**63)])
def test_what_is_no_seed_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"seeds|numbers"):
        parse_seeds(text)


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=20))
def test_seeds_that_were_written_with_commas_are_read_back(seeds: list[int]) -> None:
    assert parse_seeds(",".join(map(str, seeds))) == tuple(seeds)


def test_numbers_are_held_to_their_range() -> None:
    assert parse_numbers("0.2, 1", least=0, most=2) == (0.2, 1.0)
    for text, said in (("0.2,3", "must be 0 to 2, got 3"), ("nan", "must be 0 to 2"), ("warm", "must be numbers")):
        with pytest.raises(ValueError, match=said):
            parse_numbers(text, least=0, most=2)


def test_words_are_not_blank() -> None:
    assert parse_words("a, b") == ("a", "b")
    with pytest.raises(ValueError, match="names with commas"):
        parse_words("a,,b")
