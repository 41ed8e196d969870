"""`ensemble export`: a probability average of a config as a directory that transformers and vLLM load as one model.

Written: `config.json`, the first member's tokenizer and chat template, `generation_config.json`, two lines of code that
lead transformers here when `trust_remote_code=True`, and a `model.safetensors` that holds only the members' prior
weights: vLLM wants a weight file in a directory before it reads those of the members. Their weights are referred to, or
with `copy` copied beside them. LoRA members stay adapters: the base is held once. Views of text cannot be carried over
(all members of one model read the same tokens), so members with a system prompt of their own are refused.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from ensemble_server.ensembles.errors import ConfigError, ModelLoadError
from ensemble_server.ensembles.probability_averaging import ProbabilityAverage
from ensemble_server.server.config.averages import average_of
from ensemble_server.server.config.blocks import Config, HostedModel
from ensemble_server.server.weights.adapters import adapter_of
from ensemble_server.server.weights.checkpoints import resolve_checkpoint

REMOTE_CODE = "ensemble_directory.py"
_REMOTE_CODE_TEXT = '''"""Leads transformers to the package that reads this directory: pip install ensemble-server"""

from ensemble_server.server.one_model.configuration import EnsembleConfig
from ensemble_server.server.one_model.transformers_model import EnsembleForCausalLM

__all__ = ["EnsembleConfig", "EnsembleForCausalLM"]
'''


def export(config: Config, name: str, folder: Path, *, copy: bool = False) -> None:
    """Write the probability average `name` of `config` into `folder`, which must be empty or not there yet.

    Raises `ConfigError` for a model that is no probability average of hosted members, or a folder in use;
    `ModelLoadError` if a member's files cannot be read or the vocabularies differ.
    """
    ensemble = average_of(config, name)
    if ensemble.when is not None:
        raise ConfigError(
            f"model {name!r}: when: an exported model runs all of its members at every token; leave it out to export "
            "the average itself"
        )
    if ensemble.gate is not None:
        raise ConfigError(
            f"model {name!r}: gate: an exported model's weights follow the text and nothing else; leave it out to "
            "export the posterior pool itself"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not an empty folder; choose another, or remove it first")
    entries = {member: _hosted(config, name, member) for member in ensemble.members}
    checkpoints = {
        member: resolve_checkpoint(
            _path_of(config, entry),
            relative_to=config.source.parent,
            revision=_weights_of(config, entry).revision,
        )
        for member, entry in entries.items()
    }
    _check_vocabularies(checkpoints)

    folder.mkdir(parents=True, exist_ok=True)
    members = [
        {
            "name": member,
            **_reference(config, member, entry, checkpoints[member], folder, copy=copy),
            "weight": ensemble.members[member],
        }
        for member, entry in entries.items()
    ]
    first = next(iter(entries))
    _write_tokenizer(checkpoints[first], _view(config, entries[first]), folder)
    _write_config(checkpoints, members, ensemble, folder)
    _write_prior(list(ensemble.members.values()), folder)


def _hosted(config: Config, name: str, member: str) -> HostedModel:
    entry = config.models[member]
    if not isinstance(entry, HostedModel):
        raise ConfigError(f"model {name!r}: member {member!r} is not hosted here; one model needs its members' weights")
    if (entry.system_prompt or _weights_of(config, entry).system_prompt) is not None:
        raise ConfigError(
            f"model {name!r}: member {member!r} has a system prompt of its own; in one model all members read the same "
            "tokens, so remove it, or serve the config with `ensemble serve`"
        )
    return entry


def _weights_of(config: Config, entry: HostedModel) -> HostedModel:
    """The entry with the weights that `entry` stands on."""
    root = entry if entry.base is None else config.models[entry.base]
    assert isinstance(root, HostedModel), "a base is hosted: the config was checked"
    return root


def _path_of(config: Config, entry: HostedModel) -> str:
    path = _weights_of(config, entry).path
    assert path is not None, "what has no base has a path: the config was checked"
    return path


def _view(config: Config, entry: HostedModel) -> str | None:
    return entry.chat_template or _weights_of(config, entry).chat_template


def _reference(
    config: Config, name: str, entry: HostedModel, checkpoint: Path, folder: Path, *, copy: bool
) -> dict[str, Any]:
    """Where the member's weights are, and their dtype, as `configuration.py` says."""
    path = _path_of(config, entry)
    adapter = adapter_of(name, entry)
    if copy:
        path = _copied(checkpoint, folder / "weights")
        adapter = adapter and Path(_copied(adapter, folder / "adapters"))
    elif _weights_of(config, entry).revision is not None:
        path = str(checkpoint)  # a directory names models, not their revisions
    elif (config.source.parent / Path(path).expanduser()).exists():
        path = os.path.abspath(config.source.parent / Path(path).expanduser())
    return {"path": str(path), "adapter": adapter and str(adapter), "dtype": _weights_of(config, entry).dtype}


