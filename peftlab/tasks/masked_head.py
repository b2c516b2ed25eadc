"""The output layer of a masked language model, applied only to chosen positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftlab.specs.heads import head_modules
from peftlab.tasks.lm_head import base_of, input_of
from peftlab.tasks.outputs import OutputHead, Outputs

# Positions of the check at the first call: the full logits of more would need much memory.
_VERIFIED_TOKENS = 32


class MaskedHead:
    """Runs a transformers masked LM so that its output layer sees only chosen positions.

    Heads differ (a transform and a decoder, or layers written into the model's forward), so the model's own code runs, and a
    hook takes the input of the output layer, which then computes a single position. The layers before it see all positions:
    they are a small part of the work, and their dropout masks are then those of the model's own forward. The first call
    compares the logits with the model's own. Where they differ (MobileBERT does not call its output layer), or can differ when
    they are trained (ESM adds a bias after it), the model's own logits of all positions are computed.

    Args: head_loss: as for ``LMHead``.
    """

    def __init__(self, head_loss: Callable[..., Tensor | None]) -> None:
        self._head_loss = head_loss
        self._has_output_layer: dict[int, bool] = {}

    def at(self, model: nn.Module, inputs: dict[str, Tensor], chosen: Tensor) -> tuple[Tensor, OutputHead | None]:
        """The values at the ``chosen`` positions ([B, T] bool): [N, H] inputs of the output layer and that layer, or [N, V]
        logits and None."""
        base, own = base_of(model), chosen.shape[1]  # an adapter may put virtual tokens before them
        if id(base) not in self._has_output_layer:
            self._has_output_layer[id(base)] = self._verify(base, inputs)
        if not self._has_output_layer[id(base)]:
            return model(**inputs).logits[:, -own:][chosen], None
        layer = base.get_output_embeddings()
        with input_of(layer) as seen:
            model(**inputs)
        return seen[-1][:, -own:][chosen], OutputHead(layer, None, 1.0)

    def cross_entropy_sum(self, outputs: Outputs) -> Tensor:
        """[] float32 nats (float64 stays) over all positions of ``outputs``."""
        assert outputs.targets is not None
        head, loss = outputs.head, None
        if head is not None:
            loss = self._head_loss(head.module, outputs.values, outputs.targets, softcap=None, scale=1.0)
        return F.cross_entropy(outputs.logits(), outputs.targets, reduction="sum") if loss is None else loss

    @torch.no_grad()
    def _verify(self, base: Any, inputs: dict[str, Tensor]) -> bool:
        """Whether the output layer's input gives the model's own logits."""
        row = {name: value[:1, :_VERIFIED_TOKENS] for name, value in inputs.items()}
        layer = base.get_output_embeddings()
        if layer is None or _adds_to_logits(base, layer):
            return False
        modes = {module: module.training for module in base.modules()}
        base.eval()
        try:
            with torch.autocast(row["input_ids"].device.type, enabled=False):
                want = base(**row).logits.float()
                with input_of(layer) as seen:
                    base(**row)
                ours = OutputHead(layer, None, 1.0).logits(seen[-1]).float() if seen else None
        finally:
            for module, training in modes.items():
                module.training = training
        if ours is None or ours.shape != want.shape:
            return False
        return float((ours - want).abs().max()) <= 0.01 * max(float(want.abs().max()), 1.0)


def _adds_to_logits(base: Any, layer: nn.Module) -> bool:
    """Whether the head has a parameter outside its layers that is not one of the output layer: ESM's bias, which is 0 at first."""
    known = {id(parameter) for parameter in layer.parameters()}
    inside = [module for name in head_modules(base) for module in base.get_submodule(name).modules()]
    bare = [p for module in inside if any(module.children()) for p in module.parameters(recurse=False)]
    return any(id(parameter) not in known for parameter in bare)
