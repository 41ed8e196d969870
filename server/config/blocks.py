"""The configuration as frozen blocks, one per block of the YAML. `server.config.loading` makes them from a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ensemble_server.ensembles.method import MethodConfig
from ensemble_server.server.config.values import (
    BaseUrl,
    CheckpointPath,
    Count,
    Device,
    Dtype,
    EmbeddedEngine,
    LocalPath,
    Origin,
    Price,
    Reasoning,
    Seconds,
    Speculation,
    TemplateText,
    Tokens,
    Unit,
    VariableName,
)
from ensemble_server.server.tool_formats.formats import ToolFormatName

LISTED = "false hides it from /v1/models; it can still be a part of others"


class Block(BaseModel):
    """One block of the YAML."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ThinkingMarkers(Block):
    """Between what a model thinks aloud."""

    start: str = Field(min_length=1, description="the marker that opens a thought")
    end: str = Field(min_length=1, description="the marker that closes it")


class HostedModel(Block):
    """A member that this server runs: weights of its own (`path`), or those of another entry (`base`) seen differently.

    An entry with `base` adds a LoRA adapter or a delta, a system prompt, a chat template, or several of them, to
    weights that are loaded once.
    """

    path: CheckpointPath | None = Field(
        default=None, description="the weights: a folder, a .gguf file or a Hugging Face hub id"
    )
    revision: str | None = Field(
        default=None, min_length=1, description="branch, tag or commit of a hub id; default: what its main branch has"
    )
    base: str | None = Field(default=None, description="name of a model with `path` whose weights this one shares")
    adapter: LocalPath | None = Field(default=None, description="folder of a LoRA adapter (PEFT) for `base`")
    delta: LocalPath | None = Field(
        default=None, description="folder of a full fine-tune of `base`, as `ensemble compress` writes it"
    )
    dtype: Dtype = Field(
        default="auto", description="of the weights while they run (auto: as stored); with `path` only"
    )
    device: Device = Field(
        default="auto",
        description="auto (the accelerator, else cpu; several share the members), cpu, cuda, cuda:1, mps, ...; "
        "with `path` only",
    )
    system_prompt: str | None = Field(
        default=None, description="put before the messages of every chat, for this member alone"
    )
    chat_template: TemplateText | None = Field(
        default=None, description="Jinja text, or the path of a file with it, in place of the tokenizer's own template"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default={}, description="what else the template is told in every chat, such as `enable_thinking: false`"
    )
    reasoning: Reasoning | ThinkingMarkers = Field(
        default="auto",
        description="whether thoughts come apart from the answer, as reasoning_content: auto (if the template has "
        'markers of thoughts), off, or {start: "<think>", end: "</think>"}',
    )
    tool_format: Literal["auto", "off"] | ToolFormatName = Field(
        default="auto",
        description="how it writes tool calls: auto (what the template teaches), off (calls stay text), or hermes, "
        "qwen3_coder, glm, llama3_json, mistral, deepseek, gemma, phi",
    )
    listed: bool = Field(default=True, description=LISTED)

    @model_validator(mode="after")
    def _is_one_of_path_and_base(self) -> HostedModel:
        if (self.path is None) == (self.base is None):
            raise ValueError("needs exactly one of `path` (its own weights) and `base` (those of another model)")
        for key in ("adapter", "delta"):
            if self.path is not None and getattr(self, key) is not None:
                raise ValueError(
                    f"`{key}` goes with `base`: give the weights an entry of their own and name it as `base`"
                )
        if self.adapter is not None and self.delta is not None:
            raise ValueError("has an `adapter` and a `delta`; a member is one of them: give each an entry of its own")
        if self.base is not None and (own := {"dtype", "device", "revision"} & self.model_fields_set):
            raise ValueError(f"`{min(own)}` belongs to the entry with the weights, {self.base!r}")
        return self


