"""``peftlab adapters``."""

from __future__ import annotations

from typing import Annotated

import typer

from peftlab.cli.adapter_tables import rework_tables, show_tables
from peftlab.cli.failures import usage_error
from peftlab.cli.options import Debug, Json, Overrides, RecipeOption, Verbose, check_overrides, split_overrides
from peftlab.cli.output import Output, output_of

Run = Annotated[str, typer.Argument(metavar="RUN", help="Run folder, or adapter folder.")]
To = Annotated[str, typer.Option("--to", metavar="FOLDER", help="The folder to write.")]
Tolerance = Annotated[
    float | None,
    typer.Option("--tolerance", metavar="X", help="Largest mean KL from what was trained, in nats."),
]


def show(
    context: typer.Context,
    run: Run,
    overrides: Overrides = None,
    recipe: RecipeOption = None,
    picture: Annotated[
        str | None, typer.Option("--picture", metavar="FILE", help="Draw heat maps: a .png or .svg file.")
    ] = None,
    verbose: Verbose = False,
    _json: Json = False,
    _debug: Debug = False,
) -> None:
    out = output_of(context)
    settings = check_overrides(overrides, context, subject=run)
    with out.working():
        import peftlab

        figures = peftlab.show_adapter(run, picture=picture, recipe=recipe, overrides=settings)
    if out.json:
        out.document(figures)
        return
    out.show(*show_tables(figures, verbose=verbose))
    if picture is not None:
        out.line(f"picture: {picture}")


def shrink(
    context: typer.Context,
    run: Run,
    to: To,
    overrides: Overrides = None,
    recipe: RecipeOption = None,
    keep: Annotated[
        float | None, typer.Option("--keep", metavar="SHARE", help="Share of the parameters to keep at most.")
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", metavar="T", help="Smallest singular value, as a share of the largest."),
    ] = None,
    budget: Annotated[
        int | None, typer.Option("--budget", metavar="N", help="Number of parameters to keep at most.")
    ] = None,
    tolerance: Tolerance = None,
    _json: Json = False,
    _debug: Debug = False,
) -> None:
    out = output_of(context)
    settings = check_overrides(overrides, context, subject=run)
    with out.working():
        import peftlab

        report = peftlab.shrink_adapter(
            run,
            to,
            keep=keep,
            threshold=threshold,
            budget=budget,
            tolerance=tolerance,
            recipe=recipe,
            overrides=settings,
        )
    _finish(out, report)


def combine(
    context: typer.Context,
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN_A RUN_B ...", help="Run or adapter folders; settings last.")
    ],
    to: To,
    method: Annotated[
        str,
        typer.Option(
            "--method", metavar="M", help="linear, difference, svd, ties, dare_linear or dare_ties; default linear."
        ),
    ] = "linear",
    weights: Annotated[
        str | None, typer.Option("--weights", metavar="W,W", help="One per adapter, such as 1,0.5; default 1 each.")
    ] = None,
    density: Annotated[
        float | None, typer.Option("--density", metavar="D", help="Share that ties and dare keep; default 0.5.")
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", metavar="N", help="Rank of the result, for svd.")] = None,
    recipe: RecipeOption = None,
    tolerance: Tolerance = None,
    _json: Json = False,
    _debug: Debug = False,
) -> None:
    out = output_of(context)
    settings, names = split_overrides(runs)
    with out.working():
        import peftlab

        report = peftlab.combine_adapters(
            names,
            to,
            method=method,
            weights=None if weights is None else _numbers(weights, context),
            density=density,
            rank=rank,
            tolerance=tolerance,
            recipe=recipe,
            overrides=settings,
        )
    _finish(out, report)


def extract(
    context: typer.Context,
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model before fine-tuning.")],
    finetuned: Annotated[str, typer.Argument(metavar="FINETUNED", help="The same model after fine-tuning.")],
    rank: Annotated[int, typer.Option("--rank", metavar="N", help="Rank of each linear layer.")],
    to: To,
    overrides: Overrides = None,
    save_rest: Annotated[
        bool, typer.Option("--save-rest", help="Store biases, norms and others that differ in full.")
    ] = False,
    recipe: Annotated[
        str | None, typer.Option("--recipe", metavar="R", help="Names task and held-out rows to compare outputs on.")
    ] = None,
    tolerance: Tolerance = None,
    _json: Json = False,
    _debug: Debug = False,
) -> None:
    out = output_of(context)
    settings = check_overrides(overrides, context, subject=base)
    if recipe is None and (settings or tolerance is not None):
        usage_error("settings and --tolerance need --recipe, which names the rows to compare on", context)
    with out.working():
        import peftlab

        report = peftlab.extract_adapter(
            base,
            finetuned,
            to,
            rank=rank,
            save_rest=save_rest,
            recipe=recipe,
            overrides=settings,
            tolerance=tolerance,
        )
    _finish(out, report)


def convert(
    context: typer.Context,
    run: Run,
    to: To,
    rank: Annotated[
        str, typer.Option("--rank", metavar="N", help="Rank of each module, or the share of its norm to keep: 0.99.")
    ],
    overrides: Overrides = None,
    recipe: RecipeOption = None,
    tolerance: Tolerance = None,
    _json: Json = False,
    _debug: Debug = False,
) -> None:
    out = output_of(context)
    settings = check_overrides(overrides, context, subject=run)
    with out.working():
        import peftlab

        report = peftlab.convert_adapter(
            run, to, rank=_rank(rank, context), tolerance=tolerance, recipe=recipe, overrides=settings
        )
    _finish(out, report)


def _numbers(text: str, context: typer.Context) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        usage_error(f"expected numbers with commas between them, such as 1,0.5, found {text!r}", context)


def _rank(text: str, context: typer.Context) -> float:
    """An int for a rank, a float for a share."""
    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        usage_error(f"expected a rank such as 8, or a share such as 0.99, found {text!r}", context)


def _finish(out: Output, report: dict[str, object]) -> None:
    """Prints the report of a rework that wrote a folder."""
    if out.json:
        out.document(report)
        return
    out.show(*rework_tables(report))
    if not report.get("verified"):
        return
    out.line()
    out.line(f"use it:   peftlab eval {report['output']}")
    out.line(f"          peftlab merge {report['output']}")
