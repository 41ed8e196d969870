"""The tokenizer of a remote model, where its entry names one: texts can be cut as the model over there reads them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.config.blocks import RemoteModel
from ensemble_server.server.weights.checkpoints import PACKAGED_MODELS, resolve_checkpoint
from ensemble_server.server.weights.tokenizer import load_tokenizer
from ensemble_server.server.weights.view import Surface

if TYPE_CHECKING:
    from ensemble_server.server.hosting import Hosting

TOKENIZER_FILES = ("*.json", "*.model", "*.txt", "*.jinja")


def remote_surface(hosting: Hosting, name: str) -> Surface | None:
    """How remote model `name` reads text; None for others, and where its entry names no tokenizer. Blocks.

    Raises `ModelLoadError` if there is no such tokenizer.
    """
    entry = hosting.config.models[name]
    if not isinstance(entry, RemoteModel) or entry.tokenizer is None:
        return None
    return _surface(entry.tokenizer, hosting.config.source.absolute().parent)


@lru_cache(maxsize=8)
def _surface(tokenizer: str, relative_to: Path) -> Surface:
    local = relative_to / tokenizer
    if local.is_dir():
        return Surface(load_tokenizer(local))
    if local.exists() or tokenizer in PACKAGED_MODELS:
        return Surface(load_tokenizer(resolve_checkpoint(tokenizer, relative_to=relative_to)))
    import huggingface_hub

    try:
        folder = huggingface_hub.snapshot_download(tokenizer, allow_patterns=list(TOKENIZER_FILES))
    except Exception as exc:  # whatever the hub's client raises
        raise ModelLoadError(
            f"tokenizer {tokenizer!r}: no such folder, and the hub gives none ({type(exc).__name__}: {exc})"
        ) from exc
    return Surface(load_tokenizer(Path(folder)))
