"""Unmerging a LoRA adapter from a dense weight to the bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
else:
    LoraLayer = object


class ExactUnmerge(LoraLayer):
    """Mixin before a PEFT LoRA layer on a dense weight: unmerging restores the weight and the bias to the bit.

    PEFT subtracts the update again, which rounds: in 16 bits the weight is another after each round, and an adapter that was
    changed or deleted in between stays in it. Memory: while adapters are merged, the layer keeps its weight a second time, and
    its bias if the adapter has one, in the same dtype and on the device where it was merged.
    """

    _unmerged: dict[str, Tensor] | None = None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        layer: Any = self
        if self._unmerged is None:
            base = layer.get_base_layer()
            biased = base.bias is not None and any(layer.lora_bias.values())
            self._unmerged = {
                n: getattr(base, n).detach().clone() for n in (["weight", "bias"] if biased else ["weight"])
            }
        try:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        finally:
            if not layer.merged:  # it failed, or has none of these adapters
                self._unmerged = None

    def unmerge(self) -> None:
        layer: Any = self
        super().unmerge()
        kept, self._unmerged = self._unmerged or {}, None
        for name, value in kept.items():
            stored = getattr(layer.get_base_layer(), name)
            stored.data = value.to(stored)  # the model may have moved in between
