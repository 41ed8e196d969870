"""The memory of this machine in which members have to fit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """`device`: cpu, or the accelerator that `device: auto` takes. `prefers_float32`: it computes 16 bits slowly."""

    device: str
    free_bytes: int
    prefers_float32: bool


def this_machine(*, hosts: bool = True) -> Machine:
    """`hosts`: whether weights are to be loaded here. If not, torch, which takes seconds to import, is left alone."""
    import psutil

    if not hosts:
        return Machine("cpu", psutil.virtual_memory().available, prefers_float32=not _has_bfloat16_arithmetic())
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and accelerator.type == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return Machine(str(accelerator), free, prefers_float32=False)
    free = psutil.virtual_memory().available
    if accelerator is not None:  # it shares the machine's memory
        return Machine(str(accelerator), free, prefers_float32=False)
    return Machine("cpu", free, prefers_float32=not _has_bfloat16_arithmetic())


def _has_bfloat16_arithmetic() -> bool:
    """Whether this CPU multiplies bfloat16 matrices by instructions of its own. Known of Linux only."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags or "bf16" in flags.split()
