"""Statistics of the runs of several engines, and their tables."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.tables import spread, where
from peftlab.measuring.intervals import ratio_of_medians

MIB = 2**20


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median and range of each figure per engine, and ratios peer / peftlab: above 1 peftlab is better."""
    by_engine: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda r: r["repetition"]):
        by_engine.setdefault(row["engine"], []).append(row)
    ours = by_engine["peftlab"]
    return {
        "engines": {engine: engine_figures(repetitions) for engine, repetitions in by_engine.items()},
        "ratios": {
            engine: {
                "speed": ratio_of(ours, theirs, lambda r: r["seconds"]),
                "peak_memory": ratio_of(ours, theirs, lambda r: r["peak_rss_bytes"]),
                "training_memory": ratio_of(ours, theirs, lambda r: max(1, r["training_peak_increase_bytes"])),
            }
            for engine, theirs in by_engine.items()
            if engine != "peftlab"
        },
    }


def engine_figures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median and range of each figure over the repetitions of one engine."""
    figures = {
        "seconds": [r["seconds"] for r in rows],
        "cpu_seconds": [r["cpu_seconds"] for r in rows],
        "rows_per_s": [r["rows"] / r["seconds"] for r in rows],
        "tokens_per_s": [r["tokens"] / r["seconds"] for r in rows],
        "trained_tokens_per_s": [r["trained_tokens"] / r["seconds"] for r in rows],
        "padded_tokens": [r["padded_tokens"] for r in rows],
        "micro_batches": [r["micro_batches"] for r in rows],
        "peak_rss_bytes": [r["peak_rss_bytes"] for r in rows],
        "training_peak_increase_bytes": [r["training_peak_increase_bytes"] for r in rows],
        **{f"before_{name}": [r["before"][name] for r in rows] for name in rows[0]["before"]},
        **{f"after_{name}": [r["after"][name] for r in rows] for name in rows[0]["after"]},
    }
    return {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name, values in figures.items()
    }


def ratio_of(
    ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], value: Callable[[dict[str, Any]], float]
) -> dict[str, float | None]:
    """Ratio of medians with a 95 % bootstrap interval over pairs within a repetition; no interval for a single pair."""
    ratio = ratio_of_medians([value(r) for r in theirs], [value(r) for r in ours], min_rounds=2)
    return {"ratio": ratio.value, "low": ratio.low, "high": ratio.high}


def ratio_text(ratio: dict[str, float | None]) -> str:
    low, high = ratio["low"], ratio["high"]
    if low is None or high is None:
        return f"{ratio['ratio']:.2f} (one repetition: no interval)"
    if low <= 1 <= high:
        return f"no difference ({low:.2f}..{high:.2f})"
    return f"{ratio['ratio']:.2f} ({low:.2f}..{high:.2f})"


def verdict(result: dict[str, Any]) -> list[str]:
    """A line per peer: speed and memory, and the expected speed."""
    return [
        f"against {title}: speed ratio {ratio_text(ratios['speed'])}"
        + (f", expected {result['expected_ratio']}" if place == 0 else "")
        + f"; training memory ratio {ratio_text(ratios['training_memory'])}"
        for place, (title, ratios) in enumerate(_ratios(result))
    ]


def _ratios(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(result["peers"][engine], ratios) for engine, ratios in result["summary"]["ratios"].items()]


def _results(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("peers-*.json"))]


def tables(folder: Path) -> str:
    """The Markdown of all result files in ``folder``, for bench/RESULTS.md."""
    results = _results(folder)
    parts = [_ratio_table(results), *map(_case_table, results)] if results else []
    if (path := folder / "split_cost.json").is_file():
        parts.append(split_cost_table(json.loads(path.read_text())))
    return "\n\n".join(parts) or "No results yet."


def short_table(folder: Path) -> str:
    """A short version of ``tables``, for README.md."""
    lines = ["| work | against | speed, times | peak memory, times less |", "|---|---|---|---|"]
    results = _results(folder)
    for r in results:
        for title, ratios in _ratios(r):
            figures = f"{ratio_text(ratios['speed'])} | {ratio_text(ratios['peak_memory'])}"
            lines.append(f"| {r['title']}, {r['device'].upper()} | {title} | {figures} |")
    if not results:
        return "No results yet."
    # bench/RESULTS.md has commits and commands with each result.
    notes = [f"{where(r).rpartition('; commit')[0]}; {r['rows'][0]['threads']} threads." for r in results]
    return "\n".join([*lines, "", *dict.fromkeys(notes)])


def _ratio_table(results: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| case | against | speed, times | expected | peak memory, times less | training memory, times less |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        for place, (title, ratios) in enumerate(_ratios(r)):
            expected = f"{r['expected_ratio']:.1f}" if place == 0 else ""
            memory = f"{ratio_text(ratios['peak_memory'])} | {ratio_text(ratios['training_memory'])}"
            lines.append(f"| `{r['case']}` | {title} | {ratio_text(ratios['speed'])} | {expected} | {memory} |")
    return "\n".join(lines)


def _case_table(r: dict[str, Any]) -> str:
    engines, metrics = r["summary"]["engines"], r["metrics"]
    heads = ["", "seconds", "rows/s", "tokens/s"]
    trains_tokens = engines["peftlab"]["trained_tokens_per_s"]["median"] > 0
    heads += ["trained tokens/s"] if trains_tokens else []
    heads += ["padded tokens", "micro-batches", "peak memory, MiB", "training adds, MiB"]
    heads += [f"{m} before" for m in metrics if m == "loss"] + [f"{m} after" for m in metrics]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for key, name in ({"peftlab": "peftlab"} | r["peers"]).items():
        e = engines[key]
        cells = [name, spread(e["seconds"], 2), spread(e["rows_per_s"], 1), spread(e["tokens_per_s"], 0)]
        cells += [spread(e["trained_tokens_per_s"], 0)] if trains_tokens else []
        cells += [spread(e["padded_tokens"], 0), spread(e["micro_batches"], 0)]
        cells += [spread(e[k], 0, MIB) for k in ("peak_rss_bytes", "training_peak_increase_bytes")]
        cells += [spread(e["before_loss"], 4)] if "loss" in metrics else []
        cells += [spread(e[f"after_{m}"], 4) for m in metrics]
        lines.append("| " + " | ".join(cells) + " |")
    first, gates = r["rows"][0], r["gate"]["peers"].values()
    steps = len(r["gate"]["losses"]["peftlab"])
    absent = "; ".join(f"{title} left out: {reason}" for title, reason in r["missing"].items())
    return "\n".join(
        [
            f"**`{r['case']}`**: {r['title']}; {first['steps']:,} steps, {len(r['rows']) // len(engines)} repetitions. Gate: losses "
            f"within {max(g['first'] for g in gates):.1e} at step 1 and {max(g['largest'] for g in gates):.1e} over {steps} steps. "
            f"{where(r)}, {first['threads']} threads. `{r['command']}`" + (f". {absent}" if absent else ""),
            "",
            *lines,
        ]
    )


def split_cost_table(result: dict[str, Any]) -> str:
    """Cost of one more micro-batch, per model."""
    lines = [
        f"**Cost of one more micro-batch**: seconds = a + b x padded tokens, forward and backward. {where(result)}, "
        f"{next(iter(result['models'].values()))['threads']} threads. `{result['command']}`",
        "",
        "| model | a, ms | b, ms a token | a / b, tokens | largest relative residual |",
        "|---|---|---|---|---|",
    ]
    for name, m in result["models"].items():
        lines.append(
            f"| {name} | {m['constant_ms']:.1f} | {m['ms_per_token']:.3f} | {m['split_cost_tokens']:.0f} | "
            f"{100 * m['largest_relative_residual']:.0f} % |"
        )
    return "\n".join(lines)
