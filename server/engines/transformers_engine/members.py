"""From the config's hosted models to loaded members: weights once, a view of text each."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.engines.transformers_engine.backbone import Backbone
from ensemble_server.server.weights.checkpoint_facts import id_set
from ensemble_server.server.weights.checkpoints import checkpoint_of
from ensemble_server.server.weights.tokenizer import Vocabulary, load_tokenizer
from ensemble_server.server.weights.view import Surface, member_surface

if TYPE_CHECKING:
    from ensemble_server.server.config.blocks import HostedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Member:
    """Weights and a view of the conversation. `adapter`: its name on the backbone, if there is one."""

    name: str
    backbone: Backbone
    adapter: str | None
    surface: Surface
    eos_ids: frozenset[int]
    max_model_len: int

    @property
    def vocab_size(self) -> int:
        return self.backbone.vocab_size


def load_members(models: Mapping[str, HostedModel], *, relative_to: Path, max_context: int) -> dict[str, Member]:
    """Load every hosted model of a config. Weights that several entries stand on are loaded once.

    Raises `ModelLoadError` that names the member, what is wrong and the way out.
    """
    transformers_logging.disable_progress_bar()
    keys = {name: _weights_key(name, model, relative_to) for name, model in models.items() if model.path is not None}
    roots: dict[WeightsKey, Root] = {}
    for name, key in keys.items():
        if key in roots:
            continue
        logger.info("loading %s from %s on %s", name, key.folder, key.device)
        adapters = {
            entry: Path(model.adapter)
            for entry, model in models.items()
            if model.adapter is not None and keys.get(model.base) == key
        }
        try:
            roots[key] = Root.load(key, adapters)
        except ModelLoadError as exc:
            raise ModelLoadError(f"model {name!r}: {exc}") from exc
    return {
        name: _member(name, model, models, roots[keys[model.base or name]], max_context)
        for name, model in models.items()
    }


@dataclass(frozen=True)
class WeightsKey:
    """What makes two entries stand on the same loaded weights."""

    folder: Path
    dtype: str
    device: str


@dataclass(frozen=True)
class Root:
    """A loaded checkpoint: its weights and its tokenizer."""

    backbone: Backbone
    tokenizer: PreTrainedTokenizerBase

    @classmethod
    def load(cls, key: WeightsKey, adapters: Mapping[str, Path]) -> Root:
        tokenizer = load_tokenizer(key.folder)
        vocab_size = Vocabulary(tokenizer).vocab_size
        backbone = Backbone.load(
            key.folder, dtype=key.dtype, device=key.device, adapters=adapters, vocab_size=vocab_size
        )
        return cls(backbone, tokenizer)


def _weights_key(name: str, model: HostedModel, relative_to: Path) -> WeightsKey:
    return WeightsKey(checkpoint_of(name, model.path, relative_to=relative_to), model.dtype, _device(model.device))


def _device(device: str) -> str:
    if device != "auto":
        return device
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if accelerator is None else str(accelerator)


def _member(name: str, model: HostedModel, models: Mapping[str, HostedModel], root: Root, max_context: int) -> Member:
    surface = member_surface(name, models, root.tokenizer)
    return Member(
        name=name,
        backbone=root.backbone,
        adapter=name if model.adapter is not None else None,
        surface=surface,
        eos_ids=root.backbone.eos_ids | id_set(root.tokenizer.eos_token_id),
        max_model_len=min(max_context, root.backbone.max_positions or max_context),
    )
