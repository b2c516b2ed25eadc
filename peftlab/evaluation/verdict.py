"""Writes the verdict: whether distillation helped, and how the student compares with the teacher."""

from __future__ import annotations

import math

from peftlab.evaluation.card_shape import Card, MetricRow, Outcome, Verdict
from peftlab.measuring.intervals import MIN_ROWS, IntervalDict

_SAME = 0.02


def verdict(card: Card, *, no_baseline: str | None) -> Verdict:
    """Returns the outcome and its sentences, which claim a difference only if the 95 % interval excludes 0.

    Args: no_baseline: why there is no baseline.
    """
    head = card["metrics"][0]
    outcome = _outcome(head)
    if outcome == "not_compared":
        sentences = _not_compared(head, no_baseline or "no baseline was trained")
    else:
        sentences = [_comparison(head, outcome, card), *_contradictions(card, outcome), *_teacher(card, outcome)]
    return {"outcome": outcome, "text": " ".join([*sentences, *_kept(card)])}


def excludes_zero(interval: IntervalDict) -> bool:
    """Whether the interval is known and excludes 0."""
    low, high = interval["low"], interval["high"]
    return low is not None and high is not None and (low > 0 or high < 0)


def _outcome(row: MetricRow) -> Outcome:
    gain = row["gain"]
    if row["baseline"] is None or gain is None:
        return "not_compared"
    if gain["low"] is None or math.isnan(gain["value"]):
        return "undecided"
    if not excludes_zero(gain):
        return "no_difference"
    return "helped" if (gain["value"] > 0) == row["higher_is_better"] else "did_not_help"


def _comparison(row: MetricRow, outcome: Outcome, card: Card) -> str:
    student, baseline, gain = row["student"], row["baseline"], row["gain"]
    assert student is not None and baseline is not None and gain is not None
    against = (
        f"{_phrase(row)} {_figure(row, student['value'])} against {_figure(row, baseline['value'])} for the same student "
        "trained on the labels alone"
    )
    if outcome == "undecided":
        if not math.isfinite(gain["value"]):
            return f"No verdict: {against}; the difference is not a finite number."
        return (
            f"Too few held-out rows to tell ({card['num_rows']:,}; an interval needs {MIN_ROWS}): {against} "
            f"({_change(row, gain['value'], unit=True)})."
        )
    opening = {
        "helped": "Distillation helped",
        "did_not_help": "Distillation did not help, the student is worse for it",
        "no_difference": "No difference",
    }[outcome]
    contains = ", which contains 0" if outcome == "no_difference" else ""
    return f"{opening}: {against} ({_with_interval(row, gain)}{contains}{_seeds(card, gain)})."


def _with_interval(row: MetricRow, difference: IntervalDict) -> str:
    """``+22.3 points, 95 % interval +20.1 to +24.6``."""
    text = _change(row, difference["value"], unit=True)
    if difference["low"] is None or difference["high"] is None:
        return text
    low, high = (_change(row, bound, unit=False) for bound in (difference["low"], difference["high"]))
    return f"{text}, 95 % interval {low} to {high} over {'held-out rows' if difference['over'] == 'rows' else 'seeds'}"


def _seeds(card: Card, gain: IntervalDict) -> str:
    """Says what the interval is over and how many seeds agree."""
    num = card["num_seeds"]
    if num == 1:
        return "; one seed: training noise is not in it"
    better = sum(bool(line["better"]) for line in card["seeds"])
    if gain["over"] == "rows":
        return f"; all {num} seeds gave the same difference: training noise is not in it"
    few = "; few seeds make a wide interval" if num < 4 and not excludes_zero(gain) else ""
    return f"; better in {better} of {num}{few}"


def _contradictions(card: Card, outcome: Outcome) -> list[str]:
    """A sentence on metrics that contradict the headline, or that differ where the headline does not."""
    differing: dict[bool, list[str]] = {True: [], False: []}
    has_perplexity = any(row["name"] == "perplexity" for row in card["metrics"])
    for row in card["metrics"][1:]:
        of_row = _outcome(row)
        # The perplexity is the exponential of the loss; name only one of them.
        if of_row not in ("helped", "did_not_help") or of_row == outcome or (row["name"] == "loss" and has_perplexity):
            continue
        assert row["student"] is not None and row["baseline"] is not None
        values = " against ".join(_figure(row, row[who]["value"]) for who in ("student", "baseline"))  # type: ignore[index]
        differing[of_row == "helped"].append(f"{_phrase(row)} ({values})")
    sides = [
        f"{word} in {_joined(differing[key])}" for word, key in (("better", True), ("worse", False)) if differing[key]
    ]
    return [f"But against labels alone it is {', and '.join(sides)}."] if sides else []


