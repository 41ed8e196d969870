"""The model that learns: a LoRA adapter on a hosted model's weights or all of them, started where `init` says.

Adapters of one base side by side are the linear merge of the models that they make:

    W + Σ_k w_k s_k B_k A_k  =  W + s [w_1 s_1/s B_1 | w_2 s_2/s B_2 | ...] [A_1; A_2; ...]

so a student of rank Σ_k r_k can start there and stay an adapter. LoRA: Hu et al., 2021,
https://arxiv.org/abs/2106.09685, by PEFT.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ensemble_server.ensembles.base import Mixture
from ensemble_server.ensembles.errors import ConfigError, ModelLoadError, UnknownModelError
from ensemble_server.server.compare.arms.identity import weights_folder
from ensemble_server.server.compare.merges.merge_process import TOKENIZER_FILES
from ensemble_server.server.config.blocks import Config, HostedModel
from ensemble_server.server.config.distillation import Distillation
from ensemble_server.server.config.problems import nearest
from ensemble_server.server.distill.merged_start import MergedStart, merged_start
from ensemble_server.server.weights.causal_lm import load_causal_lm
from ensemble_server.server.weights.devices import resolve_device
from ensemble_server.server.weights.quantisation import quantisation_of

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

SCALING = 4.0  # alpha / rank of an adapter that does not start from others, as the demo's experts have it
ADAPTER = "default"  # PEFT's name for an adapter that has none
START_FOLDER = "start"  # inside that of an adapter: a merge that stands nowhere else


@dataclass(frozen=True)
class Source:
    """A model that the student starts from, with its weight in their linear merge."""

    name: str
    weight: float
    folder: Path
    adapter: Path | None


@dataclass(frozen=True)
class Origin:
    """Where a student stands before it learns. `base`: its weights as the config calls them; `folder`: where they lie.

    `sources`: what is merged into its start; none for the weights as they are. `merge`: what stands in their place;
    `folder` and `path` are its own once it is made.
    """

    base: str
    path: str
    folder: Path
    device: str
    sources: tuple[Source, ...]
    merge: MergedStart | None = None

    @property
    def start_folder(self) -> str | None:
        """Of a merge under an adapter: where it will lie, seen from the student's folder. None: a model of the config
        is under it."""
        if self.merge is None:
            return None
        return str(self.merge.path.absolute()) if self.merge.recipe is None else START_FOLDER


def origin_of(config: Config, wanted: Distillation, mixture: Mixture | None) -> Origin:
    """Looks at no weights. Raises `ConfigError` for a student or a start that cannot be."""
    entry = _hosted(config, wanted.student, "student")
    folder, root = weights_folder(config, wanted.student)
    if quantisation_of(folder) is not None:
        raise ConfigError(
            f"student: {wanted.student!r} is quantised and cannot be trained; take its unquantised weights"
        )
    base = wanted.student if entry.base is None else entry.base
    assert root.path is not None, "weights have a path"
    if (merge := merged_start(config, wanted)) is not None:
        return Origin(base, root.path, folder, resolve_device(root.device), (), merge)
    sources = [_source(config, name, weight) for name, weight in _start(config, wanted, mixture, base).items()]
    if not wanted.full:
        for source in sources:
            if source.adapter is None or source.folder != folder:
                raise ConfigError(
                    f"init: {source.name!r} is no adapter of {base!r}, and an adapter is trained; give `full` to "
                    "start from its weights"
                )
        needed = sum(_rank_of(source) for source in sources)
        if needed > wanted.rank:
            raise ConfigError(
                f"init: {wanted.init} has rank {needed} ({' + '.join(source.name for source in sources)}), "
                f"`rank` is {wanted.rank}; give at least {needed}"
            )
    return Origin(base, root.path, folder, resolve_device(root.device), tuple(sources))


def _start(config: Config, wanted: Distillation, mixture: Mixture | None, base: str) -> dict[str, float]:
    """The models that the student starts from, and their weights, which sum to one."""
    if wanted.init == "zero":
        return {} if wanted.student == base else {wanted.student: 1.0}
    if wanted.init != "merge":
        _hosted(config, wanted.init, "init")
        return {} if wanted.init == base else {wanted.init: 1.0}
    if mixture is None:
        raise ConfigError(f"init: {wanted.ensemble!r} is no average, so it has no linear merge; take zero, or a model")
    merged = {name: weight for name, weight in mixture.weights.items() if name != base}
    if negative := [name for name, weight in merged.items() if weight < 0]:
        raise ConfigError(f"init: {negative[0]!r} has a negative weight in {wanted.ensemble!r}; there is no such merge")
    if not merged:
        raise ConfigError(f"init: {wanted.ensemble!r} has no member beside {base!r}, so there is nothing to merge")
    return {name: weight / sum(merged.values()) for name, weight in merged.items()}


def _hosted(config: Config, name: str, key: str) -> HostedModel:
    entry = config.models.get(name)
    hosted = [one for one, model in config.models.items() if isinstance(model, HostedModel)]
    if entry is None:
        raise UnknownModelError(f"{key}: there is no model {name!r}{nearest(name, hosted)}", param=key)
    if not isinstance(entry, HostedModel):
        raise ConfigError(f"{key}: {name!r} has no weights of its own; take one of {', '.join(hosted)}")
    return entry


def _source(config: Config, name: str, weight: float) -> Source:
    entry = _hosted(config, name, "init")
    return Source(name, weight, weights_folder(config, name)[0], None if entry.adapter is None else Path(entry.adapter))


def _rank_of(source: Source) -> int:
    from peft import PeftConfig

    assert source.adapter is not None, "asked of adapters alone"
    config: Any = PeftConfig.from_pretrained(str(source.adapter))
    return max([config.r, *config.rank_pattern.values()])


# --- weights ---


class Student:
    """Weights that can be trained. `model`: as transformers calls it."""

    def __init__(self, model: Any, origin: Origin, *, is_full: bool) -> None:
        self.model = model
        self.origin = origin
        self.is_full = is_full

    @property
    def device(self) -> torch.device:
        return torch.device(self.origin.device)

    @property
    def trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def save(self, folder: Path) -> None:
        """As an ordinary adapter, or as a model folder, in the number format of the weights that it came from."""
        folder.mkdir(parents=True, exist_ok=True)
        if not self.is_full:
            start = self.origin.start_folder
            save_adapter(self.model, folder, base=start or self.origin.path)
            if start == START_FOLDER:
                shutil.copytree(self.origin.folder, folder / START_FOLDER)
            return
        from transformers import AutoConfig

        stored = AutoConfig.from_pretrained(self.origin.folder, local_files_only=True).dtype
        self.model.to(stored or torch.float32).save_pretrained(folder)
        for name in TOKENIZER_FILES:
            if (self.origin.folder / name).is_file():
                shutil.copyfile(self.origin.folder / name, folder / name)


def load_student(origin: Origin, *, rank: int, is_full: bool, seed: int) -> Student:
    """Float32. Raises `ModelLoadError`."""
    torch.manual_seed(seed)
    if is_full:
        model = _merged(origin) if origin.sources else _loaded(origin.folder)
        return Student(model.to(origin.device).requires_grad_(True), origin, is_full=True)
    return Student(_with_adapter(origin, rank).to(origin.device), origin, is_full=False)


def _loaded(folder: Path) -> Any:
    return load_causal_lm(folder, dtype=torch.float32)


def _merged(origin: Origin) -> Any:
    """The weighted mean of the sources' weights, one source in memory at a time besides it."""
    merged = _loaded(origin.folder)
    total = {name: torch.zeros_like(weight) for name, weight in merged.named_parameters()}
    for source in origin.sources:
        model = _loaded(source.folder)
        if source.adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(source.adapter)).merge_and_unload(safe_merge=True)
        weights = dict(model.named_parameters())
        if {name: weight.shape for name, weight in weights.items()} != {
            name: weight.shape for name, weight in total.items()
        }:
            raise ModelLoadError(f"init: {source.name!r} and {origin.base!r} have weights of other shapes")
        for name, weight in weights.items():
            total[name] += source.weight * weight.detach()
    with torch.no_grad():
        for name, weight in merged.named_parameters():
            weight.copy_(total[name])
    return merged


