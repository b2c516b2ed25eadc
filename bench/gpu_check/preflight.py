"""gpu-check: reports what is missing on this machine, within about a second and before anything starts.

It does not import torch: it searches for modules without loading them and queries the driver through its own library. A finding
is ``fatal`` if nothing can run: no torch, Triton or transformers; no CUDA device; no C compiler, which Triton needs to build the
launcher of every kernel; no space for the rows. Any other missing package is reported with the sections that it costs.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import ROOT
from bench.gpu_check.base import Section, lacking

CONSTRAINTS = ROOT / "constraints.txt"
EVERYTHING = ("torch", "triton", "transformers", "numpy", "psutil")
# Our code calls them or is compared with them; another version may compute something else.
PINNED = ("peft", "bitsandbytes")
ROWS_BYTES = 50 * 2**20
TEMPORARY_BYTES = 2 * 2**30  # Triton's cache, and the model and run of the training loop


@dataclass(frozen=True)
class Finding:
    what: str
    fatal: bool = False


def look(sections: Iterable[Section], out: Path, *, dry: bool) -> list[Finding]:
    """Findings about what is missing. dry: neither a device nor a compiler is needed."""
    findings = [Finding(f"not installed: {name}; nothing runs without it", fatal=True) for name in lacking(*EVERYTHING)]
    if not dry:
        findings += [*_device(), *_compiler()]
    return [*findings, *_disk(out), *_packages(list(sections)), *_versions(CONSTRAINTS)]


def fatal(findings: Iterable[Finding]) -> bool:
    return any(finding.fatal for finding in findings)


def report(findings: Iterable[Finding]) -> str:
    """One line per finding, fatal ones first."""
    ordered = sorted(findings, key=lambda finding: not finding.fatal)
    return "\n".join(f"preflight: {'FATAL: ' if finding.fatal else ''}{finding.what}" for finding in ordered)


def _device() -> Iterator[Finding]:
    """Asks the driver for a device. If it has none, torch decides, since torch may find the driver elsewhere."""
    name = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
        count = ctypes.c_int(0)
        code = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
        problem = "" if count.value and not code else f"the driver finds none (error {code})"
    except OSError:
        problem = f"its driver ({name}) is missing"
    if problem and not _torch_finds_one():
        yield Finding(f"gpu-check needs a CUDA device, but {problem}; nothing was checked", fatal=True)


def _torch_finds_one() -> bool:
    command = [sys.executable, "-c", "import sys, torch; sys.exit(not torch.cuda.is_available())"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _compiler() -> Iterator[Finding]:
    """Looks for a C compiler and Python.h as triton/runtime/build.py does. Only the compiler may know where the headers are."""
    named = os.environ.get("CC")
    if not any(map(shutil.which, [named] if named else ["gcc", "clang"])):
        yield Finding("no C compiler (CC, gcc or clang), which Triton needs for every kernel", fatal=True)
    scheme = sysconfig.get_default_scheme()
    paths = sysconfig.get_paths("posix_prefix" if scheme == "posix_local" else scheme)
    if not (Path(paths["include"]) / "Python.h").is_file():
        yield Finding(f"no Python.h in {paths['include']}, which Triton needs for every kernel")


def _disk(out: Path) -> Iterator[Finding]:
    out = out.resolve()
    if out.exists() and not out.is_dir():
        yield Finding(f"{out} is a file, not a folder; give another --out", fatal=True)
        return
    folder = next(parent for parent in (out, *out.parents) if parent.is_dir())
    try:
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        yield Finding(f"cannot write into {out}: {error.strerror}; give another --out", fatal=True)
    else:
        if free < ROWS_BYTES:
            yield Finding(f"only {free / 2**20:.0f} MiB are free for the rows in {out}; give another --out", fatal=True)
    temporary = Path(tempfile.gettempdir())
    if (free := shutil.disk_usage(temporary).free) < TEMPORARY_BYTES:
        yield Finding(f"only {free / 2**30:.1f} GiB are free for temporary files, but recipes may need 2")


def _packages(sections: list[Section]) -> Iterator[Finding]:
    needed = dict.fromkeys(name for s in sections for name in (*s.needs, *s.uses))
    for package in lacking(*needed):
        out = [s for s in sections if package in s.needs]
        less = [s for s in sections if package in s.uses]
        # A correctness section that lacks some rows is unfinished, so the sections that depend on it are not timed.
        open_ = {s.name for s in [*out, *less] if not s.timing}
        untimed = [s for s in sections if s not in out and open_.intersection(s.stands_on)]
        costs = {"left out": out, "not whole": less, "so not timed": untimed}
        texts = [f"{cost}: {', '.join(f'`{s.name}`' for s in those)}" for cost, those in costs.items() if those]
        yield Finding(f"not installed: {package}; {'; '.join(texts)}")


def _versions(constraints: Path) -> Iterator[Finding]:
    text = constraints.read_text(encoding="utf-8") if constraints.is_file() else ""
    for name in PINNED:
        pinned = re.search(rf"^{name}==(\S+)$", text, re.MULTILINE)
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(name)
            if pinned and version != pinned[1]:
                yield Finding(f"{name} {version} is installed, but constraints.txt pins {pinned[1]}")
