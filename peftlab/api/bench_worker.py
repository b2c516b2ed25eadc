"""One job of a benchmark in a process of its own, for clean memory: ``python -m peftlab.api.bench_worker JOB RESULT``.

JOB is a JSON file: ``job`` (ceilings, gate, run or quality), ``recipe`` (settings of the cell), ``what``, ``texts``, ``classes``,
``batch``, ``length``, ``adapters``, ``steps``, ``warm_up``, ``new_tokens``. RESULT is written when the job is done, or
failed with an error that has a name; a process that is killed leaves none.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftlab.api import build
from peftlab.api.bench_cells import text_examples
from peftlab.api.parts import make_plan, run_accelerator, trainable
from peftlab.api.run import write_json
from peftlab.bench.processes import PARENT
from peftlab.data import BatchPlan
from peftlab.errors import PeftlabError
from peftlab.recipe import LoadedRecipe, Recipe, load_recipe
from peftlab.tasks import Example, Task, lengths_of

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass
class Job:
    """A cell ready to run. ``rows``: examples of equal length, ``batch`` for each step; plan: None when it generates."""

    spec: Mapping[str, Any]
    loaded: LoadedRecipe
    accelerator: Any
    task: Task
    model: Any
    planned: list[str]
    rows: list[Example]
    plan: BatchPlan

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe

    @property
    def device(self) -> str:
        return str(self.accelerator.device.type)


def run_job(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The result of a job. Raises: PeftlabError; what a library raises."""
    build.prepare_libraries()
    loaded = load_recipe(spec["recipe"])
    if spec["job"] == "ceilings":
        return _ceilings(loaded.recipe)
    if spec["job"] == "quality":
        from peftlab.api.bench_quality import train_once

        return train_once(spec["recipe"])
    with (
        tempfile.TemporaryDirectory(prefix="peftlab-bench-") as folder,
        build.located(loaded),
        run_accelerator(loaded.recipe, Path(folder)) as accelerator,
    ):
        from peftlab.api import bench_jobs

        job = _prepare(spec, loaded, accelerator)
        if spec["job"] == "gate":
            return bench_jobs.gate(job)
        return bench_jobs.generate(job) if spec["what"] == "generate" else bench_jobs.train(job, Path(folder))


def _ceilings(recipe: Recipe) -> dict[str, Any]:
    from peftlab.bench.ceilings import measure_ceilings
    from peftlab.bench.energy import find_meter
    from peftlab.bench.machine import clocks
    from peftlab.models import resolve_precision

    device = build.pick_device(recipe.run.device)
    found = measure_ceilings(device, resolve_precision(recipe.train.precision, device))
    return found | {"clocks": clocks(device), "energy": find_meter(device)[1]}


def _prepare(spec: Mapping[str, Any], loaded: LoadedRecipe, accelerator: Any) -> Job:
    recipe, device = loaded.recipe, accelerator.device.type
    pretrained = build.pretrained_of(recipe)
    tokenizer = build.tokenizer_of(recipe, pretrained)
    task = build.build_task(recipe, tokenizer, None, classes=spec["classes"])
    count = spec["batch"] * spec["steps"]
    if spec["texts"] is None:
        data = build.load_data(recipe)
        limit = build.limit_of(recipe, pretrained, tokenizer)
        found = build.encode(recipe, task, data.train, limit=limit, training=True).examples
        rows = [found[i % len(found)] for i in range(count)]
    else:
        language_model = recipe.spec.predicts == "tokens"
        rows = text_examples(Path(spec["texts"]), rows=count, length=spec["length"], language_model=language_model)
    plan = make_plan(recipe, lengths_of(rows), device)
    model = build.model_of(recipe, pretrained, task, device)
    model, planned, report = trainable(recipe, model, task)
    job = Job(spec, loaded, accelerator, task, model, planned, rows, plan)
    job.spec = {**spec, "num_trained": report.num_trained, "num_total": report.num_total}
    return job


@contextmanager
def _reported(result: Path) -> Iterator[None]:
    """Writes an error that has a name as the result."""
    try:
        yield
    except Exception as error:
        known = isinstance(error, PeftlabError)
        kind = type(error).__name__
        if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "can't allocate memory" in str(error):
            known, kind = True, "ResourceError"
        message = str(error).strip() if isinstance(error, PeftlabError) else str(error).strip().split("\n")[0]
        write_json(result, {"error": {"kind": kind, "message": message, "known": known}})
        if not known:
            raise


def _end_with_parent() -> None:
    """A benchmark that is killed leaves no process that measures beside the one that goes on with it."""
    if sys.platform == "linux":
        import ctypes
        import signal

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    parent = os.environ.get(PARENT)
    if parent is not None and os.getppid() != int(parent):  # it went while this process was importing
        os._exit(1)


def main(arguments: list[str]) -> None:
    _end_with_parent()
    with contextlib.suppress(
        OSError
    ):  # should memory run out, this process goes, and not the one that keeps the results
        Path("/proc/self/oom_score_adj").write_text("500")
    spec, result = json.loads(Path(arguments[0]).read_text(encoding="utf-8")), Path(arguments[1])
    with _reported(result):
        write_json(result, run_job(spec))


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # the result is written: what is left is taking down gigabytes