def _copied(source: Path, parent: Path) -> str:
    """Copy a folder under `parent` once; its new place, relative to the directory."""
    target = parent / source.name
    for number in range(2, 100):
        if not target.exists() or _same_files(source, target):
            break
        target = parent / f"{source.name}-{number}"
    if not target.exists():
        shutil.copytree(source, target)
    return str(target.relative_to(parent.parent))


def _same_files(left: Path, right: Path) -> bool:
    names = [sorted(path.name for path in folder.iterdir()) for folder in (left, right)]
    return names[0] == names[1] and all((left / n).stat().st_size == (right / n).stat().st_size for n in names[0])


def _check_vocabularies(checkpoints: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    first, *others = checkpoints
    vocabularies: dict[Path, dict[str, int]] = {}
    for checkpoint in checkpoints.values():
        if checkpoint not in vocabularies:
            vocabularies[checkpoint] = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True).get_vocab()
    for other in others:
        if vocabularies[checkpoints[other]] != vocabularies[checkpoints[first]]:
            raise ModelLoadError(f"members {first!r} and {other!r} have different vocabularies; one model needs one")


def _write_tokenizer(checkpoint: Path, chat_template: str | None, folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)


def _dtype(members: list[dict[str, Any]], shapes: list[Any]) -> str:
    """The one dtype that a loader which has but one takes for all members: the widest of theirs."""
    named = [
        str(shape.dtype or "float32").removeprefix("torch.") if member["dtype"] == "auto" else member["dtype"]
        for member, shape in zip(members, shapes, strict=True)
    ]
    return "float32" if "float32" in named or len(set(named)) > 1 else named[0]


def _write_prior(weights: list[float], folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from ensemble_server.ensembles.pooling import effective_weights

    prior = torch.tensor(effective_weights(weights), dtype=torch.float32)
    save_file({"prior": prior}, folder / "model.safetensors", metadata={"format": "pt"})


def _write_config(
    checkpoints: dict[str, Path], members: list[dict[str, Any]], ensemble: ProbabilityAverage.Config, folder: Path
) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from ensemble_server.server.one_model.configuration import EnsembleConfig

    shapes = [
        AutoConfig.from_pretrained(path, local_files_only=True).get_text_config() for path in checkpoints.values()
    ]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    first = shapes[0]
    heads = first.num_attention_heads
    undeclared: dict[str, Any] = {  # keys that transformers takes and its class does not name
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "auto_map": {
            "AutoConfig": f"{Path(REMOTE_CODE).stem}.EnsembleConfig",
            "AutoModelForCausalLM": f"{Path(REMOTE_CODE).stem}.EnsembleForCausalLM",
        },
    }
    written = EnsembleConfig(
        members=members,
        pool=ensemble.pool,
        share=ensemble.share,
        # The tokenizer's ids: what lies beyond is padding, of which members may have different amounts.
        vocab_size=min(max(tokenizer.get_vocab().values()) + 1, *(shape.vocab_size for shape in shapes)),
        hidden_size=sum(shape.hidden_size for shape in shapes),
        num_hidden_layers=sum(shape.num_hidden_layers for shape in shapes),
        num_attention_heads=heads,
        num_key_value_heads=getattr(first, "num_key_value_heads", None) or heads,
        head_dim=getattr(first, "head_dim", None) or first.hidden_size // heads,
        max_position_embeddings=min(shape.max_position_embeddings for shape in shapes),
        dtype=_dtype(members, shapes),
        architectures=["EnsembleForCausalLM"],
        **undeclared,
    )
    written.save_pretrained(folder)
    (folder / REMOTE_CODE).write_text(_REMOTE_CODE_TEXT, encoding="utf-8")
    ends = {tokenizer.eos_token_id}
    for checkpoint in checkpoints.values():
        if (checkpoint / "generation_config.json").is_file():
            found = json.loads((checkpoint / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
            ends |= set(found if isinstance(found, list) else [found])
    ids = sorted(end for end in ends if end is not None)
    GenerationConfig(
        eos_token_id=ids or None,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id or min(ids, default=None),
    ).save_pretrained(folder)
