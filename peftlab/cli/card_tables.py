"""Prints the student report card: verdict, quality, size and speed, and the meaning of the terms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peftlab import formatting
from peftlab.cli.metrics_tables import new_table
from peftlab.cli.output import Output
from peftlab.specs.metrics import family_of

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

_WHO = {"teacher": "teacher", "cut": "untrained", "baseline": "labels alone", "student": "distilled"}
_WHO_NOTES = {
    "teacher": "",
    "cut": "the student before its training",
    "baseline": "the same student, trained on the labels alone",
    "student": "the student, trained on the teacher's outputs",
}
_STYLES = {"helped": "bold green", "did_not_help": "bold red", "no_difference": "bold yellow"}


def _count(value: float) -> str:
    """``134.5 M``, ``16,384``."""
    return f"{value / 1e6:,.1f} M" if value >= 1e6 else f"{value:,.0f}"


def _ms(value: float) -> str:
    if value >= 1000:
        return f"{value / 1000:.2f} s"
    return f"{value:,.1f} ms" if value >= 10 else f"{value:.2f} ms"


_COSTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "num_parameters": ("parameters", _count),
    "num_trained": ("trained", _count),
    "file_bytes": ("file", formatting.size),
    "latency_ms": ("one forward pass", _ms),
    "tokens_per_s": ("tokens/s", formatting.rate),
    "peak_memory_bytes": ("memory to train", formatting.size),
    "seconds": ("time to train", formatting.duration),
    "steps": ("steps", _count),
}

# The costs shown without --verbose.
_SHORT_COSTS = {name: _COSTS[name] for name in ("num_parameters", "latency_ms", "tokens_per_s", "seconds")}

Card = Mapping[str, Any]


def show_card(out: Output, card: Card) -> None:
    """Prints the verdict and two tables that fit a screen; verbose: also all metrics and costs, what the terms mean,
    and one line per seed if there are several."""
    out.show(*verdict_lines(card))
    out.line()
    rows = _shown_metrics(card) if out.verbose else [row for row in _shown_metrics(card) if _is_short(row, card)]
    who = _columns(rows, out.console.width)
    out.show(quality_table(rows, who))
    if out.verbose:
        out.show(notes_table(quality_notes(card, rows, who)))
    if any(card["costs"].values()):
        out.line()
        out.show(cost_table(card, _COSTS if out.verbose else _SHORT_COSTS))
        if out.verbose:
            out.show(notes_table(cost_notes(card)))
    if out.verbose and card["num_seeds"] > 1:
        out.line()
        out.show(seed_table(card))
    if not out.verbose:
        out.line()
        out.show(
            notes_table(
                [("second line", f"95 % interval over {_over(card)}"), ("-v", "all metrics, and what the terms mean")]
            )
        )


def quality_table(rows: Sequence[Mapping[str, Any]], who: Sequence[str]) -> Table:
    """A table of metric, the models of ``who``, kept: values with their intervals below. ``rows`` are the card's metrics."""
    from rich.text import Text

    kept = any(row["kept"] for row in rows)
    table = new_table()
    table.add_column("metric", min_width=max(len(word) for row in rows for word in row["label"].split()))
    for name in who:
        table.add_column(_WHO[name], justify="right", no_wrap=True)
    if kept:
        table.add_column("kept", justify="right", no_wrap=True)
    for place, row in enumerate(rows):

        def plain(value: float, row: Any = row) -> str:
            return _figure(row, value)

        # The untrained student is only the starting point: its interval is not worth the width.
        shown = {name: row[name] and (row[name] | {"low": None} if name == "cut" else row[name]) for name in who}
        cells = [_cell(shown[name], plain, style=_gain_style(name, row)) for name in who]
        if kept:
            known = row["kept"] and math.isfinite(
                formatting.number(row["kept"]["value"])
            )  # infinite if the teacher has 0
            cells.append(_cell(row["kept"] if known else None, _share if row["kept_as"] == "share" else _times))
        table.add_row(Text(row["label"], style="bold" if place == 0 else ""), *cells)
    return table


