"""`ensemble doctor`: what this machine has, what is missing, and the command that adds it."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution, requires, version
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "ensemble-server"
EXTRAS = {
    "demo": "the embedding model of the demo",
    "tables": "batch jobs over Parquet files",
    "ray": "batch jobs on a Ray cluster",
    "compare": "weight merges, plots and lm-evaluation-harness in comparisons",
    "docs": "the documentation as a site",
    "test": "running the tests",
}


@dataclass(frozen=True)
class Finding:
    """One line of the report. `command` repairs it where it is not well; a `needed` part makes the check fail."""

    topic: str
    text: str
    is_well: bool = True
    is_needed: bool = False
    command: str = ""


def doctor() -> None:
    """Check versions, devices and memory, and say how to add what is missing. Exit code 1 if a needed part is."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    findings = [*_system(), *_packages(), *_devices(), *_models(), *_extras()]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        table.add_row(finding.topic, _mark(finding), Text(finding.text))
    console = Console()
    console.print(table)
    commands = [finding.command for finding in findings if finding.command and not finding.is_well]
    if commands:
        console.print("\nTo add what is missing, in the project's folder:")
        for command in commands:
            typer.echo(f"  {command}")
    if any(finding.is_needed and not finding.is_well for finding in findings):
        raise typer.Exit(1)


def _mark(finding: Finding) -> str:
    if finding.is_well:
        return "[green]ok[/green]"
    return "[red]missing[/red]" if finding.is_needed else "[yellow]absent[/yellow]"


def _system() -> Iterator[Finding]:
    import psutil

    from ensemble_server.server.weights.cache import cache_folder

    yield Finding("python", f"{platform.python_version()} at {sys.executable}, {platform.platform()}")
    memory = psutil.virtual_memory()
    yield Finding("memory", f"{memory.available / 1e9:.1f} GB free of {memory.total / 1e9:.1f} GB")
    cache = cache_folder()
    existing = next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir())
    free = psutil.disk_usage(str(existing)).free
    is_writable = os.access(existing, os.W_OK)
    yield Finding(
        "cache",
        f"{cache}, {free / 1e9:.1f} GB free" + ("" if is_writable else "; it cannot be written"),
        is_writable,
        is_needed=True,
        command="export ENSEMBLE_CACHE=FOLDER   # one that can be written",
    )


def _packages() -> Iterator[Finding]:
    """Every package that the core needs, at a version that it admits."""
    own = version(DISTRIBUTION)
    yield Finding(DISTRIBUTION, own)
    for requirement in _requirements(extra=""):
        installed = _installed(requirement.name)
        is_well = installed is not None and requirement.specifier.contains(installed, prereleases=True)
        wanted = f" (needs {requirement.specifier})" if requirement.specifier else ""
        yield Finding(
            requirement.name,
            (installed or "not installed") + ("" if is_well else wanted),
            is_well,
            is_needed=True,
            command="pip install -c constraints.txt -e .",
        )


def _devices() -> Iterator[Finding]:
    if _installed("torch") is None:
        return
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("threads", f"{torch.get_num_threads()} of torch on {cores} cores (engine.num_threads changes it)")
    yield Finding("cpu", f"{torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield Finding(f"cuda:{index}", f"{device.name}, {device.total_memory / 1e9:.1f} GB")
    if not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build for CPUs"
        yield Finding("cuda", f"none that torch sees; this torch is {build}", is_well=False)
    if torch.backends.mps.is_available():
        yield Finding("mps", "there")


def _models() -> Iterator[Finding]:
    """Models that packages carry, and whether the hub may be asked for others."""
    from ensemble_server.server.weights.checkpoints import PACKAGED_MODELS

    for name, packaged in PACKAGED_MODELS.items():
        installed = _installed(packaged.distribution)
        text = (
            f"{packaged.distribution} {installed}" if installed else f"package {packaged.distribution} is not installed"
        )
        yield Finding(name, text, installed is not None, command=packaged.install_command)
    offline = os.environ.get("HF_HUB_OFFLINE", "") not in {"", "0"}
    yield Finding("model hub", "not asked (HF_HUB_OFFLINE is set)" if offline else "asked for models that are not here")


def _extras() -> Iterator[Finding]:
    for extra, purpose in EXTRAS.items():
        missing = [requirement.name for requirement in _requirements(extra) if _installed(requirement.name) is None]
        text = f"for {purpose}" + (f"; not installed: {', '.join(missing)}" if missing else "")
        yield Finding(f"extra {extra}", text, not missing, command=f"pip install -c constraints.txt -e '.[{extra}]'")


def _requirements(extra: str) -> Iterator[Requirement]:
    """What the core needs (`extra` is empty), or what an extra adds to it."""
    from packaging.requirements import Requirement

    for line in requires(DISTRIBUTION) or ():
        requirement = Requirement(line)
        is_core = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        is_wanted = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if is_core if not extra else is_wanted and not is_core:
            yield requirement


def _installed(name: str) -> str | None:
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return None
