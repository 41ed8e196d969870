"""Several LoRA adapters of one base in one forward: each row gets its own adapter's delta, the base runs once.

    y = W x + B_a A_a x · scaling_a          for a row that belongs to adapter a

All adapters' A are stacked side by side, and a mask keeps, for each token, only its own adapter's columns between
A and B. That is two small products per layer whatever the number of rows and however they are distributed.
PEFT reads the adapters (its key mapping, rank patterns, rsLoRA scaling); what is no plain LoRA on a linear layer is
refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.weights.adapters import refuse_beyond_plain_lora

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class AdapterRows:
    """Which adapter or delta each token of the running forward belongs to. Shared by all layers of a backbone that are
    wrapped for them.

    `owners`: (T,) int64, 0 for the bare base, else one more than the place among `names`. `is_bare`: all are 0.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.owners = torch.zeros(0, dtype=torch.long)
        self._places: dict[str, torch.Tensor] = {}
        self._index = {name: index for index, name in enumerate(names)}
        self._one_hot = torch.zeros(0)
        self._expanded: dict[tuple[int, ...], torch.Tensor] = {}
        self.is_bare = True

    def assign(self, adapters: Sequence[str | None], dtype: torch.dtype, device: torch.device) -> None:
        """adapters: one name per token, None for the bare base. Must be called before each forward."""
        self._one_hot = torch.zeros(len(adapters), len(self._index), dtype=dtype)
        tagged = [(row, self._index[name]) for row, name in enumerate(adapters) if name is not None]
        self.is_bare = not tagged
        if tagged:
            rows, columns = zip(*tagged, strict=True)
            self._one_hot[list(rows), list(columns)] = 1
        self._one_hot = self._one_hot.to(device)
        self._expanded = {}
        self.owners = torch.tensor([0 if name is None else self._index[name] + 1 for name in adapters], device=device)
        places: dict[str, list[int]] = {}
        for row, name in tagged:
            places.setdefault(self.names[name], []).append(row)
        self._places = {name: torch.tensor(at, device=device) for name, at in places.items()}

    def places(self, name: str) -> torch.Tensor | None:
        """The tokens, rising, that belong to it; None if none does."""
        return self._places.get(name)

    def mask(self, ranks: tuple[int, ...]) -> torch.Tensor:
        """(T, sum(ranks)): one where a column belongs to the token's own adapter. Layers of equal ranks share it."""
        if ranks not in self._expanded:
            repeats = torch.tensor(ranks, device=self._one_hot.device)
            self._expanded[ranks] = self._one_hot.repeat_interleave(repeats, dim=1)
        return self._expanded[ranks]


class StackedLora(nn.Module):
    """A linear layer and the low-rank deltas of all adapters that touch it."""

    a: torch.Tensor
    b: torch.Tensor

    def __init__(
        self, base: nn.Module, a: list[torch.Tensor], b: list[torch.Tensor], ranks: tuple[int, ...], rows: AdapterRows
    ) -> None:
        """a: per adapter (rank, in); b: per adapter (out, rank), scaled; ranks: 0 for an adapter without this layer."""
        super().__init__()
        self.base, self.ranks, self.rows = base, ranks, rows
        self.register_buffer("a", torch.cat(a).T.contiguous())  # (in, sum of ranks)
        self.register_buffer("b", torch.cat(b, dim=1).T.contiguous())  # (sum of ranks, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)  # (1, T, out)
        if self.rows.is_bare:
            return y
        low_rank = (x[0] @ self.a).mul_(self.rows.mask(self.ranks))
        y[0].addmm_(low_rank, self.b)
        return y


