"""The update of each adapted module as a matrix: what the adapter adds to the weight, W' - W, with its scaling."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peftlab.adapters.beside import method_of_layer
from peftlab.adapters.inject import base_name
from peftlab.adapters.layer_rules import ADAPTER, lora_factors, lora_scale, rule_of
from peftlab.adapters.merge import dequantizer
from peftlab.specs.methods import METHODS

# Initialisations of LoRA that take a part of the weight out of it when the adapter is loaded.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


@dataclass(frozen=True)
class Update:
    """The update of one module: ``left @ right`` for LoRA's factors, else ``dense``; neither with a ``reason``.

    Attributes:
        name: of the module in the base model. path: of the module in the PEFT model, as in an adapter's file.
        left: [N, R] with the scaling. right: [R, K]. dense: [N, K], W' - W. N are outputs, or rows of an embedding; a
            convolution has the kernel's extent in K.
        weight_norm: Frobenius norm of W. num_parameters: what the adapter stores for the module. rank: its nominal rank, if the
            method has one.
        layout: ``linear``, ``embedding`` or ``conv``. extent: of a convolution, [K_in, kernel ...].
        reason: why it has no update matrix.
    """

    name: str
    path: str
    weight_norm: float = 0.0
    num_parameters: int = 0
    rank: int | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    dense: Tensor | None = None
    layout: str = "linear"
    extent: tuple[int, ...] = field(default=())
    reason: str | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix; zeros without one."""
        if self.dense is not None:
            return self.dense.shape[0], self.dense.shape[1]
        if self.left is None or self.right is None:
            return 0, 0
        return self.left.shape[0], self.right.shape[1]

    def matrix(self) -> Tensor:
        """The update as one [N, K] matrix; float64 from factors."""
        if self.dense is not None:
            return self.dense
        assert self.left is not None and self.right is not None
        return self.left.double() @ self.right.double()


@torch.no_grad()
def read_updates(model: Any, adapter: str = ADAPTER) -> Iterator[Update]:
    """Yields the update of each adapted module of a ``PeftModel``, in the order of its modules, one at a time in memory.

    Nested layers, such as those of torch's own attention, are yielded each for itself. Tokens that are trained row by row are
    no update; see ``trained_in_full``.
    """
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, TrainableTokensLayer):
            yield _read(layer, path, adapter, method_of_layer(model, layer, adapter).upper())


def _read(layer: Any, path: str, adapter: str, method: str) -> Update:
    name, num_parameters = base_name(path), _num_parameters(layer, adapter)
    facts: dict[str, Any] = {"name": name, "path": path, "num_parameters": num_parameters, "layout": "linear"}
    ranks = getattr(layer, "r", None)
    if isinstance(ranks, dict) and isinstance(ranks.get(adapter), int):
        facts["rank"] = ranks[adapter]
    weight = _weight(layer)
    if weight is None:
        why = METHODS[method.lower()].unmergeable if method.lower() in METHODS else ""
        return Update(**facts, reason=why or "it adapts a bare parameter")
    facts["weight_norm"] = float(torch.linalg.vector_norm(weight.float()))
    if weight.dim() < 2:
        return Update(**facts, reason="its weight is a vector")
    base = layer.get_base_layer()
    if isinstance(base, nn.Embedding):
        facts["layout"] = "embedding"
    elif isinstance(base, nn.modules.conv._ConvNd):
        if base.groups > 1:
            return Update(**facts, reason="it is a grouped convolution")
        facts |= {"layout": "conv", "extent": tuple(base.weight.shape[1:])}
    if method == "LORA" and (found := _lora(layer, adapter, facts)) is not None:
        return found
    try:
        difference = _difference(layer, adapter, weight)
    except (ValueError, TypeError, NotImplementedError, AttributeError, RuntimeError, KeyError) as error:
        return Update(**facts, reason=_first_line(error))
    if difference is None:
        return Update(
            **facts, reason=f"the base is quantized, and {method} changes it in no additive way that PEFT states"
        )
    return Update(**facts, dense=_as_matrix(difference, base))