class RemoteModel(Block):
    """A member behind an OpenAI-compatible endpoint. It generates text; its distributions cannot be pooled."""

    url: BaseUrl = Field(repr=False, description="base address, up to and including /v1")
    model: str | None = Field(
        default=None, min_length=1, description="its name over there; default: the entry's own name"
    )
    api_key_env: VariableName | None = Field(default=None, description="environment variable that holds the key")
    timeout_s: Seconds = Field(default=120, description="longest wait for the next piece of an answer")
    connect_timeout_s: Seconds = Field(default=10, description="longest wait for a connection")
    max_retries: int = Field(
        default=2, ge=0, description="tries after the first, on 408, 409, 429, 5xx and broken connections"
    )
    max_concurrency: Annotated[Count, Unit("requests")] = Field(default=16, description="requests at once; more wait")
    prompt_price_per_million: Price = Field(default=0, description="of what is sent, for the cost that answers report")
    completion_price_per_million: Price = Field(
        default=0, description="of what is answered, for the cost that answers report"
    )
    max_model_len: Tokens | None = Field(
        default=None, description="prompt and completion together; default: only the remote end knows"
    )
    tokenizer: CheckpointPath | None = Field(
        default=None,
        description="the tokenizer that the model over there uses, a folder or a hub id: then `ensemble compare` "
        "scores texts and options by likelihood, where the endpoint gives `prompt_logprobs`, or `echo` with `logprobs`",
    )
    listed: bool = Field(default=True, description=LISTED)

    @property
    def has_price(self) -> bool:
        """Whether the config says what it costs; without that nobody knows, which is not nothing."""
        return bool({"prompt_price_per_million", "completion_price_per_million"} & self.model_fields_set)


class KeyLimits(Block):
    """What one key may use. Nothing is limited that is not set."""

    requests_per_minute: Annotated[Count, Unit("requests")] | None = Field(
        default=None, description="in any 60 seconds; more are refused with 429, rows of batches wait"
    )
    tokens_per_minute: Tokens | None = Field(
        default=None,
        description="read and written in 60 seconds, as `usage` counts them; once they are used up, requests are "
        "refused with 429 and rows of batches wait",
    )
    streams_at_once: Annotated[Count, Unit("streams")] | None = Field(
        default=None, description="answers that stream at the same time; more are refused with 429"
    )
    upload_bytes: Count | None = Field(
        default=None, description="of uploaded files that are kept at the same time; more are refused with 413"
    )
    models: tuple[str, ...] | None = Field(
        default=None, description="that may be asked; others are not listed, and refused with 403"
    )


class NamedKey(KeyLimits):
    """A key with a name and limits of its own. What it does not say, `server.limits` says for it."""

    key: str | None = Field(
        default=None, min_length=1, repr=False, description="the key, or `sha256:` and its digest as 64 hex digits"
    )
    key_env: VariableName | None = Field(default=None, description="environment variable that holds it instead")

    @model_validator(mode="after")
    def _has_one_key(self) -> NamedKey:
        if (self.key is None) == (self.key_env is None):
            raise ValueError("needs exactly one of `key` and `key_env`")
        return self


class ServerConfig(Block):
    """How the server listens, whom it lets in and what it bounds."""

    host: str = Field(default="127.0.0.1", min_length=1, description="address to listen on; 0.0.0.0 for all")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    api_keys_env: VariableName | None = Field(
        default=None, description="environment variable with the keys that clients may use, separated by commas"
    )
    api_keys: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(),
        repr=False,
        description="keys besides those of `api_keys_env`, or `sha256:` and a key's digest; without any key the server "
        "is open to all",
    )
    keys: dict[str, NamedKey] = Field(
        default={}, description="more keys, by names that logs, metrics and `ensemble usage` call them; see below"
    )
    limits: KeyLimits = Field(
        default=KeyLimits(), description="of every key, each on its own; of all callers together where there is no key"
    )
    max_queue: Annotated[Count, Unit("requests")] = Field(
        default=256, description="how many may wait; more are refused with 429"
    )
    cors_origins: tuple[Origin, ...] = Field(
        default=(), description='origins that browsers may call from; ["*"] for any; if empty, pages on this machine'
    )
    web: bool = Field(default=True, description="whether browsers get a page at `/`; false leaves the API and `/docs`")
    log_format: Literal["text", "json"] = Field(default="text", description="of the log on standard error")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="least severe that is logged"
    )
    shutdown_timeout_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        default=30, description="how long live requests may finish after a stop signal"
    )
    keep_alive_interval_s: Seconds = Field(default=15, description="a silent stream gets a comment line this often")
    max_body_bytes: Count = Field(
        default=16 * 1024**2, description="largest request body; a larger one is refused with 413"
    )
    request_timeout_s: Seconds | None = Field(
        default=None, description="longest time for one request; default: no limit"
    )
    stored_responses_mb: Annotated[int, Unit("MB")] = Field(
        default=64,
        ge=0,
        description="of memory for the responses of /v1/responses that may be gone on from; the least recently used go "
        "first; 0 stores none",
    )
    strict_params: bool = Field(
        default=False, description="refuse request parameters that are not known instead of ignoring them"
    )
    max_depth: Annotated[Count, Unit("levels")] = Field(
        default=4, description="ensembles inside ensembles, the outermost counted"
    )
    max_fan_out: Annotated[Count, Unit("members")] = Field(
        default=64, description="how many one ensemble may reach through all its levels, each as often as it is reached"
    )
    max_calls: Annotated[Count, Unit("calls")] = Field(
        default=1024,
        description="calls of single models that one request may come to: levels x samples x rounds x choices",
    )


