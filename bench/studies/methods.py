"""Tables of the adapter methods: what each costs and reaches, from the results of ``peftlab bench``.

    peftlab bench film-sentiment --methods NAME,.. --quantize none --kernels auto --batch 4 --length 128 --repeats 3
    peftlab bench film-sentiment --quality --methods NAME,.. --seeds 5

bench/results/ keeps their ``bench.json`` and ``quality.json`` as ``methods-MODEL-cpu.json`` and ``methods-quality-cpu.json``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peftlab import formatting

Result = Mapping[str, Any]


def speed_table(results: Mapping[str, Result]) -> str:
    """One row per method with trained parameters, seconds per step and memory of each model.

    Args: results: documents of ``peftlab bench`` by the model's name in the table. Their first cell is the baseline of ratios.
    """
    lines, header = [], ["method"]
    for model in results:
        header += [f"{model}: trained", "ms a step", "times as fast as the first", "peak memory"]
    lines += [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    rows = dict.fromkeys(str(cell["method"]) for result in results.values() for cell in result["cells"])
    for label in rows:
        columns = [f"`{label}`"]
        for result in results.values():
            cell = next((c for c in result["cells"] if c["method"] == label), None)
            columns += _speed(cell) if cell is not None and cell["status"] == "ok" else ["-", "-", "-", "-"]
        lines.append(f"| {' | '.join(columns)} |")
    reasons = [
        f"- `{cell['method']!s}` on {model}: {_first_sentence(cell['reason'])}"
        for model, result in results.items()
        for cell in result["cells"]
        if cell["status"] != "ok"
    ]
    notes = [f"**{model}**: {_where(result)}. `{result['header']['command']}`" for model, result in results.items()]
    return "\n".join([*lines, "", *(["Not measured:", "", *reasons, ""] if reasons else []), *notes])


def quality_table(result: Result) -> str:
    """One row per method with its learning rate, held-out metric with its interval, and the difference to the first."""
    header, rows = result["header"], result["methods"]
    metric, seeds = header["metric"], header["protocol"]["seeds"]
    lines = [
        f"| method | learning rate | {metric} | lowest..highest seed | difference to {rows[0]['name']} | trained |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"| `{row['name']}` | - | {row['status']} | - | - | - |")
            continue
        score, difference = row["metric"], row["difference"]
        value = f"{score['value']:.4f} ± {score['high'] - score['value']:.4f}"
        gap = "baseline" if difference is None else _difference(difference)
        scores = sorted(run["metrics"][metric] for run in row["runs"])
        seen = f"{scores[0]:.3f}..{scores[-1]:.3f}"
        lines.append(f"| `{row['name']}` | {row['lr']:g} | {value} | {seen} | {gap} | {row['num_trained']:,} |")
    steps = next(row["steps"] for row in rows if row["status"] == "ok")
    tried = "; ".join(
        f"{row['name']} {', '.join(f'{rate} {_score(score)}' for rate, score in row['tried'].items())}" for row in rows
    )
    return "\n".join(
        [
            *lines,
            "",
            f"{steps} steps each, {seeds} seeds, 95 % intervals of the mean (Student t), differences paired by seed. {metric} on the "
            f"first seed by learning rate: {tried}.",
            "",
            f"{_where(result)}. `{header['command']}`",
        ]
    )


def _speed(cell: Mapping[str, Any]) -> Sequence[str]:
    step, ratio = cell["step_s"], cell["speed"]
    time = f"{1000 * step['median']:,.0f} ({1000 * step['q1']:,.0f}..{1000 * step['q3']:,.0f})"
    times = "baseline" if ratio is None else _times(ratio)
    rank = "" if cell["rank"] is None else f" (r{cell['rank']})"
    return [f"{cell['num_trained']:,}{rank}", time, times, formatting.size(cell["peak_bytes"]["median"])]


def _times(ratio: Mapping[str, Any]) -> str:
    """The speed as a multiple of the baseline's, with its interval."""
    if ratio["differs"] is False:
        return "no difference"
    interval = "" if ratio["low"] is None else f" ({ratio['low']:.2f}..{ratio['high']:.2f})"
    return f"{ratio['value']:.2f}x{interval}"


def _difference(difference: Mapping[str, Any]) -> str:
    if not difference["differs"]:
        return "no difference"
    return f"{difference['value']:+.4f} ({difference['low']:+.4f}..{difference['high']:+.4f})"


def _score(score: float | None) -> str:
    return "-" if score is None else f"{score:.3f}"


def _first_sentence(reason: str) -> str:
    text = " ".join(reason.split()).removeprefix("1 problem in the recipe: ").replace("`", "")
    return text.split(". ")[0].split("; ")[0].rstrip(".")


def _where(result: Result) -> str:
    header = result["header"]
    machine, versions = header["machine"], header["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "peft") if name in versions)
    return (
        f"{machine['name']}, {machine['threads']} thread{'s' if machine['threads'] != 1 else ''} of {machine['cores']} cores; {named}; "
        f"commit {header['commit'][:9]}"
    )
