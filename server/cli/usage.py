"""`ensemble usage`: what each key of a server has used, as its metrics say."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from typing import Annotated

import typer

NAMES = ("requests", "refused", "prompt", "completion", "streams", "upload_bytes")


def usage(
    url: Annotated[str, typer.Argument(metavar="URL", help="Address of the server.")] = "http://127.0.0.1:8000",
    api_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable with a key of the server.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON in place of the table.")] = False,
) -> None:
    """Show what each key has used since the server began: requests, refusals, tokens, open streams, uploaded bytes.

    Keys go by the names under `server.keys`, others as key-1, key-2, ...; no key is shown.
    """
    used = usage_of(_metrics(url, api_key_env))
    if json:
        import orjson

        typer.echo(orjson.dumps(used, option=orjson.OPT_INDENT_2).decode())
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("key", *(name.replace("_", " ") for name in NAMES), box=None)
    for key, counts in used.items():
        table.add_row(key, *(f"{counts[name]:,}" for name in NAMES))
    Console().print(table)


def usage_of(text: str) -> Mapping[str, Mapping[str, int]]:
    """By key, from the text of `/metrics`: a number for each of `NAMES`."""
    from prometheus_client.parser import text_string_to_metric_families

    kinds = {
        "ensemble:key_requests_total": "requests",
        "ensemble:key_refusals_total": "refused",
        "ensemble:key_streams": "streams",
        "ensemble:key_upload_bytes_total": "upload_bytes",
    }
    used: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(NAMES, 0))
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "ensemble:key_tokens_total":
                used[sample.labels["key"]][sample.labels["kind"]] += int(sample.value)
            elif sample.name in kinds:
                used[sample.labels["key"]][kinds[sample.name]] += int(sample.value)
    return dict(used)


def _metrics(url: str, api_key_env: str | None) -> str:
    import httpx

    from ensemble_server.ensembles.errors import ConfigError, EnsembleError

    headers = {}
    if api_key_env is not None:
        if not os.environ.get(api_key_env):
            raise ConfigError(f"--api-key-env names {api_key_env}, which is not set")
        headers["Authorization"] = f"Bearer {os.environ[api_key_env]}"
    address = url.rstrip("/").removesuffix("/v1") + "/metrics"
    try:
        answer = httpx.get(address, headers=headers, timeout=10)
        answer.raise_for_status()
    except httpx.HTTPStatusError as exc:
        hint = "; give --api-key-env" if exc.response.status_code == httpx.codes.UNAUTHORIZED else ""
        raise EnsembleError(f"{address} answered {exc.response.status_code}{hint}") from exc
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise EnsembleError(f"no server answers at {address} ({exc or type(exc).__name__})") from exc
    return answer.text
