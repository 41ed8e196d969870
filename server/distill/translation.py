"""What members say of a text, in the tokens of a student that has others.

exact   as averages of different vocabularies do it: the text is what all have in common, and a member's own ways to
        spell it are summed out (`ensembles.spelling.projection`)
mined   as FuseLLM does it: token by token through a map, where the two readings agree (`alignment`)
em      the same, of tokens alone that both vocabularies have

A token of which some member expects nothing (at the beginning of a window, within the first token of a member whose
tokenizer puts none before) is taught as it came.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ensemble_server.ensembles.spelling.projection import ProjectedText, Projection, Row, TokenTree
from ensemble_server.server.compare.kept.content_cache import digest
from ensemble_server.server.compare.measures.windows import Window
from ensemble_server.server.config.distillation import Align
from ensemble_server.server.distill.alignment import TokenMap, warped
from ensemble_server.server.distill.records import WindowRecord, recorded
from ensemble_server.server.engines.transformers_engine.engine import TransformersEngine
from ensemble_server.server.weights.member_views import MemberView
from ensemble_server.server.weights.spelled_vocabulary import spelled_vocabulary


@dataclass(frozen=True)
class _Text:
    """A window as text. `begins`: the byte at which each token that is expected begins, and where the last ends;
    `text`: bytes [first, last) of `data`, without parts of characters at its ends."""

    data: bytes
    begins: np.ndarray
    first: int
    last: int

    @property
    def text(self) -> str:
        return self.data[self.first : self.last].decode()


@dataclass
class Translation:
    """`members`: the views of the ensemble's, in its order. Raises `ModelLoadError` if tokens of one are not bytes."""

    align: Align
    student: MemberView
    members: Sequence[MemberView]
    _projections: dict[int, Projection] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        end: object = self.student.surface.tokenizer.eos_token_id
        ends = sorted(self.student.eos_ids)
        self._end_id = end if isinstance(end, int) else ends[0] if ends else None
        self._bytes = spelled_vocabulary(self.student).token_bytes
        self._tree = TokenTree(self._bytes, self._end_id)
        for member in self.members:
            spelled_vocabulary(member)

    @cached_property
    def _map(self) -> TokenMap:
        ids = dict(zip(self._tree.strings, self._tree.ids.tolist(), strict=True))
        return TokenMap(ids, is_near=self.align == "mined")

    @property
    def key(self) -> str:
        """Of what decides a record besides members and tokens."""
        return digest([self.align, sorted(self.student.surface.token_ids.items()), self._end_id])

    async def read(self, host: TransformersEngine, window: Window, *, top_k: int) -> WindowRecord:
        """Raises what `visit_bytes` and `visit_logprobs` raise."""
        text = self._text_of(window)
        if self.align == "exact":
            rows, evidence = await self._exact(host, text)
        else:
            found = [await self._aligned(host, member, window, text, top_k) for member in self.members]
            rows, evidence = [row for row, _ in found], np.stack([nats for _, nats in found])
        return recorded(rows, evidence, text.begins, window.token_ids[1:], top_k=top_k)

    def _text_of(self, window: Window) -> _Text:
        parts = [self._bytes[token_id] for token_id in window.token_ids]
        data = b"".join(parts)
        first, last = 0, len(data)
        while first < last and 0x80 <= data[first] < 0xC0:
            first += 1
        while last > first and data[first:last].decode(errors="ignore").encode() != data[first:last]:
            last -= 1
        return _Text(data, np.cumsum([len(part) for part in parts]), first, last)

    async def _exact(self, host: TransformersEngine, text: _Text) -> tuple[list[list[Row | None]], np.ndarray]:
        borders = text.begins[:-1] - text.first
        is_inside = (borders >= 0) & (borders < text.last - text.first)
        watched = [
            ProjectedText(self._projection(place), text.data[text.first : text.last], borders[is_inside].tolist())
            for place in range(len(self.members))
        ]
        names = [member.name for member in self.members]
        await host.visit_bytes(names, text.text, lambda rows, targets: None, watches=watched)
        evidence = np.full((len(names), len(text.data)), np.nan)
        rows: list[list[Row | None]] = []
        for nats, one in zip(evidence, watched, strict=True):
            nats[text.first + one.begins_at : text.last] = one.evidence()
            found = iter(one.rows())
            rows.append([next(found) if inside else None for inside in is_inside])
        return rows, evidence

    def _projection(self, place: int) -> Projection:
        if place not in self._projections:
            self._projections[place] = Projection(spelled_vocabulary(self.members[place]).order, self._tree)
        return self._projections[place]

    async def _aligned(
        self, host: TransformersEngine, member: MemberView, window: Window, text: _Text, top_k: int
    ) -> tuple[list[Row | None], np.ndarray]:
        """One member's rows and evidence: of each of its tokens the nats, in equal parts to its bytes."""
        own = spelled_vocabulary(member).token_bytes
        ids = member.surface.encode(text.text)
        expected: list[Row] = []
        nats: list[float] = []

        def visit(logprobs, targets) -> None:
            values, tokens = logprobs[0].topk(min(top_k, logprobs.shape[-1]), dim=-1)
            expected.extend(zip(tokens.cpu().numpy(), values.double().exp().cpu().numpy(), strict=True))
            nats.extend(logprobs[0].gather(1, targets[:, None])[:, 0].tolist())

        await host.visit_logprobs([member.name], ids, visit)
        evidence = np.full(len(text.data), np.nan)
        begin = text.last - sum(len(own[token_id]) for token_id in ids)  # a blank may stand before the text
        for place, token_id in enumerate(ids):
            length = len(own[token_id])
            if place and length:
                evidence[max(0, begin) : max(0, begin + length)] = nats[place - 1] / length
            begin += length
        sources = [place for place, token_id in enumerate(ids) if own[token_id]]
        targets = [place for place, token_id in enumerate(window.token_ids) if self._bytes[token_id]]
        rows: list[Row | None] = [_as_it_came(token_id) for token_id in window.token_ids[1:]]
        if not sources or not targets:
            return rows, evidence
        pairs = warped(
            [own[ids[place]] for place in sources], [self._bytes[window.token_ids[place]] for place in targets]
        )
        for target, found in zip(targets, pairs, strict=True):
            source = sources[found[0]]
            token = own[ids[source]]
            if target and source and len(found) == 1 and self._map(token) == self._same(window.token_ids[target]):
                rows[target - 1] = self._mapped(member, own, *expected[source - 1])
        return rows, evidence

    def _same(self, token_id: int) -> int:
        """The one of the student's tokens with these bytes that others are mapped to."""
        return int(self._tree.ids[self._tree.index[self._bytes[token_id]]])

    def _mapped(self, member: MemberView, own: Sequence[bytes], ids: np.ndarray, probs: np.ndarray) -> Row:
        entries = zip(ids.tolist(), probs.tolist(), strict=True)
        is_end = np.isin(ids, sorted(member.eos_ids))
        images, masses = self._map.mapped(
            (own[token_id], probability) for token_id, probability in entries if token_id < len(own) and own[token_id]
        )
        if self._end_id is not None and is_end.any():
            images, masses = np.append(images, self._end_id), np.append(masses, probs[is_end].sum())
        return images, masses


def _as_it_came(token_id: int) -> Row:
    return np.array([token_id]), np.array([1.0])
