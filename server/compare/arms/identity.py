"""Which arm is the same as yesterday: a hash of all that decides a model's answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.ensembles.method import MethodConfig
from ensemble_server.server.compare.kept.content_cache import digest, folder_digest
from ensemble_server.server.config.blocks import Config, HostedModel
from ensemble_server.server.weights.checkpoints import checkpoint_of
from ensemble_server.server.weights.delta_folder import read_card


def identity(config: Config, name: str) -> str:
    """Hash of what decides the model's answers: weights, adapters, prompts, settings, those of its parts included.

    Names of files do not count, their content does. Raises `ModelLoadError` if a file is not there.
    """
    entry = config.models[name]
    settings = entry.model_dump(mode="json", exclude={"listed", "path", "base", "adapter", "delta"})
    parts: dict[str, Any] = {}
    if isinstance(entry, MethodConfig):
        parts = {part: identity(config, part) for part in sorted(entry.references())}
    elif isinstance(entry, HostedModel):
        folder, root = weights_folder(config, name)
        parts = {"weights": folder_digest(folder)}
        if root is not entry:
            parts["root"] = root.model_dump(mode="json", exclude={"listed", "path"})
        if entry.adapter is not None:
            parts["adapter"] = _adapter_digest(name, Path(entry.adapter))
        if entry.delta is not None:
            read_card(Path(entry.delta))
            parts["delta"] = folder_digest(Path(entry.delta))
    return digest({"settings": settings, "parts": parts})


def _adapter_digest(name: str, folder: Path) -> str:
    if not (folder / "adapter_config.json").is_file():
        raise ModelLoadError(
            f"model {name!r}: {folder} holds no adapter_config.json; give the folder of a LoRA adapter"
        )
    return folder_digest(folder)


def weights_folder(config: Config, name: str) -> tuple[Path, HostedModel]:
    """Where the weights of a hosted model lie, and the entry that has them. Raises `ModelLoadError`."""
    entry = config.models[name]
    assert isinstance(entry, HostedModel), "only hosted models have weights"
    root_name = name if entry.base is None else entry.base
    root = config.models[root_name]
    assert isinstance(root, HostedModel), "checked when the config was read"
    assert root.path is not None, "so is that"
    folder = config.source.absolute().parent
    return checkpoint_of(root_name, root.path, relative_to=folder, revision=root.revision), root
