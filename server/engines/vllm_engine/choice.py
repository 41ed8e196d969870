"""One choice of one request: vLLM's tokens in, the deltas that a client sees out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ensemble_server.ensembles.base import Delta, GenerationRequest, MemberToken, TokenLogprob
from ensemble_server.ensembles.errors import MemberError
from ensemble_server.server.engines.shared.choice_text import ChoiceText, joined
from ensemble_server.server.engines.shared.thoughts import thought_stream
from ensemble_server.server.engines.shared.token_report import report
from ensemble_server.server.weights.view import Surface

if TYPE_CHECKING:
    from vllm.logprobs import Logprob
    from vllm.outputs import CompletionOutput


class VllmChoice:
    """Belongs to one task. `explained_as`: the member that has all weight, if each token is to carry its view."""

    def __init__(
        self,
        index: int,
        request: GenerationRequest,
        surface: Surface,
        *,
        member: str,
        max_new_tokens: int,
        eos_ids: frozenset[int],
        explained_as: str | None,
        prompt: Sequence[int] = (),
    ) -> None:
        self._num_top = request.top_logprobs
        self._surface = surface
        self._member = member
        self._explained_as = explained_as
        self._text = ChoiceText(
            index,
            request.sampling,
            surface,
            max_new_tokens=max_new_tokens,
            eos_ids=eos_ids,
            thoughts=thought_stream(request, surface, prompt),
        )

    @property
    def num_generated(self) -> int:
        return self._text.num_generated

    @property
    def num_reasoning(self) -> int:
        return self._text.num_reasoning

    @property
    def is_finished(self) -> bool:
        """vLLM may not know of it yet, since stop strings are ours."""
        return self._text.finish_reason is not None

    def read(self, output: CompletionOutput) -> Delta | None:
        """What the next tokens add; None if that is nothing, as after the end. Raises `MemberError` if vLLM gave the
        request up.
        """
        if self.is_finished:
            return None
        if output.finish_reason in ("error", "abort"):
            raise MemberError(
                self._member, f"vLLM ended the generation ({output.finish_reason}); its log has the cause"
            )
        deltas = []
        for place, token_id in enumerate(output.token_ids):
            if not self.is_finished:
                known = None if output.logprobs is None or self._num_top is None else output.logprobs[place]
                deltas.append(self._text.add(token_id, None if known is None else self._report(token_id, known)))
        if output.finish_reason is not None and not self.is_finished:
            deltas.append(self._text.end("length" if output.finish_reason == "length" else "stop"))
        if not deltas:
            return None
        shown = joined(deltas)
        return shown if shown.text or shown.token_ids or self.is_finished else None

    def expire(self) -> Delta:
        """The request's deadline has passed: the choice ends with what it has."""
        return self._text.expire()

    def _report(self, token_id: int, logprobs: Mapping[int, Logprob]) -> TokenLogprob:
        token = describe(self._surface, token_id, logprobs, self._num_top or 0, previous=self._text.last_token)
        if self._explained_as is None:
            return token
        return replace(token, members={self._explained_as: MemberToken(logprobs[token_id].logprob, 1.0)})


def describe(
    surface: Surface, token_id: int, logprobs: Mapping[int, Logprob], num_top: int, *, previous: int | None = None
) -> TokenLogprob:
    """One token. `logprobs`: the likeliest tokens and this one, as vLLM gives them."""
    ranked = sorted((known.rank, candidate, known.logprob) for candidate, known in logprobs.items())
    alternatives = [(candidate, logprob) for rank, candidate, logprob in ranked if rank <= num_top]
    return report(surface, token_id, logprobs[token_id].logprob, alternatives, previous=previous)


def describe_prompt(
    surface: Surface, token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Logprob] | None], num_top: int
) -> tuple[TokenLogprob, ...]:
    """The tokens of a prompt; the first has no log-probability, since nothing predicts it."""
    tokens = [report(surface, token_ids[0], None)]
    for token_id, known in zip(token_ids[1:], logprobs[1:], strict=True):
        assert known is not None, "every token but the first is predicted"
        tokens.append(describe(surface, token_id, known, num_top))
    return tuple(tokens)
