"""The blocks of a mergekit recipe: their keys, and the rules that mergekit holds them to.

mergekit's own blocks stand in modules that import torch, which takes seconds; these say the same without it, so that a
wrong recipe is refused at once. A test holds their keys against mergekit's.

Format: https://github.com/arcee-ai/mergekit/blob/main/README.md, .../docs/moe.md
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator

from ensemble_server.server.compare.merges.references import parse_reference
from ensemble_server.server.config.problems import nearest

DTYPES = ("bfloat16", "float16", "float32", "float64", "int64")
Scalar = bool | int | float | str


def _is_model(value: Any) -> Any:
    parse_reference(value)  # raises for what is none
    return value


def _is_model_or_kind(value: Any) -> Any:
    return value if value in ("union", "base") else _is_model(value)


def _is_dtype(value: Any) -> Any:
    if isinstance(value, str) and value.removeprefix("torch.") not in DTYPES:
        raise ValueError(f"there is no dtype {value!r}{nearest(value, DTYPES)}")
    return value


Model = Annotated[Any, BeforeValidator(_is_model)]
ModelOrKind = Annotated[Any, BeforeValidator(_is_model_or_kind)]
Dtype = Annotated[str, BeforeValidator(_is_dtype)]


class RecipeBlock(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)  # unknown keys are told apart, all of them at once


class Conditional(RecipeBlock):
    value: Scalar | list[Scalar]
    filter: str | None = None


Setting = Conditional | list[Conditional] | Scalar | list[Scalar]
Settings = dict[str, Setting]


class InputSlice(RecipeBlock):
    model: Model
    layer_range: tuple[int, int]
    parameters: Settings | None = None


class InputModel(RecipeBlock):
    model: Model
    parameters: Settings | None = None


class OutputSlice(RecipeBlock):
    sources: list[InputSlice]
    base_model: Model | None = None
    residual_weight: float | None = None
    parameters: Settings | None = None


class OutputModule(RecipeBlock):
    slices: list[OutputSlice] | None = None
    models: list[InputModel] | None = None
    parameters: Settings | None = None

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> OutputModule:
        if bool(self.slices) == bool(self.models):
            raise ValueError("Exactly one of 'models' and 'slices' must be present")
        return self


class EmbeddingOfToken(RecipeBlock):
    source: Any = None
    force: bool = False


class Tokenizer(RecipeBlock):
    source: ModelOrKind = "union"
    tokens: dict[str, EmbeddingOfToken] | None = None
    pad_to_multiple_of: int | None = None


class MergeBlock(RecipeBlock):
    """A recipe of mergekit-yaml."""

    modules: dict[str, OutputModule] | None = None
    slices: list[OutputSlice] | None = None
    models: list[InputModel] | None = None
    merge_method: str
    base_model: Model | None = None
    dtype: Dtype | None = None
    tokenizer_source: ModelOrKind | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    out_dtype: Dtype | None = None
    parameters: Settings | None = None

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> MergeBlock:
        if sum(map(bool, (self.modules, self.slices, self.models))) != 1:
            raise ValueError("Exactly one of 'models', 'slices', or 'modules' must be present")
        if self.tokenizer_source and self.tokenizer:
            raise ValueError("takes one of `tokenizer_source` and `tokenizer`")
        return self


class Expert(RecipeBlock):
    source_model: Model
    positive_prompts: list[str] | None = None
    negative_prompts: list[str] | None = None
    noise_scale: float | None = None
    residual_scale: float | None = None


class MoeBlock(RecipeBlock):
    """A recipe of mergekit-moe."""

    base_model: Model
    experts: list[Expert]
    gate_mode: Literal["hidden", "cheap_embed", "random", "uniform_random"] = "hidden"
    dtype: Dtype | None = None
    experts_per_token: int = 2
    shared_experts: list[Expert] | None = None
    architecture: str | None = None
