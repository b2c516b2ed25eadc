"""The loss of a model's output head on the fused operation, with whatever is on that head: an adapter, a quantized weight."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftlab import ops
from peftlab.adapters.fused import FusedLora, compute_dtype, frozen_weight, is_hooked


class HeadInput(NamedTuple):
    """head: as the fused losses take it. hidden: [N, H] in the type its products run in. adapter_hidden: what an adapter
    on the head reads where dropout changes it, or None."""

    head: ops.Head
    hidden: Tensor
    adapter_hidden: Tensor | None


class HeadLoss:
    """Summed cross-entropy of an output head: ``(module, hidden, targets, softcap, scale) -> [] or None``.

    None where the head is something the fused operation does not know (a variant of LoRA, a hook inside it): the caller
    then takes the logits. Args: kernels: the value of run.kernels.
    """

    def __init__(self, kernels: str = "auto") -> None:
        self._backend = {"triton": "triton", "reference": "torch"}.get(kernels, "auto")

    def __call__(
        self, module: nn.Module, hidden: Tensor, targets: Tensor, *, softcap: float | None, scale: float
    ) -> Tensor | None:
        found = head_input(module, hidden, softcap=softcap, scale=scale)
        if found is None:
            return None
        return ops.linear_cross_entropy(
            found.hidden, found.head, targets, adapter_hidden=found.adapter_hidden, backend=self._backend
        ).total


def head_input(
    module: nn.Module, hidden: Tensor, *, softcap: float | None = None, scale: float = 1.0
) -> HeadInput | None:
    """What the fused losses take for the head ``module`` and hidden states [N, H]; None where it is not covered."""
    layer: Any = _active_module(module)
    low_rank = adapter_hidden = None
    if isinstance(layer, FusedLora):
        base, adapted = layer.get_base_layer(), not (layer.disable_adapters or layer.merged)
        if adapted and layer.slow_reason(hidden) is not None:
            return None
    else:
        base, adapted = layer, False
    weight = frozen_weight(base)
    if weight is None or is_hooked(base):
        return None
    # As the module itself would: in autocast's type where that is on, else in the weight's.
    as_stored = isinstance(weight, ops.DenseWeight) and not torch.is_autocast_enabled(hidden.device.type)
    hidden = hidden.to(base.weight.dtype if as_stored else compute_dtype(hidden))
    if adapted:
        factors = layer.factors()
        low_rank = (factors.A_RK, factors.B_NR, factors.scale)
        if factors.dropout:
            keep, keep_scale = ops.dropout_mask(hidden, factors.A_RK, factors.dropout, ops.new_seed())
            adapter_hidden = hidden * keep * keep_scale
    return HeadInput(ops.Head(weight, base.bias, low_rank, softcap, scale), hidden, adapter_hidden)


def _active_module(module: Any) -> Any:
    """The copy that PEFT trains where the head is in ``modules_to_save``."""
    from peft.utils import ModulesToSaveWrapper

    if not isinstance(module, ModulesToSaveWrapper):
        return module
    active = [name for name in module.active_adapters if name in module.modules_to_save]
    return module.modules_to_save[active[0]] if active and not module.disable_adapters else module.original_module
