"""Describes the machine and the versions of a measurement, and the available memory."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from peftlab import __version__, ops

# Packages that affect the time of a training step.
PACKAGES = ("torch", "triton", "bitsandbytes", "transformers", "peft", "accelerate")


def describe_machine(device: str) -> dict[str, str | int]:
    return {
        "device": ops.plan_key("dense", torch.device(device), M=1, N=1, K=1, dropout=False).device,
        "name": torch.cuda.get_device_name() if device == "cuda" else processor(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
    }


def processor(flags: Sequence[str] = ()) -> str:
    """Returns the processor's name, with its features among ``flags`` in brackets."""
    info = ""
    with contextlib.suppress(OSError):
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    match = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    name = match.group(1).strip() if match else platform.processor() or platform.machine()
    has = [flag for flag in flags if re.search(rf"\b{flag}\b", info)]
    return f"{name} ({', '.join(has)})" if flags else name


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Returns the versions of peftlab, Python and each installed package."""
    installed = {"peftlab": __version__, "python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def clocks(device: str) -> dict[str, float]:
    """Returns the current clocks in MHz, if known: of the cores, or of a GPU's multiprocessors and memory."""
    if device == "cuda":
        with contextlib.suppress(Exception):  # any NVML error; it is optional
            import pynvml

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
            kinds = {"sm": pynvml.NVML_CLOCK_SM, "memory": pynvml.NVML_CLOCK_MEM}
            return {name: float(pynvml.nvmlDeviceGetClockInfo(handle, kind)) for name, kind in kinds.items()}
        return {}
    with contextlib.suppress(OSError, ValueError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        clock_mhz = [float(line.partition(":")[2]) for line in text.splitlines() if line.startswith("cpu MHz")]
        if clock_mhz:
            return {"lowest": min(clock_mhz), "highest": max(clock_mhz)}
    return {}


def size_of_machine() -> dict[str, int]:
    """Returns the cores that this process may use, and bytes of memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"cores": cores, "memory_bytes": int(psutil.virtual_memory().total)}


def git_commit(folder: Path, *paths: str) -> str | None:
    """Returns the commit of the checkout of the package ``folder``, with a + if files differ; None outside a checkout.

    paths: as ``changed_files``; default: every tracked file.
    """
    try:
        _git(
            folder, "ls-files", "--error-unmatch", "__init__.py"
        )  # an environment inside another checkout is not part of it
        changed = changed_files(folder, *paths) if paths else len(_git(folder, "status", "--porcelain", "-uno"))
        return _git(folder, "rev-parse", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def changed_files(folder: Path, *paths: str) -> int:
    """Counts the files of ``paths`` (patterns from the root of the checkout of ``folder``) that differ from its commit or are
    new."""
    return len(_git(folder, "status", "--porcelain", "--", *(f":/{path}" for path in paths)).splitlines())


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def source_digest(root: Path, patterns: Sequence[str]) -> str:
    """Hashes names and contents of all matching files, to distinguish states of the code without git."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in root.glob(pattern) if path.is_file()}):
        digest.update(f"{path.relative_to(root)}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def free_bytes(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)
