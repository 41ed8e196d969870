"""One choice of one request: vLLM's tokens in, the deltas that a client sees out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ensemble_server.ensembles.base import Delta, FinishReason, GenerationRequest, MemberToken, TokenLogprob
from ensemble_server.ensembles.errors import MemberError
from ensemble_server.server.weights.tokenizer import TextStream
from ensemble_server.server.weights.view import StopStrings, Surface

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
    ) -> None:
        self.index = index
        self.num_generated = 0
        self.is_finished = False
        self._sampling = request.sampling
        self._num_top = request.top_logprobs
        self._surface = surface
        self._member = member
        self._max_new_tokens = max_new_tokens
        self._eos_ids = eos_ids
        self._explained_as = explained_as
        self._stream = TextStream(surface, skip_special_tokens=request.sampling.skip_special_tokens)
        self._stops = StopStrings(request.sampling.stop, include=request.sampling.include_stop_str_in_output)
        self._previous: int | None = None

    def read(self, output: CompletionOutput) -> Delta | None:
        """What the next tokens add; None if that is nothing, as after the end. Sets `is_finished`, which vLLM may not
        know yet, since stop strings are ours. Raises `MemberError` if vLLM gave the request up.
        """
        if self.is_finished:
            return None
        if output.finish_reason in ("error", "abort"):
            raise MemberError(
                self._member, f"vLLM ended the generation ({output.finish_reason}); its log has the cause"
            )
        shown = _Shown()
        for place, token_id in enumerate(output.token_ids):
            if not self.is_finished:
                report = None
                if self._num_top is not None:
                    report = self._report(token_id, output.logprobs[place])
                self._take(token_id, report, shown)
        if output.finish_reason is not None and not self.is_finished:
            self._finish(shown, "length" if output.finish_reason == "length" else "stop", None)
        if not (shown.text or shown.token_ids or self.is_finished):
            return None
        return Delta(
            self.index,
            shown.text,
            tuple(shown.token_ids),
            tuple(shown.tokens),
            finish_reason=shown.finish_reason,
            stop_reason=shown.stop_reason,
        )

    def expire(self) -> Delta:
        """The request's deadline has passed: the choice ends with what it has."""
        shown = _Shown()
        self._finish(shown, "length", "deadline")
        return Delta(self.index, shown.text, finish_reason="length", stop_reason="deadline")

    def _take(self, token_id: int, report: TokenLogprob | None, shown: _Shown) -> None:
        """A token that ends the choice is not part of its text."""
        self.num_generated += 1
        sampling = self._sampling
        if token_id in self._eos_ids and not (sampling.ignore_eos and sampling.grammar is None):
            return self._finish(shown, "stop", None)
        if token_id in sampling.stop_token_ids:
            return self._finish(shown, "stop", token_id)
        shown.token_ids.append(token_id)
        if report is not None:
            shown.tokens.append(report)
        self._previous = token_id
        text, stop = self._stream.add(token_id), None
        if self.num_generated >= sampling.min_tokens:
            text, stop = self._stops.add(text)
        shown.text += text
        if stop is not None:
            self.is_finished = True
            shown.finish_reason, shown.stop_reason = "stop", stop
        elif self.num_generated >= self._max_new_tokens:
            self._finish(shown, "length", None)
        return None

    def _finish(self, shown: _Shown, reason: FinishReason, stop_reason: str | int | None) -> None:
        self.is_finished = True
        tail, stop = self._stops.add(self._stream.flush())
        shown.text += tail if stop is not None else tail + self._stops.flush()
        shown.finish_reason, shown.stop_reason = reason, stop_reason

    def _report(self, token_id: int, logprobs: Mapping[int, Logprob]) -> TokenLogprob:
        token = describe(self._surface, token_id, logprobs, self._num_top or 0, previous=self._previous)
        if self._explained_as is None:
            return token
        view = {self._explained_as: MemberToken(token.logprob, 1.0)}
        return TokenLogprob(token.token_id, token.text, token.bytes, token.logprob, token.top, view)


class _Shown:
    """A delta in the making."""

    def __init__(self) -> None:
        self.text = ""
        self.token_ids: list[int] = []
        self.tokens: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None


def describe(
    surface: Surface, token_id: int, logprobs: Mapping[int, Logprob], num_top: int, *, previous: int | None = None
) -> TokenLogprob:
    """One token. `logprobs`: the likeliest tokens and this one, as vLLM gives them."""
    ranked = sorted((known for known in logprobs.items() if known[1].rank <= num_top), key=lambda item: item[1].rank)
    top = tuple(_token(surface, candidate, known.logprob, previous) for candidate, known in ranked)
    return _token(surface, token_id, logprobs[token_id].logprob, previous, top=top)


def describe_prompt(
    surface: Surface, token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Logprob] | None], num_top: int
) -> tuple[TokenLogprob, ...]:
    """The tokens of a prompt; the first has no log-probability, since nothing predicts it."""
    first = _token(surface, token_ids[0], None, None)
    pairs = zip(token_ids[1:], logprobs[1:], strict=True)
    return (first, *(describe(surface, token_id, known, num_top) for token_id, known in pairs))


def _token(
    surface: Surface,
    token_id: int,
    logprob: float | None,
    previous: int | None,
    top: tuple[TokenLogprob, ...] = (),
) -> TokenLogprob:
    data = surface.bytes_of(token_id, previous)
    return TokenLogprob(token_id, data.decode(errors="replace"), data, logprob, top)
