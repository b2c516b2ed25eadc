"""Energy in joules, if the machine counts it: NVML on a GPU, RAPL of the processor on Linux."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

RAPL = Path("/sys/class/powercap")


@dataclass(frozen=True)
class EnergyMeter:
    """source: the counter. read: joules since an arbitrary start. wraps_at: joules at which the counter restarts at 0."""

    source: str
    read: Callable[[], float]
    wraps_at: float | None = None

    def between(self, before: float, after: float) -> float:
        """Returns the joules between two readings, at most one wrap apart."""
        return after - before if after >= before or self.wraps_at is None else after - before + self.wraps_at


def find_meter(device: str, *, rapl: Path = RAPL) -> tuple[EnergyMeter | None, str]:
    """Returns the meter of ``device``, and its name or why there is none."""
    return _nvml() if device == "cuda" else _rapl(rapl)


def _nvml() -> tuple[EnergyMeter | None, str]:
    try:
        import pynvml
    except ImportError:
        return None, "the package nvidia-ml-py is not installed"
    import torch

    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid.encode())
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except (pynvml.NVMLError, AttributeError) as error:
        return None, f"NVML reports no energy: {error}"

    def joules() -> float:
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)) / 1000

    return EnergyMeter("NVML, the whole GPU", joules), "NVML, the whole GPU"


def _rapl(folder: Path) -> tuple[EnergyMeter | None, str]:
    packages = [path for path in sorted(folder.glob("intel-rapl:*")) if path.name.count(":") == 1]
    if not packages:
        return None, f"no energy counter of the processor in {folder}"
    files = [path / "energy_uj" for path in packages]
    try:
        for file in files:
            file.read_text()
    except OSError as error:
        return None, f"{error.filename or files[0]} cannot be read: {error.strerror}"
    wraps_at = None
    if len(files) == 1:  # in a sum it is unknown which counter wrapped
        with contextlib.suppress(OSError, ValueError):
            wraps_at = int((packages[0] / "max_energy_range_uj").read_text()) / 1e6

    def joules() -> float:
        return sum(int(file.read_text()) for file in files) / 1e6

    return EnergyMeter("RAPL, all processors of the machine", joules, wraps_at), "RAPL, all processors of the machine"
