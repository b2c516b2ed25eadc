"""Runs one benchmark job in a separate process, for clean memory: ``python -m peftlab.bench.worker JOB RESULT``.

JOB is a JSON file: ``job`` (ceilings, gate, run or quality), ``recipe`` (settings of the cell), ``what``, ``texts``, ``classes``,
``batch``, ``length``, ``adapters``, ``steps``, ``warm_up``, ``new_tokens``. The process writes RESULT when the job is done
or failed with an exception; a killed process writes none.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peftlab.assembly import Assembly
from peftlab.assembly.accelerator import run_accelerator
from peftlab.assembly.plan import make_plan
from peftlab.assembly.prepare import trainable
from peftlab.assembly.process import located, prepare_libraries
from peftlab.bench import jobs
from peftlab.bench.cells import text_examples
from peftlab.bench.job import Job
from peftlab.bench.quality_run import train_once
from peftlab.errors import PeftlabError
from peftlab.measuring.subprocesses import PARENT
from peftlab.models import resolve_precision
from peftlab.recipe import load_recipe
from peftlab.runs import write_json
from peftlab.tasks import lengths_of

# The measured steps are the first of a longer run, for a method with a schedule.
_STEPS_AFTER = 1000
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run_job(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Runs a job and returns its result. Raises: PeftlabError, and errors of libraries."""
    prepare_libraries()
    loaded = load_recipe(spec["recipe"])
    assembly = Assembly(loaded, classes=spec.get("classes"), reads_data=spec.get("texts") is None)
    if spec["job"] == "ceilings":
        return _ceilings(assembly)
    if spec["job"] == "quality":
        return train_once(assembly)
    with (
        tempfile.TemporaryDirectory(prefix="peftlab-bench-") as folder,
        located(loaded),
        run_accelerator(assembly, Path(folder)) as accelerator,
    ):
        job = _prepare(spec, assembly, accelerator)
        if spec["job"] == "gate":
            return jobs.gate(job)
        return jobs.generate(job) if spec["what"] == "generate" else jobs.train(job, Path(folder))


def _ceilings(assembly: Assembly) -> dict[str, Any]:
    from peftlab.measuring.ceilings import measure_ceilings
    from peftlab.measuring.energy import find_meter
    from peftlab.measuring.machine import clocks

    device = assembly.device
    ceilings = measure_ceilings(device, resolve_precision(assembly.recipe.train.precision, device))
    return ceilings | {"clocks": clocks(device), "energy": find_meter(device)[1]}


def _prepare(spec: Mapping[str, Any], assembly: Assembly, accelerator: Any) -> Job:
    count = spec["batch"] * spec["steps"]
    if spec["texts"] is None:
        examples = assembly.train.examples
        rows = [examples[i % len(examples)] for i in range(count)]
    else:
        rows = text_examples(Path(spec["texts"]), rows=count, length=spec["length"], task=assembly.task)
    plan = make_plan(assembly, lengths_of(rows))
    model, planned, report = trainable(assembly, assembly.model(), num_steps=spec["steps"] + _STEPS_AFTER)
    spec = {**spec, "num_trained": report.num_trained, "num_total": report.num_total}
    return Job(spec, assembly, accelerator, assembly.task, model, planned, rows, plan)


@contextmanager
def _reported(result: Path) -> Iterator[None]:
    """Writes an exception as the result."""
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
    """Ends this process with its parent, so that a killed benchmark leaves no worker that disturbs a resumed one."""
    if sys.platform == "linux":
        import ctypes
        import signal

        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
    parent = os.environ.get(PARENT)
    if parent is not None and os.getppid() != int(parent):  # the parent ended while this process was importing
        os._exit(1)


def main(arguments: list[str]) -> None:
    _end_with_parent()
    with contextlib.suppress(OSError):  # if memory runs out, kill this process and not the one with the results
        Path("/proc/self/oom_score_adj").write_text("500")
    spec, result = json.loads(Path(arguments[0]).read_text(encoding="utf-8")), Path(arguments[1])
    with _reported(result):
        write_json(result, run_job(spec))


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # the result is written; skip the slow teardown of gigabytes
