"""Quality and cost: the rows of ``peftlab bench --quality``, and their picture."""

from __future__ import annotations

import csv
import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peftlab.bench.captions import machine_text, memory_unit
from peftlab.measuring.drawing import colours, markers, place_labels, save_pictures
from peftlab.measuring.intervals import over_rounds, over_seeds, quartiles
from peftlab.specs.methods import VARIANTS
from peftlab.specs.metrics import family_of
from peftlab.specs.protocol import MOST_RATES_BEYOND

RESULT, TABLE, PICTURE, VECTOR = "quality.json", "quality.csv", "quality.png", "quality.svg"
COLOURS, MARKERS = colours(VARIANTS), markers(VARIANTS)
_GREY = "#666666"


def name_of(method: str, rank: int | None) -> str:
    return method if rank is None else f"{method} r{rank}"


def rate_to_try(
    records: Sequence[Mapping[str, Any]], name: str, rates: Sequence[float], metric: str, *, search: bool
) -> float | None:
    """Returns a learning rate that is still to be tried on the first seed: one of ``rates``, then, in a search, the next one
    beyond the end that is best; None if all are tried and the best lies between others."""
    tried = first_trials(records, name)
    if missing := [rate for rate in rates if rate not in tried]:
        return missing[0]
    best = _best(tried, metric)
    if not search or best is None or len(rates) < 2 or len(tried) >= len(rates) + MOST_RATES_BEYOND:
        return None
    factor = (max(rates) / min(rates)) ** (1 / (len(rates) - 1))
    beyond = best * factor if best == max(tried) else best / factor if best == min(tried) else None
    return None if beyond is None else float(f"{beyond:.2g}")


def chosen_rate(
    records: Sequence[Mapping[str, Any]], name: str, rates: Sequence[float], metric: str, *, search: bool = False
) -> float | None:
    """Returns the learning rate with the best metric on the first seed, the smaller one of equals; None until all are tried,
    or if none has a finite metric."""
    if rate_to_try(records, name, rates, metric, search=search) is not None:
        return None
    return _best(first_trials(records, name), metric)


def _best(tried: Mapping[float, Mapping[str, Any]], metric: str) -> float | None:
    scores = {rate: r["metrics"][metric] for rate, r in tried.items() if r["status"] == "ok"}
    scores = {rate: score for rate, score in scores.items() if math.isfinite(score)}
    sign = 1 if smaller_is_better(metric) else -1
    return min(sorted(scores), key=lambda rate: sign * scores[rate], default=None)


def first_trials(records: Sequence[Mapping[str, Any]], name: str) -> dict[float, Mapping[str, Any]]:
    """Maps learning rates to records of the first seed."""
    mine = [r for r in records if r["kind"] == "quality" and r["cell"] == name]
    return {r["lr"]: r for r in mine if r["turn"] == 0}


def smaller_is_better(metric: str) -> bool:
    spec = family_of(metric)
    return spec is not None and not spec.higher_is_better


def quality_rows(
    variants: Sequence[tuple[str, int | None]],
    reasons: Mapping[tuple[str, int | None], str],
    records: Sequence[Mapping[str, Any]],
    metric: str,
    rates: Sequence[float],
    *,
    search: bool = False,
) -> list[dict[str, Any]]:
    """Returns a row per method and rank, with its learning rate: the metric over seeds with a 95 % interval (Student t),
    trained parameters, seconds (median) and memory of the training, and the paired difference of the metric to the first
    row."""
    rows = []
    for method, rank in variants:
        row: dict[str, Any] = {"method": method, "rank": rank, "name": name_of(method, rank), "status": "ok"}
        row["reason"] = None
        rate = chosen_rate(records, row["name"], rates, metric, search=search)
        tried = first_trials(records, row["name"])
        row |= {"lr": rate, "tried": {f"{r:g}": _score(record, metric) for r, record in sorted(tried.items())}}
        row["at_end"] = rate is not None and len(tried) > 1 and rate in (min(tried), max(tried))
        mine = [r for r in records if r["kind"] == "quality" and r["cell"] == row["name"] and r["lr"] == rate]
        bad = next((r for r in mine if r["status"] != "ok"), None)
        if rate is None and len(tried) >= len(rates):
            bad = next((r for r in tried.values() if r["status"] != "ok"), _NO_METRIC)
        if (method, rank) in reasons:
            row |= {"status": "impossible", "reason": reasons[method, rank]}
        elif bad is not None or not mine:
            row |= (
                {"status": bad["status"], "reason": bad["reason"]}
                if bad
                else {"status": "pending", "reason": "not trained"}
            )
        else:
            row |= _figures(sorted(mine, key=lambda r: int(r["seed"])), metric)
        rows.append(row)
    first = next((row for row in rows if row["status"] == "ok"), None)
    for row in rows:
        if row["status"] == "ok":
            row["difference"] = None if row is first or first is None else _difference(row, first, metric)
    return rows


# Every training finished, but none with a finite metric.
_NO_METRIC = {"status": "failed", "reason": "its metric is not finite at any learning rate"}


def _score(record: Mapping[str, Any], metric: str) -> float | None:
    return record["metrics"][metric] if record["status"] == "ok" else None


def _figures(runs: Sequence[Mapping[str, Any]], metric: str) -> dict[str, Any]:
    return {
        "metric": over_seeds([float(r["metrics"][metric]) for r in runs]).as_dict(),
        "num_trained": runs[0]["num_trained"],
        "seconds": over_rounds([float(r["seconds"]) for r in runs]).as_dict(),
        "peak_bytes": quartiles([float(r["memory"]["peak_bytes"]) for r in runs])[1],
        "steps": runs[0]["steps"],
        "runs": [{k: r[k] for k in ("seed", "metrics", "seconds", "tokens", "memory", "last_loss")} for r in runs],
    }


