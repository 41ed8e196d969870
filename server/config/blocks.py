"""The configuration: one YAML file, read once, checked as a whole, frozen.

Every entry under `models:` has a name that clients use. Its kind follows from its keys: `method` makes it an ensemble,
`url` a remote model, `path` or `base` a hosted one. Loading reports every problem at once, each with its dotted path.

What exists on disk or on the hub is not looked at here (that is `server.weights.checkpoints`), so that a config can be
checked on another machine than the one that serves it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from ensemble_server.ensembles.errors import ConfigError
from ensemble_server.ensembles.method import MethodConfig
from ensemble_server.ensembles.registry import method_class
from ensemble_server.server.config.problems import findings, nearest
from ensemble_server.server.config.strict_yaml import expand_variables, read_yaml

ENGINE_KINDS = ("transformers", "vllm")

# --- values ------------------------------------------------------------------------------------------------------

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def _absolute(path: str, info: ValidationInfo) -> str:
    """The path as seen from the config's folder; as it is where no folder is known (a block made in code)."""
    folder = (info.context or {}).get("folder")
    return path if folder is None else os.path.abspath(folder / Path(path).expanduser())


def _absolute_unless_hub_id(path: str, info: ValidationInfo) -> str:
    """ "org/name" and "name" are hub ids unless there is such a file or folder; all else is a path."""
    absolute = _absolute(path, info)
    if _HUB_ID.fullmatch(path) and not path.endswith(".gguf") and not os.path.exists(absolute):
        return path
    return absolute