def quality_notes(card: Card, rows: Sequence[Mapping[str, Any]], who: Sequence[str]) -> list[tuple[str, str]]:
    """Terms and meanings: the second lines, the columns and the metrics."""
    notes = [("second line", f"95 % interval over {_over(card)}")]
    notes += [(_WHO[name], _WHO_NOTES[name]) for name in who if _WHO_NOTES[name]]
    ways = {row["kept_as"] for row in rows if row["kept"]}
    if ways:
        below = "; if lower is better, 1.00x is as good" if "times" in ways else ""
        notes.append(("kept", f"distilled divided by teacher{below}"))
    return notes + [(row["label"], row["note"]) for row in rows if row["note"]]


def _shown_metrics(card: Card) -> list[Mapping[str, Any]]:
    """All metrics, without the loss if its exponential, the perplexity, is shown; --json has both."""
    names = {row["name"] for row in card["metrics"]}
    hidden = {"loss"} if "perplexity" in names and card["headline"] != "loss" else set()
    return [row for row in card["metrics"] if row["name"] not in hidden]


def _columns(rows: Sequence[Mapping[str, Any]], width: int) -> list[str]:
    """The models with values; the untrained student only if the table fits the width with it."""
    from rich.console import Console

    who = [name for name in _WHO if any(row[name] for row in rows)]
    fits = Console(width=1000).measure(quality_table(rows, who)).minimum <= width
    return who if fits or "baseline" not in who else [name for name in who if name != "cut"]


def _is_short(row: Mapping[str, Any], card: Card) -> bool:
    family = family_of(row["name"])
    return row["name"] == card["headline"] or (family is not None and family.on_short_card)


