"""The optimizers by name; the rows are in ``specs.optimizers``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import nn

from peftlab.models import import_bitsandbytes


def make_optimizer(
    model: nn.Module, name: str, *, lr: float, factors: Mapping[str, float] | None = None, **options: Any
) -> Any:
    """Returns the optimizer for the trained parameters of ``model``. Its groups have ``factor``, which multiplies their rate.

    Args: factors: factor on the learning rate by name of a parameter; default 1. options: the keys of its row.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((factors or {}).get(parameter_name, 1.0), []).append(parameter)
    return OPTIMIZERS[name](groups, lr=lr, **options)


def _adamw(
    trained: Mapping[float, list[nn.Parameter]], *, lr: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """Fused AdamW; vectors (biases, norms, magnitudes) are not decayed."""
    return torch.optim.AdamW(_groups(trained, lr, weight_decay), lr=lr, betas=betas, fused=True)


def _of_bitsandbytes(name: str) -> Callable[..., torch.optim.Optimizer]:
    """The maker of an AdamW of bitsandbytes; a tensor with fewer than 4,096 elements keeps a state of 32 bits in each."""

    def make(
        trained: Mapping[float, list[nn.Parameter]], *, lr: float, betas: tuple[float, float], weight_decay: float
    ) -> torch.optim.Optimizer:
        cls = getattr(import_bitsandbytes().optim, name)
        return cast(torch.optim.Optimizer, cls(_groups(trained, lr, weight_decay), lr=lr, betas=betas))

    return make


def _groups(trained: Mapping[float, list[nn.Parameter]], lr: float, weight_decay: float) -> list[dict[str, Any]]:
    return [
        {**group, "factor": factor, "lr": lr * factor}
        for factor, parameters in trained.items()
        for group in _decayed(parameters, weight_decay)
    ]


def _decayed(trained: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw_8bit": _of_bitsandbytes("AdamW8bit"),
    "paged_adamw": _of_bitsandbytes("PagedAdamW"),
    "paged_adamw_8bit": _of_bitsandbytes("PagedAdamW8bit"),
}


def state_tensors(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """The optimizer's state of ``parameter`` by entry, in CPU memory; a count of steps is an int64 of shape []."""
    if parameter.is_cuda:
        torch.cuda.synchronize(parameter.device)  # a paged state is read by the CPU without the GPU's stream
    return {
        # A copy, because parameters share the code book of the 8-bit state, and a file has no shared tensors.
        key: torch.as_tensor(value).detach().to("cpu", copy=True).contiguous()
        for key, value in optimizer.state[parameter].items()
    }


def restore_state(optimizer: Any, parameter: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> None:
    """Gives ``parameter`` the state that ``state_tensors`` returned, in the kind of memory that the optimizer uses."""
    if not hasattr(optimizer, "get_state_buffer"):  # torch's own
        optimizer.state[parameter] = {
            key: value if key == "step" and parameter.device.type == "cpu" else value.to(parameter.device)
            for key, value in tensors.items()
        }
        return
    state: dict[str, Any] = {}
    for key, value in tensors.items():
        if key == "step":
            state[key] = int(value)
        elif value.shape == parameter.shape:  # paged, if the optimizer is
            state[key] = optimizer.get_state_buffer(parameter, dtype=value.dtype)
            if parameter.is_cuda:
                torch.cuda.synchronize(
                    parameter.device
                )  # the GPU fills a new page with zeros, and the CPU writes to it
            state[key].copy_(value)
        else:
            state[key] = value.to(parameter.device)
    optimizer.state[parameter] = state
