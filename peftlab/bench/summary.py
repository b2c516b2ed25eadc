"""From the measurements to a row of figures for each cell: medians, spread, intervals, and the ratio to its baseline."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from peftlab.bench.sweep import Cell
from peftlab.measuring.intervals import Interval, over_rounds, quartiles, ratio_of_medians

# Largest relative difference of the first loss of a cell and of its twin on PEFT's path, by the type of the matmuls:
# rounding stays within it, a dropped factor or mask is off by far more (peftlab.training.parity).
FIRST_LOSS_TOLERANCE = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 2e-2}


def summarize(
    cells: Sequence[Cell], reasons: Mapping[str, str], records: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A row per cell.

    Args: reasons: key -> why a cell cannot exist. records: of the journal.
    Returns: rows with ``status`` ok, red, memory, impossible, failed or pending, a ``reason`` where it is not ok, and the
        figures where it is: ``median``, quartiles ``q1`` and ``q3``, 95 % interval ``low`` and ``high`` over repetitions.
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
    """What was measured first, with the quickest matmul of the whole benchmark; empty before anything was measured."""
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
        found = bad if gate["status"] == "ok" and bad is not None else gate
        return row | {"status": found["status"], "reason": found["reason"]}
    if not mine:
        return row | {"status": "pending", "reason": "not measured yet"}
    fault = _first_loss_fault(cell, mine[0], runs, ceilings.get("dtype", "float32"))
    if fault is not None:
        return row | {"status": "red", "reason": fault}
    return row | _figures(mine, gate, ceilings)


def _first_loss_fault(
    cell: Cell, mine: Mapping[str, Any], runs: Mapping[str, Sequence[Mapping[str, Any]]], dtype: str
) -> str | None:
    """What is wrong with the first loss; None where there is nothing to compare: no twin, or dropout, whose masks differ."""
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
    found = over_rounds(values)
    return {"median": median, "q1": q1, "q3": q3, "low": found.low, "high": found.high}


def ratio(found: Interval) -> dict[str, Any]:
    """A ratio as it is written down; ``differs`` is None where there were too few repetitions to tell."""
    differs = None if found.low is None or found.high is None else not found.low <= 1 <= found.high
    return {"value": found.value, "low": found.low, "high": found.high, "differs": differs}


def per_second(row: Mapping[str, Any]) -> list[float]:
    """tokens/s of each repetition."""
    return [row["tokens_per_step"] * len(r["step_s"]) / sum(r["step_s"]) for r in row["runs"]]


def _compare(row: dict[str, Any], baseline: Mapping[str, Any]) -> None:
    """``speed`` (above 1: faster) and ``memory_ratio`` (below 1: smaller) over the repetitions that both have."""
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
    """``pareto``: no other cell of the same work is both faster and smaller."""
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
