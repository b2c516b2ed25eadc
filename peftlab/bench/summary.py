"""Summarizes measurements into a row per cell: medians, spread, intervals, and the ratio to its baseline."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from peftlab.bench.sweep import Cell
from peftlab.measuring.intervals import Interval, over_rounds, quartiles, ratio_of_medians

# Maximum relative difference between the first losses of a cell and its twin on PEFT's path, by matmul dtype: rounding stays
# within it, a missing factor or mask is off by far more (peftlab.training.parity).
FIRST_LOSS_TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 2e-2}


def summarize(
    cells: Sequence[Cell], reasons: Mapping[str, str], records: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Returns a row per cell.

    Args: reasons: key -> why a cell is impossible. records: those of the journal.
    Returns: rows with ``status`` ok, red, memory, impossible, failed or pending, a ``reason`` if not ok, and figures if ok:
        ``median``, quartiles ``q1`` and ``q3``, 95 % interval ``low`` and ``high`` over repetitions.
    """
    ceilings = best_ceilings(records)
    gates = {r["cell"]: r for r in records if r["kind"] == "gate"}
    runs: dict[str, list[Mapping[str, Any]]] = {cell.key: [] for cell in cells}
    for record in records:
        if record["kind"] == "run" and record["cell"] in runs:
            runs[record["cell"]].append(record)
    rows = [_row(cell, reasons.get(cell.key), gates.get(cell.key), runs, ceilings) for cell in cells]
    by_key = {row["key"]: row for row in rows}
    first = {row["what"]: row["key"] for row in reversed(rows) if row["status"] == "ok"}
    for cell, row in zip(cells, rows, strict=True):
        if row["status"] == "ok":
            twin = by_key.get(cell.twin.key)
            has_twin = cell.kernels != "reference" and twin is not None and twin["status"] == "ok"
            _compare(row, by_key[cell.twin.key if has_twin else first[cell.what]])
    _mark_front(rows)
    return rows


