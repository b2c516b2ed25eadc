"""``peftlab bench tune-kernels``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftlab.cli.bench_options import bench_progress, numbers_of, split_names
from peftlab.cli.options import Debug, Json
from peftlab.cli.output import make_console, output_of

if TYPE_CHECKING:
    from rich.table import Table


def tune_kernels(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            metavar="SHAPE",
            help="Model whose linears to measure; default shape:llama-3-8b, on a CPU smollm2-135m.",
        ),
    ] = None,
    rows: Annotated[str, typer.Option("--rows", metavar="N,..", help="Rows of the input.")] = "512,2048,8192",
    rank: Annotated[int, typer.Option("--rank", metavar="N", help="Rank of the adapter.")] = 16,
    kinds: Annotated[str, typer.Option("--kinds", metavar="KIND,..", help="Kinds of weights.")] = "dense,nf4,int8",
    dropout: Annotated[
        str, typer.Option("--dropout", metavar="P,..", help="0, and at most one other probability.")
    ] = "0,0.05",
    out_file: Annotated[
        str | None,
        typer.Option("--out", metavar="FILE", help="Default: kernel-plans.json in the cache, used by all runs."),
    ] = None,
    _json: Json = False,
    _debug: Debug = False,
) -> None:
    out = output_of(context)
    row_counts = numbers_of(rows, int, "--rows", "whole numbers such as 512,2048", context)
    probabilities = numbers_of(dropout, float, "--dropout", "numbers such as 0,0.05", context)
    path = None if out_file is None else Path(out_file).expanduser()
    with out.working():
        import peftlab

        with bench_progress() as progress:
            report = peftlab.tune_kernels(
                model=model,
                rows=row_counts,
                rank=rank,
                kinds=split_names(kinds),
                dropout=probabilities,
                out=path,
                progress=progress,
            )
    console = make_console(sys.stderr)
    console.print(_table(report["plans"]), markup=False)
    for note in report["notes"]:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    if out.json:
        out.document(report)
        return
    changed = sum({k: plan[k] for k in plan["rule"]} != plan["rule"] for plan in report["plans"])
    kept = f", {report['kept']} earlier plans kept" if report["kept"] else ""
    out.line(f"{len(report['plans'])} plans, {changed} differ from the rule{kept}: {report['file']}")


def _table(plans: list[dict[str, Any]]) -> Table:
    """A table with one row per direction: two for a plan, one with dropout."""
    from rich.table import Table

    hows = ("merged", "split", "library")
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("kind", "rows", "N x K", "dropout", "pass"):
        table.add_column(name, justify="left" if name in ("kind", "pass") else "right", no_wrap=True)
    for name in hows:
        table.add_column(f"{name}\nms", justify="right", no_wrap=True)
    table.add_column("chosen", no_wrap=True)
    for plan in plans:
        for direction in ("forward", "backward"):
            times = plan[f"{direction}_ms"]
            if not times:
                continue
            cells = [f"{times[how]['median']:.4g}" if how in times else "-" for how in hows]
            chosen = plan[direction] + ("" if plan[direction] == plan["rule"][direction] else " *")
            size = f"{plan['n']} x {plan['k']}"
            table.add_row(plan["kind"], str(plan["rows"]), size, f"{plan['probability']:g}", direction, *cells, chosen)
    table.caption = "* differs from the rule: at least 3 % faster, beyond noise"
    return table
