"""One choice of a request whose members have vocabularies of their own: text is drawn byte by byte.

Every member's lattice gives a row of 256 bytes and END; rows are pooled, a byte is drawn, every lattice is fed it.
Bytes follow one another without a forward until one of the lattices wants one. What the client sees is *pieces*: tokens
of the surface, as the first member's lattice has settled them, at most a few bytes late. Where alternatives to a piece
are asked for, lattices look ahead wherever one may begin, before the next byte is drawn (`byte_lookahead`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ensemble_server.ensembles.base import (
    Delta,
    FinishReason,
    GenerationRequest,
    MemberToken,
    Mixture,
    Sampling,
    TokenLogprob,
)
from ensemble_server.ensembles.pooling import sampling
from ensemble_server.ensembles.pooling.disagreement import entropy, jensen_shannon
from ensemble_server.ensembles.spelling import END, ROW, utf8
from ensemble_server.ensembles.spelling.lattice import EPSILON, History
from ensemble_server.server.engines.shared.choice_text import ChoiceText, joined
from ensemble_server.server.engines.shared.grammar import GrammarMask, byte_row
from ensemble_server.server.engines.shared.thoughts import thought_bytes_limit, thought_stream
from ensemble_server.server.engines.transformers_engine.attention import Span
from ensemble_server.server.engines.transformers_engine.byte_lookahead import Lookahead, Scored, told
from ensemble_server.server.engines.transformers_engine.byte_pool import BytePool
from ensemble_server.server.engines.transformers_engine.drawing import generator
from ensemble_server.server.engines.transformers_engine.kv_budget import Spare
from ensemble_server.server.engines.transformers_engine.kv_cache import RowCache
from ensemble_server.server.engines.transformers_engine.members import Member
from ensemble_server.server.engines.transformers_engine.speller import Speller, branched, by_speller, received

Reread = Callable[[str], list[int]]  # the answer so far -> prompt and answer in one member's tokens

NARROW = 0.5  # of all mass: if masks leave less, what sleeps may matter


@dataclass(frozen=True)
class ByteReport:
    """What is known of one byte that was drawn. Per member: log-probability and weight."""

    logprob: float
    members: Sequence[float]
    weights: Sequence[float]
    entropy: float = 0.0
    disagreement: float = 0.0


class ByteChoice:
    """`spellers`: one per member, at the end of the prompt, none of them waiting; the first is the surface's.

    `state`: what the weights of the first byte follow from (`ensembles.pooling.following`); `rereads`: for a member
    that cannot go on from what it has; `prompt`: as the first member reads it, which says whether a thought is open.
    """

    def __init__(
        self,
        index: int,
        request: GenerationRequest,
        mixture: Mixture,
        spellers: Sequence[Speller],
        *,
        state: np.ndarray,
        prior: np.ndarray,
        max_new_tokens: int,
        grammar: GrammarMask | None,
        rereads: Sequence[Reread],
        prompt: Sequence[int] = (),
    ) -> None:
        self.index = index
        self.members: Sequence[Member] = [speller.member for speller in spellers]
        self.spellers = spellers
        self.mixture = mixture
        self._pool = BytePool(mixture, prior, state)
        self._request = request
        self._sampling: Sampling = request.sampling
        self._grammar = grammar
        self._rereads = rereads
        self._text = bytearray()
        self._num_shown = 0  # bytes of it that were handed out as pieces
        self._reports: list[ByteReport] = []  # of the bytes behind `_num_shown`
        self._state = utf8.START
        self._is_fed = False  # whether a byte is on its way into the lattices
        self._has_looked = False  # whether sleepers were woken for what the masks leave at this byte
        self._ahead: dict[int, Lookahead] = {}  # from bytes behind `_num_shown` at which a piece may begin
        self._wanted: list[tuple[int, History]] = []  # by the last of them, in this step
        surface = self.members[0].surface
        self._shown = ChoiceText(
            index,
            self._sampling,
            surface,
            max_new_tokens=max_new_tokens,
            eos_ids=frozenset(),
            thoughts=thought_stream(request, surface, prompt),
        )
        self._thought_limit = thought_bytes_limit(request, surface)
        self._is_forced = False  # whether the byte on its way was no draw
        self._deltas: list[Delta] = []  # that were not handed out yet
        self._num_asked: list[int] = []  # rows of each member in this step
        self._generator = generator(self._sampling.seed, index)

    @property
    def num_generated(self) -> int:
        """Pieces that the client has seen."""
        return self._shown.num_generated

    @property
    def num_reasoning(self) -> int:
        """Of them, those of a thought and its markers, which are the first member's."""
        return self._shown.num_reasoning

    @property
    def finish_reason(self) -> FinishReason | None:
        return self._shown.finish_reason

    # --- what the engine asks for -----------------------------------------------------------------------------------

    @property
    def caches(self) -> Iterator[RowCache]:
        return (speller.cache for speller in self.spellers)

    @property
    def num_next(self) -> list[int]:
        """See `LiveChoice`."""
        looked_at = self._looked_at()
        return [speller.num_next(looked_at[k]) for k, speller in enumerate(self.spellers)]

    def next_spans(self, spare: Spare) -> list[tuple[Member, Span]]:
        """The rows that its lattices, or copies that look ahead, want: per member none, mostly one, at most eight.
        `spare`: for those that do not stand where the member's own row does."""
        if (ahead := self._looks_ahead()) is not None:
            spans, self._wanted = branched(self.spellers, ahead.wanted, spare)
        else:
            spans, self._wanted = [speller.next_spans(spare) for speller in self.spellers], []
        self._num_asked = list(map(len, spans))
        return [(member, span) for member, own in zip(self.members, spans, strict=True) for span in own]

    @torch.inference_mode()
    def take(self, rows: Sequence[torch.Tensor]) -> Delta | None:
        """The results of `next_spans`: (1, V) each. Draws bytes until a forward is wanted again, or the choice ends.

        -> what the client sees of it, if anything."""
        distributions = received(self.spellers, rows, self._num_asked, is_branched=bool(self._wanted))
        if (ahead := self._looks_ahead()) is not None:
            for (k, history), distribution in zip(self._wanted, distributions, strict=True):
                ahead.give(k, history, distribution)
            self._bound(ahead)
        return self.go_on()

    @torch.inference_mode()
    def go_on(self) -> Delta | None:
        """Draw bytes as long as no lattice wants a forward. The first call begins the choice."""
        while self.finish_reason is None and not self._is_waiting():
            if self._is_fed:
                self._learn()
            elif self._may_look_ahead():
                self._look_ahead()
            elif (symbol := self._draw()) is not None:
                if symbol == END:
                    self._finish("stop")
                else:
                    self._feed(symbol)
        if self.finish_reason is None and any(
            speller.is_waiting and speller.num_read > speller.member.max_model_len for speller in self.spellers
        ):
            self._finish("length")
        return self._delta()

    def expire(self) -> Delta:
        """The request's deadline has passed: the choice ends with what it has."""
        self._show_rest()
        if self.finish_reason is None:
            self._deltas.append(self._shown.expire())
        return joined(self._deltas)

    def cut(self) -> Delta:
        """There is no memory for it to go on: it ends with what it has."""
        self._finish("length")
        return joined(self._deltas)

    # --- one byte ---------------------------------------------------------------------------------------------------

    def _is_waiting(self) -> bool:
        return any(speller.is_waiting for speller in self.spellers) or self._looks_ahead() is not None

    def _draw(self) -> int | None:
        """The next byte, or END; None if sleepers are to be looked at before."""
        rows = [speller.row(spreads=self._pool.spreads) for speller in self.spellers]
        pooled, weights = self._pool.pooled(rows)
        mask = utf8.ALLOWED[self._state]
        is_endless = self._sampling.ignore_eos and self._grammar is None
        if is_endless or self.num_generated < self._sampling.min_tokens:
            mask = mask & (np.arange(ROW) != END)
        if self._grammar is not None:
            mask = mask & byte_row(self._grammar.allowed())
        forced = self._forced_byte()
        self._is_forced = forced is not None
        if forced is not None:
            mask = np.arange(ROW) == forced
        if not mask.any():
            return END
        logits = pooled.masked_fill(torch.from_numpy(~mask), -math.inf)
        mass = float(logits.exp().sum())
        if mass < NARROW and not self._has_looked:
            self._has_looked = True
            self._look(mass)
            return None
        if mass == 0:  # whatever is allowed then
            logits = torch.where(torch.from_numpy(mask), 0.0, -math.inf)
        symbol = sampling.choose(logits, self._sampling, self._generator)
        if self._is_reported and symbol != END:
            self._reports.append(self._report(symbol, pooled, rows, weights))
        return symbol

    def _forced_byte(self) -> int | None:
        """What must come next because a thought has had its pieces."""
        if self._thought_limit is None or not self._shown.is_thinking:
            return None
        return self._thought_limit.next(self.num_reasoning, bytes(self._text), is_whole=self._state == utf8.START)

    def _look(self, mass: float) -> None:
        """Masks leave little of the row: closings that sleep may hold more of what is left than those awake."""
        log_share = math.log(EPSILON) + (math.log(mass) if mass else -math.inf)
        for speller in self.spellers:
            if speller.lattice is not None:
                speller.lattice.wake_likely(log_share)

    def _feed(self, byte: int) -> None:
        self._text.append(byte)
        self._state = int(utf8.NEXT[self._state, byte])
        self._is_fed, self._has_looked = True, False
        if self._grammar is not None:
            self._grammar.advance(byte)
        for speller in self.spellers:
            speller.feed(byte)
        self._restart_lost()

    def _restart_lost(self) -> None:
        """Members that cannot go on begin anew, once the text has whole characters that they can read."""
        if self._state != utf8.START:
            return
        for speller, reread in zip(self.spellers, self._rereads, strict=True):
            if speller.is_lost and not speller.is_waiting:
                speller.restart(reread(self._text.decode()), len(self._text))

    def _learn(self) -> None:
        """A byte is in all lattices, and they know what follows: weights move, tokens settle."""
        self._is_fed = False
        if any(speller.is_lost for speller in self.spellers):
            self._restart_lost()
        if not self._is_forced:
            self._pool = self._pool.after([speller.evidence for speller in self.spellers])
        surface = self.spellers[0]
        if surface.lattice is not None:
            self._show(surface.lattice.settled())
        if self.finish_reason is None and self._grammar is not None and self._grammar.is_finished:
            self._finish("stop")

    # --- alternatives -----------------------------------------------------------------------------------------------

    def _looks_ahead(self) -> Lookahead | None:
        """What wants forwards before the next byte is drawn."""
        ahead = self._ahead.get(len(self._text))
        return ahead if ahead is not None and ahead.is_waiting else None

    def _looked_at(self) -> list[list[History]]:
        """What is wanted of each member by copies that look ahead; nothing else is wanted then."""
        ahead = self._looks_ahead()
        return by_speller(() if ahead is None else ahead.wanted, len(self.spellers))

    def _may_look_ahead(self) -> bool:
        """Whether alternatives are asked for, a piece may begin here, and nobody has looked ahead yet."""
        if not (self._request.top_logprobs or self._request.explain_top) or len(self._text) in self._ahead:
            return False
        surface = self.spellers[0].lattice
        return not self._text or (surface is not None and surface.may_begin_here)

    def _look_ahead(self) -> None:
        ahead = Lookahead(
            [speller.lattice for speller in self.spellers],
            self._pool,
            self.spellers[0].vocabulary,
            self._state,
            num_top=self._request.top_logprobs or 0,
            num_of_members=self._request.explain_top,
        )
        self._ahead[len(self._text)] = ahead
        self._bound(ahead)

    def _bound(self, ahead: Lookahead) -> None:
        """Nobody looks farther ahead than a member can read."""
        if not all(self.spellers[k].has_room_for(history) for k, history in ahead.wanted):
            ahead.stop()

    def _alternatives(
        self, chosen: Scored, token_id: int, begin: int, num: int, member: int | None = None
    ) -> tuple[TokenLogprob, ...]:
        """To the piece `chosen` from byte `begin` on, itself among them; alone where nobody had looked ahead."""
        if not num:
            return ()
        ahead = self._ahead.get(begin)
        listed = [chosen] if ahead is None else ahead.listed(chosen, num, member)
        return told(listed, chosen, token_id, self.spellers[0].vocabulary, self.members[0].surface, member)

    # --- pieces -----------------------------------------------------------------------------------------------------

    def _show(self, history: History | None) -> None:
        """Hand out the tokens of `history` that are not out yet."""
        begins_at, steps = self.spellers[0].begins_at, []
        while history is not None and begins_at + history.end > self._num_shown:
            steps.append(history)
            history = history.parent
        for step in reversed(steps):
            if self.finish_reason is not None:
                return
            begin = begins_at + (step.parent.end if step.parent is not None else 0)
            end = min(begins_at + step.end, len(self._text))
            if begin == self._num_shown:
                self._piece(step.token_id, end)
            else:  # another way to spell what is out already has won, or the token began in the prompt
                self._show_longest(end)

    def _show_rest(self) -> None:
        surface = self.spellers[0]
        if surface.lattice is not None:
            self._show(surface.lattice.heaviest())
        self._show_longest(len(self._text))

    def _show_longest(self, end: int) -> None:
        """Hand out the bytes up to `end` as the longest tokens that there are, unless the choice ends with one."""
        while self._num_shown < end and self.finish_reason is None:
            data = bytes(self._text[self._num_shown : end])
            token_id = self.spellers[0].vocabulary.order.longest(data)
            length = 1 if token_id is None else len(self.spellers[0].vocabulary.token_bytes[token_id])
            self._piece(token_id, self._num_shown + length)

    def _piece(self, token_id: int | None, end: int) -> None:
        """One more token for the client."""
        begin, self._num_shown = self._num_shown, end
        data = bytes(self._text[begin:end])
        report = None
        if self._is_reported:
            reports, self._reports = self._reports[: len(data)], self._reports[len(data) :]
            report = self._described(-1 if token_id is None else token_id, data, reports, begin)
        self._ahead = {place: ahead for place, ahead in self._ahead.items() if place >= end}
        self._deltas.append(self._shown.add_piece(token_id, data, report))

    def _finish(self, reason: FinishReason) -> None:
        """The text ends here: hand out what is left of it."""
        self._show_rest()
        if self.finish_reason is None:
            self._deltas.append(self._shown.end(reason))

    def _delta(self) -> Delta | None:
        deltas, self._deltas = self._deltas, []
        return joined(deltas) if deltas else None

    # --- reports ----------------------------------------------------------------------------------------------------

    @property
    def _is_reported(self) -> bool:
        return self._request.top_logprobs is not None or self._request.explain

    def _report(self, symbol: int, pooled: torch.Tensor, rows: Sequence[np.ndarray], weights: np.ndarray) -> ByteReport:
        logprob = float(pooled[symbol])
        members = [float(row[symbol]) for row in rows]
        if not self._request.explain:
            return ByteReport(logprob, members, weights.tolist())
        is_there = np.flatnonzero(weights)
        spread = jensen_shannon(
            torch.from_numpy(np.stack([rows[k] for k in is_there.tolist()])), torch.from_numpy(weights[is_there])
        )
        return ByteReport(logprob, members, weights.tolist(), float(entropy(pooled)), spread)

    def _described(self, token_id: int, data: bytes, reports: Sequence[ByteReport], begin: int) -> TokenLogprob:
        logprob = math.fsum(report.logprob for report in reports)
        of_members = [math.fsum(report.members[k] for report in reports) for k in range(len(self.members))]
        chosen = Scored(data, logprob, of_members)
        text = data.decode(errors="replace")
        top = self._alternatives(chosen, token_id, begin, self._request.top_logprobs or 0)
        if not self._request.explain:
            return TokenLogprob(token_id, text, data, logprob, top)
        num = self._request.explain_top
        members = {
            member.name: MemberToken(
                of_members[k], reports[0].weights[k], self._alternatives(chosen, token_id, begin, num, k)
            )
            for k, member in enumerate(self.members)
        }
        return TokenLogprob(
            token_id,
            text,
            data,
            logprob,
            top,
            members,
            math.fsum(report.entropy for report in reports) / len(reports),
            math.fsum(report.disagreement for report in reports) / len(reports),
        )
