"""A scripted ensemble of two members whose views of every token are known."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Sequence

from ensemble_server.ensembles.base import (
    Delta,
    Done,
    Event,
    GenerationRequest,
    MemberToken,
    MemberUsage,
    PromptScored,
    TokenLogprob,
    Usage,
)
from ensemble_server.ensembles.method import Method, MethodConfig, Services
from ensemble_server.server.engines.scripted_engine import Script, ScriptedModel

WEIGHTS = {"left": 0.25, "right": 0.75}


def views(place: int) -> dict[str, float]:
    """The probabilities that the members give token `place`."""
    return {"left": 0.9 if place % 3 == 0 else 0.05, "right": 0.1 + 0.1 * (place % 2)}


def mixed(place: int) -> float:
    return sum(WEIGHTS[name] * p for name, p in views(place).items())


class TwoMinds(Method):
    """Says `pieces`. `requests`: all that was asked; `num_live`: those that have not ended."""

    class Config(MethodConfig):
        pool: str = "arithmetic"
        share: float = 0.0

    reference = "https://example.org"
    overridable = ("weights", "pool", "share")
    explains_tokens = True

    def __init__(self, pieces: Sequence[str], *, name: str = "two", delay_s: float = 0.0, pace: int = 1) -> None:
        members = {member: ScriptedModel(member, Script(("x",)), max_model_len=9000) for member in WEIGHTS}
        super().__init__(name, self.Config(method="probability_average", members=dict(WEIGHTS)), members, Services())
        self.pieces = pieces
        self.delay_s = delay_s
        self.pace = pace  # pieces between two moments in which others may run
        self.requests: list[GenerationRequest] = []
        self.num_live = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Event]:
        self.requests.append(request)
        self.num_live += 1
        try:
            yield PromptScored((1, 2, 3))
            for place, piece in enumerate(self.pieces):
                if place % self.pace == 0:
                    await asyncio.sleep(self.delay_s)
                is_last = place == len(self.pieces) - 1
                tokens = (self._token(place, piece),) if request.top_logprobs is not None else ()
                yield Delta(0, piece, (place,), tokens, finish_reason="stop" if is_last else None)
            used = {name: MemberUsage(3, len(self.pieces)) for name in WEIGHTS}
            yield Done(Usage(3, len(self.pieces), used), "probability_average", self.members, turnout=2)
        finally:
            self.num_live -= 1

    def _token(self, place: int, piece: str) -> TokenLogprob:
        members = {name: MemberToken(math.log(p), WEIGHTS[name]) for name, p in views(place).items()}
        others = tuple(
            TokenLogprob(300 + rank, f" other{rank}", f" other{rank}".encode(), -1.0 - rank) for rank in range(3)
        )
        return TokenLogprob(place, piece, piece.encode(), math.log(mixed(place)), others, members, 1.25, 0.125)
