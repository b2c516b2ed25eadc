"""gpu-check: its rows as a readable table."""

from __future__ import annotations

from typing import Any

from bench.gpu_check.base import Row


def summary(rows: list[Row], *, seconds: float) -> str:
    """Counts of green, red and not run per section; figures with targets; red rows; the verdict."""
    parts = [_sections(rows), _figures(rows), _plans(rows), _problems(rows), _verdict(rows, seconds)]
    return "\n\n".join(part for part in parts if part)


def _sections(rows: list[Row]) -> str:
    lines = [f"{'section':36} {'green':>6} {'red':>6} {'not run':>8}"]
    for section in dict.fromkeys(row["section"] for row in rows):
        states = [row["ok"] for row in rows if row["section"] == section]
        lines.append(f"{section:36} {states.count(True):6} {states.count(False):6} {states.count(None):8}")
    return "\n".join(lines)


def name_of(row: Row) -> str:
    """A short name of the row's task."""
    task = row.get("task", {})
    words = [str(task.get("check") or task.get("case") or row["section"])]
    words += [str(task[key]) for key in ("kind", "against", "teacher", "quantize", "dtype") if key in task]
    if "shape" in task and "case" in task:
        words.append("x".join(map(str, task["shape"])))
    words += [f"{key}={task[key]}" for key in ("M", "R", "batch", "length", "card_gb") if key in task]
    words += [f"layers={row['layers']}"] if "layers" in row else []
    words += [f"d={task['dropout']:g}"] if task.get("dropout") else []
    return " ".join(words)


def _figures(rows: list[Row]) -> str:
    measured = [row for row in rows if "ratio" in row or "ratios" in row or "tflops" in row or "gb_per_s" in row]
    if not measured:
        return ""
    lines = [f"{'case':78} {'ours, us':>10} {'ratio':>7} {'target':>7} {'predicted':>9}  remarks"]
    for row in measured:
        ratio = _both(row.get("ratio") or next(iter(row.get("ratios", {}).values()), {}))
        value = f"{ratio['value']:.3f}" if ratio else f"{row.get('tflops') or row.get('gb_per_s'):.0f}"
        ours = _microseconds(row.get("us", {}).get("peftlab") or row.get("us", {}).get("before"))
        lines.append(
            f"{name_of(row):78} {ours:>10} {value:>7} {_number(row.get('target')):>7} "
            f"{_number(_predicted(row)):>9}  {'; '.join(_remarks(row, ratio))}"
        )
    return "\n".join(lines)


def _plans(rows: list[Row]) -> str:
    """Memory and speed of whole steps next to their predictions."""
    lines = []
    for row in rows:
        if "plan_bytes" in row and "peak_bytes" in row:
            lines.append(
                f"{name_of(row)}: {row['peak_bytes'] / 1e9:.2f} GB, planned {row['plan_bytes']['peak'] / 1e9:.2f}; "
                f"{row['tokens_per_s']:,} tokens/s, predicted {row['predicted_tokens_per_s']:,}"
            )
    return "\n".join(lines)


def _both(ratio: Row) -> Row:
    """The ratio; of forward and backward together if there are phases."""
    return ratio.get("both", ratio) if ratio else {}


def _microseconds(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("both") or next(iter(value.values()))
    if isinstance(value, list):
        value = value[1]
    return "" if value is None else f"{value:,.1f}"


def _number(value: Any) -> str:
    """A number as text; of several targets, the first contestant's speed target."""
    if isinstance(value, dict):
        return f"{next(iter(value.values()))[0]:.2f}"
    return "" if value is None else f"{value:.2f}"


def _predicted(row: Row) -> float | None:
    if "predicted_ratio" in row:
        return float(row["predicted_ratio"])
    predicted = row.get("predicted_us")
    return predicted["PEFT"] / predicted["built"] if predicted else None


def _remarks(row: Row, ratio: Row) -> list[str]:
    remarks = []
    if row.get("met") is not None:
        remarks.append("met" if row["met"] else "MISSED")
    if row.get("above_limit"):
        remarks.append("ABOVE THE LIMIT: measurement error?")
    if ratio.get("differs") is False:
        remarks.append("no difference")
    if row.get("held_share") is not None:
        remarks.append(f"holds {100 * row['held_share']:.1f} % of PEFT's bytes")
    if "tokens_per_s" in row and isinstance(row["tokens_per_s"], dict):
        remarks.append(f"{row['tokens_per_s']['peftlab']:,} tokens/s")
    return remarks


def _problems(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        if row["ok"] is False:
            what = row.get("failed") or row.get("not_run") or row.get("stopped") or row.get("bad") or ""
            lines.append(f"RED     {row['section']}: {name_of(row)} {str(what).splitlines()[0] if what else ''}")
        elif row["ok"] is None:
            what = row.get("not_run") or row.get("stopped") or row.get("failed") or ""
            lines.append(f"not run {row['section']}: {name_of(row)}: {what}")
    return "\n".join(lines)


def _verdict(rows: list[Row], seconds: float) -> str:
    def targets(key: str, value: bool) -> list[str]:
        return [name_of(row) for row in rows if row.get(key) is value]

    missed = targets("met", False) + [f"{name} (memory)" for name in targets("held_met", False)]
    met = len(targets("met", True)) + len(targets("held_met", True))
    lines = [f"targets: {met} met, {len(missed)} missed", *(f"  missed: {name}" for name in missed)]
    above = [name_of(row) for row in rows if row.get("above_limit")]
    lines += [f"  above the limit: {name}" for name in above]
    states = [row["ok"] for row in rows]
    lines.append(
        f"{states.count(True)} rows green, {states.count(False)} red, {states.count(None)} not run, in {seconds:.0f} s"
    )
    return "\n".join(lines)
