"""How members read text, without their weights: those are in vLLM's processes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.config.blocks import HostedModel
from ensemble_server.server.weights.checkpoint_facts import id_set, max_positions
from ensemble_server.server.weights.checkpoints import checkpoint_of
from ensemble_server.server.weights.tokenizer import load_tokenizer
from ensemble_server.server.weights.view import Surface, member_surface


@dataclass(frozen=True, eq=False)
class MemberView:
    """`vocab_size`: how many ids count; logits are often padded to a rounder width, `padded_vocab_size`."""

    name: str
    surface: Surface
    eos_ids: frozenset[int]
    max_model_len: int
    vocab_size: int
    padded_vocab_size: int


def resolve_checkpoints(models: Mapping[str, HostedModel], *, relative_to: Path) -> dict[str, Path]:
    """The folder of each model with a `path`. Raises `ModelLoadError` that names the model."""
    return {
        name: checkpoint_of(name, model.path, relative_to=relative_to)
        for name, model in models.items()
        if model.path is not None
    }


def load_views(
    models: Mapping[str, HostedModel], checkpoints: Mapping[str, Path], *, max_context: int
) -> dict[str, MemberView]:
    """Tokenizers are loaded once per checkpoint. Raises `ModelLoadError` that names the model."""
    tokenizers = {}
    for name, folder in checkpoints.items():
        if folder not in tokenizers:
            try:
                tokenizers[folder] = load_tokenizer(folder)
            except ModelLoadError as exc:
                raise ModelLoadError(f"model {name!r}: {exc}") from exc
    views = {}
    for name, model in models.items():
        folder = checkpoints[model.base or name]
        surface = member_surface(name, models, tokenizers[folder])
        shape = _Shape.of(folder)
        views[name] = MemberView(
            name,
            surface,
            shape.eos_ids | id_set(surface.tokenizer.eos_token_id),
            min(max_context, shape.max_positions or max_context),
            min(surface.vocab_size, shape.vocab_size),
            shape.vocab_size,
        )
    return views


@dataclass(frozen=True)
class _Shape:
    """What a checkpoint's files say. `eos_ids`: end-of-text ids of its generation config."""

    vocab_size: int
    max_positions: int | None
    eos_ids: frozenset[int]

    @classmethod
    def of(cls, folder: Path) -> _Shape:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
        file = folder / "generation_config.json"
        eos = json.loads(file.read_bytes()).get("eos_token_id") if file.is_file() else config.eos_token_id
        return cls(config.vocab_size, max_positions(config), id_set(eos))
