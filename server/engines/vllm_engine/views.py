"""How members read text, without their weights: those are in vLLM's processes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ensembles.errors import ModelLoadError
from server.checkpoints import resolve_checkpoint
from server.config import HostedModel
from server.members import member_surface
from server.surface import Surface


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
    folders = {}
    for name, model in models.items():
        if model.path is not None:
            try:
                folders[name] = resolve_checkpoint(model.path, relative_to=relative_to)
            except ModelLoadError as exc:
                raise ModelLoadError(f"model {name!r}: {exc}") from exc
    return folders


def load_views(
    models: Mapping[str, HostedModel], checkpoints: Mapping[str, Path], *, max_context: int
) -> dict[str, MemberView]:
    """Tokenizers are loaded once per checkpoint. Raises `ModelLoadError` that names the model."""
    from transformers import AutoTokenizer

    tokenizers = {}
    for name, folder in checkpoints.items():
        if folder not in tokenizers:
            try:
                tokenizers[folder] = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            except Exception as exc:  # tokenizers raise whatever their parts raise
                raise ModelLoadError(
                    f"model {name!r}: {folder} has no tokenizer that loads ({type(exc).__name__}: {exc})"
                ) from exc
    views = {}
    for name, model in models.items():
        folder = checkpoints[model.base or name]
        surface = member_surface(name, models, tokenizers[folder])
        shape = _Shape.of(folder)
        eos_id = surface.tokenizer.eos_token_id
        views[name] = MemberView(
            name,
            surface,
            shape.eos_ids | frozenset([] if eos_id is None else [eos_id]),
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
        rope = getattr(config, "rope_parameters", None) or {}
        max_positions = getattr(config, "max_position_embeddings", None)
        if rope.get("rope_type") == "longrope":  # beyond, the longest row would change the rotation of them all
            max_positions = rope["original_max_position_embeddings"]
        file = folder / "generation_config.json"
        eos = json.loads(file.read_bytes()).get("eos_token_id") if file.is_file() else config.eos_token_id
        return cls(config.vocab_size, max_positions, frozenset([eos] if isinstance(eos, int) else eos or []))
