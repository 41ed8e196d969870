"""What an argument is: a model folder, a GGUF file, an adapter or delta, a hub id, or a server's address.

Each becomes one or more entries of `models:`, under a name made from its own.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from ensemble_server.ensembles.errors import ConfigError, ModelLoadError
from ensemble_server.server.config.credentials import without_credentials
from ensemble_server.server.weights.delta_folder import CARD, read_card

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_GENERIC = re.compile(r"(model|models|final|best|output|adapter|lora|merged|checkpoint(-\d+)?|hf|v\d+)", re.IGNORECASE)
_NO_CHAT = re.compile(r"embed|rerank|whisper|tts|moderation", re.IGNORECASE)  # what servers list beside their LLMs


@dataclass(frozen=True)
class Entries:
    """`hosted`, `adapters` (and deltas) and `remotes`: name -> the entry's keys, in the order in which they came."""

    hosted: Mapping[str, dict[str, Any]]
    adapters: Mapping[str, dict[str, Any]]
    remotes: Mapping[str, dict[str, Any]]

    @property
    def all(self) -> dict[str, dict[str, Any]]:
        return {**self.hosted, **self.adapters, **self.remotes}


def entries_of(arguments: Iterable[str], *, folder: Path, api_key_env: str | None = None) -> Entries:
    """`folder`: where relative paths start, and where they are written relative to.

    An adapter's base is added where it was not given. Raises `ModelLoadError` naming an argument that is none of these.
    """
    hosted: dict[str, dict[str, Any]] = {}
    adapters: dict[str, tuple[Path, str]] = {}  # name -> folder, and what its config calls its base
    remotes: dict[str, dict[str, Any]] = {}

    def new_name(text: str) -> str:
        return _unique(_printable(text), {*hosted, *adapters, *remotes})

    for argument in arguments:
        if argument.startswith(("http://", "https://")):
            url, served = _served(argument, api_key_env)
            for name, max_model_len in served.items():
                key = {} if api_key_env is None else {"api_key_env": api_key_env}
                context = {} if max_model_len is None else {"max_model_len": max_model_len}
                remotes[new_name(name)] = {"url": url, "model": name, **key, **context}
            continue
        for path in _models_at(argument, folder):
            if isinstance(path, Path) and _is_adapter(path):
                adapters[new_name(_own_name(path))] = (path, _base_of(path))
            elif isinstance(path, Path):
                hosted[new_name(_own_name(path))] = {"path": _written(path, folder)}
            else:
                hosted[new_name(path.rsplit("/", 1)[-1])] = {"path": path}

    placed: dict[str, dict[str, Any]] = {}
    for name, (path, base) in adapters.items():
        owner = _owner(base, path, hosted, folder)
        if owner is None:
            owner = new_name(_own_name(Path(base)))
            local = _existing(base, path.parent, folder)
            hosted[owner] = {"path": base if local is None else _written(local, folder)}
        key = "delta" if (path / CARD).is_file() else "adapter"
        placed[name] = {"base": owner, key: _written(path, folder)}
    return Entries(hosted, placed, remotes)


def found_around(folder: Path) -> list[str]:
    """Models, adapters and GGUF files in `folder` and two levels below it, as arguments."""
    found = []
    for path in sorted([folder, *folder.glob("*"), *folder.glob("*/*")]):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if not is_hidden and (path.suffix == ".gguf" or (path.is_dir() and (_is_adapter(path) or _is_model(path)))):
            found.append(f"./{path.relative_to(folder)}" if path != folder else ".")
    return found