def best_ceilings(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first measured ceilings, with the fastest matmul of the whole benchmark; empty without measurements."""
    first = next((dict(r) for r in records if r["kind"] == "ceilings" and r["status"] == "ok"), {})
    speeds = [float(r["matmul_flops_per_s"]) for r in records if "matmul_flops_per_s" in r]
    return first | {"matmul_flops_per_s": max(speeds)} if first else {}


def _row(
    cell: Cell,
    impossible: str | None,
    gate: Mapping[str, Any] | None,
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    ceilings: Mapping[str, Any],
) -> dict[str, Any]:
    row = {"key": cell.key, **dataclasses.asdict(cell), "status": "ok", "reason": None}
    mine = sorted(runs[cell.key], key=lambda r: int(r["repetition"]))
    bad = next((r for r in mine if r["status"] != "ok"), None)
    if impossible is not None:
        return row | {"status": "impossible", "reason": impossible}
    if gate is None:
        return row | {"status": "pending", "reason": "not measured yet"}
    if gate["status"] != "ok" or bad is not None:
        failed = bad if gate["status"] == "ok" and bad is not None else gate
        return row | {"status": failed["status"], "reason": failed["reason"]}
    if not mine:
        return row | {"status": "pending", "reason": "not measured yet"}
    fault = _first_loss_fault(cell, mine[0], runs, ceilings.get("dtype", "float32"))
    if fault is not None:
        return row | {"status": "red", "reason": fault}
    return row | _figures(mine, gate, ceilings)


def _first_loss_fault(
    cell: Cell, mine: Mapping[str, Any], runs: Mapping[str, Sequence[Mapping[str, Any]]], dtype: str
) -> str | None:
    """The problem with the first loss; None if it matches or cannot be compared: no twin, or dropout masks that differ."""
    twins = [r for r in runs.get(cell.twin.key, []) if r["status"] == "ok"]
    if cell.kernels == "reference" or not twins or not mine["losses"] or mine["draws"]:
        return None
    got, want, allowed = (
        mine["losses"][0],
        twins[0]["losses"][0],
        FIRST_LOSS_TOLERANCE["bfloat16" if cell.kernels.startswith("cpu-") else dtype],
    )
    if abs(got - want) <= allowed * max(abs(want), 1e-3):
        return None
    return f"its first loss is {got:.6g}, and {want:.6g} on PEFT's path (allowed difference {allowed:g}, relative)"


def _figures(runs: Sequence[Mapping[str, Any]], gate: Mapping[str, Any], ceilings: Mapping[str, Any]) -> dict[str, Any]:
    first = runs[0]
    step_s = [sum(r["step_s"]) / len(r["step_s"]) for r in runs]
    tokens, examples = first["tokens_per_step"], first["rows_per_step"]
    flops, peak = gate.get("flops_per_step"), ceilings.get("matmul_flops_per_s")
    memory = {name: quartiles([float(r["memory"][name]) for r in runs])[1] for name in first["memory"]}
    joules = [r["joules"] / len(r["step_s"]) / tokens for r in runs if r["joules"] is not None]
    return {
        "repetitions": len(runs),
        "tokens_per_s": spread([tokens / s for s in step_s]),
        "examples_per_s": spread([examples / s for s in step_s]),
        "step_s": spread(step_s),
        "peak_bytes": spread([float(r["memory"]["peak_bytes"]) for r in runs]),
        "memory": memory,
        "flops_per_step": flops,
        "tflops": spread([flops / s / 1e12 for s in step_s]) if flops else None,
        "share_of_peak": spread([flops / s / peak for s in step_s]) if flops and peak else None,
        "joules_per_token": spread(joules) if joules else None,
        "tokens_per_step": tokens,
        "micro_batches": first["micro_batches"],
        "losses": first["losses"],
        "num_trained": gate["num_trained"],
        "num_total": gate["num_total"],
        "gate": {name: gate.get(name) for name in ("loss", "loss_reference", "worst_cosine", "logits_error")},
        "num_fused": first["num_fused"],
        "num_adapted": first["num_adapted"],
        "slow": first["slow"],
        "runs": [{k: v for k, v in r.items() if k not in ("kind", "cell", "status")} for r in runs],
    }


def spread(values: Sequence[float]) -> dict[str, float | None]:
    q1, median, q3 = quartiles(values)
    interval = over_rounds(values)
    return {"median": median, "q1": q1, "q3": q3, "low": interval.low, "high": interval.high}


def ratio(interval: Interval) -> dict[str, Any]:
    """Returns the ratio as plain values; ``differs`` is None if there are too few repetitions to decide."""
    differs = None if interval.low is None or interval.high is None else not interval.low <= 1 <= interval.high
    return {"value": interval.value, "low": interval.low, "high": interval.high, "differs": differs}


def per_second(row: Mapping[str, Any]) -> list[float]:
    """Returns tokens/s per repetition."""
    return [row["tokens_per_step"] * len(r["step_s"]) / sum(r["step_s"]) for r in row["runs"]]


def _compare(row: dict[str, Any], baseline: Mapping[str, Any]) -> None:
    """Sets ``speed`` (above 1: faster) and ``memory_ratio`` (below 1: smaller) over the common repetitions."""
    row["baseline"] = None if baseline is row else baseline["key"]
    if baseline is row:
        row["speed"] = row["memory_ratio"] = None
        return
    both = sorted({r["repetition"] for r in row["runs"]} & {r["repetition"] for r in baseline["runs"]})

    def of(one: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        return [r for r in one["runs"] if r["repetition"] in both]

    if not both:
        row["speed"] = row["memory_ratio"] = None
        return
    speeds = [per_second({**one, "runs": of(one)}) for one in (row, baseline)]
    peaks = [[float(r["memory"]["peak_bytes"]) for r in of(one)] for one in (row, baseline)]
    row["speed"] = ratio(ratio_of_medians(*speeds))
    row["memory_ratio"] = ratio(ratio_of_medians(*peaks))


def _mark_front(rows: Sequence[dict[str, Any]]) -> None:
    """Sets ``pareto``: whether no other cell of the same work is both faster and smaller."""
    for row in rows:
        if row["status"] != "ok":
            continue
        rivals = [r for r in rows if r["status"] == "ok" and r["what"] == row["what"] and r is not row]
        fast, small = row["tokens_per_s"]["median"], row["peak_bytes"]["median"]
        row["pareto"] = not any(
            r["tokens_per_s"]["median"] >= fast
            and r["peak_bytes"]["median"] <= small
            and (r["tokens_per_s"]["median"], r["peak_bytes"]["median"]) != (fast, small)
            for r in rivals
        )
