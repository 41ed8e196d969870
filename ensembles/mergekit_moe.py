"""Reads the YAML of mergekit-moe, which merges models into one mixture of experts, as routes between those models.

Its experts' example prompts become the gates. What only concerns merged weights (base_model, dtype, architecture,
noise_scale, ...) is read over. The gate modes `random` and `uniform_random` are refused: they have no prompts to go by.

Format: https://github.com/arcee-ai/mergekit/blob/main/docs/moe.md
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, Field


class Expert(BaseModel):
    source_model: str
    positive_prompts: tuple[str, ...] | None = None
    negative_prompts: tuple[str, ...] | None = None
    residual_scale: float | None = None


class MoeConfig(BaseModel):
    """The whole file. Prompts of `shared_experts` are read over: they are on for every request, whatever it says."""

    experts: tuple[Expert, ...] = Field(min_length=1)
    shared_experts: tuple[Expert, ...] | None = None
    experts_per_token: int = Field(default=2, ge=1)
    gate_mode: Literal["hidden", "cheap_embed"] = "hidden"


def routes(moe: MoeConfig, sources: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The `members` of a routing config that say the same: name -> keys of a `Route`.

    `sources`: source_model -> name of a model here, where they differ. Raises `ValueError` if one name comes twice.
    """
    found: dict[str, dict[str, Any]] = {}

    def add(expert: Expert, route: dict[str, Any]) -> None:
        name = sources.get(expert.source_model, expert.source_model)
        if name in found:
            raise ValueError(f"mergekit_moe names {expert.source_model!r} as a second expert {name!r}; one is enough")
        found[name] = route

    for expert in moe.experts:
        prompts = {"positive_prompts": expert.positive_prompts, "negative_prompts": expert.negative_prompts}
        add(expert, {key: value for key, value in prompts.items() if value is not None})
    for expert in moe.shared_experts or ():
        scale = {} if expert.residual_scale is None else {"residual_scale": expert.residual_scale}
        add(expert, {"always": True, **scale})
    return found
