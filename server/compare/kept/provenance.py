"""Everything that is needed to repeat a comparison: versions, machine, hashes, seeds, the command."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("ensemble-server", "torch", "transformers", "peft", "numpy", "scipy", "mergekit", "lm-eval")
COMPUTING = ("ensemble-server", "torch", "transformers", "peft")  # their versions may change a figure


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """None for what is not installed."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def provenance(
    *, plan: Path, config: Path, weights: Mapping[str, str], files: Mapping[str, Path], command: str | None
) -> dict[str, Any]:
    """JSON-ready. `weights`: arm -> hash of all that decides its answers; `files`: what else was read."""
    import psutil

    from ensemble_server.server.compare.kept.content_cache import file_sha256

    return {
        "command": command,
        "plan": {"file": plan.name, "sha256": file_sha256(plan)},
        "config": {"file": config.name, "sha256": file_sha256(config)},
        "files": {name: file_sha256(path) for name, path in files.items() if path.is_file()},
        "weights": dict(weights),
        "versions": versions(),
        "python": platform.python_version(),
        "git": git_state(plan.absolute().parent),
        "hardware": {
            "machine": platform.machine(),
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_bytes": psutil.virtual_memory().total,
            "accelerators": _accelerators(),
            "system": platform.platform(),
        },
        "threads": _num_threads(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit, and whether tracked files differ from it; None outside a repository."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "has_changes": bool(changed)}


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def _accelerators() -> list[str]:
    if "torch" not in sys.modules:  # a report that is only written again needs none
        return []
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]


def _num_threads() -> int | None:
    if "torch" not in sys.modules:
        return None
    import torch

    return torch.get_num_threads()
