"""What benchmarks of speed load: one checkpoint, as members with weights of their own or as adapters of one base."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from ensemble_server.server.config.blocks import HostedModel
from ensemble_server.server.engines.transformers_engine.half_weights import WeightsRule
from ensemble_server.server.engines.transformers_engine.members import Member, load_members
from ensemble_server.server.weights.checkpoints import resolve_checkpoint
from ensemble_server.server.weights.member_views import read_member_files

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
EXPERTS = Path(__file__).parent.parent / "experts"
EXPERT_NAMES = ("code", "jargon", "shakespeare")
RANK = 4  # of adapters of random numbers; that of the demo's experts


@dataclass(frozen=True)
class Subject:
    """`model`, `dtype`, `device`: as a config names them."""

    model: str = BASE
    dtype: str = "float32"
    device: str = "auto"

    @classmethod
    def of(cls, options: argparse.Namespace) -> Subject:
        """Of a parser that `add_options` has been at."""
        return cls(options.model, options.dtype, options.device)

    def __str__(self) -> str:
        return f"{self.model}, {self.dtype}, device {self.device}"

    @property
    def checkpoint(self) -> Path:
        return resolve_checkpoint(self.model, relative_to=Path())

    def hosted(self, path: str) -> HostedModel:
        return HostedModel.model_validate({"path": path, "dtype": self.dtype, "device": self.device})

    def separate(self, root: Path, num_members: int) -> dict[str, HostedModel]:
        """The same checkpoint under several folders: an engine loads it once for each, as it would different models."""
        models = {}
        for index in range(num_members):
            copy = root / f"copy{index}"
            copy.mkdir(parents=True)
            for file in self.checkpoint.iterdir():
                (copy / file.name).symlink_to(file.resolve())
            models[f"copy{index}"] = self.hosted(str(copy))
        return models

    def adapted(self, root: Path, num_members: int) -> dict[str, HostedModel]:
        """The base and adapters of it: the demo's experts where they fit, and random ones written into `root`."""
        models = {"base": self.hosted(self.model)}
        experts = EXPERT_NAMES if self.model == BASE else ()
        for index in range(num_members - 1):
            name = experts[index] if index < len(experts) else f"random{index}"
            folder = EXPERTS / name if index < len(experts) else root / name
            if index >= len(experts) and not folder.exists():
                write_adapter(self.checkpoint, folder, seed=index)
            models[name] = HostedModel(base="base", adapter=str(folder))
        return models


def load_as_in_use(
    models: Mapping[str, HostedModel], *, max_context: int, weights: WeightsRule = "exact"
) -> dict[str, Member]:
    """Members as an engine's spare time leaves them. What steps in another thread is slowed for good by the thread
    that ran this, while that lives: see `in_own_thread`."""
    members = load_members(
        models, read_member_files(models, relative_to=Path(), max_context=max_context), weights=weights
    )
    for backbone in dict.fromkeys(member.backbone for member in members.values()):
        for _ in backbone.halving():
            pass
    return members


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=BASE, help="a folder, a .gguf file or a hub id; default: %(default)s")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")


def write_adapter(checkpoint: Path, folder: Path, *, seed: int, rank: int = RANK) -> None:
    """A LoRA of random numbers on all linear layers of the blocks. How fast it is does not depend on the numbers."""
    from peft import LoraConfig
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint))
    head = model.get_output_embeddings()
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and layer is not head
    }
    draw = torch.Generator().manual_seed(seed)
    weights = {}
    for name, layer in layers.items():
        for half, shape in (("A", (rank, layer.in_features)), ("B", (layer.out_features, rank))):
            values = torch.randn(shape, generator=draw) * 0.01
            weights[f"base_model.model.{name}.lora_{half}.weight"] = values
    names = sorted({name.rsplit(".", 1)[-1] for name in layers})
    folder.mkdir(parents=True)
    LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, task_type="CAUSAL_LM").save_pretrained(str(folder))
    save_file(weights, folder / "adapter_model.safetensors")
