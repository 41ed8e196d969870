from __future__ import annotations

from ensemble_server.ensembles.base import MemberUsage
from ensemble_server.server.engines.shared.usage import done


def test_every_member_reads_its_own_prompt_and_all_that_is_generated() -> None:
    end = done("probability_average", {"a": 5, "b": 7}, 3)
    assert (end.method, end.members, end.turnout) == ("probability_average", ("a", "b"), 2)
    assert (end.usage.prompt_tokens, end.usage.completion_tokens) == (5, 3)
    assert end.usage.members == {"a": MemberUsage(5, 3), "b": MemberUsage(7, 3)}