def found_elsewhere() -> list[str]:
    """Hub ids of causal LMs in the local Hugging Face cache, and those that an installed package carries."""
    import importlib.metadata

    import huggingface_hub
    from huggingface_hub.errors import CacheNotFound

    from ensemble_server.server.weights.checkpoints import PACKAGED_MODELS

    found = []
    for name, packaged in PACKAGED_MODELS.items():
        try:
            importlib.metadata.distribution(packaged.distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.append(name)
    try:
        repos = huggingface_hub.scan_cache_dir().repos
    except CacheNotFound:
        return found
    for repo in sorted(repos, key=lambda repo: repo.repo_id):
        is_causal = repo.repo_type == "model" and any(_is_causal(revision.snapshot_path) for revision in repo.revisions)
        if is_causal and repo.repo_id not in found:
            found.append(repo.repo_id)
    return found


# --- what lies at a path -----------------------------------------------------------------------------------------


def _models_at(argument: str, folder: Path) -> list[Path | str]:
    """The models that an argument stands for: itself, or those in a folder of several."""
    path = _existing(argument, folder)
    if path is None:
        if HUB_ID.fullmatch(argument) and not argument.endswith(".gguf"):
            return [argument]
        raise ModelLoadError(
            f"{argument!r} is neither a folder, a .gguf file, a hub id such as org/name, nor an http(s) address; "
            f"{(folder / argument).absolute()} is not there"
        )
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelLoadError(
                f"{argument!r} is a file that is not .gguf; give the model's folder, or a config alone"
            )
        return [path]
    if _is_adapter(path) or _is_model(path):
        return [path]
    inside = [child for child in sorted(path.iterdir()) if _is_adapter(child) or _is_model(child)]
    inside += sorted(path.glob("*.gguf"))
    if not inside:
        raise ModelLoadError(
            f"{argument!r} holds no model: a model folder has config.json, an adapter's adapter_config.json; none is "
            "in it or one level below"
        )
    return list(inside)


def _existing(text: str, *folders: Path) -> Path | None:
    paths = (Path(os.path.abspath(folder / Path(text).expanduser())) for folder in folders)
    return next((path for path in paths if path.exists()), None)


def _is_adapter(path: Path) -> bool:
    """Whether it stands on a base: an adapter, or a delta."""
    is_one = (path / "adapter_config.json").is_file() or (path / CARD).is_file()
    return is_one and not (path / "config.json").is_file()


def _is_model(path: Path) -> bool:
    return (path / "config.json").is_file()


def _is_causal(folder: Path) -> bool:
    try:
        architectures = json.loads((folder / "config.json").read_bytes()).get("architectures") or [""]
    except (OSError, ValueError):
        return False
    return architectures[0].endswith(("ForCausalLM", "LMHeadModel"))


def _base_of(adapter: Path) -> str:
    if (adapter / CARD).is_file():
        return str(read_card(adapter).facts["base"])
    file = adapter / "adapter_config.json"
    try:
        base = json.loads(file.read_bytes()).get("base_model_name_or_path")
    except ValueError as exc:
        raise ModelLoadError(f"{file} is not valid JSON ({exc}); save the adapter again") from exc
    if not base:
        raise ModelLoadError(f"{file} does not name its base (base_model_name_or_path); write the config by hand")
    return str(base)


def _owner(base: str, adapter: Path, hosted: Mapping[str, dict[str, Any]], folder: Path) -> str | None:
    """The name under which an adapter's base was given already: the same folder, or the same hub id."""
    local = _existing(base, adapter.parent, folder)
    for name, entry in hosted.items():
        given = _existing(entry["path"], folder)
        if entry["path"] == base or (local is not None and given is not None and given.samefile(local)):
            return name
    # A base that was trained on a hub id and is given here as a folder of that name.
    named = [name for name, entry in hosted.items() if local is None and Path(entry["path"]).name == Path(base).name]
    return named[0] if len(named) == 1 else None


# --- servers -----------------------------------------------------------------------------------------------------


def _served(address: str, api_key_env: str | None) -> tuple[str, dict[str, int | None]]:
    """The base URL, with /v1, and the models that can chat, with their context where the server tells it, as vLLM does.
    Raises `ConfigError` if nothing answers there."""
    url = address.rstrip("/")
    url = url if url.endswith("/v1") else f"{url}/v1"
    shown = without_credentials(url)
    headers = {}
    if api_key_env is not None:
        if not os.environ.get(api_key_env):
            raise ConfigError(f"--api-key-env names {api_key_env}, which is not set")
        headers["Authorization"] = f"Bearer {os.environ[api_key_env]}"
    try:
        response = httpx.get(f"{url}/models", headers=headers, timeout=10, follow_redirects=True)
        response.raise_for_status()
        listed = [model for model in response.json()["data"] if model.get("kind") != "embedding"]
        served = {str(model["id"]): _context(model.get("max_model_len")) for model in listed}
    except httpx.HTTPStatusError as exc:
        hint = "; give --api-key-env" if exc.response.status_code in {401, 403} else ""
        raise ConfigError(f"{shown}/models answered {exc.response.status_code}{hint}") from exc
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        reason = without_credentials(str(exc)) or type(exc).__name__
        raise ConfigError(f"no server answers at {shown} ({reason})") from exc
    except (AttributeError, ValueError, KeyError, TypeError) as exc:
        raise ConfigError(f"{shown}/models is no list of models; is it an OpenAI-compatible server?") from exc
    served = {name: context for name, context in served.items() if not _NO_CHAT.search(name)}
    if not served:
        raise ConfigError(f"{shown} serves no model that can chat")
    return url, served


def _context(tokens: object) -> int | None:
    return tokens if isinstance(tokens, int) and tokens > 0 else None


# --- names -------------------------------------------------------------------------------------------------------


def _own_name(path: Path) -> str:
    """runs/tuned -> "tuned"; runs/tuned/checkpoint-500 -> "tuned-checkpoint-500": a generic name says nothing alone."""
    name = path.stem if path.suffix == ".gguf" else path.name
    return f"{path.parent.name}-{name}" if _GENERIC.fullmatch(name) and path.parent.name else name


def _printable(text: str) -> str:
    return re.sub(r"[^\w.:-]+", "-", text).strip("-") or "model"


def _unique(name: str, taken: set[str]) -> str:
    candidates = [name, *(f"{name}-{number}" for number in range(2, 2 + len(taken)))]
    return next(candidate for candidate in candidates if candidate not in taken)


def _written(path: Path, folder: Path) -> str:
    """Relative to `folder` where it lies below, else absolute."""
    path, folder = Path(os.path.abspath(path)), Path(os.path.abspath(folder))
    return f"./{path.relative_to(folder)}" if path.is_relative_to(folder) else str(path)
