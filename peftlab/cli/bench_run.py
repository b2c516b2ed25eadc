"""``peftlab bench RECIPE``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from peftlab.cli.bench_options import bench_progress, numbers_of, split_names
from peftlab.cli.bench_tables import show_bench, show_cells, show_quality, show_trainings
from peftlab.cli.failures import usage_error
from peftlab.cli.options import Debug, Json, Overrides, check_overrides
from peftlab.cli.output import output_of
from peftlab.errors import PeftlabError, VerificationError
from peftlab.specs.kernels import KERNEL_MODES
from peftlab.specs.methods import VARIANTS
from peftlab.specs.protocol import LENGTH, NEW_TOKENS, REPEATS, SEEDS, STEPS
from peftlab.specs.storages import STORAGES

_LISTS = ("methods", "quantize", "kernels", "what")
_WHOLE = "whole numbers such as 8,16"
_TOKENS = f"Tokens per row; default up to {LENGTH['cpu']}, on CUDA {LENGTH['cuda']}."
_RATE = "numbers such as 1e-4,1e-3"


def bench_run(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file or shipped recipe.")],
    overrides: Overrides = None,
    methods: Annotated[
        str | None, typer.Option("--methods", metavar="NAME,..", help=f"{', '.join(VARIANTS)}; default the recipe's.")
    ] = None,
    ranks: Annotated[
        str | None, typer.Option("--ranks", metavar="N,..", help="Adapter ranks; default the recipe's.")
    ] = None,
    quantize: Annotated[
        str | None, typer.Option("--quantize", metavar="NAME,..", help=f"{', '.join(STORAGES)}; default none,nf4.")
    ] = None,
    kernels: Annotated[
        str | None,
        typer.Option(
            "--kernels",
            metavar="NAME,..",
            help=f"{', '.join(m.name for m in KERNEL_MODES.values() if m.benched)}; default auto,reference.",
        ),
    ] = None,
    batch: Annotated[
        str | None, typer.Option("--batch", metavar="N,..", help="Rows per step; default the recipe's.")
    ] = None,
    length: Annotated[
        str | None,
        typer.Option(
            "--length",
            metavar="N,..",
            help=_TOKENS,
        ),
    ] = None,
    adapters: Annotated[
        str | None, typer.Option("--adapters", metavar="N,..", help="Number of adapters in one batch (generation).")
    ] = None,
    what: Annotated[
        str | None, typer.Option("--what", metavar="NAME,..", help="train, generate; default train.")
    ] = None,
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", help="Processes per cell.")] = REPEATS,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", metavar="N", help=f"Steps per process; default {STEPS['cpu']}, on CUDA {STEPS['cuda']}."
        ),
    ] = None,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", metavar="N", help="Tokens per generated answer.")
    ] = NEW_TOKENS,
    out_folder: Annotated[
        str | None, typer.Option("--out", metavar="FOLDER", help="Output folder; default runs/bench-NAME.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Measure only the missing cells.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Overwrite an earlier benchmark in the folder.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="List the cells; measure nothing.")] = False,
    quality: Annotated[
        bool, typer.Option("--quality", help="Train each method fully and score it, instead of timing a few steps.")
    ] = False,
    seeds: Annotated[
        int, typer.Option("--seeds", metavar="N", help="With --quality: number of seeds per method.")
    ] = SEEDS,
    learning_rates: Annotated[
        str | None,
        typer.Option(
            "--learning-rates",
            metavar="X,..",
            help="With --quality: learning rates to try; each method keeps its best on the first seed. "
            "Default: a search in steps of three around the recipe's rate.",
        ),
    ] = None,
    _json: Json = False,
    _debug: Debug = False,
) -> None:
    out = output_of(context)
    settings = check_overrides(overrides, context, subject=recipe)
    given = {"methods": methods, "ranks": ranks, "quantize": quantize, "kernels": kernels, "batch": batch}
    given |= {"length": length, "adapters": adapters, "what": what}
    choices: dict[str, Any] = {
        name: None
        if text is None
        else split_names(text)
        if name in _LISTS
        else numbers_of(text, int, f"--{name}", _WHOLE, context)
        for name, text in given.items()
    }
    if quality:
        _refuse(context, given, {"methods", "ranks"})
        rates = (
            None if learning_rates is None else numbers_of(learning_rates, float, "--learning-rates", _RATE, context)
        )
        with out.working():
            import peftlab

            with bench_progress() as progress:
                report = peftlab.benchmark_quality(
                    recipe,
                    settings,
                    methods=choices["methods"],
                    ranks=choices["ranks"],
                    seeds=seeds,
                    learning_rates=rates,
                    out=out_folder,
                    resume=resume,
                    replace=replace,
                    plan=plan,
                    progress=progress,
                )
        if out.json:
            out.document(report)
        elif plan:
            show_trainings(out, report)
        else:
            show_quality(out, report)
        _raise_for(report["methods"], report["folder"])
        return
    if learning_rates is not None:
        usage_error("--learning-rates has no effect without --quality; add --quality", context)
    with out.working():
        import peftlab

        with bench_progress() as progress:
            report = peftlab.benchmark(
                recipe,
                settings,
                **choices,
                repeats=repeats,
                steps=steps,
                new_tokens=new_tokens,
                out=out_folder,
                resume=resume,
                replace=replace,
                plan=plan,
                progress=progress,
            )
    if out.json:
        out.document(report)
    elif plan:
        show_cells(out, report)
    else:
        show_bench(out, report)
    _raise_for(report["cells"], report["folder"])


def _refuse(context: typer.Context, given: dict[str, str | None], known: set[str]) -> None:
    """Raises a usage error if an option would have no effect."""
    idle = [f"--{name}" for name, text in given.items() if text is not None and name not in known]
    if idle:
        usage_error(
            f"{idle[0]} has no effect with --quality; change the recipe with section.key=value",
            context,
        )


def _raise_for(cells: list[dict[str, Any]], folder: str) -> None:
    """Raises for exit code 6 if a cell fails its check against PEFT, for 1 if a cell failed with an error."""
    red = [cell for cell in cells if cell["status"] == "red"]
    failed = [cell for cell in cells if cell["status"] == "failed"]
    if red:
        raise VerificationError(
            f"{len(red)} of {len(cells)} cells do not match PEFT's path and were not timed: {_name(red[0])}: "
            f"{red[0]['reason']}"
        )
    if failed:
        raise PeftlabError(
            f"{len(failed)} of {len(cells)} cells failed; first: {_name(failed[0])}: {failed[0]['reason']}. All are in "
            f"{folder}"
        )


def _name(cell: dict[str, Any]) -> str:
    return str(cell.get("key") or cell["name"])
