"""What a fine-tune has changed: matrices of the blocks, and weights that are kept as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.weights.causal_lm import load_causal_lm
from ensemble_server.server.weights.quantisation import quantisation_of
from ensemble_server.server.weights.tokenizer import load_tokenizer
from ensemble_server.server.weights.view import Surface

Embeddings = Literal["keep", "base"]


@dataclass(frozen=True, eq=False)
class Difference:
    """`base`, `finetune`: float32, on the CPU. `matrices`: path of a linear layer that has changed -> Δ (out, in).
    `kept`: name of any other parameter that has changed -> the fine-tune's. `left`: those that stay the base's.
    """

    base: PreTrainedModel
    finetune: PreTrainedModel
    surface: Surface  # of the base
    finetune_surface: Surface
    matrices: Mapping[str, torch.Tensor]
    kept: Mapping[str, torch.Tensor]
    left: tuple[str, ...]

    @property
    def num_weights(self) -> int:
        """Of the matrices that have changed."""
        return sum(delta.numel() for delta in self.matrices.values())


def difference(
    finetune: Path,
    base: Path,
    *,
    embeddings: Embeddings = "keep",
    vectors: Embeddings = "keep",
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Difference:
    """finetune, base: model folders. Loads both.

    Raises `ModelLoadError` where no delta can be told: other shapes or tokens, quantised or damaged weights, nothing
    changed, or changed weights that are neither linear layers, vectors nor embeddings.
    """
    for name, folder in (("the base", base), ("the fine-tune", finetune)):
        if quantisation_of(folder) is not None:
            raise ModelLoadError(f"{name}, {folder}, is quantised; give the weights that it was made from")
    surface, tuned_surface = Surface(load_tokenizer(base)), Surface(load_tokenizer(finetune))
    _check_tokens(surface, tuned_surface, finetune)
    on_stage("loading the base")
    base_model = load_causal_lm(base, dtype=torch.float32).eval().requires_grad_(False)
    on_stage("loading the fine-tune")
    tuned_model = load_causal_lm(finetune, dtype=torch.float32).eval().requires_grad_(False)
    ours, theirs = dict(base_model.named_parameters()), dict(tuned_model.named_parameters())
    _check_shapes(ours, theirs, finetune)

    layers = dict(linear_layers(base_model))
    matrices: dict[str, torch.Tensor] = {}
    kept: dict[str, torch.Tensor] = {}
    left: list[str] = []
    rows = _embedding_names(base_model)
    for name, weight in ours.items():
        if torch.equal(weight, theirs[name]):
            continue
        if not theirs[name].isfinite().all():
            raise ModelLoadError(f"the fine-tune's {name} is not finite; the file is damaged or training diverged")
        path = name.removesuffix(".weight")
        if path in layers and name.endswith(".weight"):
            matrices[path] = as_matrix(layers[path], theirs[name] - weight)
        elif weight.ndim > 1 and name not in rows:
            raise ModelLoadError(
                f"the fine-tune has changed {name} of shape {tuple(weight.shape)}, which is no linear layer, vector or "
                f"embedding; deltas of {type(base_model).__name__} are not supported"
            )
        elif (embeddings if name in rows else vectors) == "base":
            left.append(name)
        else:
            kept[name] = _as_small_as_exact(theirs[name])
    if not matrices:
        raise ModelLoadError(
            f"{finetune} and {base} have the same weights in every linear layer, so there is no delta to compress"
        )
    return Difference(base_model, tuned_model, surface, tuned_surface, matrices, kept, tuple(left))


def linear_layers(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Those of the blocks, by path; the output head is an embedding."""
    head = model.get_output_embeddings()
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear | Conv1D) and layer is not head:
            yield path, layer


def as_matrix(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A layer's weight (or one like it) as (out, in), and back: GPT-2's layers hold theirs the other way round."""
    return weight.T.contiguous() if isinstance(layer, Conv1D) else weight


def _embedding_names(model: PreTrainedModel) -> set[str]:
    embeddings: list[Any] = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    weights = {id(module.weight) for module in (*embeddings, model.get_output_embeddings()) if module is not None}
    return {name for name, weight in model.named_parameters() if id(weight) in weights}


def _check_tokens(base: Surface, finetune: Surface, folder: Path) -> None:
    ours, theirs = base.token_ids, finetune.token_ids
    if ours == theirs:
        return
    added = sorted(theirs.keys() - ours.keys(), key=lambda token: theirs[token])
    if added and all(theirs[token] == index for token, index in ours.items() if token in theirs):
        raise ModelLoadError(
            f"{folder} has {len(added)} tokens that its base lacks ({added[0]!r} first): a delta runs with its base's "
            "tokens. Give the base these tokens (resize_token_embeddings) and compress against that, or load it whole"
        )
    raise ModelLoadError(f"{folder} has another tokenizer than its base; a delta needs a fine-tune of that base")


def _check_shapes(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor], folder: Path) -> None:
    for name in (*ours, *theirs):
        shapes = [tuple(weights[name].shape) if name in weights else None for weights in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise ModelLoadError(
                f"{folder} is no fine-tune of this base: {name} has the shape {shapes[1] or 'of nothing'} there and "
                f"{shapes[0] or 'of nothing'} in the base"
            )


def _as_small_as_exact(weight: torch.Tensor) -> torch.Tensor:
    """In 16 bits where these hold every number: most checkpoints are stored so."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(weight.to(dtype).float(), weight):
            return weight.to(dtype).clone()
    return weight.clone()
