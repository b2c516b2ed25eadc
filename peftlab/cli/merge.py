"""``peftlab merge``."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from peftlab.cli.closing import merge_table
from peftlab.cli.options import Debug, Json, Overrides, RecipeOption, Replace, check_overrides
from peftlab.cli.output import output_of


class Base(StrEnum):
    """The weights the adapter goes into."""

    original = "original"
    dequantized = "dequantized"


class DType(StrEnum):
    """The dtype of the written weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def merge(
    context: typer.Context,
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Run folder, or adapter folder.")],
    overrides: Overrides = None,
    recipe: RecipeOption = None,
    base: Annotated[
        Base | None,
        typer.Option("--base", help="Weights to merge into; default: dequantized for a quantized run."),
    ] = None,
    output: Annotated[str | None, typer.Option("--output", metavar="DIR", help="Default: TARGET/merged.")] = None,
    dtype: Annotated[
        DType, typer.Option("--dtype", help="dtype of the written weights; auto: that of the published model.")
    ] = DType.auto,
    max_kl: Annotated[
        float | None, typer.Option("--max-kl", metavar="X", min=0.0, help="Maximum mean KL, in nats.")
    ] = None,
    min_top1: Annotated[
        float | None,
        typer.Option("--min-top1", metavar="X", min=0.0, max=1.0, help="Minimum top-1 agreement."),
    ] = None,
    replace: Replace = False,
    _json: Json = False,
    _debug: Debug = False,
) -> None:
    out = output_of(context)
    settings = check_overrides(overrides, context, subject=target)
    with out.working():
        import peftlab

        report = peftlab.merge(
            target,
            recipe=recipe,
            overrides=settings,
            base=base.value if base else None,
            output=output,
            dtype=dtype.value,
            max_kl=max_kl,
            min_top1=min_top1,
            replace=replace,
        )
    if out.json:
        out.document(report)
        return
    out.show(*merge_table(report))
    out.line()
    out.line(f"use it:   peftlab eval {report['output']}")
    out.line(f'          {report["model_class"]}.from_pretrained("{report["output"]}")', style="dim")
