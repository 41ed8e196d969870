"""What each model pays for each document of a text: nats, bytes and tokens, from which bits per byte follow.

    bpb = (sum of -log2 p(token | earlier tokens of its window)) / (UTF-8 bytes of the scored tokens)

A stream (a continuous text, or one document of a .jsonl) is tokenised once. Window i holds `window` tokens from
i·`stride` on, and scores those that no earlier window has scored. With stride = window - 1 that is the rule of
`experts/bits_per_byte.py`; smaller strides give each token at least window - stride tokens of context and cost more.
Every token but a stream's first is scored exactly once. If the tokenizer puts a token of its own before a text
(Llama's and Gemma's <s>), it stands at the beginning of every window, and the first token is scored too.

A token belongs to the document in which it begins, with all of its bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from server.compare.documents import Documents

if TYPE_CHECKING:
    from server.hosting import Hosting

WINDOW = 512


@dataclass(frozen=True)
class TextScores:
    """What one model pays for each document; all (num_documents,) float64. A document without scored tokens has zeros.

    `nats`: -log p of the scored tokens; `num_bytes`, `num_tokens`: of the same tokens.
    """

    nats: np.ndarray
    num_bytes: np.ndarray
    num_tokens: np.ndarray

    @property
    def bits_per_byte(self) -> float:
        return float(self.nats.sum() / np.log(2) / self.num_bytes.sum())

    @property
    def perplexity(self) -> float:
        """Per token, so it depends on the tokenizer; bits per byte do not."""
        return float(np.exp(self.nats.sum() / self.num_tokens.sum()))


@dataclass(frozen=True)
class NotScored:
    """Why a model has no figure on a text."""

    reason: str


async def measure_text(
    hosting: Hosting,
    arms: Mapping[str, str],
    documents: Documents,
    *,
    window: int = WINDOW,
    stride: int | None = None,
    priority: int = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, TextScores | NotScored]:
    """Score `documents` under the models `arms` (arm -> name of a model of `hosting`), arm by arm in their order.

    Mixtures over hosted members of one vocabulary share one pass of their members. `stride` defaults to window - 1.
    `on_progress` hears windows done and windows in all. A model that cannot score text is `NotScored`, with the
    reason; errors of the engine are raised.
    """
    raise NotImplementedError