def cost_table(card: Card, costs_shown: Mapping[str, tuple[str, Callable[[Any], str]]] = _COSTS) -> Table:
    """A table of size, speed and training cost of each model, and the ratio distilled / teacher."""
    from rich.text import Text

    costs, ratios = card["costs"], card["ratios"]
    who = [name for name in _WHO if costs.get(name) and name != "cut"]
    table = new_table()
    table.add_column("cost", min_width=max(len(word) for label, _ in costs_shown.values() for word in label.split()))
    for name in (*(_WHO[name] for name in who), "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for key, (label, text) in costs_shown.items():
        values = [costs[name].get(key) for name in who]
        if all(value is None for value in values):
            continue
        cells = [_cost_cell(costs[name], key, text) for name in who]
        speed = costs["student"].get("speed") if key == "tokens_per_s" else None
        ratio = _cell(speed, _times) if speed else Text(_times(ratios[key]) if key in ratios else "")
        table.add_row(Text(label), *cells, ratio)
    return table


def cost_notes(card: Card) -> list[tuple[str, str]]:
    notes = [("ratio", "distilled divided by teacher")]
    if any("latency_ms" in costs for costs in card["costs"].values()):
        where = f" ({formatting.one_line(card['timed_on'])})" if card.get("timed_on") else ""
        notes.append(("one forward pass", f"median and quartiles; the models take turns on one batch{where}"))
    return notes


def verdict_lines(card: Card) -> list[RenderableType]:
    """The verdict, and the notes of the card."""
    from rich.text import Text

    outcome, verdict = card["verdict"]["outcome"], formatting.printable(card["verdict"]["text"])
    # "Distillation helped", "No difference"; or the text before a reason in brackets.
    first = verdict.partition(":" if outcome in _STYLES else " (")[0]
    text = Text.assemble((first, _STYLES.get(outcome, "bold")), verdict.removeprefix(first))
    return [text, *(Text(formatting.printable(note), style="yellow") for note in card["notes"])]


def seed_table(card: Card) -> Table:
    """A table of the headline metric per seed."""
    from rich.text import Text

    head = card["metrics"][0]
    who = [name for name in _WHO if any(line[name] is not None for line in card["seeds"])]
    compared = any(line["gain"] is not None for line in card["seeds"])
    table = new_table()
    table.add_column("seed", justify="right", no_wrap=True)
    for name in who:
        table.add_column(_WHO[name], justify="right", no_wrap=True)
    if compared:
        table.add_column(f"difference in {head['label']}", justify="right", overflow="fold")
    for line in card["seeds"]:
        cells = [Text("-" if line[name] is None else _figure(head, formatting.number(line[name]))) for name in who]
        if compared:
            cells.append(_change(head, line))
        table.add_row(str(line["seed"]), *cells)
    return table


def notes_table(notes: Sequence[tuple[str, str]]) -> Table:
    """A table of terms and their meanings."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for term, meaning in notes:
        table.add_row(Text(term, style="dim"), Text(meaning, style="dim"))
    return table


def _cell(interval: Mapping[str, Any] | None, text: Callable[[float], str], *, style: str = "") -> Text:
    """The value, with its interval, if known, on the line below."""
    from rich.text import Text

    if interval is None:
        return Text("-", style="dim")
    cell = Text(text(formatting.number(interval["value"])), style=style)
    if interval["low"] is None or interval["high"] is None:
        return cell
    return Text.assemble(cell, "\n", (_range(interval["low"], interval["high"], text), "dim"))


def _range(low: Any, high: Any, text: Callable[[float], str]) -> str:
    """``0.681-0.709``, with the unit once: ``91.2-95.1 %``; ``to`` in place of ``-`` if the lower end is negative."""
    ends = [text(formatting.number(end)) for end in (low, high)]
    unit = next((unit for unit in (" %", "x", " ms", " s") if all(end.endswith(unit) for end in ends)), "")
    between = "-" if formatting.number(low) >= 0 else " to "
    return f"{ends[0].removesuffix(unit)}{between}{ends[1]}"


def _cost_cell(costs: Mapping[str, Any], key: str, text: Callable[[Any], str]) -> Text:
    """The cost; a latency comes with its quartiles."""
    value = costs.get(key)
    if value is None:
        return _cell(None, text)
    quartiles = [costs.get(f"latency_{end}_ms") if key == "latency_ms" else None for end in ("low", "high")]
    return _cell({"value": value, "low": quartiles[0], "high": quartiles[1]}, text)


def _figure(row: Mapping[str, Any], value: float) -> str:
    """The value with three decimals below 1 and four significant digits above, as in the verdict; below 0.01 in exponent
    form, to save width."""
    if row["in_points"] or not math.isfinite(value) or 0.1 <= abs(value) < 1 or value == 0:
        return f"{value:.3f}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 1:
        return f"{value:#.4g}"
    return f"{value:#.3g}" if abs(value) >= 0.01 else f"{value:.1e}"


def _share(ratio: float) -> str:
    return f"{100 * ratio:.1f} %"


def _times(ratio: float) -> str:
    return f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.2f}x"


def _gain_style(who: str, row: Mapping[str, Any]) -> str:
    """Green or red for the student if the interval of its gain excludes 0."""
    gain = row["gain"]
    if who != "student" or gain is None or gain["low"] is None:
        return ""
    value, low, high = (formatting.number(gain[key]) for key in ("value", "low", "high"))
    if low <= 0 <= high:
        return ""
    return "green" if (value > 0) == row["higher_is_better"] else "red"


def _change(head: Mapping[str, Any], line: Mapping[str, Any]) -> Text:
    from rich.text import Text

    if line["gain"] is None:
        return Text("-", style="dim")
    gain = formatting.number(line["gain"])
    return Text(
        f"{100 * gain:+.1f} points" if head["in_points"] else f"{'-' if gain < 0 else '+'}{_figure(head, abs(gain))}"
    )


def _over(card: Card) -> str:
    rows = f"{card['num_rows']:,} held-out rows"
    if card["num_seeds"] == 1:
        return f"the {rows}"
    return f"{card['num_seeds']} seeds, all on the same {rows} (over the rows if all seeds give one value)"
