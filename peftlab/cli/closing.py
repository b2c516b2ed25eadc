"""Prints the end of a training run: gains, answers, speed, the merge, and the next commands."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peftlab import formatting
from peftlab.cli.metrics_tables import before_after, class_table, new_table
from peftlab.cli.output import Output
from peftlab.specs.tasks import TASKS

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

_MAX_SAMPLES = 5
# Classes that fit a screen with the rest; --verbose shows all.
_MAX_CLASSES = 4
_MAX_ANSWER_LINES = 6
_MAX_PROMPT_LINES = 3


def show_training(out: Output, folder: str, summary: Mapping[str, Any]) -> None:
    """Prints the summary of a finished run."""
    out.line()
    rows = summary.get("eval_rows")
    if summary.get("after"):
        out.line(f"on {rows:,} held-out row{'' if rows == 1 else 's'}" if rows else "on the held-out rows", style="dim")
        out.show(before_after(summary.get("before"), summary["after"], verbose=out.verbose))
        if not out.verbose and (table := class_table(summary["after"], most=_MAX_CLASSES)) is not None:
            out.line()
            out.show(table)
    samples = summary.get("samples") or []
    if samples:
        out.line()
        out.show(samples_table(samples, out.console.width))
        if len(samples) > _MAX_SAMPLES:
            out.line(f"and {len(samples) - _MAX_SAMPLES} more in {folder}/run.json", style="dim")
    out.line()
    for line in figure_lines(summary, out.console.width):
        out.line(line)
    if summary.get("merge"):
        out.line()
        out.show(*merge_table(summary["merge"]))
    out.line()
    out.show(next_steps(folder, summary))


def samples_table(samples: Sequence[Mapping[str, Any]], width: int) -> Table:
    """A table of prompts, each above its answers before and after training, side by side."""
    from rich.table import Table
    from rich.text import Text

    column = (width - 2) // 2
    whole = Table.grid()
    for sample in samples[:_MAX_SAMPLES]:
        prompt = Text.assemble(("prompt  ", "dim"), formatting.printable(str(sample["prompt"])).strip())
        if whole.rows:
            whole.add_row("")
        whole.add_row(_clipped(prompt, width, _MAX_PROMPT_LINES))
        one = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
        one.add_column("before", width=column - 1)
        one.add_column("after", width=column - 1)
        one.add_row(*(_answer(sample.get(when), column - 1) for when in ("before", "after")))
        whole.add_row(one)
    return whole


def _answer(text: Any, width: int) -> Text:
    from rich.text import Text

    if text is None:
        return Text("-", style="dim")
    answer = formatting.printable(str(text)).strip()
    return _clipped(Text(answer), width, _MAX_ANSWER_LINES) if answer else Text("(empty)", style="dim")


def _clipped(text: Text, width: int, max_lines: int) -> Text:
    """The first ``max_lines`` lines of ``width`` characters; the last ends in ``...`` if lines were cut."""
    from rich.console import Console
    from rich.text import Text

    lines = list(text.wrap(Console(width=width), width))
    if len(lines) > max_lines:
        last = lines[max_lines - 1]
        last.truncate(width - 4)
        lines = [*lines[: max_lines - 1], Text.assemble(last, (" ...", "dim"))]
    return Text("\n").join(lines)


def figure_lines(summary: Mapping[str, Any], width: int) -> Sequence[str]:
    """Steps, speed, size and time of the training, in as few lines as possible."""
    figures = summary.get("training") or {}
    adapter = summary.get("adapter") or {}
    parts = []
    if adapter.get("num_total"):
        share = 100 * adapter["num_trained"] / adapter["num_total"]
        parts.append(f"{adapter['num_trained']:,} parameters trained ({float(f'{share:.2g}'):g} %)")
    if figures:
        parts.append(f"{figures['steps']:,} steps in {formatting.duration(figures['seconds'])}")
        if figures.get("stopped_early"):
            parts[-1] += " (stopped early)"
        if figures.get("best_step") is not None:
            parts.append(f"best at step {figures['best_step']:,}")
        parts.append(f"{formatting.rate(figures['rows_per_s'])} rows/s")
        parts.append(f"{formatting.rate(figures['tokens_per_s'])} tokens/s")
        if figures.get("trained_tokens"):
            parts.append(f"{figures['trained_tokens']:,.0f} of {figures['tokens']:,.0f} tokens trained")
        if figures.get("peak_memory_bytes"):
            parts.append(f"peak memory {formatting.size(figures['peak_memory_bytes'])}")
    return formatting.joined(parts, width=width)


def merge_table(report: Mapping[str, Any]) -> list[RenderableType]:
    """A table with one row per base that was merged into, and the path of the kept model."""
    from rich.text import Text

    table = new_table()
    table.add_column("merged into", no_wrap=True)
    for title in ("mean KL, nats", "same top-1", "layer error", "kept"):
        table.add_column(title, justify="right")
    verified = bool(report.get("verified"))
    for name, figures in report["targets"].items():
        kept = name == report["target"]
        verdict = (
            Text("verified", "green") if kept and verified else Text("failed" if kept else "no", "red" if kept else "")
        )
        logits, layers = figures["logits"], figures["layers"]
        table.add_row(
            name,
            formatting.small(logits["kl_mean"]),
            f"{100 * formatting.number(logits['top1']):.1f} %",
            "-" if layers is None else formatting.small(layers["relative"]),
            verdict,
        )
    chosen = report["targets"].get(report["target"], {})
    parts = [str(report["output"]), str(chosen.get("dtype", report.get("dtype", "")))]
    if chosen.get("bytes"):
        parts.append(formatting.size(chosen["bytes"]))
    notes = [Text(line, style="dim") for line in _compared(chosen)]
    return [table, *notes, Text("merged model: " + ", ".join(p for p in parts if p))]


def _compared(figures: Mapping[str, Any]) -> list[str]:
    """What the merged files were compared with: outputs, then layers."""
    if figures.get("of_training"):
        with_what = "the trained model, as it was in memory at the end of training"
    else:
        with_what = "base + adapter, loaded from their files: the adapter has no witness of its training"
    lines = [f"the merged files were compared on held-out rows with {with_what}"]
    if (layers := figures.get("layers")) is not None:
        counts = {
            "against the formula of the method": layers["by_formula"],
            "by their outputs on random inputs": layers["by_probes"],
            "not one by one": layers["unchecked"],
        }
        listed = ", ".join(f"{count} {how}" for how, count in counts.items() if count)
        lines.append(f"layers: {listed}; the error is relative to what the adapter changes")
    return lines


def predict_line(folder: str, summary: Mapping[str, Any]) -> str:
    """The command that runs the model on an example input."""
    return f"peftlab predict {shlex.quote(folder)} {TASKS[summary['task']].example_input}"


def next_steps(folder: str, summary: Mapping[str, Any]) -> Table:
    """A table of the useful next commands for this run."""
    from rich.table import Table
    from rich.text import Text

    where = shlex.quote(folder)
    steps = [predict_line(folder, summary), f"peftlab eval {where}"]
    if TASKS[summary["task"]].chats and "accuracy" not in (summary.get("after") or {}):
        steps.insert(0, f"peftlab chat {where}")
    if not summary.get("merge") and summary.get("mergeable", not summary.get("full")):
        steps.append(f"peftlab merge {where}")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("run", Text(folder))
    for index, step in enumerate(steps):
        table.add_row("next" if index == 0 else "", Text(step, style="cyan"))
    return table
