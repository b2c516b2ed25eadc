"""What measurements hold for: the machine and the versions; and how much memory there is."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from pathlib import Path

import torch

from peftlab import __version__, ops


def describe_machine(device: str) -> dict[str, str | int]:
    return {
        "device": ops.plan_key("dense", torch.device(device), M=1, N=1, K=1, dropout=False).device,
        "name": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Version of each package that the times depend on."""
    found = {"peftlab": __version__, "python": platform.python_version()}
    for name in ("torch", "triton", "bitsandbytes"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def free_bytes(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    import psutil  # type: ignore[import-untyped]

    return int(psutil.virtual_memory().available)
