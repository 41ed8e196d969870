"""What a student pays on a batch: for the text itself, and for what the teacher expected of it.

    loss = λ · CLM + (1 - λ) · KL(P || Q)      CLM = -log Q(token that came),   KL = Σ_x P(x) log P(x) / Q(x)

P is known on a few tokens and on all others as one bucket, and Q is looked at the same way: that KL is at most the one
over the whole vocabulary, and zero where the two agree on what is kept. Since P's entropy is constant, its gradient is
that of the cross entropy CE(P, Q). Nats per token, averaged over what is scored.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Batch:
    """Windows side by side, filled up to the longest.

    `inputs`: (B, L) int64; `tokens`: (B, L - 1) int64, what comes after each input but the last; `is_scored`:
    (B, L - 1) bool. The target, if there is one: `ids` (B, L - 1, M) int64, `probs` (B, L - 1, M), `tail` (B, L - 1).
    """

    inputs: torch.Tensor
    tokens: torch.Tensor
    is_scored: torch.Tensor
    ids: torch.Tensor | None = None
    probs: torch.Tensor | None = None
    tail: torch.Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        return replace(self, **{name: tensor.to(device) for name, tensor in vars(self).items() if tensor is not None})


def token_losses(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
    """CLM and KL of the scored tokens, (n,) each in nats; KL is None without a target.

    logits: (B, L - 1, V), of what comes after each input but the last.
    """
    scored = batch.is_scored
    logits = logits[scored].float()  # (n, V)
    normaliser = logits.logsumexp(-1)
    clm = normaliser - logits.gather(1, batch.tokens[scored][:, None])[:, 0]
    if batch.ids is None or batch.probs is None or batch.tail is None:
        return clm, None
    ids, probs, tail = batch.ids[scored], batch.probs[scored], batch.tail[scored]
    logprobs = logits.gather(1, ids) - normaliser[:, None]
    kl = torch.xlogy(probs, probs).sum(-1) - (probs * logprobs).sum(-1)
    has_tail = tail > 0
    if has_tail.any():
        rest = logits[has_tail].scatter(1, ids[has_tail], -torch.inf).logsumexp(-1) - normaliser[has_tail]
        kl = kl.index_add(0, has_tail.nonzero()[:, 0], tail[has_tail] * (tail[has_tail].log() - rest))
    return clm, kl


def loss_of(clm: torch.Tensor, kl: torch.Tensor | None, clm_share: float) -> torch.Tensor:
    """The scalar that is made smaller. clm, kl: (n,) nats."""
    if kl is None or clm_share == 1:
        return clm.mean()
    return clm_share * clm.mean() + (1 - clm_share) * kl.mean()
