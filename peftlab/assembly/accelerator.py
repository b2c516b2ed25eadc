"""The Accelerator of one run."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch

from peftlab.assembly.assembly import Assembly
from peftlab.ranks import WAIT


@contextlib.contextmanager
def run_accelerator(assembly: Assembly, folder: Path) -> Iterator[Any]:
    """Yields an Accelerator for this run, with its seeds and deterministic mode set."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import InitProcessGroupKwargs, set_seed

    recipe = assembly.recipe
    if AcceleratorState._shared_state:  # an earlier run in this process may have used another precision
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        mixed_precision=assembly.precision,
        cpu=assembly.device == "cpu",
        log_with=list(recipe.run.log) or None,
        project_dir=str(folder),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=WAIT)],
    )
    before = torch.are_deterministic_algorithms_enabled()
    set_seed(recipe.run.seed)
    torch.use_deterministic_algorithms(recipe.run.deterministic, warn_only=True)
    # Deterministic mode also fills every new tensor with NaN: an extra memory pass that is not needed here.
    switch = cast("torch.utils.deterministic._Deterministic", torch.utils.deterministic)
    filled, switch.fill_uninitialized_memory = switch.fill_uninitialized_memory, False
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
            yield accelerator
    finally:
        torch.use_deterministic_algorithms(before, warn_only=True)
        switch.fill_uninitialized_memory = filled
        for tracker in accelerator.trackers:  # not end_training, which leaves the process group: a run may go on in it
            tracker.finish()
        accelerator.free_memory()
