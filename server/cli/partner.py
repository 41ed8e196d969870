"""Whom `ensemble chat` talks to: models loaded here from a config, or those that a server has."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import typer

from ensemble_server.ensembles.base import Model
from ensemble_server.ensembles.errors import ConfigError, EnsembleError, UnknownModelError
from ensemble_server.ensembles.method import Method
from ensemble_server.server.config.blocks import RemoteModel
from ensemble_server.server.config.credentials import without_credentials
from ensemble_server.server.config.problems import nearest
from ensemble_server.server.engines.remote.remote import RemoteChat
from ensemble_server.server.proposal.targets import config_of


@dataclass(frozen=True)
class Partners:
    """The models that there are, and the one to begin with. `weights`: of each ensemble's members, as configured."""

    names: Sequence[str]
    chosen: str
    weights: Mapping[str, Mapping[str, float]]
    _model: Callable[[str], Model]

    def model(self, name: str) -> Model:
        """Raises `UnknownModelError`."""
        if name not in self.names:
            raise UnknownModelError(f"there is no model {name!r}{nearest(name, list(self.names))}", param="model")
        return self._model(name)


@asynccontextmanager
async def partners(targets: Sequence[str], name: str | None, api_key_env: str | None) -> AsyncIterator[Partners]:
    """The models behind the targets: a config, the address of one server, or models. The one called `name` is chosen
    (default: the main one). Raises `EnsembleError` if there is none.
    """
    if len(targets) == 1 and is_address(targets[0]):
        async with _served(targets[0], name, api_key_env) as found:
            yield found
        return
    config = await asyncio.to_thread(config_of, targets, api_key_env=api_key_env)
    names = list(config.models)
    wanted = _chosen(name, config.main_model, names)
    typer.echo(f"Loading {', '.join(names)} ...", err=True)
    from ensemble_server.server.hosting import Hosting  # loads torch

    async with Hosting.open(config) as hosting:
        weights = {
            name: {member: weight for member, weight in model.config.members.items() if isinstance(weight, int | float)}
            for name, model in hosting.models.items()
            if isinstance(model, Method)
        }
        yield Partners(names, wanted, weights, lambda name: hosting.models[name])


def is_address(target: str) -> bool:
    return target.startswith(("http://", "https://"))


@asynccontextmanager
async def _served(url: str, name: str | None, api_key_env: str | None) -> AsyncIterator[Partners]:
    """The models of the OpenAI-compatible server at `url`, with or without /v1 at its end."""
    base = base_of(url)
    served = await served_models(base, api_key_env)
    names = [model["id"] for model in served]
    wanted = _chosen(name, names[0], names)
    explains = {model["id"]: model.get("explains_tokens") for model in served}  # a server of this kind says it
    weights = {model["id"]: model["ensemble"].get("weights", {}) for model in served if "ensemble" in model}
    talked_to: dict[str, RemoteChat] = {}

    def model(name: str) -> RemoteChat:
        if name not in talked_to:
            config = RemoteModel(url=base, api_key_env=api_key_env, max_retries=0)
            talked_to[name] = RemoteChat(name, config, explains_tokens=explains[name])
        return talked_to[name]

    try:
        yield Partners(names, wanted, weights, model)
    finally:
        for one in talked_to.values():
            await one.aclose()


def base_of(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1") + "/v1"


async def served_models(base: str, api_key_env: str | None, *, timeout_s: float = 10) -> list[dict[str, Any]]:
    """The models that a server lists, at least one, each with its `id`. Raises `EnsembleError`."""
    shown, headers = without_credentials(base), {}
    if api_key_env is not None:
        if not os.environ.get(api_key_env):
            raise ConfigError(f"--api-key-env names {api_key_env}, which is not set")
        headers["Authorization"] = f"Bearer {os.environ[api_key_env]}"
    try:
        async with httpx.AsyncClient(timeout=timeout_s) as client:
            response = await client.get(f"{base}/models", headers=headers)
            response.raise_for_status()
            listed = [{**model, "id": model["id"]} for model in response.json()["data"]]
            models = [model for model in listed if model.get("kind") != "embedding"]
    except httpx.HTTPStatusError as exc:
        hint = "; give --api-key-env" if exc.response.status_code == httpx.codes.UNAUTHORIZED else ""
        raise EnsembleError(f"{shown}/models answered {exc.response.status_code}{hint}") from exc
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        reason = without_credentials(str(exc)) or type(exc).__name__
        raise EnsembleError(f"no server answers at {shown} ({reason})") from exc
    except (AttributeError, ValueError, KeyError, TypeError) as exc:
        raise EnsembleError(f"{shown}/models is no list of models; is it an OpenAI-compatible server?") from exc
    if not models:
        raise EnsembleError(f"{shown} serves no model")
    return models


def _chosen(name: str | None, default: str, names: list[str]) -> str:
    if name is None:
        if len(names) > 1:
            typer.echo(f"Talking to {default}; --model takes any of {', '.join(names)}.", err=True)
        return default
    if name not in names:
        raise UnknownModelError(f"there is no model {name!r}{nearest(name, names)}", param="model")
    return name