def _with_adapter(origin: Origin, rank: int) -> Any:
    from peft import LoraConfig, PeftConfig, get_peft_model

    configs: dict[str, PeftConfig] = {
        source.name: PeftConfig.from_pretrained(str(source.adapter)) for source in origin.sources
    }
    base = _loaded(origin.folder)
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=SCALING * rank,  # type: ignore[arg-type]  # PEFT divides it
        lora_dropout=0.0,
        target_modules=_target_modules(configs),
    )
    model: Any = get_peft_model(base, settings)
    if origin.sources:
        for source in origin.sources:
            model.load_adapter(str(source.adapter), adapter_name=_part(source))
        _fill(model, origin.sources)
        for source in origin.sources:
            model.delete_adapter(_part(source))
        model.set_adapter(ADAPTER)
    return model


def _part(source: Source) -> str:
    return f"start-{source.name}".replace(".", "-")  # PEFT keeps adapters as modules, whose names have no dots


def _target_modules(configs: Mapping[str, Any]) -> list[str] | str:
    """Every layer that one of the sources changes; every linear layer of the blocks where there is no source."""
    named: set[str] = set()
    for name, config in configs.items():
        if isinstance(config.target_modules, str):
            raise ConfigError(
                f"init: the adapter of {name!r} names its layers by a pattern; start from `zero`, or save it again "
                "with a list of `target_modules`"
            )
        named.update(config.target_modules)
    return sorted(named) if named else "all-linear"


@torch.no_grad()
def _fill(model: PeftModel, sources: Sequence[Source]) -> None:
    """Put the sources' adapters side by side into the one that is trained. What is left of its rank starts at zero."""
    for module in model.modules():
        adapters: Any = getattr(module, "lora_A", None)
        if not isinstance(adapters, torch.nn.ModuleDict) or ADAPTER not in adapters:
            continue
        layer: Any = module
        down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight  # (rank, in), (out, rank)
        first = 0
        for source in sources:
            part = _part(source)
            if part not in layer.lora_A:
                continue
            its_down, its_up = layer.lora_A[part].weight, layer.lora_B[part].weight
            here = slice(first, first + len(its_down))
            down[here] = its_down
            up[:, here] = its_up * (source.weight * layer.scaling[part] / layer.scaling[ADAPTER])
            first = here.stop


def save_adapter(model: PeftModel, folder: Path, *, base: str) -> int:
    """Writes PEFT's two files, weights as float16 and `base` as the model that it belongs to; returns the weights' size
    in bytes."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: weight.detach().to(torch.float16).contiguous().cpu()
        for name, weight in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    config: Any = model.peft_config[ADAPTER]
    config.base_model_name_or_path = base  # PEFT wrote the local folder that the base was loaded from
    config.inference_mode = True
    config.save_pretrained(str(folder))
    config_file = folder / "adapter_config.json"
    settings = json.loads(config_file.read_text(encoding="utf-8"))
    settings["target_modules"].sort()  # PEFT keeps a set: its order would differ from run to run
    config_file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    weights_file = folder / "adapter_model.safetensors"
    save_file(weights, weights_file, metadata={"format": "pt"})
    return weights_file.stat().st_size
