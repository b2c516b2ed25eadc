"""``peftlab plan``."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from peftlab import formatting
from peftlab.cli.metrics_tables import new_table
from peftlab.cli.options import Debug, Json, Overrides, Recipe, check_overrides, check_recipe
from peftlab.cli.output import Output, output_of
from peftlab.errors import ResourceError

_UNITS = "KMGT"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT])(i?)(B?)", re.IGNORECASE)
_BAR = 20


def size_in_bytes(text: str) -> int:
    """Bytes of ``24GiB``, ``24GB`` or ``24G`` (as GiB). Raises: typer.BadParameter."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter(f"expected a size with its unit, such as 24GiB, found {text!r}")
    value, unit, binary, byte = match.groups()
    base = 1000 if byte and not binary else 1024
    return int(float(value) * base ** (1 + _UNITS.index(unit.upper())))


def plan(
    context: typer.Context,
    recipe: Recipe,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="SIZE", help="Plan for a GPU of this memory, such as 24GiB.")
    ] = None,
    fit: Annotated[
        str | None, typer.Option("--fit", metavar="SIZE", help="Search settings that fit into a GPU of this memory.")
    ] = None,
    flops: Annotated[
        float | None, typer.Option("--flops", metavar="RATE", help="FLOPs per second of the device, such as 150e12.")
    ] = None,
    _json: Json = False,
    _debug: Debug = False,
) -> None:
    out = output_of(context)
    if gpu is not None and fit is not None:
        raise typer.BadParameter("expected --gpu or --fit, found both; --fit plans for its GPU too")
    size = gpu or fit
    memory = None if size is None else size_in_bytes(size)
    settings = check_overrides(overrides, context, subject=recipe)
    with out.working():
        check_recipe(recipe, settings)
        import peftlab

        report = peftlab.plan(recipe, settings, gpu_bytes=memory, fit=fit is not None, flops_per_s=flops)
    if out.json:
        out.document(report)
    else:
        show_plan(out, report)
    fits = report["fits"] if report["fit"] is None else report["fit"]["fits"]
    if fits is False:
        raise typer.Exit(ResourceError.exit_code)


def show_plan(out: Output, report: Mapping[str, Any]) -> None:
    """Prints the plan: each phase with its terms, the peak, whether it fits, disk and time."""
    batch, most = report["micro_batch"], max(phase["bytes"] for phase in report["phases"])
    limit = report["gpu_bytes"] or most
    out.line()
    counts = report["parameters"]
    out.line(f"{report['model']}: {counts['total']:,} parameters, {counts['trained']:,} trained")
    layers = report["checkpointed_layers"]
    recomputed = f"; {layers} layers are recomputed" if layers else ""
    out.line(f"largest micro-batch: {batch['rows']:,} x {batch['tokens']:,} tokens{recomputed}")
    out.line()
    table = new_table()
    table.add_column("phase", no_wrap=True)
    table.add_column("what", no_wrap=True)
    table.add_column("GiB", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for phase in report["phases"]:
        first = True
        for name, size in sorted(phase["terms"].items(), key=lambda term: -term[1]):
            if size >= phase["bytes"] / 1000:
                table.add_row(phase["name"] if first else "", name, _gib(size), _bar(size, limit))
                first = False
        table.add_row("", "all", _gib(phase["bytes"]), _bar(phase["bytes"], limit), style="bold", end_section=True)
    out.show(table)
    peak = report["peak"]
    text = f"peak     {_gib(peak['bytes'])} GiB, in {peak['phase']}"
    if report["fits"] is None:
        out.line(text)
    else:
        left = report["gpu_bytes"] - peak["bytes"]
        verdict = f"fits into {_gib(report['gpu_bytes'])} GiB, {_gib(left)} GiB are left"
        if left < 0:
            verdict = f"does not fit into {_gib(report['gpu_bytes'])} GiB: {_gib(-left)} GiB too much"
            if peak["phase"] == "merge":
                verdict += "; run.merge=none trains without it"
        out.line(f"{text}; {verdict}", style="green" if left >= 0 else "red")
    disk = report["disk"]
    parts = ", ".join(f"{name} {formatting.size(size)}" for name, size in disk.items())
    out.line(f"disk     {formatting.size(sum(disk.values()))}: {parts}")
    if (estimate := report["estimate"]) is not None:
        seconds = estimate["seconds"]
        time = "give --flops for the time" if seconds is None else f"about {formatting.duration(seconds)}"
        out.line(f"work     {estimate['steps']:,} steps, {estimate['flops']:.2g} FLOPs; {time}")

    if report["fit"] is not None:
        _show_fit(out, report)


def _show_fit(out: Output, report: Mapping[str, Any]) -> None:
    """The search, step by step, and the settings to add."""
    fit, limit = report["fit"], report["gpu_bytes"]
    steps = fit["steps"]
    out.line()
    for before, step in itertools.pairwise(steps):
        words = " ".join(f"{key}={_yaml(value)}" for key, value in step["changes"].items())
        out.line(f"{_gib(step['bytes']):>7} GiB  {words}")
        saved = before["bytes"] - step["bytes"]
        effect = f"saves {_gib(saved)} GiB" if saved >= 0 else f"takes {_gib(-saved)} GiB again"
        out.line(f"{'':13}{effect}; {step['price']}", style="dim")
    words = " ".join(f"{key}={_yaml(value)}" for key, value in fit["changes"].items())
    if not fit["fits"]:
        least = steps[-1]
        out.line(
            f"nothing fits into {_gib(limit)} GiB: with all of this, {least['phase']} takes {_gib(least['bytes'])} GiB; use "
            f"a GPU with more memory than that, or a smaller model",
            style="red",
        )
    elif words:
        out.line(f"fits     add {words}", style="green")


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _gib(size: float) -> str:
    return f"{size / 2**30:.3f}" if size < 0.995 * 2**30 else f"{size / 2**30:.2f}"


def _bar(size: int, limit: int) -> str:
    return "\u2588" * min(_BAR, round(_BAR * size / limit)) if limit else ""
