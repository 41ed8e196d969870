"""WIDEN: models that differ much from their base, merged by how far each column of their weights has moved.

For a matrix W (out, in), with m_j = |W_:j| the magnitude and W_:j / m_j the direction of column j, against the base W⁰:

    Δm_j = |m_j - m⁰_j|        Δd_j = 1 - cos(W_:j, W⁰_:j)
    r(Δ)_j = rank of Δ_j within its model, ascending from 0, over the number of columns
    s(r)_nj = softmax over the models n of r_nj; c where r_nj > a · (mean over j of r_nj)
    W = W⁰ + Σ_n ½ (s(r(Δm)) + s(r(Δd)))_n (W_n - W⁰)

a is `above_average_value_ratio`, c `score_calibration_value`. Embeddings are turned over first, so that a column is a
token's. Of a vector (norms, biases) each number has one score, with |w_n - w⁰| in place of both ranks.

Helps where models were trained on for long: DARE and TIES, which drop most of a change, need small ones. One merge, one
model. Base model required; no seed. Left out: nothing is known of which axis of a checkpoint is the input's, so layers
that are stored the other way round (GPT-2's) are scored by their outputs.

Reference: Yu et al. 2024, "Extend model merging from fine-tuned to pre-trained large language models via weight
disentanglement", https://arxiv.org/abs/2408.03092
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

NAME = "widen"
REFERENCE = "https://arxiv.org/abs/2408.03092"
_EMBEDDINGS = ("embed", "wte", "wpe")  # parts of the names of weights with a row for each token or position


def widen(
    base: torch.Tensor,
    models: Sequence[torch.Tensor],
    *,
    above_average_value_ratio: float = 1.0,
    score_calibration_value: float = 1.0,
    is_embedding: bool = False,
) -> torch.Tensor:
    """The merged weight, of the base's shape and dtype; computed in float32, or float64 if that is given.

    base, each of models: (out, in), or a vector; of more axes all but the first are taken together. `is_embedding`:
    a row belongs to a token, and is scored as a column is elsewhere.
    """
    if not models:
        return base
    dtype = torch.float64 if base.dtype == torch.float64 else torch.float32
    flat = base.to(dtype) if base.dim() < 2 else base.to(dtype).flatten(1)
    changes = torch.stack([model.to(dtype).reshape(flat.shape) - flat for model in models])  # (N, ...)

    def scored(places: torch.Tensor, scale: int = 1) -> torch.Tensor:
        """(N, C) -> (N, C)"""
        above = places > above_average_value_ratio * places.mean(dim=1, keepdim=True)
        return torch.where(above, score_calibration_value, (places / scale).softmax(dim=0))

    if base.dim() < 2:
        weights = scored(changes.abs().reshape(len(models), -1)).reshape(changes.shape)
    else:
        along = 1 if is_embedding else 0  # of one matrix: the axis that a column runs along
        size = torch.linalg.vector_norm(flat, dim=along)  # (C,)
        sizes = torch.stack([torch.linalg.vector_norm(flat + change, dim=along) for change in changes])  # (N, C)
        products = torch.stack([((flat + change) * flat).sum(dim=along) for change in changes])
        lengths = sizes * size
        cosine = torch.where(lengths > 0, products / lengths.clamp_min(torch.finfo(dtype).tiny), (sizes == size) * 1.0)
        by_size, by_direction = _places((sizes - size).abs()), _places(1 - cosine)
        weights = (scored(by_size, len(size)) + scored(by_direction, len(size))) / 2
        weights = weights.unsqueeze(along + 1)  # (N, 1, C), or (N, C, 1)
    return (flat + (weights * changes).sum(dim=0)).reshape(base.shape).to(base.dtype)


def _places(values: torch.Tensor) -> torch.Tensor:
    """(N, C) -> (N, C): the place of each value in its row, 0 to C - 1; the first of equal ones is lower.

    Whole numbers, so that the middle one is not above the mean by rounding.
    """
    places = torch.empty_like(values)
    order = values.argsort(dim=1, stable=True)
    steps = torch.arange(values.shape[1], dtype=values.dtype, device=values.device)
    return places.scatter_(1, order, steps.expand_as(values))


def register_with_mergekit() -> None:
    """Make `merge_method: widen` known to mergekit in this process; a second call does nothing."""
    from mergekit.merge_methods import BasePolicy, InputContract, MergeMethod, TensorGroup, merge_method
    from mergekit.merge_methods.registry import register, registered_methods

    if any(method.spec.name == NAME for method in registered_methods()):
        return

    def kernel(group: Any, above_average_value_ratio: Any = 1.0, score_calibration_value: Any = 1.0) -> Any:
        assert group.base is not None, "the contract asks for one"
        return widen(
            group.base.tensor,
            [entry.tensor for entry in group.non_base],
            above_average_value_ratio=above_average_value_ratio,
            score_calibration_value=score_calibration_value,
            is_embedding=any(part in (group.metadata.name or "") for part in _EMBEDDINGS),
        )

    # subtle: mergekit reads what a method takes from its annotations, which are texts in this module
    kernel.__annotations__ = {
        "group": TensorGroup,
        "above_average_value_ratio": float,
        "score_calibration_value": float,
        "return": torch.Tensor,
    }
    options = {"name": NAME, "pretty_name": "WIDEN", "reference_url": REFERENCE}
    method = merge_method(kernel, contract=InputContract(base=BasePolicy.REQUIRED, min_inputs=2), **options)
    assert isinstance(method, MergeMethod), "it is a decorator only where no function is given"
    register(method)
