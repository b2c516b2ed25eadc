"""Writes a reworked adapter, opens the files again, compares, and keeps them only if they agree."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peftlab.adapters.lora_files import num_stored
from peftlab.assembly.assembly import Assembly
from peftlab.assembly.target import Target, open_target
from peftlab.assembly.witness import WITNESS_NAME, Witness
from peftlab.errors import RecipeError, VerificationError
from peftlab.recipe import write_lock
from peftlab.reworking.source import metrics_of, runs_of
from peftlab.runs import LOCK_NAME, finite, write_json
from peftlab.tasks import Encoded
from peftlab.training.progress import Progress

# The result is the same function in other factors: only rounding and the order of sums differ.
EXACT = 1e-4
# Mean KL in nats that an approximation may cost; see ``limits_of`` for the top-1 agreement that goes with it.
APPROXIMATE = 0.02


def limits_of(tolerance: float) -> dict[str, float]:
    """The limits on mean KL and top-1 agreement for one tolerance in nats.

    The mean total variation is at most sqrt(KL / 2) (Pinsker), and so many of the positions may change their likeliest class.
    """
    return {"kl_mean": tolerance, "top1": max(0.0, 1 - math.sqrt(tolerance / 2))}


def check_tolerance(tolerance: float | None) -> None:
    """Raises RecipeError unless it is a number of nats."""
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise RecipeError(f"expected a tolerance above 0 nats of mean KL, found {tolerance}")


@contextlib.contextmanager
def partial_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder next to ``folder`` that is gone at the end of the block, unless it was renamed."""
    written = folder.absolute().with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        written.mkdir()
        yield written
    finally:
        shutil.rmtree(written, ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What a new adapter is compared with. target, assembly: how it is opened, on which base. reference: outputs that it has to
    give, on some of the held-out rows."""

    target: Target
    assembly: Assembly
    held_out: Encoded
    reference: Witness


def write_verified(
    folder: Path,
    write: Callable[[Path], None],
    comparison: Comparison,
    report: dict[str, Any],
    *,
    tolerance: float,
    remedy: str,
    progress: Progress,
) -> dict[str, Any]:
    """Writes an adapter, opens it again, compares it, and adds lock, witness and report; returns the report.

    Args:
        write: writes the adapter's files into a folder. report: of the verb, with the metrics known so far.
        tolerance: nats of mean KL. remedy: what a user can do if that is exceeded.
    Raises: VerificationError, with nothing kept, if the result is beyond ``tolerance``.
    """
    assembly, held_out = comparison.assembly, comparison.held_out
    with partial_folder(folder) as written:
        write(written)
        assert num_stored(written) == report["parameters"]["after"] + report["in_full"]
        target = dataclasses.replace(comparison.target, adapter=written, kind="adapter")
        opened = open_target(target, progress, assembly=assembly, check=False)
        progress.stage("comparing with the reference on held-out rows")
        agreement = comparison.reference.compare(opened.model, assembly.task, **runs_of(assembly))
        metrics = metrics_of(opened, held_out, progress)
        limits = limits_of(tolerance)
        if failures := agreement.failures(**limits):
            raise VerificationError(
                f"the new adapter does not agree, nothing was written: {'; '.join(failures)}. {remedy}"
            )
        report = finite(
            {
                **report,
                "metrics": {**report.get("metrics", {}), "after": metrics},
                "output": str(folder),
                "logits": asdict(agreement),
                "limits": limits,
                "rows": held_out.num_rows,
                "verified": True,
            }
        )
        # A witness of its own: `eval` and `merge` of the new folder compare with this adapter, not with the one it came from.
        Witness.take(opened.model, assembly.task, held_out.examples, **runs_of(assembly)).write(written / WITNESS_NAME)
        if target.lock is not None:
            shutil.copyfile(target.lock, written / LOCK_NAME)
        else:
            fingerprints, kept = assembly.fingerprints, assembly.kept
            write_lock(written / LOCK_NAME, assembly.loaded, fingerprints=fingerprints, environment=kept)
        write_json(written / f"{report['verb']}.json", report)
        os.replace(written, folder)
    return report