class EngineBlock(Block):
    """What every engine is told."""

    kind: str
    max_batch: Annotated[Count, Unit("sequences")] = Field(default=32, description="how many run at once; more wait")
    max_context: Tokens = Field(
        default=4096, description="prompt and completion of one sequence together; a model's own limit may be lower"
    )


class EngineConfig(EngineBlock):
    """The embedded engine, that runs the hosted models in this process."""

    kind: EmbeddedEngine = Field(default="transformers", description="in this process, on CPU or GPU")
    prefill_chunk: Tokens = Field(
        default=512, description="read of a prompt per step, so that a long one does not stall others"
    )
    prefix_cache_mb: Annotated[int, Unit("MB")] = Field(
        default=512,
        ge=0,
        description="kept of prompts that were read, so that prompts that begin alike (a system prompt, examples) are "
        "read once; 0 switches it off",
    )
    kv_cache_mb: Annotated[Count, Unit("MB")] | None = Field(
        default=None,
        description="for the keys and values of all that runs; answers wait for one another where it is short, and "
        "what needs more alone is refused; default: 80% of what is free when weights are loaded, less prefix_cache_mb",
    )
    speculation: Speculation = Field(
        default="off",
        description="what members read ahead of an answer: off, text (what came after the same words before, in the "
        "prompt or the answer), or member (that, or what the lightest member of an ensemble writes by itself); answers "
        "stay the same",
    )
    weights: Literal["exact", "half", "full"] = Field(
        default="exact",
        description="what is kept as fp16 of a model that runs as float32 on a CPU, so that steps of few rows are "
        "faster: exact (tensors that lose nothing by it), half (all; the others are rounded), full (nothing)",
    )
    num_threads: Annotated[Count, Unit("CPU threads")] | None = Field(
        default=None, description="default: torch's choice"
    )


class VllmEngineConfig(EngineBlock):
    """vLLM runs the hosted models, in processes of its own that are started again when they die."""

    kind: Literal["vllm"] = Field(
        default="vllm", description="vLLM, for throughput; members of an ensemble are one model there"
    )
    prefill_chunk: Annotated[int, Field(ge=16), Unit("tokens")] | None = Field(
        default=None, description="read and generated per step, of all sequences together; default: vLLM's choice"
    )
    prefix_caching: bool = Field(default=True, description="whether prompts that begin alike are read once")
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1), Unit("of 1")] = Field(
        default=0.9,
        description="the part of a device's memory (on CPUs: of the machine's) that all models of this config may take "
        "together, weights and caches",
    )
    kv_cache_gb: Annotated[float, Field(gt=0, allow_inf_nan=False), Unit("GiB")] | None = Field(
        default=None, description="for the caches of all models together; default: what gpu_memory_utilization leaves"
    )
    tensor_parallel: Annotated[Count, Unit("devices")] = Field(
        default=1, description="that share every layer of every member"
    )
    options: dict[str, Any] = Field(
        {}, description="any other argument of vLLM's engine under its Python name, such as `enforce_eager: true`"
    )


class EmbeddingConfig(Block):
    """The model that /v1/embeddings and similarity votes use."""

    path: CheckpointPath = Field(
        default="all-MiniLM-L6-v2",
        description="a sentence-transformers model: that of an installed package, or a folder",
    )
    batch_size: Annotated[Count, Unit("texts")] = Field(default=32, description="how many are embedded at once")


class BatchConfig(Block):
    """Files and batches over HTTP: where they are kept, and how much of them."""

    folder: LocalPath | None = Field(
        default=None,
        description="where files and batches are kept; default: beside the config, demo.yaml -> demo.batches",
    )
    max_file_bytes: Count = Field(default=200 * 1000**2, description="largest upload; a larger one is refused with 413")
    max_rows: Annotated[Count, Unit("rows")] = Field(default=100_000, description="of one batch; one with more fails")
    max_live: Annotated[Count, Unit("batches")] = Field(
        default=32, description="of one key that have not ended; more are refused with 429"
    )
    max_running: Annotated[Count, Unit("batches")] = Field(default=2, description="that run side by side; more wait")
    retention_days: Annotated[float, Field(gt=0, allow_inf_nan=False), Unit("days")] = Field(
        default=30,
        description="files, and batches that have ended, are deleted after this; an upload may ask for less or more",
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
