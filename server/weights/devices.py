"""Where weights go: what `device` in the config means on this machine."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from ensemble_server.ensembles.errors import ModelLoadError

logger = logging.getLogger(__name__)

Key = TypeVar("Key", bound=Hashable)

AMPERE = (8, 0)  # the first compute capability with bfloat16 arithmetic; older GPUs emulate it, slowly


def resolve_device(device: str) -> str:
    """`device` of the config as torch calls it; auto is the first accelerator (`spread` has others), else the CPU.

    Raises `ModelLoadError` for a device that is not in this machine.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device == "auto":
        return "cpu" if accelerator is None else str(accelerator)
    kind, _, index = device.partition(":")
    there = 0 if accelerator is None or accelerator.type != kind else torch.accelerator.device_count()
    if kind != "cpu" and int(index or 0) >= there:
        found = f"{there} of kind {kind}" if there else f"no {kind}; torch sees {accelerator or 'only the cpu'}"
        raise ModelLoadError(
            f"device {device!r} is not there: this machine has {found}; correct `device`, or take auto"
        )
    return device


def free_bytes(device: str) -> int:
    """Memory that a device, as torch calls it, has left; the machine's where torch does not tell."""
    import psutil
    import torch

    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def rooms() -> list[int]:
    """Free bytes of each accelerator; none where there is no choice: no accelerator, one, or one that does not say."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type == "mps" or (num := torch.accelerator.device_count()) < 2:
        return []
    return [torch.accelerator.get_memory_info(index)[0] for index in range(num)]


def spread(sizes: Mapping[Key, int], rooms: Sequence[int]) -> dict[Key, int]:
    """Which accelerator each weights of so many bytes go to: the largest first, each where most room is left.

    Members that fit on one device are spread all the same: devices run their members' forwards side by side.
    """
    left = list(rooms)
    places: dict[Key, int] = {}
    for key, size in sorted(sizes.items(), key=lambda item: -item[1]):  # stable: equal ones keep the config's order
        places[key] = max(range(len(left)), key=lambda index: left[index])
        left[places[key]] -= size
    return places


def warn_of_slow_bfloat16(name: str, dtype: str, device: str) -> None:
    """Log that model `name` runs in a dtype that its GPU can only emulate (a T4, a V100)."""
    import torch

    if dtype != "bfloat16" or not device.startswith("cuda"):
        return
    if torch.cuda.get_device_capability(device) < AMPERE:
        logger.warning(
            "model %r runs in bfloat16, which %s has no arithmetic for and emulates; try `dtype: float16`",
            name,
            torch.cuda.get_device_name(device),
        )
