"""The end of a trained run: its files are opened again and compared, the adapter is merged, the status is written."""

from __future__ import annotations

import datetime
import shlex
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peftlab.assembly.assembly import Assembly
from peftlab.assembly.merging import merge_run
from peftlab.assembly.target import find_target, open_target
from peftlab.assembly.witness import WITNESS_NAME, read_witness
from peftlab.errors import ArtifactError, Interrupted
from peftlab.measuring.memory import release_memory
from peftlab.runs import RUN_NAME, Run, open_run, write_json
from peftlab.training.progress import Progress


def write_status(assembly: Assembly, folder: Path, status: str, started: float, summary: Mapping[str, Any]) -> None:
    when = datetime.datetime.fromtimestamp(started, datetime.UTC).isoformat(timespec="seconds")
    head = {"name": assembly.name, "status": status, "task": assembly.recipe.task, "started": when}
    write_json(folder / RUN_NAME, {**head, **summary, **head})


def _reopened(assembly: Assembly, folder: Path, progress: Progress) -> dict[str, Any]:
    """Opens the run from its files and returns how far it agrees with the trained model (contract C13)."""
    witness, target = read_witness(folder), find_target(folder)
    if witness is None:
        raise ArtifactError(f"{folder / WITNESS_NAME} is missing; train the run again")
    adapts = target.adapter is not None
    opened = open_target(target, progress, assembly=assembly if adapts else None, check=not adapts)
    progress.stage("comparing the saved files with the trained model")
    result = witness.check(
        opened.model,
        opened.task,
        folder,
        batch_tokens=assembly.recipe.eval.batch_tokens,
        device=assembly.device,
        same=True,
    )
    progress.done()
    progress.detail(f"opened again from its files: {result}")
    del opened
    release_memory()
    return asdict(result)


def verify_and_finish(
    assembly: Assembly, folder: Path, summary: dict[str, Any], progress: Progress, *, resume_hint: str
) -> None:
    """Compares the run's files with its witness, merges if the recipe asks for it, and writes the final status."""
    started, merge = time.time(), assembly.recipe.run.merge
    try:
        summary["reopened"] = _reopened(assembly, folder, progress)
        if merge != "none":
            summary["merge"] = merge_run(folder, base=merge, replace=True, progress=progress, assembly=assembly)
    except BaseException as error:
        write_status(assembly, folder, "trained", started, summary)
        if isinstance(error, KeyboardInterrupt):
            raise Interrupted(
                f"interrupted while checking and merging; the training is complete. Resume with: {resume_hint}"
            ) from None
        raise
    write_status(assembly, folder, "finished", started, summary)


def complete(assembly: Assembly, folder: Path, progress: Progress) -> Run:
    """Finishes a trained run whose merge is missing: merges if the recipe asks for it. Errors: as ``merge_run``."""
    progress.note(f"the run in {folder} is trained; only its end is missing")
    summary = dict(open_run(folder).summary)
    verify_and_finish(assembly, folder, summary, progress, resume_hint=resume_command(folder))
    return open_run(folder)


def resume_command(folder: Path) -> str:
    return f"peftlab train {shlex.quote(str(folder))} --resume"
