"""Whom `ensemble chat` talks to: a model loaded here from a config, or one that a server has."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import httpx
import typer

from ensemble_server.ensembles.base import Model
from ensemble_server.ensembles.errors import ConfigError, EnsembleError, UnknownModelError
from ensemble_server.server.config.blocks import RemoteModel
from ensemble_server.server.config.problems import nearest
from ensemble_server.server.engines.remote.remote import RemoteChat
from ensemble_server.server.proposal.targets import config_of


@asynccontextmanager
async def partner(targets: Sequence[str], name: str | None, api_key_env: str | None) -> AsyncIterator[Model]:
    """The model called `name` (default: the main one) behind the targets: a config, the address of one server, or
    models. Raises `EnsembleError` if there is none.
    """
    if len(targets) == 1 and targets[0].startswith(("http://", "https://")):
        async with _served(targets[0], name, api_key_env) as model:
            yield model
        return
    config = await asyncio.to_thread(config_of, targets, api_key_env=api_key_env)
    wanted = _chosen(name, config.main_model, list(config.models))
    typer.echo(f"Loading {', '.join(config.models)} ...", err=True)
    from ensemble_server.server.hosting import Hosting  # loads torch

    async with Hosting.open(config) as hosting:
        yield hosting.models[wanted]


@asynccontextmanager
async def _served(url: str, name: str | None, api_key_env: str | None) -> AsyncIterator[Model]:
    """A model of the OpenAI-compatible server at `url`, with or without /v1 at its end."""
    base = url.rstrip("/").removesuffix("/v1") + "/v1"
    names = await _served_names(base, api_key_env)
    wanted = _chosen(name, names[0], names)
    model = RemoteChat(wanted, RemoteModel(url=base, api_key_env=api_key_env, max_retries=0))
    try:
        yield model
    finally:
        await model.aclose()


async def _served_names(base: str, api_key_env: str | None) -> list[str]:
    headers = {}
    if api_key_env is not None:
        if not os.environ.get(api_key_env):
            raise ConfigError(f"--api-key-env names {api_key_env}, which is not set")
        headers["Authorization"] = f"Bearer {os.environ[api_key_env]}"
    try:
        async with httpx.AsyncClient(timeout=10) as client:
            response = await client.get(f"{base}/models", headers=headers)
            response.raise_for_status()
            names = [model["id"] for model in response.json()["data"] if model.get("kind") != "embedding"]
    except httpx.HTTPStatusError as exc:
        hint = "; give --api-key-env" if exc.response.status_code == httpx.codes.UNAUTHORIZED else ""
        raise EnsembleError(f"{base}/models answered {exc.response.status_code}{hint}") from exc
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise EnsembleError(f"no server answers at {base} ({exc or type(exc).__name__})") from exc
    except (AttributeError, ValueError, KeyError, TypeError) as exc:
        raise EnsembleError(f"{base}/models is no list of models; is it an OpenAI-compatible server?") from exc
    if not names:
        raise EnsembleError(f"{base} serves no model")
    return names


def _chosen(name: str | None, default: str, names: list[str]) -> str:
    if name is None:
        if len(names) > 1:
            typer.echo(f"Talking to {default}; --model takes any of {', '.join(names)}.", err=True)
        return default
    if name not in names:
        raise UnknownModelError(f"there is no model {name!r}{nearest(name, names)}", param="model")
    return name
