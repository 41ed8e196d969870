"""From a YAML file to a checked, frozen `Config`. Every problem is reported at once, each with its dotted path.

An entry's kind follows from its keys: `method` makes it an ensemble, `url` a remote model, `path` or `base` a hosted
one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.ensembles.method import MethodConfig
from ensemble_server.ensembles.registry import method_class
from ensemble_server.server.config.blocks import (
    BatchConfig,
    Block,
    Config,
    EmbeddingConfig,
    EngineBlock,
    EngineConfig,
    HostedModel,
    ModelEntry,
    RemoteModel,
    ServerConfig,
    VllmEngineConfig,
)
from ensemble_server.server.config.gates import gate_problems
from ensemble_server.server.config.problems import findings, nearest
from ensemble_server.server.config.references import key_problems, nesting_problems, reference_problems
from ensemble_server.server.config.strict_yaml import expand_variables, read_yaml


def load_config(path: Path) -> Config:
    """The configuration in the YAML file at `path`. Raises `ConfigError` that lists every problem in it."""
    data, problems = read_yaml(path)
    return _parse(data, source=path, problems=problems)


def load_demo() -> Config:
    """The demo that the package carries. What it keeps for batches goes below the working folder."""
    config = load_config(Path(str(files("ensemble_server") / "configs" / "demo.yaml")))
    kept = config.batch.model_copy(update={"folder": os.path.abspath("ensemble-demo.batches")})
    return config.model_copy(update={"batch": kept})


def parse_config(data: Any, *, source: Path) -> Config:
    """The configuration in `data`, the value of a YAML file at `source`. Raises as `load_config` does."""
    return _parse(data, source=source, problems=[])


def _parse(data: Any, *, source: Path, problems: list[str]) -> Config:
    data, missing_variables = expand_variables(data)
    problems = [*problems, *missing_variables]
    if not isinstance(data, dict):
        raise ConfigError(_report(source, [*problems, "must be a map with the key `models`"]))
    if "models" not in data and {"baseline", "arms"} & data.keys():
        named = f", {data['config']}" if isinstance(data.get("config"), str) else ""
        raise ConfigError(
            f"{source} is a plan of `ensemble compare`, not a config; give the config that it names{named}, or run "
            f"`ensemble compare {source} --out FOLDER`"
        )
    blocks: dict[str, type[Block]] = {
        "server": ServerConfig,
        "engine": _engine_block(data.get("engine")),
        "embedding": EmbeddingConfig,
        "batch": BatchConfig,
    }
    known = ["models", *blocks]
    problems += [f"unknown key {str(key)!r}{nearest(str(key), known)}" for key in data if key not in known]
    folder = Path(os.path.abspath(source)).parent

    def parse_block(block: type[Any], value: Any, at: str) -> Any:
        """The block, or None once its problems are noted."""
        try:
            return block.model_validate(value, context={"folder": folder})
        except ValidationError as exc:
            problems.extend(findings(exc, block, value, at))
            return None

    entries = data.get("models")
    if not isinstance(entries, dict) or not entries:
        problems.append("models: must map at least one name to a model")
        entries = {}
    models: dict[str, ModelEntry] = {}
    for name, entry in entries.items():
        problems += _name_problems(name)
        kind, kind_problem = _kind_of(entry)
        if kind is None:
            problems.append(f"models.{name}: {kind_problem}")
            continue
        if issubclass(kind, MethodConfig):
            entry, file_problems = _with_files(entry, kind.yaml_files, folder)
            problems += [f"models.{name}.{problem}" for problem in file_problems]
            if file_problems:
                continue
        if (model := parse_block(kind, entry, f"models.{name}")) is not None:
            models[name] = model
    problems += reference_problems(models, entries)
    parsed = {
        key: parse_block(
            block, {} if data.get(key) is None else data[key], key
        )  # `server:` with no keys below is empty
        for key, block in blocks.items()
    }
    server = parsed["server"]
    if server is not None:
        problems += key_problems(server, [name for name in entries if isinstance(name, str)])
    if server is not None and not problems:
        problems += nesting_problems(models, server)
        problems += gate_problems(models, folder)
        if not any(model.listed for model in models.values()):
            problems.append("models: every one has `listed: false`; at least one must be listed")
    if problems:
        raise ConfigError(_report(source, problems))
    return Config(models=models, source=source, **parsed)


def _report(source: Path, problems: list[str]) -> str:
    if len(problems) == 1:
        return f"{source}: {problems[0]}"
    return "\n  - ".join([f"{source}: {len(problems)} problems", *problems])


def _engine_block(value: Any) -> type[EngineBlock]:
    kind = value.get("kind") if isinstance(value, dict) else None
    return VllmEngineConfig if kind == "vllm" else EngineConfig


def _name_problems(name: Any) -> list[str]:
    if not isinstance(name, str):
        return [f"models: the name {name!r} is read as {type(name).__name__}, put it in quotes"]
    if not name or not name.isprintable() or " " in name:
        return [f"models: the name {name!r} must be printable, without spaces, and not empty"]
    return []


def _kind_of(entry: Any) -> tuple[type[ModelEntry] | None, str]:
    """The block that an entry under `models:` must fit, or None and what is wrong with it."""
    if not isinstance(entry, dict):
        return None, f"must be a map of keys such as {{path: ...}}, got {type(entry).__name__}"
    signs = {"method": "an ensemble", "url": "a remote model", "path": "a hosted model", "base": "a hosted model"}
    found = [key for key in signs if key in entry]
    if not found:
        wanted = "must have one of `path` or `base` (hosted), `url` (remote), `method` (ensemble)"
        return None, f"{wanted}; its keys are: {', '.join(map(str, entry)) or 'none'}"
    if len({signs[key] for key in found}) > 1:
        return None, f"must be of one kind, but {' and '.join(f'`{key}` makes it {signs[key]}' for key in found)}"
    if "url" in entry:
        return RemoteModel, ""
    if "method" not in entry:
        return HostedModel, ""
    if not isinstance(entry["method"], str):
        return None, f"`method` must be the name of a method, got {type(entry['method']).__name__}"
    try:
        return method_class(entry["method"]).Config, ""
    except ConfigError as exc:
        return None, str(exc)


def _with_files(entry: dict[str, Any], keys: Iterable[str], folder: Path) -> tuple[dict[str, Any], list[str]]:
    """`entry` with the YAML files that these keys name in the place of their paths, and the problems in the files."""
    problems: list[str] = []
    for key in keys:
        if isinstance(path := entry.get(key), str):
            try:
                value, found = read_yaml(Path(os.path.abspath(folder / Path(path).expanduser())))
            except ConfigError as exc:
                value, found = None, [str(exc)]
            entry = {**entry, key: value}
            problems += [f"{key}: {problem}" for problem in found]
    return entry, problems
