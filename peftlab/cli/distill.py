"""``peftlab distill``."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from peftlab.cli.card_tables import show_card
from peftlab.cli.closing import predict_line
from peftlab.cli.options import (
    Debug,
    Json,
    Overrides,
    Recipe,
    Replace,
    Resume,
    Verbose,
    check_overrides,
    check_recipe,
    check_start,
)
from peftlab.cli.output import output_of
from peftlab.specs.tasks import TASKS


def distill(
    context: typer.Context,
    recipe: Recipe,
    overrides: Overrides = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", metavar="N", min=1, help="Number of seeds (overrides distill.seeds).")
    ] = None,
    resume: Resume = False,
    replace: Replace = False,
    _verbose: Verbose = False,
    _json: Json = False,
    _debug: Debug = False,
) -> None:
    out = output_of(context)
    settings = check_overrides(overrides, context, subject=recipe)
    check_start(context, resume=resume, replace=replace)
    with out.working():
        check_recipe(recipe, settings)
        import peftlab

        run = peftlab.distill(recipe, settings, seeds=seeds, resume=resume, replace=replace, verbose=out.verbose)
    if out.json:
        out.document({"run": str(run.folder), **run.summary})
        return
    out.line()
    for line in phase_lines(run.summary):
        out.line(line)
    show_card(out, run.summary["card"])
    out.line()
    where = shlex.quote(str(run.folder))
    out.line(f"student  {where}/student")
    out.line(f"next     {predict_line(str(run.folder), run.summary)}", style="cyan")
    if TASKS[run.summary["task"]].learns_from_labels:
        out.line(f"         peftlab eval {where}", style="cyan")


def phase_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """One line per phase of an on-policy distillation, then a blank line; nothing for other runs."""
    runs = summary.get("on_policy", [])
    for run in runs:
        seed = f" of seed {run['seed']}" if len(runs) > 1 else ""
        for phase in run["phases"]:
            empty = f" ({phase['empty']:,} empty)" if phase["empty"] else ""
            seconds = ", ".join(f"{what} {s:,.0f} s" for what, s in phase["seconds"].items())
            yield (
                f"phase {phase['phase']}{seed}: {phase['written']:,} of {phase['rows']:,} rows written by the student{empty}, "
                f"{phase['mean_answer_tokens']:.1f} tokens each, {100 * phase['ended']:.0f} % ended; "
                f"KL to the teacher {phase['kl']:.4f} nats per token; {seconds}"
            )
    if runs:
        yield ""
