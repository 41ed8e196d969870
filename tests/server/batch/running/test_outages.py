from __future__ import annotations

from ensemble_server.server.batch.running.outages import MAX_S, Outages


def test_one_row_tries_at_a_time_and_waits_longer_each_time() -> None:
    now, said = 0.0, []
    outages = Outages(lambda: now, said.append)
    assert outages.failed("m", "refused", was_turn=False)
    assert not outages.failed("m", "refused", was_turn=False), "was under way when the outage began"
    waits = []
    for _ in range(9):
        wait_s = outages.wait_s("m")
        waits.append(wait_s)
        now += wait_s / 2
        assert outages.wait_s("m") == wait_s / 2
        now += wait_s / 2
        assert outages.wait_s("m") == 0, "this row's turn"
        assert outages.wait_s("m") > 0, "and nobody else's"
        assert outages.failed("m", "refused", was_turn=True)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert waits[-1] == MAX_S
    outages.over("m")
    assert "m" not in outages
    assert (said[0], said[-1]) == ("waits 1 s and tries again: refused", "model 'm' answers again")


def test_models_are_out_of_reach_each_by_itself() -> None:
    outages = Outages(lambda: 0.0)
    outages.failed("m", "refused", was_turn=False)
    assert "m" in outages and "other" not in outages
    outages.over("other")
    assert "m" in outages
