"""The Accelerator of one run."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch

from peftlab.assembly.assembly import Assembly
from peftlab.ranks import WAIT, num_ranks, shards


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
    _shard(accelerator)
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


def _shard(accelerator: Any) -> None:
    """Sets up FSDP2 as the launch asks for it: also on the CPU, where Accelerate would ignore the flags and copy the model."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    if num_ranks() == 1 or not shards():
        return
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        # Accelerate copies it from the one to the other, as it does on a GPU.
        state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
    # Autocast casts, as without FSDP2. The policy would gather trained weights in 16 bits, and these would be saved.
    state.fsdp_plugin.mixed_precision_policy = None
