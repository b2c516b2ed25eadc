"""Models whose parameters FSDP2 shards over the ranks: the whole model for a while, to run it or to save it, and the
optimizer's state by name.

Accelerate shards, PyTorch gathers. A model that is not sharded passes through unchanged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

# State of the optimizer by name of the parameter, then of the entry.
States = dict[str, dict[str, Any]]


def is_sharded(module: nn.Module) -> bool:
    return bool(_sharded(module))


@contextlib.contextmanager
def whole(module: nn.Module, *, reshards: bool = True) -> Iterator[None]:
    """Inside, every rank can run the module and its parts without the other ranks. All ranks enter together. ``state_dict``
    would shard the parameters again: see ``plain``.

    Args: module: as ``prepare`` returned it. reshards: whether its layers let go of their parameters after their forward.
    """
    parts = _sharded(module)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(reshards and part is not module, recurse=False)
            part.reshard()


@contextlib.contextmanager
def plain(module: nn.Module) -> Iterator[None]:
    """Inside, the parameters of the module are ordinary ones on every rank, to be saved or loaded; it cannot run. All ranks
    enter together."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    sharded = [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner.named_parameters(recurse=False)
        if isinstance(parameter, DTensor)
    ]
    ordinary: dict[int, nn.Parameter] = {}  # by id: tied modules share one
    for owner, name, parameter in sharded:
        if id(parameter) not in ordinary:
            ordinary[id(parameter)] = nn.Parameter(parameter.full_tensor().detach(), parameter.requires_grad)
        setattr(owner, name, ordinary[id(parameter)])
    try:
        yield
    finally:
        with torch.no_grad():
            for owner, name, parameter in sharded:
                setattr(owner, name, parameter)
                values = ordinary[id(parameter)].detach()
                parameter.copy_(distribute_tensor(values, parameter.device_mesh, parameter.placements))


def gathered_states(model: nn.Module, optimizer: torch.optim.Optimizer) -> States:
    """The optimizer's state with whole tensors, in the memory of the CPU. All ranks call it."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: {key: _full(value) for key, value in values.items()}
        for parameter, values in optimizer.state.items()
    }


def as_optimizer(model: nn.Module, states: States) -> Any:
    """What a checkpoint saves of an optimizer, for the parameters that ``model`` has now."""
    parameters = dict(model.named_parameters())
    trained = [p for p in parameters.values() if p.requires_grad]
    return SimpleNamespace(
        param_groups=[{"params": trained}], state={parameters[name]: values for name, values in states.items()}
    )


def shard_states(model: nn.Module, optimizer: torch.optim.Optimizer, states: States) -> None:
    """Gives the optimizer of a sharded model the state of the whole one. All ranks call it."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    for name, parameter in model.named_parameters():
        if name in states:
            assert isinstance(parameter, DTensor)
            optimizer.state[parameter] = {
                key: distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
                if value.shape == parameter.shape
                else value
                for key, value in states[name].items()
            }


def _sharded(module: nn.Module) -> list[Any]:
    from torch.distributed.fsdp import FSDPModule

    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def full_value(value: Tensor) -> float:
    """The value of a tensor of one element, which may be a sum over the ranks."""
    return float(_full(value))


def _full(value: Any) -> Any:
    from torch.distributed.tensor import DTensor

    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.detach().cpu() if isinstance(value, Tensor) else value
