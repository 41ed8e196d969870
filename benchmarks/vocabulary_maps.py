"""What others do with members of different vocabularies, to be compared with summing tokenisations out.

All three go on in the tokens of one member, the pivot, and give the next of them a probability that mixes the pivot's
own with what the other member seems to say of it. The other reads the text so far in its own tokens, cut anew.

- GaC: the union of both vocabularies as strings; a string that a member lacks has probability zero there.
  Yu et al., "Breaking the ceiling of the LLM community by treating token generation as a classification for
  ensembling", https://arxiv.org/abs/2406.12585.
- UniTE: the union of both members' `TOP` likeliest strings; one that a member lacks has the probability of the first
  token in which that member cuts it; both are normalised over the union.
  Yao et al., "Determine-then-ensemble: necessity of top-k union for large language model ensembling",
  https://arxiv.org/abs/2410.03777.
- MinED: every token of the other goes to the pivot's token at the least edit distance, the same string if there is one.
  Wan et al., "Knowledge fusion of large language models", https://arxiv.org/abs/2401.10491. Here of the other's
  `MAPPED` likeliest tokens, renormalised; the paper keeps 10.

Written from the papers for this comparison alone, but for the map of MinED, which distillation uses, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from ensemble_server.server.distill.alignment import TokenMap

TOP = 10
MAPPED = 50
Encode = Callable[[str], list[int]]


class Strings:
    """The tokens of one member as what they add to a text. `token_bytes`: of every id, b"" for special ones."""

    def __init__(self, token_bytes: Sequence[bytes], encode: Encode) -> None:
        self.token_bytes = token_bytes
        self.encode = encode
        self.ids: dict[bytes, list[int]] = {}  # several tokens may be one string
        for token_id, data in enumerate(token_bytes):
            if data:
                self.ids.setdefault(data, []).append(token_id)

    def probability(self, probs: torch.Tensor, data: bytes) -> float | None:
        """Of a string, probs: (V,); None if no token is that string."""
        ids = self.ids.get(data)
        return None if ids is None else float(probs[ids].sum())

    def likeliest(self, probs: torch.Tensor, num: int) -> list[tuple[bytes, float]]:
        """Strings with their probabilities, at most `num`; special tokens are left out."""
        values, ids = probs.topk(num)
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        return [(self.token_bytes[token_id], value) for token_id, value in pairs if self.token_bytes[token_id]]


def gac(pivot: Strings, other: Strings, of_pivot: torch.Tensor, of_other: torch.Tensor, target: bytes) -> float:
    """Nats of the string `target`, a token of the pivot. of_pivot, of_other: (V,) probabilities of each vocabulary."""
    ours, theirs = pivot.probability(of_pivot, target), other.probability(of_other, target)
    return _log(((ours or 0.0) + (theirs or 0.0)) / 2)


def unite(pivot: Strings, other: Strings, of_pivot: torch.Tensor, of_other: torch.Tensor, target: bytes) -> float:
    """As `gac`; minus infinity for a string that is not among the likeliest of either."""
    union = sorted({data for data, _ in (*pivot.likeliest(of_pivot, TOP), *other.likeliest(of_other, TOP))})
    if target not in union:
        return -math.inf
    at, total = union.index(target), 0.0
    for strings, probs in ((pivot, of_pivot), (other, of_other)):
        masses = [_or_first_token(strings, probs, data) for data in union]
        total += masses[at] / sum(masses)
    return _log(total / 2)


def _or_first_token(strings: Strings, probs: torch.Tensor, data: bytes) -> float:
    found = strings.probability(probs, data)
    if found is not None:
        return found
    ids = strings.encode(data.decode(errors="replace"))
    return float(probs[ids[0]]) if ids else 0.0


class MinED:
    """Tokens of `other` to the nearest of `pivot`; found when first asked for, and kept."""

    def __init__(self, pivot: Strings, other: Strings) -> None:
        self._pivot, self._other = pivot, other
        self._ids = {data: ids[0] for data, ids in pivot.ids.items()}
        self._map = TokenMap(self._ids, is_near=True)

    def __call__(self, of_pivot: torch.Tensor, of_other: torch.Tensor, target: bytes) -> float:
        likeliest = self._other.likeliest(of_other, MAPPED)
        mapped = sum(mass for data, mass in likeliest if self._map(data) == self._ids.get(target))
        ours = self._pivot.probability(of_pivot, target) or 0.0
        return _log((ours + mapped / sum(mass for _, mass in likeliest)) / 2)


def _log(mass: float) -> float:
    return math.log(mass) if mass > 0 else -math.inf
