"""The model directory that vLLM loads for a placement: a checkpoint as it is, or an exported ensemble.

Exports hold references to weights, so they are small. They are kept in `$ENSEMBLE_CACHE`, under a hash of what is in
them: the same config finds the same folder again, and with it what vLLM has compiled for it.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ensemble_server.ensembles.probability_averaging import ProbabilityAverage
from ensemble_server.server.config.blocks import Config, HostedModel
from ensemble_server.server.engines.vllm_engine.placement import Placement
from ensemble_server.server.one_model.export import export
from ensemble_server.server.weights.cache import cache_folder
from ensemble_server.server.weights.member_views import MemberView

_ENSEMBLE = "the ensemble"  # with a space, which no model of a config has in its name


@dataclass(frozen=True)
class ModelFolder:
    path: Path
    is_ensemble: bool


def model_folder(placement: Placement, views: Mapping[str, MemberView], source: Path) -> ModelFolder:
    """The folder to load. `source`: the config file, for messages.

    A single member is an ensemble of one if its logits are padded: vLLM would let the padding take part.
    """
    (first, weights), *others = placement.parts.items()
    if not others and weights.adapter is None and views[first].vocab_size == views[first].padded_vocab_size:
        return ModelFolder(weights.checkpoint, is_ensemble=False)
    parent = cache_folder() / "vllm"
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix="new-") as scratch:
        made = Path(scratch) / "directory"
        export(_config_of(placement, source), _ENSEMBLE, made)
        kept = parent / _digest(made)
        if not kept.exists():
            try:
                os.rename(made, kept)
            except OSError:  # another process was faster
                if not kept.exists():
                    raise
    return ModelFolder(kept, is_ensemble=True)


def _config_of(placement: Placement, source: Path) -> Config:
    """A config with the placement's parts as members of one ensemble. Views stay behind: prompts come as token ids."""
    models: dict[str, HostedModel | ProbabilityAverage.Config] = {}
    bases = {
        (weights.checkpoint, weights.dtype): name
        for name, weights in placement.parts.items()
        if weights.adapter is None
    }
    for name, weights in placement.parts.items():
        if (key := (weights.checkpoint, weights.dtype)) not in bases:
            bases[key] = f"the base of {name}"  # that is all it is: no part is it
            models[bases[key]] = HostedModel(path=str(weights.checkpoint), dtype=weights.dtype)
        if weights.adapter is None:
            models[name] = HostedModel(path=str(weights.checkpoint), dtype=weights.dtype)
        else:
            models[name] = HostedModel(base=bases[key], adapter=str(weights.adapter))
    mixture = placement.mixture
    models[_ENSEMBLE] = ProbabilityAverage.Config(
        method="probability_average", members=dict(mixture.weights), pool=mixture.pool, share=mixture.share
    )
    return Config(models=models, source=source)


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(folder)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]
