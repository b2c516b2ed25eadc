"""``benchmark``: how fast and how large a recipe's training is here, over adapters, weights and kernels."""

from __future__ import annotations

import dataclasses
import datetime
import os
import shlex
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peftlab.api import bench_cells, build
from peftlab.api.parts import check_settings
from peftlab.bench import files, journal
from peftlab.bench.compare import compare_results
from peftlab.bench.machine import describe_machine, git_commit, size_of_machine, versions
from peftlab.bench.processes import launch
from peftlab.bench.runner import Launch, Tell, run_sweep
from peftlab.bench.summary import best_ceilings, summarize
from peftlab.bench.sweep import Cell, cells_of, impossible
from peftlab.errors import Interrupted, RecipeError
from peftlab.recipe import LoadedRecipe, load_recipe

REPEATS, NEW_TOKENS = 5, 32
# Steps of a repetition: a GPU's are short, and its first ones compile.
_STEPS = {"cpu": 4, "cuda": 20}
_WARM_UP = {"cpu": 1, "cuda": 5}
_WORKER = "peftlab.api.bench_worker"


@dataclasses.dataclass(frozen=True)
class _Plan:
    """All that is known before anything is measured."""

    loaded: LoadedRecipe
    device: str
    sweep: Any
    cells: list[Cell]
    reasons: dict[str, str]
    classes: list[str] | None
    header: dict[str, Any]
    folder: Path
    write_texts: Callable[[Path], None]

    @property
    def alive(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.key not in self.reasons]


def benchmark(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    methods: Sequence[str] | None = None,
    ranks: Sequence[int] | None = None,
    quantize: Sequence[str] | None = None,
    kernels: Sequence[str] | None = None,
    batch: Sequence[int] | None = None,
    length: Sequence[int] | None = None,
    adapters: Sequence[int] | None = None,
    what: Sequence[str] | None = None,
    repeats: int = REPEATS,
    steps: int | None = None,
    new_tokens: int = NEW_TOKENS,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    replace: bool = False,
    plan: bool = False,
    progress: Tell = lambda done, total, text: None,
) -> dict[str, Any]:
    """Measures every cell of a sweep in processes of its own, and writes bench.json, bench.csv and a picture.

    Args:
        recipe, overrides: as for ``train``. methods: of lora, rslora, dora, full. ranks: of the adapters. quantize: of
            none, nf4, int8. kernels: of auto (fused) and reference (PEFT's own). batch: rows of a step. length: tokens of a
            row. adapters: that the rows of a batch are spread over. what: train, generate. Each is the recipe's own value if
            None; quantize then none and nf4, kernels both.
        repeats: processes per cell. steps: measured in each, after the warm-up. new_tokens: of each generated answer.
        out: the folder; default runs/bench-NAME. resume: measure what its folder lacks. replace: begin it anew.
        plan: list the cells and measure nothing. progress: told (jobs done, all jobs, the next).

    Returns: the contents of bench.json, ``header``, ``ceilings`` and ``cells`` (see ``bench.summary``), with ``folder``.
    Raises: RecipeError, DataError, ArtifactError (another benchmark to resume), Interrupted. Cells that are red, too large
        or impossible are rows that say so, not errors.
    """
    asked = {"what": what, "methods": methods, "ranks": ranks, "quantize": quantize, "kernels": kernels}
    asked |= {"batch": batch, "length": length, "adapters": adapters}
    protocol = {"repeats": repeats, "steps": steps, "new_tokens": new_tokens}
    return run_benchmark(
        recipe, overrides, asked, protocol, out=out, resume=resume, replace=replace, plan=plan, progress=progress
    )


def run_benchmark(
    recipe: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str],
    asked: Mapping[str, Any],
    protocol: Mapping[str, Any],
    *,
    out: str | os.PathLike[str] | None,
    resume: bool,
    replace: bool,
    plan: bool,
    progress: Tell,
    start: Launch | None = None,
) -> dict[str, Any]:
    """See ``benchmark``. Args: start: runs one job; default in a process of its own."""
    if resume and replace:
        raise RecipeError("--resume goes on with a benchmark and --replace removes it: give one of them")
    build.prepare_libraries()
    loaded = load_recipe(recipe, overrides)
    with build.located(loaded):
        made = _plan(loaded, overrides, asked, protocol, out)
        if plan:
            return {"folder": str(made.folder), "header": made.header, "cells": _planned(made)}
        if not made.alive:
            reason = next(iter(made.reasons.values()))
            raise RecipeError(f"nothing to measure: none of {len(made.cells)} cells can exist; the first: {reason}")
        with tempfile.TemporaryDirectory(prefix="peftlab-bench-") as temporary:
            texts = Path(temporary) / "texts.npz"
            opened = journal.open_journal(made.folder, made.header, resume=resume, replace=replace)
            try:
                made.write_texts(texts)
                run_sweep(
                    made.alive,
                    job_of=partial(_job, made, texts),
                    launch=start or partial(launch, _WORKER),
                    journal=opened,
                    repeats=made.header["protocol"]["repeats"],
                    tell=progress,
                )
            except KeyboardInterrupt:
                done = len(opened.of("run"))
                raise Interrupted(
                    f"interrupted; {done} measurements are in {opened.path}. Go on with the same command and --resume"
                ) from None
            finally:
                opened.close()
        return _write(made, opened)


