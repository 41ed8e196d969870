"""`ensemble version`: what is installed, as a report of a fault needs it. Nothing heavy is imported."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import typer

PACKAGES = ("torch", "transformers", "tokenizers", "peft", "vllm", "mergekit")


def print_versions() -> None:
    """Show the version, and those of Python and of the packages that answers depend on."""
    typer.echo(f"ensemble-server {version('ensemble-server')}")
    typer.echo(f"python {platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        try:
            typer.echo(f"{package} {version(package)}")
        except PackageNotFoundError:
            typer.echo(f"{package}: not installed")
