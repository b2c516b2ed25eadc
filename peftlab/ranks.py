"""The processes of one launch: ``accelerate launch`` and ``torchrun`` start one command several times, as ranks 0, 1, ...

All ranks run the same code. What must happen once goes through ``on_first``; only rank 0 speaks. The environment says
which rank this is, so that the command line knows it before it imports torch. Accelerate does the rest.
"""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

from peftlab.errors import FailedElsewhere, PeftlabError, RecipeError

# Bounds every wait for another rank. The longest is for a merge or a student's comparison on rank 0.
WAIT = datetime.timedelta(hours=2)
# The names that Accelerate reads, from torchrun and three kinds of MPI.
_RANK = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_SIZE = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# Texts of gloo and NCCL when the process at the other end has ended.
_LOST = ("connection closed by peer", "connection reset by peer", "broken pipe", "remote process exited", "read error")

T = TypeVar("T")


def num_ranks() -> int:
    """The number of processes of this launch; 1 without a launcher."""
    return _number(_SIZE, 1)


def rank() -> int:
    """The number of this process in the launch, from 0."""
    return _number(_RANK, 0) if num_ranks() > 1 else 0


def is_first() -> bool:
    """Whether this process writes files and speaks: rank 0, or the only one."""
    return rank() == 0


def shards() -> bool:
    """Whether the launch asks for FSDP, which shards the model over the ranks."""
    return is_set("ACCELERATE_USE_FSDP")


def join(device: str) -> None:
    """Joins the process group of the launch, through Accelerate: gloo on the CPU, NCCL on GPUs. Without a launcher nothing.

    Args: device: ``cpu`` or ``cuda``.
    Raises: RecipeError if the environment is that of no launcher that Accelerate knows.
    """
    if num_ranks() > 1:
        from accelerate import PartialState
        from accelerate.utils import disable_fsdp_ram_efficient_loading

        disable_fsdp_ram_efficient_loading()  # the other ranks would load no weights, and their checks would see that
        if PartialState(cpu=device == "cpu", timeout=WAIT).num_processes != num_ranks():
            raise RecipeError("expected a launch by accelerate launch or torchrun: LOCAL_RANK is not set")


def leave() -> None:
    """Leaves the process group that ``join`` joined, at the end of the process."""
    if num_ranks() > 1 and "torch.distributed" in sys.modules:
        import torch.distributed

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def on_first(work: Callable[[], T]) -> T:
    """The result of ``work``, which runs in rank 0 only; the others wait for it and get a copy.

    Raises: in rank 0 what ``work`` raises; in the others FailedElsewhere, with the same exit code.
    """
    if num_ranks() == 1:
        return work()
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    failure: Exception | None = None
    if is_first():
        try:
            outcome[0] = work()
        except Exception as error:
            failure = error
            outcome[1] = (str(error), error.exit_code if isinstance(error, PeftlabError) else 1)
    broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    if outcome[1] is not None:
        raise FailedElsewhere(*outcome[1])
    return cast(T, outcome[0])


def lost_another(error: BaseException) -> bool:
    """Whether ``error`` only says that another rank has ended."""
    text = str(error).lower()
    return num_ranks() > 1 and isinstance(error, RuntimeError) and any(part in text for part in _LOST)


def _number(names: tuple[str, ...], default: int) -> int:
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), default)


def is_set(variable: str) -> bool:
    """Whether a launcher has set a flag in the environment."""
    return os.environ.get(variable, "").lower() in ("true", "1")
