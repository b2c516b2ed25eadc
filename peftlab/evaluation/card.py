"""Builds the student report card: one document with the figures of teacher, baseline and student, and a verdict."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

from peftlab.evaluation.card_metrics import CardMetric, card_metric, in_order
from peftlab.evaluation.card_shape import WHO, Card, Costs, Figures, MetricRow, Paired, Seed, SeedLine, Side
from peftlab.evaluation.verdict import excludes_zero, verdict
from peftlab.measuring.intervals import Estimate, IntervalDict, over_seeds

_COSTS = tuple(name for name in Costs.__annotations__ if name != "speed")
Estimates = Mapping[str, Estimate]


def as_metrics(estimates: Estimates, **values: float) -> dict[str, IntervalDict]:
    """Returns ``Side.metrics`` from estimates, and from figures without an interval such as ``ece=0.04``."""
    metrics = {name: estimate.interval().as_dict() for name, estimate in estimates.items()}
    return metrics | {name: _bare(value) for name, value in values.items()}


def paired(
    *, teacher: Estimates, student: Estimates, baseline: Estimates | None = None, cut: Estimates | None = None
) -> Paired:
    """Returns differences and ratios with intervals over the rows, which all models must share.

    Raises: ValueError if the models were scored on different rows.
    """
    return {
        "gain": _differences(student, baseline or {}),
        "lead": _differences(teacher, baseline or {}),
        "progress": _differences(student, cut or {}),
        "kept": {
            name: student[name].over(teacher[name]).interval().as_dict()
            for name in student
            if name in teacher and card_metric(name).kept_as
        },
    }


def make_card(figures: Figures) -> Card:
    """Returns the report card of a run.

    With one seed every interval is over held-out rows. With several, figures are means over the seeds with Student's t
    interval. If all seeds give the same value (such as a shared teacher), the interval is over rows, because seed variance
    is unknown.

    Raises:
        ValueError: no seed, or the headline is not among a student's metrics. RecipeError: an unknown metric.
    """
    seeds, headline = figures["seeds"], figures["headline"]
    if not seeds or any(headline not in seed["student"]["metrics"] for seed in seeds):
        raise ValueError(f"expected at least one seed and {headline!r} among the metrics of every student")
    names = {name for seed in seeds for side in _sides(seed).values() for name in side["metrics"]}
    costs = {who: _mean_costs([_sides(seed)[who] for seed in seeds]) for who in WHO if _all_have(seeds, who)}
    card: Card = {
        "headline": headline,
        "num_rows": figures["num_rows"],
        "num_seeds": len(seeds),
        "metrics": [_row(name, seeds) for name in in_order(names, headline)],
        "costs": costs,
        "ratios": _ratios(costs["teacher"], costs["student"]),
        "timed_on": figures.get("timed_on"),
        "seeds": [_line(seed, headline) for seed in seeds],
        "verdict": {"outcome": "undecided", "text": ""},
        "notes": [],
    }
    card["verdict"] = verdict(card, no_baseline=figures.get("no_baseline"))
    card["notes"] = _notes(card, seeds)
    return card


def _bare(value: float) -> IntervalDict:
    return {"value": value, "low": None, "high": None, "over": "rows", "n": 0}


def _differences(a: Estimates, b: Estimates) -> dict[str, IntervalDict]:
    return {name: a[name].minus(b[name]).interval().as_dict() for name in a if name in b}


def _sides(seed: Seed) -> dict[str, Side]:
    sides = {"teacher": seed["teacher"], "student": seed["student"]}
    if "cut" in seed:
        sides["cut"] = seed["cut"]
    if "baseline" in seed:
        sides["baseline"] = seed["baseline"]
    return sides


def _all_have(seeds: Sequence[Seed], who: str) -> bool:
    return all(who in _sides(seed) for seed in seeds)


def _mean(per_seed: Iterable[IntervalDict | None]) -> IntervalDict | None:
    """Combines the intervals of all seeds; None if a seed has none."""
    known = list(per_seed)
    intervals = [one for one in known if one is not None]
    if not intervals or len(intervals) < len(known):
        return None
    values = [one["value"] for one in intervals]
    return intervals[0] if len(set(values)) == 1 else over_seeds(values).as_dict()


def _clipped(interval: IntervalDict | None, about: CardMetric) -> IntervalDict | None:
    """Clips the interval to the metric's range: Student's t can give an error below 0."""
    if interval is None or interval["low"] is None or interval["high"] is None:
        return interval
    low, high = max(interval["low"], about.lowest), min(interval["high"], about.highest)
    return {**interval, "low": low, "high": high}


def _row(name: str, seeds: Sequence[Seed]) -> MetricRow:
    about = card_metric(name)

    def of(who: str) -> IntervalDict | None:
        per_seed = (_sides(seed)[who]["metrics"].get(name) if who in _sides(seed) else None for seed in seeds)
        return _clipped(_mean(per_seed), about)

    gain, lead, progress = (_mean(_difference(name, seed, *who) for seed in seeds) for who in _DIFFERENCES)
    return {
        "name": name,
        "label": about.label,
        "note": about.note,
        "higher_is_better": about.higher_is_better,
        "in_points": about.in_points,
        "teacher": of("teacher"),
        "cut": of("cut"),
        "baseline": of("baseline"),
        "student": of("student"),
        "gain": gain,
        "lead": lead,
        "progress": progress,
        "kept": _mean(seed["paired"]["kept"].get(name) for seed in seeds),
        "kept_as": about.kept_as,
    }


_DIFFERENCES = (("gain", "student", "baseline"), ("lead", "teacher", "baseline"), ("progress", "student", "cut"))


def _difference(name: str, seed: Seed, kind: str, a: str, b: str) -> IntervalDict | None:
    """The difference with its interval over rows; without an interval for figures such as the ECE."""
    measured: Mapping[str, Mapping[str, IntervalDict]] = {
        "gain": seed["paired"]["gain"], "lead": seed["paired"]["lead"], "progress": seed["paired"]["progress"],
    }  # fmt: skip
    if name in measured[kind]:
        return measured[kind][name]
    sides = _sides(seed)
    if any(who not in sides or name not in sides[who]["metrics"] for who in (a, b)):
        return None
    return _bare(sides[a]["metrics"][name]["value"] - sides[b]["metrics"][name]["value"])


def _mean_costs(sides: Sequence[Side]) -> Costs:
    means: dict[str, float] = {}
    for name in _COSTS:
        values = [value for side in sides if isinstance(value := side.get(name), int | float)]
        if len(values) == len(sides):
            mean = math.fsum(values) / len(values)
            means[name] = round(mean) if all(isinstance(value, int) for value in values) else mean
    speed = _mean(side.get("speed") for side in sides)
    costs = cast(Costs, means)
    if speed is not None:
        costs["speed"] = speed
    return costs


def _ratios(teacher: Costs, student: Costs) -> dict[str, float]:
    ratios = {}
    for name in _COSTS:
        above, below = student.get(name), teacher.get(name)
        if isinstance(above, int | float) and isinstance(below, int | float) and below > 0:
            ratios[name] = above / below
    return ratios


def _line(seed: Seed, headline: str) -> SeedLine:
    def value(who: str) -> float | None:
        side = _sides(seed).get(who)
        return side["metrics"][headline]["value"] if side and headline in side["metrics"] else None

    student, baseline = value("student"), value("baseline")
    gain = None if student is None or baseline is None else student - baseline
    better = None if gain is None else (gain > 0 if card_metric(headline).higher_is_better else gain < 0)
    return {
        "seed": seed["seed"],
        "teacher": value("teacher"),
        "cut": value("cut"),
        "baseline": baseline,
        "student": student,
        "gain": gain,
        "better": better,
    }


def _notes(card: Card, seeds: Sequence[Seed]) -> list[str]:
    notes = []
    baseline, student = card["costs"].get("baseline", Costs()), card["costs"]["student"]
    for name, unit in (("steps", "steps"), ("num_parameters", "parameters"), ("num_trained", "trained parameters")):
        mine, theirs = student.get(name), baseline.get(name)
        if mine is not None and theirs is not None and mine != theirs:
            notes.append(f"Not the same budget: the student had {mine:,} {unit}, the baseline {theirs:,}.")
    ours, theirs = student.get("num_parameters"), card["costs"]["teacher"].get("num_parameters")
    if ours is not None and theirs and ours > theirs:
        notes.append(f"The student is larger than its teacher: {ours:,} parameters against {theirs:,}.")
    gains = [seed["paired"]["gain"].get(card["headline"]) for seed in seeds]
    unsure = sum(gain is not None and not excludes_zero(gain) for gain in gains)
    if card["num_seeds"] > 1 and card["verdict"]["outcome"] in ("helped", "did_not_help") and 2 * unsure > len(seeds):
        notes.append(
            f"With other held-out rows it might come out differently: in {unsure} of {len(seeds)} seeds the interval over "
            f"the {card['num_rows']:,} rows contains 0. More held-out rows would tell."
        )
    return notes