def _plan(
    loaded: LoadedRecipe,
    overrides: Sequence[str],
    asked: Mapping[str, Any],
    protocol: Mapping[str, Any],
    out: str | os.PathLike[str] | None,
) -> _Plan:
    recipe = loaded.recipe
    bench_cells.check_recipe(loaded)
    check_settings(recipe)
    for name, value in protocol.items():
        if value is not None and value < 1:
            raise RecipeError(f"--{name.replace('_', '-')}: expected at least 1, found {value}")
    device = build.pick_device(recipe.run.device)
    pretrained = build.pretrained_of(recipe)
    tokenizer = build.tokenizer_of(recipe, pretrained)
    facts = bench_cells.facts_of(recipe, tokenizer, pretrained, protocol["new_tokens"])
    sweep = bench_cells.sweep_of(recipe, device, asked, facts.fixed_length)
    cells = cells_of(sweep)
    reasons = {cell.key: why for cell in cells if (why := impossible(cell, facts)) is not None}
    data = build.load_data(recipe)
    classes = bench_cells.class_names_of(recipe, data)
    steps, warm_up = protocol["steps"] or _STEPS[device], _WARM_UP[device]
    needed = max((cell.batch * cell.length for cell in cells), default=0) * (steps + warm_up)

    def write_texts(file: Path) -> None:
        if facts.fixed_length is not None:
            return
        task = build.build_task(recipe, tokenizer, data.labelled)
        limit = build.limit_of(recipe, pretrained, tokenizer)
        bench_cells.write_texts(file, recipe, task, data.train, num_tokens=needed, limit=limit)

    header = {
        "format": journal.FORMAT,
        "name": loaded.name,
        "command": _command(loaded, overrides, asked, protocol),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(device) | size_of_machine(),
        "versions": versions(),
        "commit": git_commit(Path(__file__).parent),
        "unit": {
            "task": recipe.task,
            "model": recipe.model.name,
            "fingerprint": pretrained.fingerprint,
            "precision": build.precision_of(recipe, device),
            "new_tokens": protocol["new_tokens"],
        },
        "protocol": {"repeats": protocol["repeats"], "steps": steps, "warm_up": warm_up},
        "sweep": sweep.as_dict(),
        "recipe": bench_cells.settings_of(recipe),
    }
    folder = Path(out) if out is not None else Path("runs") / f"bench-{loaded.name}"
    return _Plan(loaded, device, sweep, cells, reasons, classes, header, folder, write_texts)


def _job(made: _Plan, texts: Path, kind: str, cell: Cell) -> dict[str, Any]:
    protocol = made.header["protocol"]
    # The gate needs one step's rows; that the plan cuts them as a run's does follows from their equal length.
    steps = 1 if kind == "gate" else protocol["steps"] + protocol["warm_up"]
    return {
        "job": kind,
        "recipe": bench_cells.cell_settings(made.header["recipe"], cell, steps=steps),
        "classes": made.classes,
        "texts": str(texts) if made.loaded.recipe.spec.reader != "image processor" else None,
        "steps": steps,
        "warm_up": protocol["warm_up"],
        "new_tokens": made.header["unit"]["new_tokens"],
        **{name: getattr(cell, name) for name in ("what", "batch", "length", "adapters")},
    }


def _planned(made: _Plan) -> list[dict[str, Any]]:
    return [
        {
            "key": cell.key,
            **dataclasses.asdict(cell),
            "status": "impossible" if cell.key in made.reasons else "pending",
            "reason": made.reasons.get(cell.key),
        }
        for cell in made.cells
    ]


def _write(made: _Plan, opened: journal.Journal) -> dict[str, Any]:
    cells = summarize(made.cells, made.reasons, opened.records)
    document = {
        "header": {k: v for k, v in opened.records[0].items() if k != "kind"},
        "ceilings": {k: v for k, v in best_ceilings(opened.records).items() if k != "kind"},
        "cells": cells,
    }
    files.write_result(made.folder / journal.RESULT, document)
    files.write_text(made.folder / journal.TABLE, files.csv_text(cells))
    from peftlab.bench.figure import draw_picture

    picture = made.folder / journal.PICTURE
    drawn = draw_picture(document, picture, made.folder / journal.VECTOR)
    return {"folder": str(made.folder), "picture": str(picture) if drawn else None, **document}


def compare_benchmarks(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> dict[str, Any]:
    """Two results of ``benchmark``, cell by cell; see ``bench.compare``.

    Args: a, b: a folder or its bench.json. Raises: RecipeError (no result there), ArtifactError (damaged, other work).
    """
    return compare_results(journal.read_result(Path(a)), journal.read_result(Path(b)), (os.fspath(a), os.fspath(b)))


def _command(
    loaded: LoadedRecipe, overrides: Sequence[str], asked: Mapping[str, Any], protocol: Mapping[str, Any]
) -> str:
    """What a person types for the same sweep."""
    parts = ["peftlab", "bench", loaded.name, *overrides]
    for name, value in asked.items():
        if value is not None:
            parts += [f"--{name}", ",".join(map(str, value))]
    defaults = {"repeats": REPEATS, "steps": None, "new_tokens": NEW_TOKENS}
    for name, value in protocol.items():
        if value != defaults[name]:
            parts += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(parts)
