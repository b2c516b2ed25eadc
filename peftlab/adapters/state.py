"""The state of a model that training may change beside its trained parameters: buffers, such as BatchNorm's statistics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def train_mode(model: nn.Module) -> None:
    """``model.train()``, except that running statistics, such as BatchNorm's, are used as they are unless ``move_statistics``
    was called.

    An adapter's files have no place for other statistics, and those of a micro-batch would make the loss depend on how a
    batch is cut.
    """
    model.train()
    for module in model.modules():
        if _has_statistics(module):
            module.train(_is_trained(module) and getattr(module, "moves_statistics", False))


def move_statistics(model: nn.Module) -> None:
    """Lets the trained BatchNorms of ``model`` normalize by each micro-batch, and follow its statistics."""
    for module in model.modules():
        if _has_statistics(module):
            module.moves_statistics = True  # type: ignore[assignment]


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats


def method_of(config: Any) -> str:
    """The name in ``specs.methods`` of an adapter's configuration, PEFT's or ours."""
    kind = config.peft_type
    return str(getattr(kind, "value", kind)).lower()


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers of ``model`` by name, those that its state dict contains."""
    saved = model.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


def changed_buffers(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    """Names of the buffers outside trained modules that differ from ``before``, a copy of ``saved_buffers``."""
    trained = {id(b) for module in model.modules() if _is_trained(module) for b in module.buffers(recurse=False)}
    return [
        name
        for name, buffer in saved_buffers(model).items()
        if id(buffer) not in trained and name in before and not _equal(buffer, before[name])
    ]


@contextlib.contextmanager
def kept_buffers(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Restores the model's buffers at the end of the block; yields their copies."""
    before = {name: buffer.detach().clone() for name, buffer in saved_buffers(model).items()}
    try:
        yield before
    finally:
        with torch.no_grad():
            for name, buffer in saved_buffers(model).items():
                if name in before and not _equal(buffer, before[name]):
                    buffer.copy_(before[name])


def _is_trained(module: nn.Module) -> bool:
    parameters: list[Any] = list(module.parameters(recurse=False))
    return any(p.requires_grad for p in parameters)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)
