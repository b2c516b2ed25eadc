"""``peftlab adapters list``: the adapter methods, or one of them with its options."""

from __future__ import annotations

import difflib
import functools
from typing import Annotated, Any

import typer

from peftlab.cli.options import Debug, Json
from peftlab.cli.output import Output, output_of
from peftlab.errors import RecipeError
from peftlab.recipe import shipped
from peftlab.specs.method_spec import MethodSpec
from peftlab.specs.methods import METHODS
from peftlab.specs.peft_methods import COMPUTED, peft_version
from peftlab.specs.storages import STORAGES

_QUANTIZED = [name for name, storage in STORAGES.items() if storage.is_quantized]


def list_methods(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[METHOD]", help="A method, to see its options.")] = None,
    _json: Json = False,
    _debug: Debug = False,
) -> None:
    out = output_of(context)
    if name is None:
        if out.json:
            out.document({"peft": peft_version(), "methods": [_facts(spec) for spec in METHODS.values()]})
        else:
            _show_all(out)
        return
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise RecipeError(f"there is no adapter method {name!r} in PEFT {peft_version()}{hint}")
    if out.json:
        out.document({"peft": peft_version(), **_facts(METHODS[name]), "options": _options(METHODS[name])})
    else:
        _show_one(out, METHODS[name])


def _show_all(out: Output) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("method", style="bold", no_wrap=True)
    for column in ("merges", *_QUANTIZED):
        table.add_column(column, no_wrap=True)
    table.add_column("what it does")
    for spec in METHODS.values():
        storages = [_says(None if spec.storages is None else name in spec.storages) for name in _QUANTIZED]
        text = f"no recipe can use it: {spec.refused}" if spec.refused else spec.summary or spec.label
        shown = ["-"] * (1 + len(storages)) if spec.refused else [_says(not spec.unmergeable), *storages]
        table.add_row(spec.name, *shown, text, style="dim" if spec.refused else None)
    out.show(table)
    out.line()
    out.line(f"From PEFT {peft_version()}; docs/adapters.md has what was measured.", style="dim")
    out.line("Options of one: peftlab adapters list METHOD", style="dim")
    out.line("Use one: peftlab train RECIPE adapter.method=METHOD", style="dim")


def _show_one(out: Output, spec: MethodSpec) -> None:
    from rich.table import Table

    out.line(f"{spec.name}: {spec.label}" if spec.label != spec.name else spec.name, style="bold")
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column(no_wrap=True)
    facts.add_column()
    for label, text in _lines(spec):
        facts.add_row(label, text)
    out.show(facts)
    options = _options(spec)
    if options:
        out.line()
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("key", style="bold", no_wrap=True)
        table.add_column("default", overflow="fold", max_width=16)
        table.add_column("meaning")
        for option in options:
            table.add_row(option["key"], option["default"], option["meaning"])
        out.show(table)


def _lines(spec: MethodSpec) -> list[tuple[str, str]]:
    paper = f"arXiv {spec.paper}" if spec.paper else ""
    merges = f"no: {spec.unmergeable}" if spec.unmergeable else "yes"
    quantized = ", ".join(spec.storages or ()) or "none"
    lines = [
        ("what", spec.summary),
        ("paper", paper),
        ("evidence", spec.evidence),
        ("merges", merges),
        ("quantized weights", "not tried" if spec.storages is None else quantized),
        ("several in one batch", "yes" if spec.several else "no"),
        ("beside another method", "yes" if spec.beside else ""),
        ("refused", spec.refused),
    ]
    return [(label, text) for label, text in lines if text and not (spec.refused and label in ("merges",))]


def _options(spec: MethodSpec) -> list[dict[str, str]]:
    """The keys of ours, with PEFT's name, then PEFT's options."""
    rows = []
    for key in (*spec.keys, *spec.places):
        meaning = (
            f"PEFT's {spec.keys[key]}" if spec.peft is not None and key in spec.keys else _keys()[key]["description"]
        )
        rows.append({"key": key, "default": _shown(_default(spec, key)), "meaning": meaning})
    for name, option in spec.options.items():
        default = spec.defaults.get(name, option.default)
        required = "required; " if name in spec.required else ""
        meaning = f"{required}{option.help or option.kind}"
        if name in spec.refused_options:
            meaning = f"cannot be set: {spec.refused_options[name]}"
        rows.append({"key": name, "default": _shown(default), "meaning": meaning})
    return rows


@functools.cache
def _keys() -> dict[str, Any]:
    """The keys of the section adapter, with their descriptions and defaults."""
    return dict(shipped.recipe_schema()["$defs"]["AdapterSection"]["properties"])


def _default(spec: MethodSpec, key: str) -> Any:
    """The default of a key of ours: the method's own, or that of all methods."""
    own = spec.targets if key == "targets" else spec.default(key)
    return _keys()[key].get("default") if own is None else own


def _shown(value: Any) -> str:
    """A default as a recipe writes it."""
    if value is None or value is COMPUTED or value == []:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _says(fact: bool | None) -> str:
    return "?" if fact is None else "yes" if fact else "no"


def _facts(spec: MethodSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "label": spec.label,
        "summary": spec.summary,
        "paper": spec.paper,
        "evidence": spec.evidence,
        "merges": not (spec.unmergeable or spec.refused),
        "quantized": None if spec.storages is None else list(spec.storages),
        "several_in_one_batch": spec.several,
        "refused": spec.refused,
    }