def _lora(layer: Any, adapter: str, facts: dict[str, Any]) -> Update | None:
    """The factors of plain LoRA, or why there is no matrix; None for DoRA, whose update is no product of them."""
    variant = layer.lora_variant.get(adapter)
    down, up = lora_factors(layer, adapter)
    scale = lora_scale(layer, adapter)
    if facts["layout"] == "embedding":
        return None if variant is not None else Update(**facts, left=down.T * scale, right=up.T)
    if getattr(layer.lora_B[adapter], "bias", None) is not None:
        return Update(**facts, reason="it has a bias of its own (lora_bias)")
    if variant is None:
        return Update(**facts, left=up * scale, right=down)
    if "Dora" not in type(variant).__name__:
        return Update(**facts, reason=f"it is a variant of LoRA ({type(variant).__name__})")
    return None


def _difference(layer: Any, adapter: str, weight: Tensor) -> Tensor | None:
    """W' - W in the layout of the weight: by the method's formula, else from PEFT's own merge of a copy; None for a quantized
    weight without either.

    ``get_delta_weight`` alone is no common definition: of HiRA it is a factor, of others a rotation.
    """
    if (rule := rule_of(layer, adapter)) is not None:
        before = weight.double().cpu()
        return (rule.weight(before) - before).to(weight.device, torch.float32)
    if _is_quantized(layer.get_base_layer()):
        if not layer.supports_lora_conversion(adapter):
            return None
        return layer.get_delta_weight(adapter).float()  # type: ignore[no-any-return]
    alone = copy.deepcopy(layer).float()
    before = alone.get_base_layer().weight.detach().clone()
    alone.merge(safe_merge=True, adapter_names=[adapter])
    return alone.get_base_layer().weight.detach() - before  # type: ignore[no-any-return]


def _weight(layer: Any) -> Tensor | None:
    """The frozen weight of an adapted layer, dequantized; None for a bare parameter of a module, such as routed experts."""
    from peft.tuners.lora.layer import ParamWrapper

    if isinstance(layer, ParamWrapper):
        return None
    base = layer.get_base_layer()
    if isinstance(base, nn.MultiheadAttention):
        inner: Tensor = base.in_proj_weight
        return inner.detach()
    if not hasattr(base, "weight"):
        return None
    read = dequantizer(base) if _is_quantized(base) else None
    weight: Tensor = base.weight if read is None else read()
    return weight.detach()


def _is_quantized(base: nn.Module) -> bool:
    weight = getattr(base, "weight", None)
    return isinstance(weight, Tensor) and not weight.is_floating_point()


def _as_matrix(weight: Tensor, base: nn.Module) -> Tensor:
    """[N, K] from a weight as the module stores it; GPT-2's Conv1D stores [K, N]."""
    return weight.T if type(base).__name__ == "Conv1D" else weight.flatten(1)


def _num_parameters(layer: Any, adapter: str) -> int:
    """What the adapter's file contains for one layer."""
    count = 0
    for name in layer.adapter_layer_names:
        part = getattr(layer, name, None)
        if part is not None and not isinstance(part, Tensor) and adapter in part:
            stored = part[adapter]
            count += stored.numel() if isinstance(stored, Tensor) else sum(p.numel() for p in stored.parameters())
    return count


def trained_in_full(model: Any, adapter: str = ADAPTER) -> dict[str, int]:
    """Number of parameters by name of what a ``PeftModel`` trains beside updates: modules, rows of tokens and biases."""
    from peft.utils import ModulesToSaveWrapper
    from peft.utils.other import TrainableTokensWrapper

    found: dict[str, int] = {}
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            found[base_name(path)] = sum(p.numel() for p in module.modules_to_save[adapter].parameters())
        elif isinstance(module, TrainableTokensWrapper):
            rows = module.token_adapter.trainable_tokens_delta
            if adapter in rows:
                found[f"{base_name(path)} ({len(rows[adapter])} rows)"] = rows[adapter].numel()
    if (kind := getattr(model.peft_config[adapter], "bias", "none")) != "none":
        found[f"biases ({kind})"] = sum(p.numel() for n, p in model.named_parameters() if n.endswith(".bias"))
    return found


def changed_base(config: Any) -> str | None:
    """The name of the initialisation if loading the adapter changes the base, such as ``pissa``; else None.

    Its update is then relative to the changed base, and the same factors on the published weights are another model.
    """
    name = str(getattr(config, "init_lora_weights", "")).lower()
    return name if name.startswith(_CHANGES_BASE) else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
