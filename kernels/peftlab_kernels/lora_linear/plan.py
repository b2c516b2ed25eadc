"""The plan of a LoRA linear: from a table of measurements if there is one, else by rule."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from peftlab_kernels.runtime import next_power_of_2

SHIPPED_TABLE = Path(__file__).with_name("plans.json")
FORWARD, BACKWARD = ("merged", "split", "library"), ("merged", "split")
# Required fields of a table's row; a measurement may add more.
_FIELDS = {
    "device": str, "kind": str, "m": int, "n": int, "k": int, "dropout": bool, "forward": str, "backward": str,
}  # fmt: skip

# Above this many rows bitsandbytes' fused NF4 product is slower than dequantizing once plus a dense product, by compute
# capability (bitsandbytes 0.50 switches at the same sizes for most weights).
_NF4_LIBRARY_ROWS = {(8, 9): 256, (9, 0): 48, (8, 0): 128}
# Capabilities where bitsandbytes' int8 product gains nothing. It copies and quantizes x, and writes and reads 4-byte sums:
# about 350 us on an H200 at 8,192 x 4,096 x 4,096. Dequantizing the weight and multiplying in 16 bits takes as long, does not
# round x and does not wait for the host. GPUs with slower matrix units keep it (1.17 against 1.72 ms on a 4090).
_NO_INT8_LIBRARY = {(9, 0), (10, 0), (10, 3)}


@dataclass(frozen=True)
class Plan:
    """forward: ``merged`` (one product with W + s B A), ``split`` (the adapter, then the product with W added to it) or
    ``library`` (bitsandbytes' base product, then the adapter). backward (dX): ``merged`` or ``split``."""

    forward: str
    backward: str


class Key(NamedTuple):
    """The key for choosing a plan. device: ``cpu`` or ``sm_90``. m: rows of the input, rounded up to a power of two."""

    device: str
    kind: str
    m: int
    n: int
    k: int
    dropout: bool


UNMERGED = Plan("split", "split")
_Table = dict[Key, Plan]
_extra_tables: list[_Table] = []
_planned_rows: list[int] = []
_forced: list[Plan] = []
_int8_by_library: list[list[Plan]] = []


def key_of(kind: str, device: torch.device, *, M: int, N: int, K: int, dropout: bool) -> Key:
    return Key(_device_key(device.type, device.index), kind, next_power_of_2(max(M, 1)), N, K, dropout)


def choose(
    kind: str, device: torch.device, *, M: int, N: int, K: int, dropout: bool, on_grid: bool, backend: str
) -> Plan:
    """The plan for [M, K] inputs to a [N, K] weight of ``kind`` (dense, nf4, int8).

    on_grid: W is stored in the 16-bit type of x. Adding a small adapter to it would round most of the adapter away, so it
    is never merged, whatever was measured.
    """
    if _forced:
        return _forced[-1]
    M = _planned_rows[-1] if _planned_rows else M
    chosen = _choose(key_of(kind, device, M=M, N=N, K=K, dropout=dropout), backend)
    if kind == "int8" and _int8_by_library:
        if chosen.forward != "library":
            _int8_by_library[-1].append(chosen)
        return Plan("library", chosen.backward)
    return UNMERGED if on_grid and "merged" in (chosen.forward, chosen.backward) else chosen


@contextlib.contextmanager
def planned_for(rows: int) -> Iterator[None]:
    """Inside the context, plans are chosen for ``rows`` rows, whatever the input has: a small sample then uses the plans
    of the real batch."""
    _planned_rows.append(rows)
    try:
        yield
    finally:
        _planned_rows.pop()


@contextlib.contextmanager
def forced(plan: Plan) -> Iterator[None]:
    """Inside the context every call uses ``plan``, to measure it."""
    _forced.append(plan)
    try:
        yield
    finally:
        _forced.pop()


@contextlib.contextmanager
def int8_by_library() -> Iterator[list[Plan]]:
    """Inside the context bitsandbytes multiplies int8 weights, even if another plan is faster. It rounds rows of x to 8 bits,
    as in its own layers. The list collects the replaced plans."""
    replaced: list[Plan] = []
    _int8_by_library.append(replaced)
    try:
        yield replaced
    finally:
        _int8_by_library.pop()


def use_table(path: Path | None) -> None:
    """Uses the measurements in ``path`` before the shipped ones, and replaces those of an earlier call; None: only the
    shipped ones. Raises: ValueError if the file is not such a table; then nothing changes."""
    tables = [] if path is None else [_table_of(read_table(path))]
    _extra_tables[:] = tables
    _choose.cache_clear()


def in_use() -> str:
    """A short hash of the measured plans; ``by rule`` without a table."""
    plans = sorted(str(item) for table in _extra_tables for item in table.items())
    return hashlib.sha256("\n".join(plans).encode()).hexdigest()[:12] if plans else "by rule"


def read_table(path: Path) -> list[dict[str, Any]]:
    """Rows ``{device, kind, m, n, k, dropout, forward, backward}``. Raises: ValueError naming the first wrong row."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["plans"]
        if not isinstance(rows, list):
            raise TypeError(f"expected a list of plans, found {type(rows).__name__}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a table of kernel plans: {type(error).__name__}: {error}") from error
    for number, row in enumerate(rows):
        where = f"{path}, plan {number + 1}"
        if not isinstance(row, dict) or any(type(row.get(name)) is not kind for name, kind in _FIELDS.items()):
            raise ValueError(f"{where}: expected {', '.join(_FIELDS)}, found {row}")
        if row["forward"] not in FORWARD or row["backward"] not in BACKWARD:
            raise ValueError(f"{where}: expected {FORWARD} and {BACKWARD}, found {row}")
        if row["kind"] == "dense" and row["forward"] == "library":
            raise ValueError(f"{where}: bitsandbytes has no product with a dense weight, found {row}")
        if row["dropout"] and "merged" in (row["forward"], row["backward"]):
            raise ValueError(f"{where}: dropout acts on x, so nothing can be merged, found {row}")
    return rows


def _table_of(rows: list[dict[str, Any]]) -> _Table:
    return {Key(*(row[name] for name in Key._fields)): Plan(row["forward"], row["backward"]) for row in rows}


@functools.cache
def _choose(key: Key, backend: str) -> Plan:
    for table in [*_extra_tables, _shipped_table()]:
        if key in table:
            return table[key]
    return rule(key.device, key.kind, M=key.m, N=key.n, K=key.k, dropout=key.dropout, backend=backend)


@functools.cache
def _shipped_table() -> _Table:
    return _table_of(read_table(SHIPPED_TABLE)) if SHIPPED_TABLE.is_file() else {}


def rule(device: str, kind: str, *, M: int, N: int, K: int, dropout: bool, backend: str = "triton") -> Plan:
    """The plan without measurements. backend: the backend of the kernels with matrix products, on a GPU.

    Merging saves passes over x and y, and is free where a quantized weight is written out anyway. A dense weight would
    have to be copied, 8NK bytes against 2MN + 2MK: no gain in time up to 2N rows, and a loss in precision (``choose``).
    PyTorch merges through float32 copies, so on a GPU without Triton nothing is merged. Dropout acts on x, so with
    dropout nothing is merged either.
    """
    cuda, capability = device != "cpu", _capability(device)
    library = cuda and (
        (kind == "nf4" and _NF4_LIBRARY_ROWS.get(capability, 64) >= M)
        or (kind == "int8" and capability not in _NO_INT8_LIBRARY)
    )
    merges = kind != "dense" and not dropout and (backend == "triton" if cuda else max(N, K) <= M)
    backward = "merged" if merges else "split"
    return Plan("library" if library else backward, backward)


@functools.cache
def _device_key(kind: str, index: int | None) -> str:
    if kind != "cuda":
        return kind
    return "sm_{}{}".format(*torch.cuda.get_device_capability(index))


def _capability(device: str) -> tuple[int, int]:
    number = device.removeprefix("sm_")
    return (int(number[:-1]), int(number[-1])) if number.isdigit() else (0, 0)
