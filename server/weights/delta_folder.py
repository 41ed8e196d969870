"""A folder with a compressed fine-tune: what its `delta.json` says, and what can be refused without its weights.

delta.json                   method, the models it was made from, what it holds, what it costs
delta.safetensors            the matrices' deltas, packed; of the method `svd` they are a PEFT adapter instead:
adapter_config.json, adapter_model.safetensors
kept.safetensors             weights that are no matrices of the blocks, as the fine-tune has them; if there are any
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ensemble_server.ensembles.errors import ModelLoadError

FORMAT = 1
CARD, PACKED, KEPT = "delta.json", "delta.safetensors", "kept.safetensors"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")

DeltaMethod = Literal["svd", "delta-come", "bitdelta", "dare"]
METHODS: tuple[DeltaMethod, ...] = get_args(DeltaMethod)


@dataclass(frozen=True)
class DeltaCard:
    """`kept`: names of weights that are in `kept.safetensors`. `facts`: the whole of delta.json."""

    method: DeltaMethod
    kept: tuple[str, ...]
    facts: dict[str, Any]

    @property
    def is_adapter(self) -> bool:
        """Whether the folder is a LoRA adapter and nothing else."""
        return self.method == "svd" and not self.kept


def read_card(folder: Path) -> DeltaCard:
    """Raises `ModelLoadError` if `folder` is no whole delta of a format that is known here."""
    file = folder / CARD
    if not file.is_file():
        raise ModelLoadError(
            f"{folder} cannot be loaded: it holds no {CARD}; `delta` takes a folder that `ensemble compress` wrote"
        )
    try:
        facts = json.loads(file.read_bytes())
        method, kept, format_ = facts["method"], tuple(facts["kept"]), facts["format"]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise ModelLoadError(
            f"{file} cannot be read ({type(exc).__name__}: {exc}); compress the fine-tune again"
        ) from exc
    if format_ != FORMAT or method not in METHODS:
        raise ModelLoadError(
            f"{file} has format {format_!r} and method {method!r}; format {FORMAT} with one of {', '.join(METHODS)} is "
            "known here. Compress the fine-tune again with this version"
        )
    needed = (*(ADAPTER if method == "svd" else (PACKED,)), *((KEPT,) if kept else ()))
    if missing := [name for name in needed if not (folder / name).is_file()]:
        raise ModelLoadError(f"{folder} lacks {missing[0]}, which its {CARD} promises; compress the fine-tune again")
    return DeltaCard(method, kept, facts)


# In the engine, what a byte on disk becomes where weights run as float32: low rank is unpacked; codes of 2 and 3 bits,
# and signs, take 4; a sparse value has a column of 4 bytes beside it.
_IN_MEMORY = {"svd": 2.0, "delta-come": 1.8, "bitdelta": 4.0, "dare": 2.7}


def bytes_in_memory(card: DeltaCard) -> int:
    """About what a member with this delta takes beside its base, from the card alone."""
    sizes = card.facts["bytes"]
    return round(_IN_MEMORY[card.method] * sizes["matrices"] + 2 * sizes["kept"])
