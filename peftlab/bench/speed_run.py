"""Runs a benchmark: the plan, all jobs in separate processes, and JSON, CSV and picture."""

from __future__ import annotations

import dataclasses
import datetime
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peftlab.assembly import Assembly
from peftlab.assembly.checks import check_settings
from peftlab.bench import cells, result_files
from peftlab.bench.figure import draw_picture
from peftlab.bench.runner import Launch, Tell, launch_worker, run_sweep
from peftlab.bench.summary import best_ceilings, summarize
from peftlab.bench.sweep import Cell, cells_of, impossible
from peftlab.errors import Interrupted, RecipeError
from peftlab.measuring import journal
from peftlab.measuring.machine import describe_machine, git_commit, size_of_machine, versions
from peftlab.specs.protocol import NEW_TOKENS, REPEATS, STEPS, WARM_UP


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The plan of a benchmark. num_tokens: needed by all cells; None for images."""

    cells: list[Cell]
    reasons: dict[str, str]
    classes: list[str] | None
    header: dict[str, Any]
    folder: Path
    num_tokens: int | None

    @property
    def possible(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.key not in self.reasons]


def run_benchmark(
    assembly: Assembly,
    overrides: Sequence[str],
    choices: Mapping[str, Any],
    protocol: Mapping[str, Any],
    *,
    folder: Path,
    resume: bool,
    replace: bool,
    plan: bool,
    progress: Tell,
    start: Launch | None = None,
) -> dict[str, Any]:
    """See ``api.benchmark``.

    Args: choices: values of the sweep's dimensions, None: the default. protocol: repeats, steps, new_tokens. start: runs one
        job; default: in a separate process.
    """
    if resume and replace:
        raise RecipeError("--resume and --replace exclude each other")
    planned = _plan(assembly, overrides, choices, protocol, folder)
    if plan:
        return {"folder": str(planned.folder), "header": planned.header, "cells": _planned_cells(planned)}
    if not planned.possible:
        reason = next(iter(planned.reasons.values()))
        raise RecipeError(f"nothing to measure: all {len(planned.cells)} cells are impossible; first: {reason}")
    with tempfile.TemporaryDirectory(prefix="peftlab-bench-") as temporary:
        texts = Path(temporary) / "texts.npz"
        if planned.num_tokens is not None:
            cells.write_texts(texts, assembly, num_tokens=planned.num_tokens)
        opened = journal.open_journal(planned.folder, planned.header, resume=resume, replace=replace)
        try:
            run_sweep(
                planned.possible,
                job_of=partial(_job, planned, texts),
                start=start or launch_worker,
                journal=opened,
                repeats=planned.header["protocol"]["repeats"],
                tell=progress,
            )
        except KeyboardInterrupt:
            done = len(opened.of("run"))
            raise Interrupted(
                f"interrupted; {done} measurements are in {opened.path}. Resume with the same command and --resume"
            ) from None
        finally:
            opened.close()
    return _write(planned, opened)


def _plan(
    assembly: Assembly, overrides: Sequence[str], choices: Mapping[str, Any], protocol: Mapping[str, Any], folder: Path
) -> _Plan:
    recipe, device = assembly.recipe, assembly.device
    cells.check_recipe(recipe)
    cells.check_overrides(overrides, choices)
    check_settings(assembly)
    for name, value in protocol.items():
        if value is not None and value < 1:
            raise RecipeError(f"--{name.replace('_', '-')}: expected at least 1, found {value}")
    facts = cells.facts_of(assembly, protocol["new_tokens"])
    sweep = cells.sweep_of(recipe, device, choices, facts.fixed_length)
    every = cells_of(sweep, recipe.adapter.method if choices.get("ranks") is None else None)
    reasons = {cell.key: why for cell in every if (why := impossible(cell, facts)) is not None}
    classes = assembly.classes if assembly.spec.names_classes else None
    steps, warm_up = protocol["steps"] or STEPS[device], WARM_UP[device]
    needed = max((cell.batch * cell.length for cell in every), default=0) * (steps + warm_up)
    header = {
        "format": journal.FORMAT,
        "name": assembly.name,
        "command": _command(assembly.name, overrides, choices, protocol),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(device) | size_of_machine(),
        "versions": versions(),
        "commit": git_commit(Path(__file__).parent),
        "unit": {
            "task": recipe.task,
            "model": recipe.model.name,
            "fingerprint": assembly.pretrained.fingerprint,
            "precision": assembly.precision,
            "new_tokens": protocol["new_tokens"],
        },
        "protocol": {"repeats": protocol["repeats"], "steps": steps, "warm_up": warm_up},
        "sweep": sweep.as_dict(),
        "recipe": cells.settings_of(recipe),
    }
    num_tokens = needed if facts.fixed_length is None else None
    return _Plan(every, reasons, classes, header, folder, num_tokens)


def _job(planned: _Plan, texts: Path, kind: str, cell: Cell) -> dict[str, Any]:
    protocol = planned.header["protocol"]
    # The gate needs the rows of one step; equal lengths ensure that its plan forms the same micro-batches as a run's.
    steps = 1 if kind == "gate" else protocol["steps"] + protocol["warm_up"]
    return {
        "job": kind,
        "recipe": cells.cell_settings(planned.header["recipe"], cell, steps=steps),
        "classes": planned.classes,
        "texts": None if planned.num_tokens is None else str(texts),
        "steps": steps,
        "warm_up": protocol["warm_up"],
        "new_tokens": planned.header["unit"]["new_tokens"],
        **{name: getattr(cell, name) for name in ("what", "batch", "length", "adapters")},
    }


def _planned_cells(planned: _Plan) -> list[dict[str, Any]]:
    return [
        {
            "key": cell.key,
            **dataclasses.asdict(cell),
            "status": "impossible" if cell.key in planned.reasons else "pending",
            "reason": planned.reasons.get(cell.key),
        }
        for cell in planned.cells
    ]


def _write(planned: _Plan, opened: journal.Journal) -> dict[str, Any]:
    rows = summarize(planned.cells, planned.reasons, opened.records)
    document = {
        "header": {k: v for k, v in opened.records[0].items() if k != "kind"},
        "ceilings": {k: v for k, v in best_ceilings(opened.records).items() if k != "kind"},
        "cells": rows,
    }
    result_files.write_result(planned.folder / journal.RESULT, document)
    result_files.write_text(planned.folder / journal.TABLE, result_files.csv_text(rows))
    picture = planned.folder / journal.PICTURE
    drawn = draw_picture(document, picture, planned.folder / journal.VECTOR)
    return {"folder": str(planned.folder), "picture": str(picture) if drawn else None, **document}


def _command(name: str, overrides: Sequence[str], choices: Mapping[str, Any], protocol: Mapping[str, Any]) -> str:
    """The command line for the same sweep."""
    parts = ["peftlab", "bench", name, *overrides]
    for option, value in choices.items():
        if value is not None:
            parts += [f"--{option}", ",".join(map(str, value))]
    defaults = {"repeats": REPEATS, "steps": None, "new_tokens": NEW_TOKENS}
    for option, value in protocol.items():
        if value != defaults[option]:
            parts += [f"--{option.replace('_', '-')}", str(value)]
    return shlex.join(parts)
