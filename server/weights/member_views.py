"""Hosted models as their files describe them: everything about a member but its weights.

Both engines build on this, and so does what is checked before any weights are loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.config.blocks import HostedModel
from ensemble_server.server.weights.adapters import check_adapter
from ensemble_server.server.weights.checkpoint_facts import id_set, max_positions
from ensemble_server.server.weights.checkpoints import resolve_checkpoint
from ensemble_server.server.weights.delta_folder import read_card
from ensemble_server.server.weights.quantisation import quantisation_of
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


@dataclass(frozen=True)
class MemberFiles:
    """`checkpoints`: the local folder of each model with a `path`. `failures`: why the other members have no view."""

    views: dict[str, MemberView] = field(default_factory=dict)
    checkpoints: dict[str, Path] = field(default_factory=dict)
    failures: dict[str, ModelLoadError] = field(default_factory=dict)

    def check(self) -> None:
        """Raise the first failure, which names its model."""
        for failure in self.failures.values():
            raise failure


def read_member_files(
    models: Mapping[str, HostedModel], *, relative_to: Path, max_context: int, may_download: bool = True
) -> MemberFiles:
    """What can be known of every hosted model of a config without its weights. Tokenizers are loaded once per folder.

    Blocks: checkpoints may have to be converted or (if they may) downloaded. Nothing is raised: see `failures`. A model
    whose base failed is not among them.
    """
    files = MemberFiles()
    read: dict[Path, _Checkpoint] = {}
    for name in [*(name for name, model in models.items() if model.base is None), *models]:
        root = models[name].base or name
        if name in files.views or name in files.failures or root in files.failures:
            continue
        try:
            if root == name:
                path = str(models[name].path)
                folder = resolve_checkpoint(
                    path, relative_to=relative_to, revision=models[name].revision, may_download=may_download
                )
                if folder not in read:
                    read[folder] = _Checkpoint.read(folder)
                files.checkpoints[name] = folder
            files.views[name] = _view(name, models, read[files.checkpoints[root]], max_context)
        except ModelLoadError as exc:
            files.failures[name] = _naming(name, exc)
    order = list(models)
    files.views.update({name: files.views.pop(name) for name in order if name in files.views})
    return files


def _naming(name: str, error: ModelLoadError) -> ModelLoadError:
    text = str(error)
    named = ModelLoadError(text if text.startswith(f"model {name!r}: ") else f"model {name!r}: {text}")
    named.__cause__ = error
    return named


@dataclass(frozen=True)
class _Checkpoint:
    """`eos_ids`: end-of-text ids of the generation config, or of the model's where there is none."""

    surface: Surface  # of the bare weights: its tokenizer, read once
    vocab_size: int
    max_positions: int | None
    eos_ids: frozenset[int]
    is_quantised: bool

    @classmethod
    def read(cls, folder: Path) -> _Checkpoint:
        from transformers import AutoConfig

        surface = Surface(load_tokenizer(folder))
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()
            file = folder / "generation_config.json"
            eos = json.loads(file.read_bytes()).get("eos_token_id") if file.is_file() else config.eos_token_id
            is_quantised = quantisation_of(folder) is not None
            return cls(surface, config.vocab_size, max_positions(config), id_set(eos), is_quantised)
        except Exception as exc:  # configs are classes of transformers: damage comes as a dozen types
            raise ModelLoadError(
                f"the config of {folder} cannot be read ({type(exc).__name__}: {exc}); is it of an architecture "
                "that this version of transformers does not know?"
            ) from exc


def _view(name: str, models: Mapping[str, HostedModel], checkpoint: _Checkpoint, max_context: int) -> MemberView:
    tokenizer = checkpoint.surface.tokenizer
    adapter, delta = models[name].adapter, models[name].delta
    if adapter is not None:
        check_adapter(name, Path(adapter))
        if checkpoint.is_quantised:
            raise ModelLoadError(
                f"adapter {name!r} stands on quantised weights, which cannot be shared by rows with and without it; "
                "merge it into unquantised weights, or take those as its base"
            )
    if delta is not None:
        read_card(Path(delta))
        if checkpoint.is_quantised:
            raise ModelLoadError(
                f"delta {name!r} stands on quantised weights, which it was not made for; take those that they were "
                "made from as its base"
            )
    eos_id: Any = tokenizer.eos_token_id
    return MemberView(
        name,
        member_surface(name, models, tokenizer),
        checkpoint.eos_ids | id_set(eos_id),
        min(max_context, checkpoint.max_positions or max_context),
        min(checkpoint.surface.vocab_size, checkpoint.vocab_size),
        checkpoint.vocab_size,
    )