def _difference(row: Mapping[str, Any], first: Mapping[str, Any], metric: str) -> dict[str, Any]:
    seeds = {r["seed"]: r for r in first["runs"]}
    pairs = [(r["metrics"][metric], seeds[r["seed"]]["metrics"][metric]) for r in row["runs"] if r["seed"] in seeds]
    interval = over_seeds([mine - theirs for mine, theirs in pairs])
    differs = None if interval.low is None or interval.high is None else not interval.low <= 0 <= interval.high
    return {**interval.as_dict(), "differs": differs, "to": first["name"]}


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = ["method", "rank", "lr", "status", "reason", "num_trained", "steps", "peak_bytes"]
    spreads = [f"{name}_{part}" for name in ("metric", "seconds", "difference") for part in ("value", "low", "high")]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*columns, *spreads], restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        line = {name: row[name] for name in columns if row.get(name) is not None}
        for name in ("metric", "seconds", "difference"):
            spread = row.get(name) or {}
            line |= {
                f"{name}_{part}": spread[part] for part in ("value", "low", "high") if spread.get(part) is not None
            }
        writer.writerow(line)
    return text.getvalue()


def draw_quality(document: Mapping[str, Any], png: Path, svg: Path) -> bool:
    """Writes the picture as PNG and SVG; returns False if no method has figures."""
    if not any(row["status"] == "ok" for row in document["methods"]):
        return False
    save_pictures(lambda: build_figure(document), png, svg)
    return True


def build_figure(document: Mapping[str, Any]) -> Any:
    """Returns a matplotlib ``Figure``: the metric against trained parameters, seconds and peak memory."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    header = document["header"]
    rows = [row | {"metric": _on_scale(row["metric"], header)} for row in document["methods"] if row["status"] == "ok"]
    scale, unit = memory_unit([row["peak_bytes"] for row in rows])
    figure: Any = Figure(figsize=(12.8, 5.4))
    FigureCanvasAgg(figure)
    figure.text(0.065, 0.945, f"{header['name']}: quality and cost of each method", fontsize=14, fontweight="bold")
    lines = textwrap.wrap(f"{header['unit']['model']}; {machine_text(header)}; {_budget(header, rows)}", 150)
    figure.text(0.065, 0.92, "\n".join(lines), fontsize=9, color=_GREY, va="top", linespacing=1.4)
    panels: tuple[tuple[str, Callable[[Any], float]], ...] = (
        ("trained parameters", lambda row: row["num_trained"]),
        ("seconds of training", lambda row: row["seconds"]["value"]),
        (f"peak memory of training ({unit})", lambda row: row["peak_bytes"] / scale),
    )
    shared: Any = None
    for index, (label, cost) in enumerate(panels):
        axes: Any = figure.add_axes((0.065 + index * 0.27, 0.16, 0.235, 0.63), sharey=shared)
        shared = shared or axes
        for row in rows:
            value, seconds = row["metric"], row["seconds"]
            bars: dict[str, Any] = {"yerr": _bars(value)}
            if index == 1:
                bars["xerr"] = _bars(seconds)
            axes.errorbar(cost(row), value["value"], fmt=MARKERS[row["method"]], color=COLOURS[row["method"]], markersize=7,
                          capsize=3, elinewidth=1.1, label="_method", **bars)  # fmt: skip
        if index == 0:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter("")
            axes.set_ylabel(
                f"held-out {header['metric']}, {'smaller' if header['smaller_is_better'] else 'larger'} is better"
            )
        else:
            axes.tick_params(labelleft=False)
        axes.set_xlabel(label)
        axes.grid(color="#e5e5e5", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(0.15)
        place_labels(
            axes,
            [
                (cost(row), row["metric"]["value"], _rank(row), _ends(row["metric"]), COLOURS[row["method"]])
                for row in rows
            ],
        )
    _legend(figure, rows)
    figure.text(
        0.065,
        0.03,
        "Bars: 95 % interval of the mean over seeds (Student t); for seconds, of the median (bootstrap). r8: rank 8.",
        fontsize=8,
        color=_GREY,
    )
    return figure


def _on_scale(interval: Mapping[str, Any], header: Mapping[str, Any]) -> Mapping[str, Any]:
    """Clips intervals of shares to 0..1, which Student's t can exceed."""
    if header["smaller_is_better"] or interval["low"] is None:
        return interval
    return {**interval, "low": max(0.0, interval["low"]), "high": min(1.0, interval["high"])}


def _ends(interval: Mapping[str, Any]) -> tuple[float, float]:
    value = interval["value"]
    return (value, value) if interval["low"] is None else (interval["low"], interval["high"])


def _bars(interval: Mapping[str, Any]) -> list[list[float]]:
    low, high = _ends(interval)
    return [[interval["value"] - low], [high - interval["value"]]]


def _budget(header: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    protocol = header["protocol"]
    seeds, rates = protocol["seeds"], protocol["learning_rates"]
    text = f"{rows[0]['steps']} steps each, {seeds} seed{'s' if seeds != 1 else ''}, "
    if len(rates) == 1:
        return f"{text}learning rate {rates[0]:g} for all"
    if protocol["search"]:
        return f"{text}each with the best learning rate that a search finds on the first seed"
    return f"{text}each with its best learning rate on the first seed, of {', '.join(f'{r:g}' for r in rates)}"


def _rank(row: Mapping[str, Any]) -> str:
    return "" if row["rank"] is None else f"r{row['rank']}"


def _legend(figure: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=COLOURS[m], marker=MARKERS[m], linestyle="", markersize=7, label=m)
        for m in dict.fromkeys(row["method"] for row in rows)
    ]
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.855, 0.8), frameon=False, fontsize=10)
