"""Which members stand on which weights, and how vLLM builds them.

Members of one `path` are one backbone: a `SeparateMember`, or a `SharedBase` as soon as one of them has an adapter or
there are several. Every member has attention layers and a KV cache of its own under vLLM's manager.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.compilation.backends import set_model_tag
from vllm.config import VllmConfig
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.utils import maybe_prefix
from vllm.transformers_utils.config import get_config

from ensemble_server.ensembles.errors import ModelLoadError
from ensemble_server.server.one_model.vllm.backbone import Backbone, Member
from ensemble_server.server.one_model.vllm.shared_base import SharedBase
from ensemble_server.server.weights.checkpoints import resolve_checkpoint


class SeparateMember(nn.Module):
    """One member with weights of its own: any text model that vLLM has."""

    def __init__(self, *, vllm_config: VllmConfig, index: int, checkpoint: Path, prefix: str) -> None:
        """vllm_config: the member's own. index: among the directory's members."""
        super().__init__()
        self.members = (index,)
        self.hidden_size = vllm_config.model_config.get_hidden_size()
        self.model = initialize_model(vllm_config=vllm_config, prefix=prefix)
        self.secondary_weights = [DefaultModelLoader.Source(str(checkpoint), None, prefix=f"{prefix}.")]

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, positions, None, None)[None]

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        logits = self.model.compute_logits(hidden[0])
        return None if logits is None else logits[None]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return {f"model.{name}" for name in self.model.load_weights(weights)}


def build_backbones(
    vllm_config: VllmConfig, members: Sequence[Member], folder: Path, prefix: str
) -> dict[str, Backbone]:
    """The backbones of a directory by the name that they are to have as attributes of the model with this `prefix`.

    Raises `ModelLoadError` if a member's files cannot be found, or vLLM cannot build it.
    """
    found: dict[str, Backbone] = {}
    for letter, group in zip("abcdefghijklmnopqrstuvwxyz", groups(members), strict=False):
        # subtle: vLLM wants exactly one number in the name of an attention layer, that of the layer
        name = f"backbone_{letter}"
        checkpoint = resolve_checkpoint(members[group[0]]["path"], relative_to=folder)
        try:
            with set_model_tag(name):
                found[name] = _build(vllm_config, members, group, checkpoint, folder, maybe_prefix(prefix, name))
        except Exception as exc:  # quantisation and kernels raise what they like
            names = " and ".join(repr(members[index]["name"]) for index in group)
            cause = exc if isinstance(exc, ModelLoadError) else f"{type(exc).__name__}: {exc}"
            raise ModelLoadError(f"vLLM cannot build member {names} from {checkpoint} ({cause})") from exc
    return found


def _build(
    vllm_config: VllmConfig,
    members: Sequence[Member],
    group: tuple[int, ...],
    checkpoint: Path,
    folder: Path,
    prefix: str,
) -> Backbone:
    config = member_config(vllm_config, checkpoint, prefix)
    if len(group) == 1 and members[group[0]]["adapter"] is None:
        return SeparateMember(vllm_config=config, index=group[0], checkpoint=checkpoint, prefix=prefix)
    return SharedBase(
        vllm_config=config,
        members=[members[index] for index in group],
        indices=group,
        checkpoint=checkpoint,
        folder=folder,
        prefix=prefix,
    )


def groups(members: Sequence[Member]) -> list[tuple[int, ...]]:
    """Indices of the members of each backbone: those of one path, in the order of their first one."""
    by_path: dict[str, list[int]] = {}
    for index, member in enumerate(members):
        by_path.setdefault(member["path"], []).append(index)
    return [tuple(group) for group in by_path.values()]


def member_config(vllm_config: VllmConfig, checkpoint: Path, prefix: str) -> VllmConfig:
    """`vllm_config` with the model of `checkpoint` in place of the ensemble. KV layers stay the ensemble's.

    prefix: of the backbone. It becomes part of what vLLM's compile cache goes by, which otherwise gives two members of
    one shape the code of one of them.
    """
    hf_config = get_config(str(checkpoint), trust_remote_code=vllm_config.model_config.trust_remote_code)
    if hf_config.get_text_config() is not hf_config:
        raise ModelLoadError(
            f"{checkpoint}: members of an ensemble in vLLM are text models, this one reads other input"
        )
    hf_config.ensemble_backbone = prefix
    head_dtype = getattr(vllm_config.model_config.hf_config, "head_dtype", None)
    if head_dtype is not None:  # --hf-overrides '{"head_dtype": "float32"}' is meant for every member's output head
        hf_config.head_dtype = head_dtype
    config = vllm_config.with_hf_config(hf_config)
    model_config = config.model_config
    model_config.hf_text_config = hf_config
    model_config.model_arch_config = model_config.get_model_arch_config()
    model_config.model = str(checkpoint)
    # Read off the member's own config; what --quantization asks for is meant for members that say nothing.
    model_config._verify_quantization()
    config.quant_config = VllmConfig.get_quantization_config(model_config, config.load_config)
    if config.quant_config is not None:
        _refuse_cache_of_its_own(config, checkpoint)
        _read_own_names(config.quant_config, prefix)
    return config


def _refuse_cache_of_its_own(config: VllmConfig, checkpoint: Path) -> None:
    """vLLM would give every member that is built later an 8-bit cache, too, without scales for it."""
    if getattr(config.quant_config, "kv_cache_scheme", None) is not None and config.cache_config.cache_dtype == "auto":
        raise ModelLoadError(
            f"{checkpoint} asks for a quantised KV cache, and all members of an ensemble have one kind of it; choose "
            "it for all with --kv-cache-dtype (fp8, bfloat16, ...)"
        )


def _read_own_names(quant_config: QuantizationConfig, prefix: str) -> None:
    """Let `quant_config` see layers by the names that its checkpoint has for them, without the backbone's.

    Checkpoints say by name which layers are quantised, and how. With another name a layer would silently be taken for
    one of another kind, and its weights for what they are not.
    """

    def of_own_name(method: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
        return lambda layer, prefix, *, backbone=f"{prefix}.": method(layer, prefix.removeprefix(backbone))

    quant_config.get_quant_method = of_own_name(quant_config.get_quant_method)
    online = quant_config.online_quantization_config
    if online is not None:  # on top of the checkpoint's, from --quantization-config
        online.get_quant_method = of_own_name(online.get_quant_method)
        online.resolve_quant_method_cls = of_own_name(online.resolve_quant_method_cls)


def directory_of(model: str) -> Path:
    """The local folder of the ensemble directory that vLLM was given: a folder, or a hub id that it has downloaded."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, allow_patterns=["*.json"], local_files_only=True))
