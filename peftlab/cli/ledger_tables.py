"""Prints the loss ledger: trained tokens, lengths, problems and example rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peftlab import formatting
from peftlab.cli.metrics_tables import new_table
from peftlab.cli.output import Output
from peftlab.data.ledger_text import (
    PreviewText,
    answers_line,
    blocks_text,
    finding_line,
    left_out_lines,
    numbers_text,
    questions_line,
    shared_line,
)

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

_BAR = 24
# Minimum width of names in a narrow terminal.
_NAME = 9
_MAX_LABELS = 12
# As ``models.UNLIMITED``, which this module cannot import without torch.
_UNLIMITED = 2**31
_STYLES = {"error": "bold red", "allowed": "yellow", "note": "yellow"}
_TITLES = {"train": "train", "held_out": "held out"}

Report = Mapping[str, Any]


def show_check(out: Output, report: Report) -> None:
    """Prints the report of ``peftlab.api.check``."""
    train, held_out = report["train"], report["held_out"]
    out.line(f"{report['recipe']}: {report['task']} on {report['model']}", style="bold")
    distill = report["distill"]
    part = "rows of data.train" if distill and distill["transfer"] else "a part of it"
    out.line(f"data: {train['name']}, {part if report['split'] else held_out['name']} held out")
    if report["format"]:
        out.line(f"format: {formatting.printable(report['format'])}")
    for line in [*([] if distill is None else _distill_lines(distill, report["model"])), *report["unlabelled"]]:
        out.line(line)
    _show_findings(out, [f for f in report["findings"] if f["level"] == "error"])
    out.line()
    out.show(_data_table(report))
    if train["labels"] is not None:
        out.line()
        title = "pixels of" if report["style"] == "masks" else "label"
        out.show(_label_table(title, train["labels"], held_out["labels"]))
    if line := questions_line(train):
        out.line()
        out.line(f"train: {line}")
        out.line(f"held out: {questions_line(held_out)}")
    for name, title in _TITLES.items():
        if text := numbers_text(report[name]["numbers"]):
            out.line(f"{title}: {text}")
    if train["trained"] is not None:
        if train["roles"] or held_out["roles"]:
            out.line()
            out.show(_count_table("written by", "role", train["roles"], held_out["roles"]))
        if train["special_tokens"] or held_out["special_tokens"]:
            out.line()
            out.show(_count_table("special token", "token", train["special_tokens"], held_out["special_tokens"]))
        answers = [f"{title}: {line}" for name, title in _TITLES.items() if (line := answers_line(report[name]))]
        if answers:
            out.line()
        for line in answers:
            out.line(line)
    if train["tokens"] is not None:
        out.line()
        for side in train["sides"]:
            out.line(_side_line(side))
        out.show(*_length_lines(train, unicode=_draws(out)))
    _show_rows(out, report)
    if report["estimate"] is not None:
        out.line()
        for line in _estimate_lines(report["estimate"], out.console.width, images=train["tokens"] is None):
            out.line(line)
    for preview in report["preview"]:
        out.line()
        out.show(PreviewText(preview))
    out.line()
    _show_findings(out, [f for f in report["findings"] if f["level"] != "error"])
    errors = sum(finding["level"] == "error" for finding in report["findings"])
    if errors:
        verdict = f"{errors} error{'' if errors == 1 else 's'} (above): peftlab would refuse to train this recipe"
        out.line(verdict, style="bold red")
    else:
        out.line("ready to train", style="bold green")


def _distill_lines(distill: Report, model: str) -> list[str]:
    """Lines on the teachers, their caches and the student."""
    lines = []
    for teacher in distill["teachers"]:
        lines.append(f"teacher: {_sized(teacher['name'], teacher['num_parameters'])}")
        if (cache := teacher["cache"]) is None:
            continue
        if cache["examples"] is not None:
            state = f"{cache['examples']:,} examples, {formatting.size(cache['bytes'])}"
        else:
            state = f"{'not complete' if cache['begun'] else 'empty'}; `peftlab teach` or `peftlab distill` fills it"
        lines.append(f"cache: {cache['folder']}, {state}")
    student, name = distill["student"], model
    if student["cut_from"]:
        name = f"{student['layers']} of {student['layers_before']} layers of {model}"
    both = ", and a baseline on the labels alone" if distill["baseline"] else ""
    seeds = f", with {distill['seeds']} seeds" if distill["seeds"] > 1 else ""
    lines.append(f"student: {_sized(name, student['num_parameters'])}{both}{seeds}")
    largest = max(teacher["num_parameters"] or 0 for teacher in distill["teachers"])
    if 0 < largest < (student["num_parameters"] or 0):
        lines.append("the student is larger than its teacher")
    return lines


def _sized(name: str, num_parameters: int | None) -> str:
    return name if num_parameters is None else f"{name} ({num_parameters:,} parameters)"


def _data_table(report: Report) -> Table:
    table = new_table()
    table.add_column("data", overflow="fold", min_width=_NAME)
    for title in ("rows", "kept", "tokens", "trained", "share"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, title in _TITLES.items():
        data = report[name]
        trained = data["trained"]
        table.add_row(
            title,
            f"{data['rows']:,}",
            f"{data['kept']:,}{blocks_text(data)}",
            "-" if data["tokens"] is None else f"{data['tokens']:,}",
            "-" if trained is None else f"{trained:,}",
            "-" if trained is None else formatting.share(trained, data["tokens"]),
        )
    return table


def _count_table(title: str, key: str, train: Sequence[Report], held_out: Sequence[Report]) -> Table:
    """A table of tokens seen and trained per role or special token, for both data sets."""
    table = new_table()
    table.add_column(f"\n{title}", overflow="fold", min_width=_NAME)
    for column in ("train\ntokens", "\ntrained", "\nshare", "held out\ntokens", "\ntrained"):
        table.add_column(column, justify="right", no_wrap=True)
    others = {entry[key]: entry for entry in held_out}
    known = {entry[key] for entry in train}
    nothing = {"seen": 0, "trained": 0}
    for entry in [*train, *({key: e[key], **nothing} for e in held_out if e[key] not in known)]:
        other = others.get(entry[key], nothing)
        table.add_row(
            formatting.printable(entry[key]),
            f"{entry['seen']:,}",
            f"{entry['trained']:,}",
            formatting.share(entry["trained"], entry["seen"]),
            f"{other['seen']:,}",
            f"{other['trained']:,}",
            style="green" if entry["trained"] else None,
        )
    return table


def _label_table(title: str, train: Sequence[Report], held_out: Sequence[Report]) -> Table:
    """Rows of each label, or spans where a row has several."""
    table = new_table()
    table.add_column(title, overflow="fold", min_width=_NAME)
    for title in ("train", "share", "held out", "share"):
        table.add_column(title, justify="right", no_wrap=True)
    counted = [[entry.get("spans", entry["rows"]) for entry in entries] for entries in (train, held_out)]
    totals = [sum(counts) for counts in counted]
    pairs = sorted(zip((entry["label"] for entry in train), *counted, strict=True), key=lambda pair: -pair[1])
    for label, one, other in pairs[:_MAX_LABELS]:
        table.add_row(
            formatting.printable(label),
            f"{one:,}",
            formatting.share(one, totals[0]),
            f"{other:,}",
            formatting.share(other, totals[1]),
        )
    if len(pairs) > _MAX_LABELS:
        rest = pairs[_MAX_LABELS:]
        counts = [sum(pair[side] for pair in rest) for side in (1, 2)]
        table.add_row(
            f"{len(rest):,} more",
            f"{counts[0]:,}",
            formatting.share(counts[0], totals[0]),
            f"{counts[1]:,}",
            formatting.share(counts[1], totals[1]),
        )
    return table


def _side_line(side: Report) -> str:
    """The lengths of the sources, or of the targets."""
    name = "target" if side["key"] == "data.max_target_length" else "source"
    return f"tokens per {name} before truncation ({_limit_text(side['limit'])}): {_range_text(side)}"


def _limit_text(limit: int) -> str:
    return f"limit {limit:,}" if limit < _UNLIMITED else "no limit"


def _range_text(lengths: Report) -> str:
    return (
        f"{lengths['min']:,} to {lengths['max']:,}, median {lengths['median']:,.0f}, 95 % up to {lengths['p95']:,.0f}"
    )


def _length_lines(train: Report, *, unicode: bool) -> list[Table | Text]:
    from rich.text import Text

    lengths, limit = train["lengths"], None if train["sides"] else train["max_length"]
    if limit is None:
        which = "tokens per row, source and target"
    elif "questions" in train:
        which = f"tokens per row, in windows of {limit:,}"
    else:
        which = f"tokens per row before truncation (limit {limit:,})"
    summary = f"{which}: {_range_text(lengths)}"
    table = new_table()
    table.show_header, table.box = False, None
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    most = max((entry["rows"] for entry in lengths["histogram"]), default=1)
    for entry in lengths["histogram"]:
        filled = round(_BAR * entry["rows"] / most)
        bar = ("\u2588" if unicode else "#") * (filled or (1 if entry["rows"] else 0))
        over = limit is not None and entry["from"] > limit
        span = f"{entry['from']:,} to {entry['to']:,}" if entry["from"] < entry["to"] else f"{entry['to']:,}"
        table.add_row(span, f"{entry['rows']:,}", Text(bar, "red" if over else "cyan"))
    return [Text(summary), table]


def _draws(out: Output) -> bool:
    encoding = (getattr(out.stdout, "encoding", None) or "ascii").lower()
    return encoding.startswith("utf")


def _show_rows(out: Output, report: Report) -> None:
    """Prints the rows that are truncated, dropped, or in both data sets."""
    from rich.text import Text

    lines = [f"{title}: {line}" for name, title in _TITLES.items() for line in left_out_lines(report[name])]
    if shared := report["shared"]:
        lines.append(shared_line(shared))
    if lines:
        out.line()
        out.show(*(Text(line, style="yellow") for line in lines))


def _estimate_lines(estimate: Report, width: int, *, images: bool) -> Sequence[str]:
    parts = [
        f"{estimate['steps']:,} step{'' if estimate['steps'] == 1 else 's'}",
        f"{estimate['epochs']:.3g} epoch{'' if estimate['epochs'] == 1 else 's'}",
        f"{estimate['rows']:,} images" if images else f"{estimate['tokens']:,} tokens",
    ]
    if estimate["trained_tokens"] is not None:
        parts.append(f"{estimate['trained_tokens']:,} trained")
    if (packing := estimate["packing"]) is not None:
        parts.append(
            f"{packing['packs']:,} packs of up to {packing['capacity']:,} tokens, {100 * packing['empty']:.1f} % empty"
        )
    seconds = estimate["seconds"]
    about = f"about {formatting.duration(seconds)}, within a factor of two," if seconds >= 1 else "a few seconds"
    parts.append(f"{about} of training on this machine")
    return formatting.joined(parts, width=width)


def _show_findings(out: Output, findings: Sequence[Report]) -> None:
    from rich.text import Text

    for finding in findings:
        title, colon, message = finding_line(finding).partition(": ")
        out.show(Text.assemble((f"{title}{colon}", _STYLES[finding["level"]]), message))