def _teacher(card: Card, outcome: Outcome) -> list[str]:
    """A sentence if the teacher is not better than the baseline, by the first metric that both have."""
    tasks = [row for row in card["metrics"] if row["kept_as"] or row["name"] == "loss"]
    row = next((row for row in tasks if row["lead"]), None)
    if row is None or row["lead"] is None or row["teacher"] is None or row["baseline"] is None:
        return []
    lead = row["lead"]
    # The teacher leads, even if not significantly: with few seeds no teacher would lead significantly.
    if lead["low"] is None or (lead["value"] != 0 and (lead["value"] > 0) == row["higher_is_better"]):
        return []
    values = " against ".join(_figure(row, side["value"]) for side in (row["teacher"], row["baseline"]))
    where = f"({_phrase(row)} {values})"
    if excludes_zero(lead):
        if outcome == "helped":
            return [f"And yet the teacher itself is worse than the baseline {where}."]
        return [f"The teacher is worse than the baseline {where}: there was nothing to learn from it."]
    if outcome == "helped":
        return []
    return [f"The teacher is no better than the baseline {where}: there was little to learn from it."]


def _not_compared(row: MetricRow, reason: str) -> list[str]:
    student, progress, cut = row["student"], row["progress"], row["cut"]
    assert student is not None
    interval = ""
    if student["low"] is not None and student["high"] is not None:
        low, high = (_figure(row, bound) for bound in (student["low"], student["high"]))
        interval = f" (95 % interval {low} to {high} over {_over(student)})"
    sentences = [
        f"Not compared with labels alone ({reason}), so what the teacher added is not known: the student has "
        f"{_phrase(row)} {_figure(row, student['value'])}{interval}."
    ]
    if progress is not None and cut is not None:
        sentences.append(
            f"Before its training it had {_figure(row, cut['value'])}: a change of {_with_interval(row, progress)}."
        )
    return sentences


def _kept(card: Card) -> list[str]:
    """Sentences on how much of the teacher the student keeps, and at what size and speed."""
    sentences = []
    row = next((row for row in card["metrics"] if row["kept"] and math.isfinite(row["kept"]["value"])), None)
    costs = _size_and_speed(card, named=row is not None)
    if row is not None and row["kept"] is not None:
        ratio = row["kept"]["value"]
        if row["kept_as"] == "share":
            kept = f"{'keeps' if ratio <= 1 else 'reaches'} {100 * ratio:.1f} % of the teacher's {_phrase(row)}"
            sentences.append(f"The student {kept}{f' at {costs}' if costs else ''}.")
        else:
            kept = f"The student's {_phrase(row)} is {ratio:.2f}x the teacher's"
            sentences.append(f"{kept}{f', at {costs}' if costs else ''}.")
    elif costs:
        sentences.append(f"The student has {costs}.")
    if card["ratios"].get("num_parameters", 1.0) > 1 + _SAME:
        times = _times(card["ratios"]["num_parameters"])
        sentences.append(f"The student is larger than the teacher ({times} its parameters): nothing was compressed.")
    return sentences


def _size_and_speed(card: Card, *, named: bool) -> str:
    """``50 % of its parameters and 2.1x its speed``; ``named``: whether the sentence already names the teacher."""
    parts, whose = [], "its" if named else "the teacher's"
    ratio = card["ratios"].get("num_parameters")
    if ratio is not None and abs(ratio - 1) <= _SAME:
        parts.append("the same number of parameters")
    elif ratio is not None:
        parts.append(f"{f'{100 * ratio:.0f}' if ratio >= 0.1 else f'{100 * ratio:.2g}'} % of {whose} parameters")
        whose = "its"
    speed = card["costs"]["student"].get("speed")
    if speed is not None and math.isfinite(speed["value"]):
        low, high = speed["low"], speed["high"]
        same = low is not None and high is not None and low <= 1 <= high
        parts.append("the same speed, as far as can be measured" if same else f"{_times(speed['value'])} {whose} speed")
    return _joined(parts)


def _phrase(row: MetricRow) -> str:
    return "KL to the teacher" if row["name"] == "kl" else row["label"]


def _figure(row: MetricRow, value: float) -> str:
    """Three decimals below 1, four significant digits above."""
    if row["in_points"] or not math.isfinite(value) or 0.1 <= abs(value) < 1 or value == 0:
        return f"{value:.3f}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.4g}" if abs(value) >= 1 else f"{value:#.3g}"


def _change(row: MetricRow, value: float, *, unit: bool) -> str:
    if row["in_points"]:
        return f"{100 * value:+.1f}{' points' if unit else ''}"
    text = f"{'-' if value < 0 else '+'}{_figure(row, abs(value))}"
    return f"{text} nats" if unit and row["name"] in ("kl", "loss") else text


def _times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.2g}x" if ratio < 1 else f"{ratio:.1f}x"


def _over(interval: IntervalDict) -> str:
    return "held-out rows" if interval["over"] == "rows" else f"{interval['n']} seeds"


def _joined(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + f" and {parts[-1]}" if parts else ""
