"""`ensemble serve`: loads what a config names and answers over HTTP until it is stopped."""

from __future__ import annotations

import asyncio
import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ensemble_server.server.cli.paths import check_target

if TYPE_CHECKING:
    from ensemble_server.server.config.blocks import Config, ServerConfig


def serve(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG|MODEL...",
            help="A YAML file; or, without one, model folders, .gguf files, adapters, hub ids and servers' addresses.",
        ),
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Serve the demo that the package carries: a small model and its experts.")
    ] = False,
    host: Annotated[str | None, typer.Option(help="Address to listen on, in place of the config's.")] = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port to listen on, in place of the config's; 0 takes a free one."),
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable with the key of servers given by address.")
    ] = None,
) -> None:
    """Serve the models of a config behind an OpenAI-compatible API. Ctrl-C stops it once live requests are done.

    Models without a config are served as `ensemble init` would write them down: each of them, and ensembles that fit.
    """
    from ensemble_server.server.config.loading import load_demo
    from ensemble_server.server.proposal.targets import config_of, is_config

    if bool(targets) == demo:
        raise typer.BadParameter("give a CONFIG, or --demo, or models", param_hint="CONFIG")
    if targets and is_config(targets[0]) and not Path(targets[0]).is_file():
        raise typer.BadParameter(f"File {targets[0]!r} does not exist.", param_hint="CONFIG")
    for target in targets or ():
        check_target(target)
    loaded = config_of(targets, api_key_env=api_key_env) if targets else load_demo()
    given = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    loaded = loaded.model_copy(update={"server": loaded.server.model_copy(update=given)})
    given_from = f" from {loaded.source}" if demo or (targets and is_config(targets[0])) else ""
    typer.echo(f"Loading {', '.join(loaded.models)}{given_from} ...")

    from ensemble_server.server.api.serve import serve as serve_api

    asyncio.run(serve_api(loaded, on_ready=lambda port: typer.echo(_welcome(loaded, port))))


def _welcome(config: Config, port: int) -> str:
    """Where the server is and a line that asks it something, ready to be pasted into a shell."""
    address = f"http://{_reachable(config.server.host)}:{port}"
    body = {"model": config.main_model, "messages": [{"role": "user", "content": "Who are you?"}], "stream": True}
    headers = f"-H 'Content-Type: application/json' {_key_header(config.server)}"
    return (
        f"Ready: {address}/v1 serves {', '.join(config.listed)}.\n{_page(config.server, address)}Try:\n\n"
        f"curl -N {address}/v1/chat/completions {headers}-d {shlex.quote(json.dumps(body))}\n"
    )


def _page(server: ServerConfig, address: str) -> str:
    return f"Open {address}/\n" if server.web else ""


def _reachable(host: str) -> str:
    """The name under which this machine reaches a server that listens on `host`, as URLs write it."""
    if host in {"0.0.0.0", "::", ""}:
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _key_header(server: ServerConfig) -> str:
    """A header that takes the key from where the config has it; a key itself is never printed."""
    if server.api_keys_env is not None:
        return f'-H "Authorization: Bearer ${{{server.api_keys_env}%%,*}}" '  # the first of the list
    return '-H "Authorization: Bearer YOUR_KEY" ' if server.api_keys or server.keys else ""
