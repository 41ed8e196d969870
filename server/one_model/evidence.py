"""The posterior pool's state inside a transformers cache: the weights after every token, and what would judge the next.

It lives in the cache as one more layer, so that beam search reorders it, assisted generation crops it and sampling of
several sequences repeats it with the keys and values of the members.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers.cache_utils import DynamicLayer

from ensemble_server.ensembles.pooling import following

# Positions whose distributions are kept. Assisted generation takes back at most as many tokens as it drafted.
NUM_KEPT = 64


class EvidenceLayer(DynamicLayer):
    """`keys`: (B, 1, T, S) float64, the state after each token (`ensembles.pooling.following`): K weights, or what they
    follow from. `values`: (B, K, R, V), the members' log-probabilities after each of the last R <= `NUM_KEPT` tokens.
    In this layout the operations on keys and values that caches have fit as they are.
    """

    def __init__(self, prior: np.ndarray, share: following.Share) -> None:
        super().__init__()
        self._prior = prior
        self._share: following.Share = share

    def follow(self, token_ids: torch.Tensor, is_judged: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
        """The weights that predict the token after each of `token_ids`: (B, T, K) float64 on the CPU.

        token_ids: (B, T), the tokens just read. is_judged: (B, T), whether the token is evidence (padding is none, and
        neither is a text's first token). logprobs: (B, K, T, V), what the members said after each of them.
        """
        before = logprobs[:, :, :0] if self.values is None else self.values[:, :, -1:]
        said = torch.cat([before, logprobs[:, :, :-1]], dim=2)  # about the last of these tokens, and those before it
        targets = token_ids[:, -said.shape[2] :] if said.shape[2] else token_ids[:, :0]
        gains = said.gather(-1, targets[:, None, :, None].expand(-1, said.shape[1], -1, 1))[..., 0].double().cpu()
        judged = is_judged[:, -said.shape[2] :].cpu() if said.shape[2] else is_judged[:, :0]
        paths = [self._path(row, gains[row].numpy(), judged[row].numpy()) for row in range(len(token_ids))]
        states = np.stack(paths)[:, -token_ids.shape[1] :]  # (B, T, ...)
        self._keep(torch.from_numpy(states.reshape(*states.shape[:2], -1)), logprobs)
        return torch.from_numpy(following.member_weights(states, self._share))

    def _path(self, row: int, gains: np.ndarray, is_judged: np.ndarray) -> np.ndarray:
        """(T + 1 or T, ...): the state so far, and after each token."""
        state = following.start(self._prior, self._share)
        if self.keys is not None:
            state = self.keys[row, 0, -1].numpy().reshape(state.shape)
        path = [state]
        for gain, counts in zip(gains.T, is_judged, strict=True):
            if counts:
                state = following.update(state, gain, self._prior, self._share)
            path.append(state)
        return np.stack(path)

    def _keep(self, states: torch.Tensor, logprobs: torch.Tensor) -> None:
        kept = logprobs[:, :, -NUM_KEPT:]
        if self.keys is None or self.values is None:
            self.dtype, self.device = logprobs.dtype, logprobs.device
            self.keys, self.values = states[:, None], kept.clone()
            self.is_initialized = True
        else:
            self.keys = torch.cat([self.keys, states[:, None]], dim=-2)
            self.values = torch.cat([self.values, kept], dim=-2)[:, :, -NUM_KEPT:]
