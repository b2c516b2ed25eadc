"""gpu-check: what the device can do at best, dequantization against bitsandbytes, and when to add the adapter."""

# ruff: noqa: N803, N806 -- sizes are called M, N, K and R, as in the kernels
from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from bench.gpu_check.base import Device, Row, Task
from bench.gpu_check.dequant import int8_weight, low_rank, nf4_weight, quant_state
from bench.gpu_check.roofline import (
    CARD,
    DEQUANT_TARGET,
    GEMM_FLOPS,
    HBM_BYTES_PER_S,
    HBM_SHARE,
    LAYER,
    SMALL_WEIGHT,
    dequant_bytes,
)
from bench.gpu_check.timing import Run, compared, interleaved, reaches

DEQUANT_SHAPES = [(4096, 4096), (14336, 4096), (1024, 4096)]


PRODUCT, COPY = "ceiling, bf16 product", "ceiling, copy"


def ceilings(device: Device) -> Iterator[Task]:
    """The rates that every floor below is made of: a large product in bfloat16, a large copy."""
    yield Task({"case": PRODUCT}, partial(_gemm_ceiling, device), seconds=3)
    yield Task({"case": COPY}, partial(_copy_ceiling, device), seconds=3)


def _gemm_ceiling(device: Device) -> Row:
    import torch

    from peftlab.bench.ceilings import matmul_speed

    return {"tflops": matmul_speed(device.kind, torch.bfloat16) / 1e12, "expected_tflops": GEMM_FLOPS / 1e12}


def _copy_ceiling(device: Device) -> Row:
    from peftlab.bench.ceilings import copy_speed

    return {"gb_per_s": copy_speed(device.kind) / 1e9, "expected_gb_per_s": HBM_SHARE * HBM_BYTES_PER_S / 1e9}


def flops_per_s(device: Device) -> float:
    """As measured, or where that was left out as the model takes it."""
    row = device.row_of(case=PRODUCT)
    return 1e12 * row["tflops"] if row else GEMM_FLOPS


def bytes_per_s(device: Device) -> float:
    """As ``flops_per_s``."""
    row = device.row_of(case=COPY)
    return 1e9 * row["gb_per_s"] if row else HBM_SHARE * HBM_BYTES_PER_S


def dequant_speed(device: Device) -> Iterator[Task]:
    """Dequantizing to bfloat16 against bitsandbytes: the GPU's time, by which the target is judged because training
    launches ahead of the GPU, and the time of calls by themselves."""
    for kind in ("nf4", "int8"):
        for N, K in device.pick(DEQUANT_SHAPES, [(64, 128)]):
            what = {"case": f"{kind}_dequant", "shape": [N, K], "dtype": "bfloat16"}
            yield Task(what, partial(_dequant, device, kind, N, K), seconds=4)
    for N, K in device.pick(DEQUANT_SHAPES[:2], [(64, 128)]):
        what = {"case": "nf4_dequant + r=16 merge", "shape": [N, K], "dtype": "bfloat16"}
        yield Task(what, partial(_merge, device, N, K), seconds=3)


