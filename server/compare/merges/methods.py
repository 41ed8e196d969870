"""The merge methods that a recipe may name: their parameters, what they need, and what `choose: auto` tries.

mergekit 0.1.5 has all but `widen`, which is ours (`server.compare.merges.widen`). It is written down here so that a
recipe can be refused without importing mergekit, and torch with it; a test holds the table against mergekit's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

TASK_VECTORS = ("int8_mask", "normalize", "rescale", "lambda", "weight", "density")


@dataclass(frozen=True)
class MergeMethod:
    """`base`: whether the recipe must name a `base_model`. `num_models`: how many models beside the base it takes, at
    least and at most; None for any number.

    `per_model`: parameters that each model may have its own value of. `tried`: what `choose: auto` tries, by parameter;
    every combination is a variant. `tries_emphasis`: it also tries each model with twice the weight of the others.
    """

    parameters: tuple[str, ...] = ()
    base: Literal["required", "optional", "ignored"] = "ignored"
    num_models: tuple[int, int | None] = (0, None)
    per_model: frozenset[str] = frozenset({"weight", "density", "gamma", "epsilon", "scale"})
    tried: Mapping[str, tuple[float | bool, ...]] = field(default_factory=dict)
    tries_emphasis: bool = False


def _of_task_vectors(*more: str, **tried: tuple[float | bool, ...]) -> MergeMethod:
    grids = {name.rstrip("_"): values for name, values in tried.items()}  # lambda_: a word of Python's
    return MergeMethod((*TASK_VECTORS, *more), base="required", tried=grids)


METHODS: Mapping[str, MergeMethod] = {
    "linear": MergeMethod(("weight", "normalize"), tries_emphasis=True),
    "slerp": MergeMethod(("t",), base="required", num_models=(1, 1), tried={"t": (0.25, 0.5, 0.75)}),
    "nuslerp": MergeMethod(
        ("weight", "nuslerp_row_wise", "nuslerp_flatten"), base="optional", num_models=(2, 2), tries_emphasis=True
    ),
    "multislerp": MergeMethod(
        ("weight", "normalize_weights", "eps"), base="optional", num_models=(1, None), tries_emphasis=True
    ),
    "karcher": MergeMethod(("max_iter", "tol")),
    "nearswap": MergeMethod(("t",), base="required", num_models=(1, 1), tried={"t": (0.0003, 0.001, 0.003)}),
    "passthrough": MergeMethod(("scale",)),
    "model_stock": MergeMethod(
        ("filter_wise",), base="required", num_models=(2, None), tried={"filter_wise": (False, True)}
    ),
    "arcee_fusion": MergeMethod(base="required", num_models=(1, 1)),
    "sce": MergeMethod(("int8_mask", "select_topk"), base="required", tried={"select_topk": (0.1, 0.3, 1.0)}),
    "ram": MergeMethod(("epsilon",), base="required", per_model=frozenset()),
    "ramplus_tl": MergeMethod(
        ("r", "alpha", "epsilon"), base="required", per_model=frozenset(), tried={"r": (0.1, 0.5)}
    ),
    "task_arithmetic": _of_task_vectors(weight=(0.2, 0.3, 0.4, 0.6, 0.8)),
    "ties": _of_task_vectors(density=(0.2, 0.5), lambda_=(1.0, 1.5)),
    "dare_linear": _of_task_vectors(density=(0.2, 0.5), weight=(0.3, 0.6)),
    "dare_ties": _of_task_vectors(density=(0.2, 0.5), weight=(0.3, 0.6)),
    "breadcrumbs": _of_task_vectors("gamma", density=(0.5, 0.9), weight=(0.3, 0.6)),
    "breadcrumbs_ties": _of_task_vectors("gamma", density=(0.5, 0.9), weight=(0.3, 0.6)),
    "della": _of_task_vectors("epsilon", density=(0.3, 0.7), lambda_=(1.0, 1.5)),
    "della_linear": _of_task_vectors("epsilon", density=(0.3, 0.7), weight=(0.3, 0.6)),
    "widen": MergeMethod(
        ("above_average_value_ratio", "score_calibration_value"),
        base="required",
        num_models=(1, None),
        tried={"above_average_value_ratio": (0.5, 1.0), "score_calibration_value": (0.5, 1.0)},
    ),
}
