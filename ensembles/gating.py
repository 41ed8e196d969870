"""The gate of a mixture of experts at request level: how much each member is suited to a prompt.

    v_k = normalised( mean of its positive prompts' vectors - mean of its negative prompts' vectors )
    gates = softmax over k of  (x . v_k) / T          x: the prompt's vector, of length one

as mergekit-moe makes the gates of its merged models (its gate_mode hidden), with sentence embeddings for hidden states.
Pure arithmetic in float64.

References: Shazeer et al., "The sparsely-gated mixture-of-experts layer", 2017, https://arxiv.org/abs/1701.06538;
Fedus et al., "Switch transformers", 2021, https://arxiv.org/abs/2101.03961 (top-1).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def gate_vector(positive: Sequence[np.ndarray], negative: Sequence[np.ndarray]) -> np.ndarray:
    """positive: p >= 1 vectors (dim,); negative: q >= 0 of them. (dim,), of length one; about 0 where they cancel."""
    vector = np.asarray(np.mean(positive, axis=0, dtype=np.float64))
    if len(negative):
        vector = vector - np.mean(negative, axis=0, dtype=np.float64)
    return vector / max(float(np.linalg.norm(vector)), 1e-8)


def softmax(scores: Sequence[float], temperature: float) -> list[float]:
    """Sums to one. temperature > 0: towards 0 only the highest score counts, towards infinity all count alike."""
    scaled = np.asarray(scores, dtype=np.float64) / temperature
    powers = np.exp(scaled - scaled.max())
    return (powers / powers.sum()).tolist()


def mixture_weights(gates: Mapping[str, float], top_k: int, always: Mapping[str, float]) -> dict[str, float]:
    """The `top_k` highest gates, renormalised to one in sum, beside the always-on members; then all normalised.

    {"a": .6, "b": .3, "c": .1}, top_k 2, always {"s": 1} -> {"a": 1/3, "b": 1/6, "s": 1/2}, highest gate first. Of
    equal gates the first is taken.
    """
    chosen = sorted(gates, key=lambda name: -gates[name])[:top_k]
    total_gate = sum(gates[name] for name in chosen)
    weights = {name: gates[name] / total_gate for name in chosen} | dict(always)
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}