def stack_adapters(model: PreTrainedModel, adapters: Mapping[str, Path], others: Sequence[str] = ()) -> AdapterRows:
    """Replace, in place, every linear layer of `model` that an adapter touches by a `StackedLora`.

    adapters: name -> PEFT folder; others: names that also own rows, of nothing here. Raises `ModelLoadError` naming the
    adapter for anything but finite, plain LoRA on linear layers of the blocks, and for files that do not hold exactly
    the layers that their config promises.
    """
    from peft.tuners.lora import LoraLayer

    wrapped: PeftModel | None = None
    slots = {name: f"adapter_{index}" for index, name in enumerate(adapters)}  # PEFT's names cannot have dots
    for name, folder in adapters.items():
        wrapped = _load(name, folder, model if wrapped is None else wrapped, slots[name])
    rows = AdapterRows([*adapters, *others])
    head = model.get_output_embeddings()
    for path, layer in [(path, layer) for path, layer in model.named_modules() if isinstance(layer, LoraLayer)]:
        if layer is head or layer.lora_embedding_A:
            owners = [name for name, slot in slots.items() if slot in layer.lora_A or slot in layer.lora_embedding_A]
            raise ModelLoadError(
                f"adapter {owners[0]!r}: only the linear layers of the blocks can carry an adapter here, not {path}"
            )
        parent, _, attribute = path.rpartition(".")
        setattr(model.get_submodule(parent), attribute, _stacked(path, layer, slots, rows))
    return rows


def _load(name: str, folder: Path, model: PreTrainedModel | PeftModel, slot: str) -> PeftModel:
    """`model` (plain, or wrapped by PEFT already) with one adapter more, under the name `slot`."""
    from peft import PeftConfig, PeftModel, load_peft_weights, set_peft_model_state_dict

    try:
        config = PeftConfig.from_pretrained(str(folder))
        refuse_beyond_plain_lora(name, config)
        config.inference_mode = True
        weights = load_peft_weights(str(folder), device="cpu")
        if isinstance(model, PeftModel):
            model.add_adapter(slot, config)
        else:
            model = PeftModel(model, config, adapter_name=slot)
        result = set_peft_model_state_dict(model, weights, adapter_name=slot)
    except ModelLoadError:
        raise
    except Exception as exc:
        raise ModelLoadError(
            f"adapter {name!r} at {folder} cannot be loaded on its base ({type(exc).__name__}: {exc}); "
            "is it a PEFT folder (adapter_config.json, adapter_model.safetensors) trained on this base?"
        ) from exc
    foreign = [key for key in weights if ".lora_A." not in key and ".lora_B." not in key]
    missing = [key for key in result.missing_keys if f".{slot}." in key]
    for keys, problem in ((foreign, "is no LoRA weight"), (result.unexpected_keys, "fits no layer of its base")):
        if keys:
            raise ModelLoadError(
                f"adapter {name!r} at {folder} has {len(keys)} weights that cannot be used: {keys[0]} {problem}"
            )
    if missing:
        raise ModelLoadError(
            f"adapter {name!r} at {folder} lacks {len(missing)} weights that its config promises, for example "
            f"{missing[0].replace(f'.{slot}.', '.')}; save it again, or check that it was trained on this base"
        )
    return model


def _stacked(path: str, layer: Any, slots: Mapping[str, str], rows: AdapterRows) -> StackedLora:
    """layer: PEFT's `LoraLayer`, whose types say no more of its parts than that they are modules."""
    weight = layer.get_base_layer().weight
    a, b, ranks = [], [], []
    for name, slot in slots.items():
        if slot not in layer.lora_A:
            ranks.append(0)
            continue
        a.append(layer.lora_A[slot].weight.detach().to(weight))
        b.append(layer.lora_B[slot].weight.detach().to(weight) * layer.scaling[slot])
        ranks.append(len(a[-1]))
        if not (a[-1].isfinite().all() and b[-1].isfinite().all()):
            raise ModelLoadError(
                f"adapter {name!r}: weights of {path} are not finite; the file is damaged or training diverged"
            )
    ranks += [0] * (len(rows.names) - len(ranks))
    return StackedLora(layer.get_base_layer(), a, b, tuple(ranks), rows)