def _template_text(value: str, info: ValidationInfo) -> str:
    """The template itself; read from its file if `value` is the path of one."""
    if "\n" in value or not value.endswith(".jinja"):
        return value
    try:
        return Path(_absolute(value, info)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ValueError(f"the template file {value!r} cannot be read ({exc})") from exc


def _base_url(url: str) -> str:
    """An http(s) address without a slash at its end."""
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_url = False
    if not is_url:
        raise ValueError(f'must be an http(s) address such as "http://127.0.0.1:9000/v1", got {url!r}')
    return url.rstrip("/")


def _variable_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ValueError("must be the name of an environment variable, not its value")
    return name


def _device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|(cuda|xpu)(:\d+)?", device):
        raise ValueError(f"must be auto, cpu, cuda, cuda:N, mps, xpu or xpu:N, got {device!r}")
    return device


def _engine_kind(kind: Any) -> Any:
    if kind not in ENGINE_KINDS:
        raise ValueError(f"must be one of {', '.join(ENGINE_KINDS)}, got {kind!r}{nearest(str(kind), ENGINE_KINDS)}")
    return kind


@dataclass(frozen=True)
class Unit:
    """What a number counts, for the reference of keys. Keys that end in `_s` or `_bytes` say it themselves."""

    name: str


CheckpointPath = Annotated[str, Field(min_length=1), AfterValidator(_absolute_unless_hub_id)]
LocalPath = Annotated[str, Field(min_length=1), AfterValidator(_absolute)]
VariableName = Annotated[str, AfterValidator(_variable_name)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Tokens = Annotated[Count, Unit("tokens")]
Price = Annotated[float, Field(ge=0, allow_inf_nan=False), Unit("currency per million tokens")]

# --- blocks ------------------------------------------------------------------------------------------------------

LISTED = "false hides it from /v1/models; it can still be a part of others"


class Block(BaseModel):
    """One block of the YAML."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class HostedModel(Block):
    """A member that this server runs: weights of its own (`path`), or those of another entry (`base`) seen differently.

    An entry with `base` adds a LoRA adapter, a system prompt, a chat template, or several of them, to weights that are
    loaded once.
    """

    path: CheckpointPath | None = Field(
        None, description="the weights: a folder, a .gguf file or a Hugging Face hub id"
    )
    base: str | None = Field(None, description="name of a model with `path` whose weights this one shares")
    adapter: LocalPath | None = Field(None, description="folder of a LoRA adapter (PEFT) for `base`")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="of the weights while they run (auto: as stored); with `path` only"
    )
    device: Annotated[str, AfterValidator(_device)] = Field(
        "auto", description="auto (the first accelerator, else cpu), cpu, cuda, cuda:1, mps, xpu, ...; with `path` only"
    )
    system_prompt: str | None = Field(None, description="put before the messages of every chat, for this member alone")
    chat_template: Annotated[str, AfterValidator(_template_text)] | None = Field(
        None, description="Jinja text, or a path to a .jinja file, in place of the tokenizer's own template"
    )
    listed: bool = Field(True, description=LISTED)

    @model_validator(mode="after")
    def _is_one_of_path_and_base(self) -> HostedModel:
        if (self.path is None) == (self.base is None):
            raise ValueError("needs exactly one of `path` (its own weights) and `base` (those of another model)")
        if self.path is not None and self.adapter is not None:
            raise ValueError("`adapter` goes with `base`: give the weights an entry of their own and name it as `base`")
        if self.base is not None and (own := {"dtype", "device"} & self.model_fields_set):
            raise ValueError(f"`{min(own)}` belongs to the entry with the weights, {self.base!r}")
        return self


class RemoteModel(Block):
    """A member behind an OpenAI-compatible endpoint. It generates text; its distributions cannot be pooled."""

    url: Annotated[str, AfterValidator(_base_url)] = Field(description="base address, up to and including /v1")
    model: str | None = Field(None, min_length=1, description="its name over there; default: the entry's own name")
    api_key_env: VariableName | None = Field(None, description="environment variable that holds the key")
    timeout_s: Seconds = Field(120, description="longest wait for the next piece of an answer")
    connect_timeout_s: Seconds = Field(10, description="longest wait for a connection")
    max_retries: int = Field(2, ge=0, description="tries after the first, on 408, 409, 429, 5xx and broken connections")
    max_concurrency: Annotated[Count, Unit("requests")] = Field(16, description="requests at once; more wait")
    prompt_price_per_million: Price = Field(0, description="of what is sent, for the cost that answers report")
    completion_price_per_million: Price = Field(0, description="of what is answered, for the cost that answers report")
    max_model_len: Tokens | None = Field(
        None, description="prompt and completion together; default: only the remote end knows"
    )
    listed: bool = Field(True, description=LISTED)


class ServerConfig(Block):
    """How the server listens, whom it lets in and what it bounds."""

    host: str = Field("127.0.0.1", min_length=1, description="address to listen on; 0.0.0.0 for all")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    api_keys_env: VariableName | None = Field(
        None, description="environment variable with the keys that clients may use, separated by commas"
    )
    api_keys: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), repr=False, description="keys besides those of `api_keys_env`; without any key the server is open to all"
    )
    max_queue: Annotated[Count, Unit("requests")] = Field(
        256, description="how many may wait; more are refused with 429"
    )
    cors_origins: tuple[str, ...] = Field((), description='origins that browsers may call from; ["*"] for any')
    log_format: Literal["text", "json"] = Field("text", description="of the log on standard error")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe that is logged")
    shutdown_timeout_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        30, description="how long live requests may finish after a stop signal"
    )
    keep_alive_interval_s: Seconds = Field(15, description="a silent stream gets a comment line this often")
    max_body_bytes: Count = Field(16 * 1024**2, description="largest request body; a larger one is refused with 413")
    request_timeout_s: Seconds | None = Field(None, description="longest time for one request; default: no limit")
    strict_params: bool = Field(
        False, description="refuse request parameters that are not known instead of ignoring them"
    )
    max_depth: Annotated[Count, Unit("levels")] = Field(
        4, description="ensembles inside ensembles, the outermost counted"
    )
    max_fan_out: Annotated[Count, Unit("members")] = Field(
        64, description="how many one ensemble may reach through all its levels, each as often as it is reached"
    )
    max_calls: Annotated[Count, Unit("calls")] = Field(
        1024, description="calls of single models that one request may come to: levels x samples x rounds x choices"
    )


class EngineBlock(Block):
    """What every engine is told."""

    kind: str
    max_batch: Annotated[Count, Unit("sequences")] = Field(32, description="how many run at once; more wait")
    max_context: Tokens = Field(
        4096, description="prompt and completion of one sequence together; a model's own limit may be lower"
    )


class EngineConfig(EngineBlock):
    """The embedded engine, that runs the hosted models in this process."""

    kind: Annotated[Literal["transformers"], BeforeValidator(_engine_kind)] = Field(
        "transformers", description="in this process, on CPU or GPU"
    )
    prefill_chunk: Tokens = Field(
        512, description="read of a prompt per step, so that a long one does not stall others"
    )
    prefix_cache_mb: Annotated[int, Unit("MB")] = Field(
        512,
        ge=0,
        description="kept of prompts that were read, so that prompts that begin alike (a system prompt, examples) are "
        "read once; 0 switches it off",
    )
    num_threads: Annotated[Count, Unit("CPU threads")] | None = Field(None, description="default: torch's choice")


class VllmEngineConfig(EngineBlock):
    """vLLM runs the hosted models, in processes of its own that are started again when they die."""

    kind: Literal["vllm"] = Field(
        "vllm", description="vLLM, for throughput; members of an ensemble are one model there"
    )
    prefill_chunk: Annotated[int, Field(ge=16), Unit("tokens")] | None = Field(
        None, description="read and generated per step, of all sequences together; default: vLLM's choice"
    )
    prefix_caching: bool = Field(True, description="whether prompts that begin alike are read once")
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1), Unit("of 1")] = Field(
        0.9,
        description="the part of a device's memory (on CPUs: of the machine's) that all models of this config may take "
        "together, weights and caches",
    )
    kv_cache_gb: Annotated[float, Field(gt=0, allow_inf_nan=False), Unit("GiB")] | None = Field(
        None, description="for the caches of all models together; default: what gpu_memory_utilization leaves"
    )
    tensor_parallel: Annotated[Count, Unit("devices")] = Field(1, description="that share every layer of every member")
    options: dict[str, Any] = Field(
        {}, description="any other argument of vLLM's engine under its Python name, such as `enforce_eager: true`"
    )


class EmbeddingConfig(Block):
    """The model that /v1/embeddings and similarity votes use."""

    path: CheckpointPath = Field(
        "all-MiniLM-L6-v2", description="a sentence-transformers model: that of an installed package, or a folder"
    )
    batch_size: Annotated[Count, Unit("texts")] = Field(32, description="how many are embedded at once")


class BatchConfig(Block):
    """Files and batches over HTTP: where they are kept, and how much of them."""

    folder: LocalPath | None = Field(
        None, description="where files and batches are kept; default: beside the config, demo.yaml -> demo.batches"
    )
    max_file_bytes: Count = Field(200 * 1000**2, description="largest upload; a larger one is refused with 413")
    max_rows: Annotated[Count, Unit("rows")] = Field(100_000, description="of one batch; one with more fails")
    max_live: Annotated[Count, Unit("batches")] = Field(
        32, description="of one key that have not ended; more are refused with 429"
    )
    max_running: Annotated[Count, Unit("batches")] = Field(2, description="that run side by side; more wait")
    retention_days: Annotated[float, Field(gt=0, allow_inf_nan=False), Unit("days")] = Field(
        30, description="files, and batches that have ended, are deleted after this; an upload may ask for less or more"
    )


ModelEntry = HostedModel | RemoteModel | MethodConfig


class Config(Block):
    """A whole configuration, made by `load_config` or `parse_config`: they check what entries say of each other."""

    models: Mapping[str, ModelEntry]
    server: ServerConfig = ServerConfig()
    engine: EngineConfig | VllmEngineConfig = EngineConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()
    batch: BatchConfig = BatchConfig()
    source: Path  # the file; relative paths in it start at its folder

    @property
    def listed(self) -> list[str]:
        """Names that /v1/models shows, in the file's order."""
        return [name for name, model in self.models.items() if model.listed]

    @property
    def batch_folder(self) -> Path:
        """Where files and batches are kept. It need not exist."""
        return Path(self.batch.folder) if self.batch.folder else self.source.absolute().with_suffix(".batches")

    @property
    def main_model(self) -> str:
        """The model to try first: the first listed ensemble, else the first listed model."""
        ensembles = [name for name in self.listed if isinstance(self.models[name], MethodConfig)]
        return (ensembles or self.listed)[0]


# --- loading -----------------------------------------------------------------------------------------------------


def load_config(path: Path) -> Config:
    """The configuration in the YAML file at `path`. Raises `ConfigError` that lists every problem in it."""
    data, problems = read_yaml(path)
    return _parse(data, source=path, problems=problems)


def parse_config(data: Any, *, source: Path) -> Config:
    """The configuration in `data`, the value of a YAML file at `source`. Raises as `load_config` does."""
    return _parse(data, source=source, problems=[])


def _parse(data: Any, *, source: Path, problems: list[str]) -> Config:
    data, missing_variables = expand_variables(data)
    problems = [*problems, *missing_variables]
    if not isinstance(data, dict):
        raise ConfigError(_report(source, [*problems, "must be a map with the key `models`"]))
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
    problems += _reference_problems(models, entries)
    parsed = {
        key: parse_block(
            block, {} if data.get(key) is None else data[key], key
        )  # `server:` with no keys below is empty
        for key, block in blocks.items()
    }

    if not problems:
        problems += _nesting_problems(models, parsed["server"])
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


# --- what entries say of each other ------------------------------------------------------------------------------


def _members_named_in(entry: Any) -> set[str]:
    """The members of an ensemble whose block did not parse: what can be told without knowing its method."""
    members = entry.get("members") if isinstance(entry, dict) and "method" in entry else None
    return {name for name in members if isinstance(name, str)} if isinstance(members, list | dict) else set()


def _reference_problems(models: Mapping[str, ModelEntry], entries: Mapping[Any, Any]) -> list[str]:
    """Names that no entry has, bases that are none, and cycles. `entries` also has those that did not parse."""
    known = [name for name in entries if isinstance(name, str)]
    problems = []
    graph: dict[str, set[str]] = {}
    for name in known:
        model = models.get(name)
        parts = model.references() if isinstance(model, MethodConfig) else _members_named_in(entries[name])
        problems += [
            f"models.{name}: refers to an unknown model {part!r}{nearest(part, known)}"
            for part in sorted(parts - set(known))
        ]
        graph[name] = parts & set(known)

    for name, entry in entries.items():
        base = entry.get("base") if isinstance(entry, dict) else None
        if not isinstance(base, str):
            continue
        if base not in entries:
            problems.append(f"models.{name}.base: there is no model {base!r}{nearest(base, known)}")
        elif not isinstance(entries[base], dict) or "path" not in entries[base]:
            problems.append(
                f"models.{name}.base: {base!r} must be an entry with `path`, so that its weights are its own"
            )

    while True:
        try:
            TopologicalSorter(graph).prepare()
            return problems
        except CycleError as exc:
            cycle = exc.args[1][::-1]  # each refers to the next
            problems.append(f"models.{cycle[0]}: an ensemble cannot contain itself: {' -> '.join(cycle)}")
            graph[cycle[0]] = graph[cycle[0]] - {cycle[1]}


def _nesting_problems(models: Mapping[str, ModelEntry], limits: ServerConfig) -> list[str]:
    """Ensembles nested deeper or reaching further than `limits` allow. References must be known and without cycles."""
    graph = {name: model.references() if isinstance(model, MethodConfig) else set() for name, model in models.items()}
    depth: dict[str, int] = {}
    reach: dict[str, int] = {}
    calls: dict[str, int] = {}
    problems = []
    for name in TopologicalSorter(graph).static_order():
        depth[name] = 1 + max(depth[part] for part in graph[name]) if graph[name] else 0
        reach[name] = sum(reach[part] for part in graph[name]) if graph[name] else 1
        calls[name] = models[name].num_calls(calls) if isinstance(models[name], MethodConfig) else 1
        if depth[name] == limits.max_depth + 1:  # the first too deep: all that contain it are, too
            problems.append(f"models.{name}: is {depth[name]} ensembles deep, server.max_depth is {limits.max_depth}")
        if reach[name] > limits.max_fan_out:
            problems.append(f"models.{name}: reaches {reach[name]} members, server.max_fan_out is {limits.max_fan_out}")
        if calls[name] > limits.max_calls:
            limit = f"server.max_calls is {limits.max_calls}"
            problems.append(f"models.{name}: one reply may take {calls[name]} calls of models, {limit}")
    return problems
