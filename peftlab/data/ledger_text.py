"""The ledger as text: a few lines before training, and previews of rows as training sees them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from peftlab.formatting import printable, share

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.text import Text

# Without colours, trained text is marked like additions in `git diff --word-diff`.
OPEN, CLOSE = "{+", "+}"
_MOST_LABELS = 20
_COLOURS = {"trained": "green", "masked": "dim"}


def places(where: Sequence[str], shown: int = 3) -> str:
    """``mails.csv:17, 18, 21 and 12 more``: the first places; consecutive places in one file name it once."""
    texts: list[str] = []
    files = [_file_and_row(place) for place in where[:shown]]
    for i, (file, mark, row) in enumerate(files):
        texts.append(row if i and files[i - 1][0] == file else f"{PurePath(file).name}{mark}{row}")
    more = len(where) - shown
    return ", ".join(texts) + (f" and {more:,} more" if more > 0 else "")


def _file_and_row(place: str) -> tuple[str, str, str]:
    file, mark, row = place.rpartition(", record ")
    return (file, mark, row) if mark else place.rpartition(":")


def answers_line(report: Mapping[str, Any]) -> str:
    """A sentence on how the answers of a data set end; empty if there are none."""
    answers, count = report["answers"], report["answers"]["count"]
    what = {"chat": "assistant turn", "text": "text", "pairs": "target"}.get(report["style"], "answer")
    if not count:
        return ""
    ends = " or ".join(printable(token) for token in answers["terminators"]) or "end-of-turn token"
    if answers["ended"] == count:
        return (
            f"1 {what}, ends with a trained {ends}"
            if count == 1
            else f"{count:,} {what}s, each ends with a trained {ends}"
        )
    cut = f"; truncation cuts {answers['cut']:,}" if answers["cut"] else ""
    return f"{answers['ended']:,} of {count:,} {what}s end with a trained {ends}{cut}"


def questions_line(report: Mapping[str, Any]) -> str:
    """A sentence on the windows of a data set of questions and on its answers; empty for other data."""
    found = report.get("questions")
    if found is None:
        return ""
    windows = f"{found['windows']:,} window{'' if found['windows'] == 1 else 's'} of up to {found['window']:,} tokens"
    several = f" ({found['rows_of_several_windows']:,} rows have several)" if found["rows_of_several_windows"] else ""
    if not found["rows_labelled"]:
        return f"{windows}{several}"
    without = f"{found['rows_without_answer']:,} of {found['rows_labelled']:,} rows have no answer"
    inside = f"; in {found['rows_not_aligned']:,} it begins or ends inside a token" if found["rows_not_aligned"] else ""
    return f"{windows}{several}, {found['windows_with_answer']:,} with the answer; {without}{inside}"


def left_out_lines(report: Mapping[str, Any]) -> list[str]:
    """One line per reason why rows were changed or left out."""
    return [
        f"{entry['rows']:,} row{'' if entry['rows'] == 1 else 's'} {entry['reason']}: {places(entry['where'])}"
        for entry in report["left_out"]
    ]


def blocks_text(report: Mapping[str, Any]) -> str:
    """`` in 1,234 blocks`` for rows that are split; else nothing."""
    return "" if report["blocks"] is None else f" in {report['blocks']:,} blocks"


def finding_line(finding: Mapping[str, Any]) -> str:
    """A finding of ``check`` with its kind and its rows."""
    held_out = f" ({finding['data']})" if finding["data"] != "train" else ""
    kind = f" {finding['kind']}" if finding["level"] != "note" else ""
    where = f" ({places(finding['where'])})" if finding["where"] else ""
    return f"{finding['level']}{kind}{held_out}: {finding['message']}{where}"


def shared_line(shared: Sequence[Mapping[str, str]]) -> str:
    """One line on the rows that are in both parts of the data."""
    count = f"{len(shared):,} held-out row{' is' if len(shared) == 1 else 's are'} also among the training rows"
    first = shared[0]
    return f"{count}: {places([s['held_out'] for s in shared])} (the first equals {places([first['train']])})"


def _label_counts(entries: Sequence[Mapping[str, Any]]) -> str:
    shown = ", ".join(f"{entry['label']} {entry.get('spans', entry['rows']):,}" for entry in entries[:_MOST_LABELS])
    more = len(entries) - _MOST_LABELS
    return f"{shown} and {more:,} more" if more > 0 else shown


def numbers_text(figures: Mapping[str, float] | None) -> str:
    """``numbers: 1 to 5, mean 3.2``; empty without any."""
    if figures is None:
        return ""
    return f"numbers: {figures['min']:.4g} to {figures['max']:.4g}, mean {figures['mean']:.4g}, deviation {figures['std']:.4g}"


def opening_lines(name: str, report: Mapping[str, Any], *, counts: bool) -> list[str]:
    """The lines that ``train`` prints about a data set; with ``counts`` also figures per role and special token."""
    rows = f"{report['kept']:,} rows" + (f" of {report['rows']:,}" if report["kept"] < report["rows"] else "")
    rows += blocks_text(report)
    if report["trained"] is None:
        tokens = "" if report["tokens"] is None else f", {report['tokens']:,} tokens"
        labels = _label_counts(report["labels"] or [])
        known = (
            f"{'pixels' if report['style'] == 'masks' else 'labels'}: {labels}"
            if labels
            else numbers_text(report["numbers"])
        )
        about = questions_line(report) or known or "without labels"
        lines = [f"{name}: {rows}{tokens}; {about}"]
    else:
        trained = f"{report['trained']:,} trained ({share(report['trained'], report['tokens'])})"
        lines = [f"{name}: {rows}, {report['tokens']:,} tokens, {trained}"]
        roles = [(r["role"], r) for r in report["roles"]]
        special = [(printable(t["token"]), t) for t in report["special_tokens"]]
        for what, entries in (("by role", roles), ("special tokens", special)):
            counted = ", ".join(f"{title} {e['trained']:,} of {e['seen']:,}" for title, e in entries)
            lines += [f"  trained {what}: {counted}"] if counted and counts else []
        lines += [f"  {line}" for line in [answers_line(report)] if line]
        spans = [entry for entry in report["labels"] or () if "spans" in entry]
        lines += [f"  labels: {_label_counts(spans)}"] if spans else []
    return [*lines, *(f"  {line}" for line in left_out_lines(report))]


class PreviewText:
    """A row of ``check``'s ``preview``: trained text is green and the rest dim; without colours it is marked {+ +}.

    Args: longest: maximum characters shown of a stretch; a longer one is shortened in the middle.
    """

    def __init__(self, preview: Mapping[str, Any], *, longest: int = 400) -> None:
        self._preview, self._longest = preview, longest

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.padding import Padding
        from rich.text import Text

        coloured = console.is_terminal and console.color_system is not None and not console.no_color
        preview = self._preview
        head = Text(places([preview["where"]]), style="bold")
        if preview["label"] is not None:
            head.append(f"  label {printable(preview['label'])}")
        elif coloured:
            head.append("  ").append("trained", _COLOURS["trained"]).append(" ").append("masked", _COLOURS["masked"])
        else:
            head.append(f"  (trained text is marked {OPEN} {CLOSE})")
        yield head
        body = self._body(coloured, preview["label"] is not None)
        body.rstrip()
        if preview["cut"]:
            body.append(f" ... {preview['cut']:,} tokens cut off", "yellow")
        if follows := preview.get("follows", 0):
            body.append(f" ... {follows:,} tokens in further blocks", "yellow")
        yield Padding(body, (0, 0, 0, 2), expand=False)

    def _body(self, coloured: bool, classified: bool) -> Text:
        from rich.text import Text

        body = Text()
        stretches: list[tuple[str, bool]] = []
        for text, _, trained in self._preview["segments"]:
            if stretches and stretches[-1][1] == trained:
                stretches[-1] = (stretches[-1][0] + text, trained)
            else:
                stretches.append((text, trained))
        for text, trained in stretches:
            shown = self._clipped(printable(text))
            if classified:
                body.append(shown)
            elif coloured:
                body.append(shown, _COLOURS["trained" if trained else "masked"])
            else:
                body.append(f"{OPEN}{shown}{CLOSE}" if trained else shown)
        return body

    def _clipped(self, text: str) -> str:
        if len(text) <= self._longest:
            return text
        half = self._longest // 2
        return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"
