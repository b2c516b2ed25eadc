"""gpu-check: the device's peak rates, and dequantization against bitsandbytes."""

# ruff: noqa: N803, N806 -- sizes are called M, N, K and R, as in the kernels
from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from peftlab_kernels.cases import Storage

from bench.gpu_check.base import Device, Row, Task
from bench.gpu_check.dequant import low_rank, storages
from bench.gpu_check.roofline import (
    CARD,
    DEQUANT_TARGET,
    GEMM_FLOPS,
    HBM_BYTES_PER_S,
    HBM_SHARE,
    SMALL_WEIGHT,
)
from bench.gpu_check.timing import Run, compared, interleaved, reaches

Calls = list[Callable[[], Any]]
PRODUCT, COPY = "ceiling, bf16 product", "ceiling, copy"


def ceilings(device: Device) -> Iterator[Task]:
    """The rates behind every floor below: a large product in bfloat16, a large copy."""
    yield Task({"case": PRODUCT}, partial(_gemm_ceiling, device), seconds=3)
    yield Task({"case": COPY}, partial(_copy_ceiling, device), seconds=3)


def _gemm_ceiling(device: Device) -> Row:
    from peftlab.measuring.ceilings import matmul_speed

    return {"tflops": matmul_speed(device.kind, torch.bfloat16) / 1e12, "expected_tflops": GEMM_FLOPS / 1e12}


def _copy_ceiling(device: Device) -> Row:
    from peftlab.measuring.ceilings import copy_speed

    return {"gb_per_s": copy_speed(device.kind) / 1e9, "expected_gb_per_s": HBM_SHARE * HBM_BYTES_PER_S / 1e9}


def flops_per_s(device: Device) -> float:
    """The measured rate, or the model's if it was not measured."""
    row = device.row_of(case=PRODUCT)
    return 1e12 * row["tflops"] if row else GEMM_FLOPS


def bytes_per_s(device: Device) -> float:
    """As ``flops_per_s``."""
    row = device.row_of(case=COPY)
    return 1e9 * row["gb_per_s"] if row else HBM_SHARE * HBM_BYTES_PER_S


def dequant_speed(device: Device) -> Iterator[Task]:
    """Dequantizing to bfloat16 against bitsandbytes: the GPU's time, and the time of single calls. The GPU's time decides the
    target, because training launches ahead of the GPU."""
    for op, storage in storages():
        for N, K in device.pick(storage.timed, [(64, 128)]):
            what = {"case": op, "shape": [N, K], "dtype": "bfloat16"}
            yield Task(what, partial(_dequant, device, storage, N, K), seconds=4)
    for op, storage in storages():
        for N, K in device.pick(storage.merge_timed, [(64, 128)] if storage.merge_timed else []):
            what = {"case": f"{op} + r=16 merge", "shape": [N, K], "dtype": "bfloat16"}
            yield Task(what, partial(_merge, device, op, storage, N, K), seconds=3)


def _moved(storage: Storage, N: int, K: int) -> float:
    """Bytes to read the stored weight once and write it once in 16 bits."""
    return (storage.stored_bytes + 2) * N * K


def _weights(device: Device, storage: Storage, N: int, K: int) -> list[Any]:
    """Enough weights that, used in turn, none is in the L2 when its turn comes."""
    count = int(device.pick(max(2, -(-512 * 2**20 // int(_moved(storage, N, K)))), 2))
    return [storage.make(device, N, K, **storage.variants[-1], seed=seed) for seed in range(count)]


def _dequant(device: Device, storage: Storage, N: int, K: int) -> Row:
    dtype = torch.bfloat16
    ours: Calls = []
    theirs: Calls = []
    for weight in _weights(device, storage, N, K):
        out = torch.empty(N, K, dtype=dtype, device=device.kind)
        ours.append(partial(storage.dense, weight, dtype=dtype, out=out, backend=device.backend(dtype)))
        theirs.append(partial(storage.library(weight, dtype), out))
    size = "small" if N * K < SMALL_WEIGHT else "large"
    row = _against(device, {"peftlab": ours, "bitsandbytes": theirs}, _moved(storage, N, K))
    target = DEQUANT_TARGET[size] if device.has(CARD) else None
    return {**row, "size": size, "target": target, "met": reaches(row["ratio"], target)}


def _merge(device: Device, op: str, storage: Storage, N: int, K: int) -> Row:
    """W + s B A in one launch, against bitsandbytes' dequantization and an addition in place."""
    dtype = torch.bfloat16
    ours: Calls = []
    theirs: Calls = []
    A, B, scale = low_rank(device, N, K, 16, dtype, 1.0)
    for weight in _weights(device, storage, N, K):
        options: Row = {"dtype": dtype, "out": torch.empty(N, K, dtype=dtype, device=device.kind)}
        options |= {"low_rank": (A, B, scale), "backend": device.backend(dtype)}
        ours.append(partial(storage.dense, weight, **options))
        theirs.append(partial(_added, storage.library(weight, dtype), A, B, scale))
    row = _against(device, {"peftlab": ours, "bitsandbytes": theirs}, _moved(storage, N, K))
    alone = device.row_of(case=op, shape=[N, K])
    times = [r["rounds_us"]["peftlab"]["time"] for r in (row, alone) if r]
    return {**row, "over_dequant": compared(*times) if alone else None}


def _added(library: Callable[[Any], Any], A: Any, B: Any, scale: float) -> Any:
    return library(None).addmm_(B, A, alpha=scale)


def _against(device: Device, calls: dict[str, Calls], moved: float) -> Row:
    """Times per call of both, launched ahead and as single calls, and the distance from the bytes that must move."""
    count = len(calls["peftlab"])
    alone = interleaved(device, {name: _one(each) for name, each in calls.items()}, seconds=0.5)
    timed = interleaved(device, {name: _all(each) for name, each in calls.items()}, seconds=1.5, ahead=True)
    us = {name: [round(t / count, 3) for t in phases["time"]] for name, phases in timed.spreads().items()}
    floor = 1e6 * moved / bytes_per_s(device)
    return {
        "us": us,
        "rounds_us": {name: {"time": [t / count for t in phases["time"]]} for name, phases in timed.rounds().items()},
        "alone_us": {name: phases["time"] for name, phases in alone.spreads().items()},
        "ratio": timed.ratio("bitsandbytes", "peftlab", "time"),
        "alone_ratio": alone.ratio("bitsandbytes", "peftlab", "time"),
        "floor_us": floor,
        "of_bandwidth": floor / us["peftlab"][1] if us["peftlab"][1] else None,
        # 10 %: a copy is not the fastest access pattern.
        "above_limit": not device.dry and us["peftlab"][1] < 0.9 * floor,
        "weights_in_turn": count,
        **timed.protocol(),
    }


def _one(calls: Calls) -> Run:
    """Cycles through them, one per call."""
    turn = _forever(calls)
    return lambda mark: next(turn)()


def _all(calls: Calls) -> Run:
    return lambda mark: [call() for call in calls]


def _forever(calls: Calls) -> Iterator[Callable[[], Any]]:
    while True:
        yield from calls
