"""Steps on caches that were filled: what is timed is a decode step, and the caches stay as long as they were."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks.scaling import Extent, Point, Rows, draw, measure, members_of, step, table
from benchmarks.subjects import Subject, load_as_in_use
from ensemble_server.server.engines.transformers_engine.members import Member


@pytest.fixture(scope="module")
def members(tiny: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Member]:
    """A base and a random adapter of it."""
    models = Subject(str(tiny["llama"]), device="cpu").adapted(tmp_path_factory.mktemp("adapters"), 2)
    return list(load_as_in_use(models, max_context=512).values())


def test_a_step_reads_one_token_of_each_row_and_member_and_forgets_it(members: list[Member]) -> None:
    rows, point = Rows(members, 20), Point(members=2, rows=3, context=20)
    first = step(rows, point)
    assert len(first) == 3
    assert step(rows, point) == first
    assert [[span.start for span in spans] for spans in rows.spans(point)] == [[19] * 3] * 2


def test_rows_that_share_tokens_compute_what_rows_with_their_own_do(members: list[Member]) -> None:
    rows = Rows(members, 20)
    (sharing,), (own,) = (rows.spans(Point(rows=2, context=16, num_shared=shared)) for shared in (12, 0))
    assert [span.cache.num_shared for span in sharing] == [12, 12]
    assert sharing[0].cache.shared[0] is sharing[1].cache.shared[0]
    backbone = members[0].backbone
    for found, expected in zip(backbone.forward(sharing), backbone.forward(own), strict=True):
        assert torch.allclose(found, expected, atol=1e-4)


def test_a_context_can_be_short_and_long_again(members: list[Member]) -> None:
    rows = Rows(members, 20)
    long, short = Point(context=20), Point(context=5)
    first = members[0].backbone.forward(rows.spans(long)[0])[0]
    assert not torch.allclose(first, members[0].backbone.forward(rows.spans(short)[0])[0], atol=1e-3)
    ((again,),) = rows.spans(long)
    assert again.start == 19
    assert again.cache.copy_of(5, 19).keys() == again.cache.copy_of(0, 4).keys()


def test_members_with_weights_of_their_own_are_loaded_apart(tiny: dict[str, Path]) -> None:
    extent = Extent(separate=(1, 2))
    ((sweep, two),) = members_of(Subject(str(tiny["llama"]), device="cpu"), extent, ["separate"])
    assert sweep == "separate"
    assert two[0].backbone is not two[1].backbone


def test_each_sweep_gives_a_table(members: list[Member]) -> None:
    extent = Extent(rows=(1, 2), adapters=(1, 2), context=(8, 16), more_rows=2, context_rows=2, num_shared=6)
    results = {
        sweep: measure(members, extent.points(sweep), repeats=2, num_steps=1) for sweep in ("adapters", "shared")
    }
    for record in results["adapters"]:
        assert len(record["wall"]) == len(record["cpu"]) == 2
        assert min(record["wall"]) > 0
    told = table("adapters", results["adapters"], "wall").splitlines()[2:]
    assert [line.split(" | ")[:2] for line in told] == [["| 1", "1"], ["| 2", "1"], ["| 1", "2"], ["| 2", "2"]]
    assert [line.split(" | ")[3] for line in told[::2]] == ["1.00 (1.00 to 1.00)"] * 2
    assert "once for all" in table("shared", results["shared"], "wall")


@pytest.mark.slow  # matplotlib
def test_the_figure_shows_rows_members_and_context(tmp_path: Path) -> None:
    extent = Extent()
    results = {
        sweep: [{**asdict(point), "cpu": [90.0, 110.0, 100.0]} for point in extent.points(sweep)]
        for sweep in ("rows", "adapters", "context")
    }
    draw(results, "cpu", tmp_path / "scaling.svg")
    drawn = (tmp_path / "scaling.svg").read_text()
    for told in ("tokens of context", "adapters, 16 rows", "4,096", "CPU milliseconds of a step"):
        assert told in drawn