def _sets(device: Device, kind: str, N: int, K: int) -> int:
    """How many weights to go through in turn, so that none is in the L2 when its turn comes."""
    return int(device.pick(max(2, -(-512 * 2**20 // int(dequant_bytes(kind, N, K)))), 2))


def _dequant(device: Device, kind: str, N: int, K: int) -> Row:
    ours, theirs = [], []
    for seed in range(_sets(device, kind, N, K)):
        mine, other = _nf4_pair(device, N, K, seed) if kind == "nf4" else _int8_pair(device, N, K, seed)
        ours.append(mine)
        theirs.append(other)
    size = "small" if N * K < SMALL_WEIGHT else "large"
    row = _against(device, {"peftlab": ours, "bitsandbytes": theirs}, dequant_bytes(kind, N, K))
    target = DEQUANT_TARGET[size] if device.has(CARD) else None
    return {**row, "size": size, "target": target, "met": reaches(row["ratio"], target)}


def _nf4_pair(device: Device, N: int, K: int, seed: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from peftlab_kernels.nf4_dequant import nf4_dequant

    dtype = torch.bfloat16
    weight = nf4_weight(device, N, K, nested=True, seed=seed)
    out, backend = torch.empty(N, K, dtype=dtype, device=device.kind), device.backend(dtype)
    packed, state = weight.packed.view(-1, 1), quant_state(weight, dtype)
    into = None if device.dry else out  # bitsandbytes writes into given memory on CUDA only
    return (
        lambda: nf4_dequant(weight, dtype=dtype, out=out, backend=backend),
        lambda: dequantize_4bit(packed, state, out=into),
    )


def _int8_pair(device: Device, N: int, K: int, seed: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    import torch
    from bitsandbytes.functional import int8_vectorwise_dequant
    from peftlab_kernels.int8_dequant import int8_dequant

    dtype = torch.bfloat16
    q, row_absmax = int8_weight(device, N, K, seed=seed)
    out, backend = torch.empty(N, K, dtype=dtype, device=device.kind), device.backend(dtype)
    return (
        lambda: int8_dequant(q, row_absmax, dtype=dtype, out=out, backend=backend),
        lambda: int8_vectorwise_dequant(q, row_absmax).to(dtype),
    )


def _merge(device: Device, N: int, K: int) -> Row:
    """W + s B A in one launch, against bitsandbytes' dequantization and an addition in place."""
    import torch
    from bitsandbytes.functional import dequantize_4bit
    from peftlab_kernels.nf4_dequant import nf4_dequant

    dtype = torch.bfloat16
    A, B, scale = low_rank(device, N, K, 16, dtype, 1.0)
    ours, theirs = [], []
    for seed in range(_sets(device, "nf4", N, K)):
        weight = nf4_weight(device, N, K, nested=True, seed=seed)
        out = torch.empty(N, K, dtype=dtype, device=device.kind)

        def mine(weight: Any = weight, out: Any = out) -> Any:
            return nf4_dequant(weight, dtype=dtype, low_rank=(A, B, scale), out=out, backend=device.backend(dtype))

        def other(packed: Any = weight.packed.view(-1, 1), state: Any = quant_state(weight, dtype)) -> Any:  # noqa: B008
            return dequantize_4bit(packed, state).addmm_(B, A, alpha=scale)

        ours.append(mine)
        theirs.append(other)
    row = _against(device, {"peftlab": ours, "bitsandbytes": theirs}, dequant_bytes("nf4", N, K))
    alone = device.row_of(case="nf4_dequant", shape=[N, K])
    times = [r["rounds_us"]["peftlab"]["time"] for r in (row, alone) if r]
    return {**row, "over_dequant": compared(*times) if alone else None}


def _against(device: Device, calls: dict[str, list[Callable[[], Any]]], moved: float) -> Row:
    """Times per call of both, launched ahead and by themselves, and how far from the bytes that must move."""
    count = len(calls["peftlab"])
    turns = {name: iter(_forever(each)) for name, each in calls.items()}
    single: dict[str, Run] = {name: lambda mark, turn=turn: next(turn)() for name, turn in turns.items()}
    alone = interleaved(device, single, seconds=0.5)
    whole: dict[str, Run] = {name: lambda mark, each=each: [call() for call in each] for name, each in calls.items()}
    found = interleaved(device, whole, seconds=1.5, ahead=True)
    us = {name: [round(t / count, 3) for t in phases["time"]] for name, phases in found.spreads().items()}
    floor = 1e6 * moved / bytes_per_s(device)
    return {
        "us": us,
        "rounds_us": {name: {"time": [t / count for t in phases["time"]]} for name, phases in found.rounds().items()},
        "alone_us": {name: phases["time"] for name, phases in alone.spreads().items()},
        "ratio": found.ratio("bitsandbytes", "peftlab", "time"),
        "alone_ratio": alone.ratio("bitsandbytes", "peftlab", "time"),
        "floor_us": floor,
        "of_bandwidth": floor / us["peftlab"][1] if us["peftlab"][1] else None,
        # 10 %: a copy is not the fastest pattern there is.
        "above_limit": not device.dry and us["peftlab"][1] < 0.9 * floor,
        "weights_in_turn": count,
        **found.protocol(),
    }


def _forever(calls: list[Callable[[], Any]]) -> Iterator[Callable[[], Any]]:
    while True:
        yield from calls


def addition_order(device: Device) -> Iterator[Task]:
    """Where dropout forbids merging: adding the adapter to the finished product reads and writes all of it once more.
    Written first, the product is added onto it while the matrix unit is busy; and the sum is rounded once, not twice."""
    for M in device.pick((8192, 2048), (16,)):
        for N, K in device.pick(list(LAYER), [(96, 128)]):
            what = {"case": "product + adapter, added after or before", "M": M, "shape": [N, K], "R": 16}
            yield Task(what, partial(_addition_order, device, M, N, K), seconds=1)


def _addition_order(device: Device, M: int, N: int, K: int) -> Row:
    import torch

    # The product is about 1, the adapter a tenth of it.
    sizes = {(M, K): 1.0, (N, K): K**-0.5, (M, 16): 0.25, (N, 16): 0.05}
    x, W, S, B = (
        (device.randn(*size, seed=i) * scale).to(torch.bfloat16) for i, (size, scale) in enumerate(sizes.items())
    )
    y = torch.empty(M, N, dtype=torch.bfloat16, device=device.kind)
    runs: dict[str, Run] = {
        "after": lambda mark: torch.mm(x, W.t(), out=y).addmm_(S, B.t(), alpha=2.0),
        "before": lambda mark: torch.mm(S, (2.0 * B).t(), out=y).addmm_(x, W.t()),
        "product alone": lambda mark: torch.mm(x, W.t(), out=y),
    }
    want = x.double() @ W.double().T + 2 * S.double() @ B.double().T
    errors = {}
    for name in ("after", "before"):
        runs[name](lambda phase: None)
        errors[name] = float((y.double() - want).norm() / want.norm())
    del want
    found = interleaved(device, runs, seconds=0.5, ahead=True)
    us = {name: phases["time"] for name, phases in found.spreads().items()}
    ratio = found.ratio("after", "before", "time")
    return {"us": us, "rounds_us": found.rounds(), "ratio": ratio, "error": errors, **found.protocol()}
