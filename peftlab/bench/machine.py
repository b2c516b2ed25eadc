"""What measurements hold for: the machine and the versions; and how much memory there is."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from pathlib import Path

import psutil  # type: ignore[import-untyped]
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
    for name in ("torch", "triton", "bitsandbytes", "transformers", "peft", "accelerate"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def clocks(device: str) -> dict[str, float]:
    """MHz now, where the machine tells: of the cores, or of a GPU's multiprocessors and memory."""
    if device == "cuda":
        with contextlib.suppress(Exception):  # whatever NVML says; it is no dependency
            import pynvml

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
            kinds = {"sm": pynvml.NVML_CLOCK_SM, "memory": pynvml.NVML_CLOCK_MEM}
            return {name: float(pynvml.nvmlDeviceGetClockInfo(handle, kind)) for name, kind in kinds.items()}
        return {}
    with contextlib.suppress(OSError, ValueError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        found = [float(line.partition(":")[2]) for line in text.splitlines() if line.startswith("cpu MHz")]
        if found:
            return {"lowest": min(found), "highest": max(found)}
    return {}


def size_of_machine() -> dict[str, int]:
    """Cores that this process may use, and bytes of memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"cores": cores, "memory_bytes": int(psutil.virtual_memory().total)}


def git_commit(folder: Path) -> str | None:
    """The commit of the checkout that the package ``folder`` is in, with a + where files differ from it; None outside of one."""
    import subprocess

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=10
        )
        return done.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # an environment inside somebody's checkout is none of it
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def free_bytes(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)
