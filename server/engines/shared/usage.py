"""What a mixture's answer used: every member reads its own prompt and every token that is generated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ensemble_server.ensembles.base import Done, MemberUsage, Usage


def done(method: str, num_read: Mapping[str, int], num_generated: int, num_reasoning: int = 0) -> Done:
    """The last event of a request. `num_read`: tokens of the prompt by member; the first member's count as the
    request's. `num_generated`: tokens of all choices, also those that ended a choice and were not shown;
    `num_reasoning`: those of them that are thoughts.
    """
    members = {
        name: MemberUsage(length, num_generated, reasoning_tokens=num_reasoning) for name, length in num_read.items()
    }
    usage = Usage(next(iter(num_read.values())), num_generated, members, num_reasoning)
    return Done(usage, method, tuple(members), len(members), vocabulary="tokens" if len(members) > 1 else None)


def with_joint(done: Done, main: str, num_joint: int) -> Done:
    """`done` of a selective average: members besides `main` have written those tokens that came from the pool."""
    members = {
        name: member if name == main else MemberUsage(member.prompt_tokens, num_joint)
        for name, member in done.usage.members.items()
    }
    return replace(done, usage=replace(done.usage, members=members))
