"""The loss of a model's output head on the fused operation; the head may have an adapter or a quantized weight."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftlab import ops
from peftlab.adapters.fused import FusedLora, compute_dtype, frozen_weight, is_hooked


class HeadInput(NamedTuple):
    """head: in the form that the fused losses take. hidden: [N, H] in the dtype of its products. adapter_hidden: the input
    of an adapter on the head if dropout changes it, else None."""

    head: ops.Head
    hidden: Tensor
    adapter_hidden: Tensor | None


class HeadLoss:
    """Summed cross-entropy of an output head: ``(module, hidden, targets, softcap, scale) -> [] or None``.

    None if ``head_reason`` has a reason, and with ``reference``: the caller then uses the logits.
    Args: kernels: the value of run.kernels.
    """

    def __init__(self, kernels: str = "auto") -> None:
        self._kernels = kernels

    def __call__(
        self, module: nn.Module, hidden: Tensor, targets: Tensor, *, softcap: float | None, scale: float
    ) -> Tensor | None:
        inputs = None if self._kernels == "reference" else head_input(module, hidden, softcap=softcap, scale=scale)
        if inputs is None:
            return None
        return ops.linear_cross_entropy(
            inputs.hidden, inputs.head, targets, adapter_hidden=inputs.adapter_hidden, backend=self._kernels
        ).total


def head_input(
    module: nn.Module,
    hidden: Tensor,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    num_classes: int | None = None,
) -> HeadInput | None:
    """The input of the fused losses for the head ``module`` and hidden states [N, H]; None if the head is not supported.

    Args: num_classes: number of leading columns that are classes; None: all.
    """
    if head_reason(module, hidden) is not None:
        return None
    layer, base, adapted = _layers(module)
    weight = frozen_weight(base)
    assert weight is not None
    low_rank = adapter_hidden = None
    # Like the module itself: in autocast's dtype if it is on, else in the weight's.
    as_stored = isinstance(weight, ops.DenseWeight) and not torch.is_autocast_enabled(hidden.device.type)
    hidden = hidden.to(base.weight.dtype if as_stored else compute_dtype(hidden))
    if adapted:
        factors = layer.factors()
        low_rank = (factors.A_RK, factors.B_NR, factors.scale)
        if factors.dropout:
            keep, keep_scale = ops.dropout_mask(hidden, factors.dropout, ops.new_seed(hidden.device))
            adapter_hidden = hidden * keep * keep_scale
    return HeadInput(ops.Head(weight, base.bias, low_rank, softcap, scale, num_classes), hidden, adapter_hidden)


def head_reason(module: nn.Module, hidden: Tensor | None = None) -> str | None:
    """Why the fused losses do not support the head ``module`` (for these hidden states); None if they do."""
    layer, base, adapted = _layers(module)
    if adapted and (reason := layer.slow_reason(hidden)):
        return str(reason)
    if frozen_weight(base) is None:
        return f"it is a {type(base).__name__} that the fused loss does not know"
    return "a hook is registered inside it" if is_hooked(base) else None


def _layers(module: nn.Module) -> tuple[Any, Any, bool]:
    """The called module, its linear, and whether an adapter is active on it."""
    layer: Any = _active_module(module)
    if isinstance(layer, FusedLora):
        return layer, layer.get_base_layer(), not (layer.disable_adapters or layer.merged)
    return layer, layer, False


def _active_module(module: Any) -> Any:
    """The copy that PEFT trains if the head is in ``modules_to_save``."""
    from peft.utils import ModulesToSaveWrapper

    if not isinstance(module, ModulesToSaveWrapper):
        return module
    active = [name for name in module.active_adapters if name in module.modules_to_save]
    return module.modules_to_save[active[0]] if active and not module.disable_adapters else module.original_module
