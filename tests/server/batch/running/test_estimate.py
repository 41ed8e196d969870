from __future__ import annotations

import pytest

from ensemble_server.ensembles.base import MemberUsage
from ensemble_server.server.batch.job.rows import BadRow, Row, RowResult
from ensemble_server.server.batch.running.estimate import Estimate, Probe, evenly_chosen


def answered(written: int, **members: MemberUsage) -> RowResult:
    return RowResult(200, "r", {"usage": {"completion_tokens": written}}, members)


FAILED = RowResult(400, "r", {"error": {"message": "too long"}})


def test_a_job_takes_what_its_probe_took_for_each_of_its_rows() -> None:
    """Two rows wrote 10 and 14 tokens in 3 s. A job of 100: 1200 ± 100 * 2.828 / sqrt(2) = 200 tokens, 150 s."""
    results = [answered(10, a=MemberUsage(5, 10, 0.5)), FAILED, answered(14, a=MemberUsage(7, 14, 0.25))]
    probe = Probe(results, elapsed_s=3.0)
    assert probe.errors == ["too long"]
    estimate = Estimate.of(probe, num_rows=100)
    assert estimate is not None
    assert estimate.completion_tokens == 1200
    assert estimate.completion_error == pytest.approx(200)
    assert estimate.elapsed_s == 150
    assert estimate.members == {"a": MemberUsage(600, 1200, 37.5)}


def test_one_row_says_nothing_of_the_spread_and_none_nothing_at_all() -> None:
    alone = Estimate.of(Probe([answered(7)], 1.0), num_rows=10)
    assert alone is not None
    assert (alone.completion_tokens, alone.completion_error) == (70, None)
    assert Estimate.of(Probe([FAILED], 1.0), num_rows=10) is None


def test_a_probe_is_taken_from_all_over_the_job() -> None:
    rows = [Row(index, str(index), "/v1/completions", {}) for index in range(10)]
    assert [row.index for row in evenly_chosen(rows, 10, 3)] == [0, 3, 6]
    assert [row.index for row in evenly_chosen(rows, 10, 20)] == list(range(10))
    assert evenly_chosen(rows, 10, 0) == []
    bad = BadRow(0, "0", 1, {"message": "no", "type": "t", "param": None, "code": None})
    assert [row.index for row in evenly_chosen([bad, *rows[1:]], 10, 2)] == [1, 5]
