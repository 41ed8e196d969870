"""From the config's hosted models to loaded members: weights once, a view of text each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers.utils import logging as transformers_logging

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.engines.engine import Loading
from ensemble_server.server.engines.transformers_engine.backbone import Backbone
from ensemble_server.server.engines.transformers_engine.half_weights import WeightsRule
from ensemble_server.server.weights.devices import resolve_device, rooms, spread, warn_of_slow_bfloat16
from ensemble_server.server.weights.footprint import read_weights
from ensemble_server.server.weights.member_views import MemberFiles, MemberView
from ensemble_server.server.weights.view import Surface

if TYPE_CHECKING:
    from ensemble_server.server.config.blocks import HostedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Member:
    """Weights and a view of the conversation. `adapter`: its name on the backbone, if it has an adapter or a delta."""

    name: str
    backbone: Backbone
    adapter: str | None
    surface: Surface
    eos_ids: frozenset[int]
    max_model_len: int

    @property
    def vocab_size(self) -> int:
        return self.backbone.vocab_size

    def has(self, token_id: int) -> bool:
        """Whether `token_id` is a token of its own."""
        return token_id < self.vocab_size

    def widened(self, logprobs: torch.Tensor) -> torch.Tensor:
        """(n, vocab_size): as they are. Members of a family (`family.py`) have some of their tokens in common only."""
        return logprobs


def load_members(
    models: Mapping[str, HostedModel],
    files: MemberFiles,
    *,
    weights: WeightsRule = "exact",
    on_load: Callable[[Loading], None] = lambda loading: None,
) -> dict[str, Member]:
    """Load every hosted model of a config. Weights that several entries stand on are loaded once.

    `files`: what is known of them without weights. `weights`: which are kept as fp16 on a CPU. `on_load` is told before
    each weights. Raises `ModelLoadError` that names the member, what is wrong and the way out.
    """
    transformers_logging.disable_progress_bar()
    files.check()
    keys = placed(models, files)
    backbones: dict[WeightsKey, Backbone] = {}
    for name, key in keys.items():
        if key in backbones:
            continue
        loading = Loading(name, len(backbones) + 1, len(set(keys.values())))
        logger.info("%s from %s on %s", loading, key.folder, key.device)
        on_load(loading)
        adapters = {
            entry: Path(model.adapter)
            for entry, model in models.items()
            if model.adapter is not None and model.base is not None and keys[model.base] == key
        }
        deltas = {
            entry: Path(model.delta)
            for entry, model in models.items()
            if model.delta is not None and model.base is not None and keys[model.base] == key
        }
        try:
            backbones[key] = Backbone.load(
                key.folder,
                dtype=key.dtype,
                device=key.device,
                adapters=adapters,
                deltas=deltas,
                vocab_size=files.views[name].vocab_size,
                weights=weights,
            )
        except ModelLoadError as exc:
            raise ModelLoadError(f"model {name!r}: {exc}") from exc
        warn_of_slow_bfloat16(name, str(backbones[key].model.dtype).removeprefix("torch."), key.device)
    return {
        name: _member(files.views[name], model, backbones[keys[model.base or name]]) for name, model in models.items()
    }


@dataclass(frozen=True)
class WeightsKey:
    """What makes two entries stand on the same loaded weights."""

    folder: Path
    dtype: str
    device: str


def placed(models: Mapping[str, HostedModel], files: MemberFiles) -> dict[str, WeightsKey]:
    """The weights of every entry that has a folder. Where there are several accelerators, `device: auto` spreads."""
    keys = {}
    for name, folder in files.checkpoints.items():
        try:
            device = resolve_device(models[name].device)
        except ModelLoadError as exc:
            raise ModelLoadError(f"model {name!r}: {exc}") from exc
        keys[name] = WeightsKey(folder, models[name].dtype, device)
    free = rooms()
    if not free:
        return keys
    anywhere = dict.fromkeys(key for name, key in keys.items() if models[name].device == "auto")
    places = spread({key: read_weights(key.folder).bytes_as(key.dtype) for key in anywhere}, free)
    return {
        name: replace(key, device=f"{key.device}:{places[key]}") if models[name].device == "auto" else key
        for name, key in keys.items()
    }


def _member(view: MemberView, model: HostedModel, backbone: Backbone) -> Member:
    return Member(
        name=view.name,
        backbone=backbone,
        adapter=None if model.adapter is None and model.delta is None else view.name,
        surface=view.surface,
        eos_ids=view.eos_ids,
        max_model_len=view.max_model_len,
    )
