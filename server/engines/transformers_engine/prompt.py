"""The prefill of one request: every member reads its own view of the prompt, in chunks, and is judged by it.

What is gathered on the way, if asked for: the pooled log-probability of each prompt token, and the evidence that moves
the weights of the posterior pool. What another prompt with the same beginning has read, or is about to read, is taken
from the prefix cache; only prompts whose log-probabilities the client wants to see are read from their first token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from ensemble_server.ensembles.base import Mixture, PoolName, TokenLogprob
from ensemble_server.ensembles.pooling import effective_weights, following, gated, pool, selective
from ensemble_server.server.engines.transformers_engine.attention import Span
from ensemble_server.server.engines.transformers_engine.family import known_rows
from ensemble_server.server.engines.transformers_engine.kv_cache import RowCache
from ensemble_server.server.engines.transformers_engine.members import Member
from ensemble_server.server.engines.transformers_engine.prefix_cache import (
    BLOCK,
    Block,
    BlockKey,
    PrefixCache,
    block_keys,
)
from ensemble_server.server.engines.transformers_engine.token_report import describe

SCORED_CHUNK = 128  # positions per row and step for which whole distributions are computed: 25 MB each at V = 49k


class Prompt:
    """`token_ids`: per member. If all are equal, rows can advance together, and prompt tokens can be scored."""

    def __init__(
        self,
        members: Sequence[Member],
        token_ids: Sequence[Sequence[int]],
        mixture: Mixture,
        prompt_logprobs: int | None,
        prefixes: PrefixCache,
    ) -> None:
        self.members = members
        self.token_ids = token_ids
        self.caches = [RowCache() for _ in members]
        self._last_logprobs: list[torch.Tensor | None] = [None] * len(members)
        self.is_done = False
        self.prior = effective_weights(list(mixture.weights.values()))
        self.weights = self.prior  # of the next token to be predicted
        self.scored: list[TokenLogprob] = []
        self.state = following.start(self.prior, mixture.share)  # what the weights follow from
        self.trail = gated.start(len(members))  # what a gate knows besides
        self._gate = mixture.gate
        self._pool: PoolName = mixture.pool
        self._when = mixture.when
        self._main = list(mixture.weights).index(mixture.main)
        self._share: following.Share = mixture.share
        self._num_top = prompt_logprobs
        self._is_lockstep = all(ids == token_ids[0] for ids in token_ids)
        self._follows_evidence = mixture.pool == "posterior" and len(members) > 1
        self._evidence: list[list[np.ndarray]] = [[] for _ in members]  # nats of the tokens 1, 2, ... read so far
        self._prefixes = prefixes
        self._keys = [block_keys(*view) if prefixes.max_bytes else [] for view in zip(members, token_ids, strict=True)]
        self._num_offered = [0] * len(members)  # blocks that were read, and kept for others
        if prompt_logprobs is not None:
            first = members[0].surface.bytes_of(token_ids[0][0])
            self.scored = [TokenLogprob(token_ids[0][0], first.decode(errors="replace"), first, None)]

    def next_spans(self, budget: int, being_read: dict[BlockKey, bool]) -> list[Span | None]:
        """One chunk per member (None: it has read all, or waits), together about `budget` tokens, at least one each.

        `being_read`: blocks that prompts before this one are going to read, and whether with evidence. A member whose
        next block is among them waits for it; the blocks that this prompt is going to read are added.
        """
        share = max(1, budget // len(self.members))
        if self._scores_all:
            share = min(share, SCORED_CHUNK)
        spans: list[Span | None] = []
        waits = self._catch_up(being_read)
        for index, (member, cache, ids) in enumerate(zip(self.members, self.caches, self.token_ids, strict=True)):
            chunk = [] if waits[index] else ids[cache.length : cache.length + share]
            ends_here = cache.length + len(chunk) == len(ids)
            num_keep = len(chunk) if self._scores_all else int(ends_here)
            spans.append(Span(cache, chunk, num_keep, member.adapter) if chunk else None)
        return spans

    def take(self, logprobs: Sequence[torch.Tensor | None]) -> None:
        """Results of the spans just forwarded, per member: (num_keep, V), or None where there was no span."""
        predicted = []  # per member that read a chunk: what it gave every token that follows a token of the chunk
        for index, rows in enumerate(logprobs):
            if rows is None:
                continue
            ids, end = self.token_ids[index], self.caches[index].length
            if end == len(ids):
                self._last_logprobs[index] = rows[-1]
            if self._scores_all:
                targets = torch.tensor(ids[end - len(rows) + 1 : end + 1], dtype=torch.long, device=rows.device)
                predicted.append((targets, rows[: len(targets)]))
                self._evidence[index].append(predicted[-1][1].gather(1, targets[:, None])[:, 0].double().cpu().numpy())
            self._offer(index)
        self.is_done = all(logprobs is not None for logprobs in self._last_logprobs)
        if self._is_lockstep and predicted and len(predicted[0][0]):
            self._advance_in_lockstep(predicted)
        elif self._follows_evidence and self.is_done and not self._is_lockstep:
            self._follow(self._common_evidence())

    @property
    def last_logprobs(self) -> list[torch.Tensor]:
        """After the last token, (V,) per member. The prompt must have been read."""
        assert self.is_done, "the prompt has been read"
        return [logprobs for logprobs in self._last_logprobs if logprobs is not None]

    @property
    def _scores_all(self) -> bool:
        """Whether distributions are needed at every position, not only at the last."""
        return self._num_top is not None or self._follows_evidence

    @property
    def _shares_weights_path(self) -> bool:
        """Whether weights move along the tokens, so that all members must stand at the same one."""
        return self._is_lockstep and self._follows_evidence

    def _catch_up(self, being_read: dict[BlockKey, bool]) -> list[bool]:
        """Take over what others have read by now, and say which members wait for what others are about to read."""
        if self._num_top is not None:
            known, waits = [], [False] * len(self.members)
        else:
            known = [self._prefixes.find(keys, with_evidence=self._follows_evidence) for keys in self._keys]
            if self._shares_weights_path:
                known = [blocks[: min(map(len, known))] for blocks in known]
            waits = [self._is_coming(index, len(blocks), being_read) for index, blocks in enumerate(known)]
            if self._shares_weights_path:
                waits = [any(waits)] * len(waits)
        if any(known):
            self._restore([[] if wait else blocks for wait, blocks in zip(waits, known, strict=True)])
        for wait, cache, keys in zip(waits, self.caches, self._keys, strict=True):
            for key in [] if wait else keys[cache.length // BLOCK :]:
                being_read[key] = being_read.get(key, False) or self._scores_all
        return waits

    def _is_coming(self, index: int, num_known: int, being_read: Mapping[BlockKey, bool]) -> bool:
        """Whether another prompt is about to read what member `index` needs next, with evidence if that is needed."""
        keys, place = self._keys[index], max(num_known, self.caches[index].length // BLOCK)
        if place >= len(keys) or keys[place] not in being_read:
            return False
        return being_read[keys[place]] or not self._follows_evidence

    @torch.inference_mode()
    def _restore(self, known: Sequence[Sequence[Block]]) -> None:
        """Continue from `known` blocks, per member, where they reach further than its cache does.

        The last token is always left to read, since the answer begins with what follows it. So is, with evidence, the
        last that is known: it judges the next one.
        """
        gained: list[np.ndarray] = []
        for index, blocks in enumerate(known):
            cache, num_tokens = self.caches[index], len(self.token_ids[index])
            begin, end = cache.length, min(len(blocks) * BLOCK, num_tokens - 1)
            if self._follows_evidence:
                end = min(len(blocks) * BLOCK, num_tokens) - 1
            if end <= begin:
                continue
            if begin:
                cache.append([block.layers for block in blocks], end)
            else:
                self.caches[index] = RowCache((self._prefixes.segment(self._keys[index], blocks, end),))
            self._prefixes.count_hit(self.members[index].name, end - begin)
            if self._follows_evidence:
                evidence = [block.evidence for block in blocks if block.evidence is not None]
                assert len(evidence) == len(blocks), "the blocks were looked up with their evidence"
                judged = np.concatenate(evidence)[begin + 1 : end + 1]
                self._evidence[index].append(judged)
                gained.append(judged)
        if gained and self._shares_weights_path:
            self._follow(np.stack(gained))

    def _offer(self, index: int) -> None:
        """Keep the blocks that member `index` has just completed for prompts that begin alike."""
        keys, cache = self._keys[index], self.caches[index]
        begin, end = self._num_offered[index], min(len(keys), cache.length // BLOCK)
        new = [b for b in range(begin, end) if not self._prefixes.has(keys[b], with_evidence=self._scores_all)]
        evidence = np.concatenate([[0.0], *self._evidence[index]]) if new and self._scores_all else None
        for b in new:
            place = slice(b * BLOCK, (b + 1) * BLOCK)
            layers = cache.copy_of(place.start, place.stop)
            self._prefixes.keep(keys[: b + 1], Block(layers, None if evidence is None else evidence[place].copy()))
        self._num_offered[index] = max(begin, end)

    def _advance_in_lockstep(self, predicted: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """All members gave the same tokens a probability: move the weights along, and pool each position if asked."""
        targets, first = predicted[0]
        weights = np.repeat(self.weights[:, None], len(targets), axis=1)
        if self._follows_evidence:
            evidence = np.stack([parts[-1] for parts in self._evidence])
            trail = self.trail
            weights = self._follow(evidence)[:, :-1]
        if self._num_top is None:
            return
        pooled = first
        if len(predicted) > 1:
            stacked = torch.stack([rows.to(first.device) for _, rows in predicted])
            known = known_rows([self.members] * len(targets), stacked)
            if self._gate is not None:
                recent, places, _ = gated.follow(trail, evidence)
                weights = gated.weights(self._gate, gated.Situation(gated.views(stacked), weights, recent, places))
            pooled = pool(
                self._pool, stacked, torch.as_tensor(weights, dtype=torch.float32, device=first.device), known
            )
            if self._when is not None:
                pooled = selective.selected(self._when, stacked[self._main], pooled)
        for row, token_id in zip(pooled, targets.tolist(), strict=True):
            self.scored.append(describe(self.members[0].surface, row, token_id, self._num_top))

    def _follow(self, evidence: np.ndarray) -> np.ndarray:
        """Move the weights along tokens that member k gave `evidence[k]`, (K, T) nats. -> (K, T + 1), weights before
        each and after the last."""
        path, self.state = following.track(self.state, evidence, self.prior, self._share)
        self.weights = path[:, -1]
        if self._gate is not None:
            *_, self.trail = gated.follow(self.trail, evidence)
        return path

    def _common_evidence(self) -> np.ndarray:
        """(K, T): what each member gave the longest common end of the prompts: different views of one conversation."""
        evidence = [np.concatenate(parts) if parts else np.empty(0) for parts in self._evidence]
        length = min(common_suffix(self.token_ids), *(len(row) for row in evidence))
        return np.stack([row[len(row) - length :] for row in evidence])


def common_suffix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest end that all share: [[1, 2, 3], [9, 2, 3]] -> 2"""
    shortest = min(len(sequence) for sequence in sequences)
    for length in range(shortest):
        if len({sequence[-1 - length] for sequence in sequences}) > 1:
            return length
    return shortest
