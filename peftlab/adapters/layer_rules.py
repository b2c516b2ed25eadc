"""Reads what an adapted layer of PEFT stores, and gives the formula of its method with these values.

Only the stored parameters, their rank and alpha and the kind of the layer are read; no merge, delta or forward of PEFT.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftlab.adapters import formulas

ADAPTER = "default"


@dataclass(frozen=True)
class Rule:
    """What an adapter does to a module.

    Attributes:
        parameter: the adapted parameter's name in the module.
        weight: W in float64 on the CPU, in the module's layout -> W'. It keeps no module alive.
        bias: the same for the bias, which no adapter changes by default.
    """

    parameter: str
    weight: Callable[[Tensor], Tensor]
    bias: Callable[[Tensor], Tensor] = lambda bias: bias


def rule_of(layer: Any, adapter: str = ADAPTER) -> Rule | None:
    """The rule of one adapter of a layer; None for a method or a layout without a formula here, or another adapter's layer."""
    from peft.tuners import adalora, ia3, loha, lokr, lora, oft, vera

    # AdaLoRA's layers are LoRA layers too.
    readers: list[tuple[type, Callable[[Any, str], Rule | None]]] = [
        (adalora.AdaLoraLayer, _adalora),
        (lora.LoraLayer, _lora),
        (ia3.IA3Layer, _ia3),
        (vera.VeraLayer, _vera),
        (loha.LoHaLayer, _loha),
        (lokr.LoKrLayer, _lokr),
        (oft.OFTLayer, _oft),
    ]
    for kind, read in readers:
        if isinstance(layer, kind):
            return read(layer, adapter)
    return None


def _exact(value: Any) -> Tensor:
    tensor: Tensor = value.detach().to("cpu", torch.float64)
    return tensor


def _changed(base: nn.Module, change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function of a weight in the module's layout, of one of [N, K] matrices, outputs by inputs."""
    if isinstance(base, nn.Embedding) or type(base).__name__ == "Conv1D":  # these store [K, N]
        return lambda weight: change(weight.T).T
    return lambda weight: change(weight.flatten(1)).reshape(weight.shape)


def _added(base: nn.Module, update: Callable[[], Tensor]) -> Rule:
    """W + D of an update [N, K], which is computed when it is needed."""
    return Rule("weight", _changed(base, lambda weight: weight + update().reshape(weight.shape)))


def _is_grouped(base: nn.Module) -> bool:
    return isinstance(base, nn.modules.conv._ConvNd) and base.groups > 1


def lora_scale(layer: Any, adapter: str) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA."""
    rank = layer.r[adapter]
    return float(layer.lora_alpha[adapter] / (rank**0.5 if layer.use_rslora.get(adapter) else rank))


def lora_factors(layer: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """A [R, K] and B [N, R] as stored, without the scaling; a convolution's kernel is in K."""
    if isinstance(layer.get_base_layer(), nn.Embedding):
        return layer.lora_embedding_A[adapter].detach(), layer.lora_embedding_B[adapter].detach()
    return layer.lora_A[adapter].weight.detach().flatten(1), layer.lora_B[adapter].weight.detach().flatten(1)


def _lora(layer: Any, adapter: str) -> Rule | None:
    from peft.tuners.lora.layer import ParamWrapper

    if adapter not in layer.r:
        return None
    base, scale = layer.get_base_layer(), lora_scale(layer, adapter)
    down, up = lora_factors(layer, adapter)
    variant = layer.lora_variant.get(adapter)

    def update() -> Tensor:
        return formulas.low_rank(_exact(down), _exact(up), scale)

    if isinstance(layer, ParamWrapper):
        return _parameter(layer, down, up, scale)
    if isinstance(base, nn.MultiheadAttention):  # its output projection is a layer of its own
        return Rule("in_proj_weight", lambda weight: weight + update()) if variant is None else None
    if _is_grouped(base):
        return None
    if variant is None:
        weight = _added(base, update).weight
    elif "Dora" in type(variant).__name__:
        magnitude = layer.lora_magnitude_vector[adapter].weight
        weight = _changed(base, lambda w: formulas.dora(w, update(), _exact(magnitude).flatten()))
    else:
        return None
    own_bias = None if isinstance(base, nn.Embedding) else getattr(layer.lora_B[adapter], "bias", None)
    if own_bias is None:
        return Rule("weight", weight)
    return Rule("weight", weight, lambda bias: bias + scale * _exact(own_bias))


def _parameter(layer: Any, down: Tensor, up: Tensor, scale: float) -> Rule:
    """LoRA on a bare parameter: a matrix, or experts [E, N, K], or [E, K, N] where their module says that it is transposed."""
    transposed = bool(getattr(layer.get_base_layer(), "is_transposed", False))

    def changed(weight: Tensor) -> Tensor:
        if weight.dim() == 2:
            return weight + formulas.low_rank(_exact(down), _exact(up), scale)
        update = formulas.expert_low_rank(_exact(down), _exact(up), len(weight), scale)
        return weight + (update.mT if transposed else update)

    return Rule(layer.parameter_name, changed)


def _adalora(layer: Any, adapter: str) -> Rule | None:
    if adapter not in layer.lora_E:
        return None
    base = layer.get_base_layer()
    down, up, values = layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_E[adapter]
    # PEFT divides alpha by the number of values in use, as the authors' code does, and the paper does not say.
    alpha, used = float(layer.lora_alpha[adapter] or layer.r[adapter]), layer.ranknum[adapter]
    return _added(
        base,
        lambda: formulas.singular(
            _exact(down), _exact(values).flatten(), _exact(up), alpha / (float(_exact(used)) + 1e-5)
        ),
    )


def _ia3(layer: Any, adapter: str) -> Rule | None:
    """IA3 multiplies a layer's outputs, with its bias; or its inputs, if it is a feed-forward module.

    Source: Liu et al. 2022, arXiv 2205.05638, section 3.3.
    """
    if adapter not in layer.ia3_l:
        return None
    base, vector = layer.get_base_layer(), layer.ia3_l[adapter]
    groups = base.groups if isinstance(base, nn.modules.conv._ConvNd) else 1
    if not layer.is_feedforward:
        return Rule(
            "weight",
            _changed(base, lambda weight: weight * _exact(vector).reshape(-1, 1)),
            lambda bias: bias * _exact(vector).flatten(),
        )

    def inputs_scaled(weight: Tensor) -> Tensor:
        of_group = _exact(vector).reshape(groups, -1)
        of_row = of_group.repeat_interleave(len(weight) // groups, 0)
        return weight * of_row.repeat_interleave(weight.shape[1] // of_row.shape[1], 1)

    return Rule("weight", _changed(base, inputs_scaled))


def _vera(layer: Any, adapter: str) -> Rule | None:
    if adapter not in layer.vera_lambda_d:
        return None
    scale_d, scale_b = layer.vera_lambda_d[adapter], layer.vera_lambda_b[adapter]
    # All layers share the frozen matrices, and use the part that they need.
    down, up = layer.vera_A[adapter][:, : layer.in_features], layer.vera_B[adapter][: layer.out_features]
    return _added(
        layer.get_base_layer(), lambda: formulas.vera(_exact(down), _exact(up), _exact(scale_d), _exact(scale_b))
    )


def _loha(layer: Any, adapter: str) -> Rule | None:
    if adapter not in layer.hada_w1_a:
        return None
    scale = float(layer.alpha[adapter] / layer.r[adapter])
    stored = [
        (layer.hada_t1.get(adapter), layer.hada_w1_a[adapter], layer.hada_w1_b[adapter]),
        (layer.hada_t2.get(adapter), layer.hada_w2_a[adapter], layer.hada_w2_b[adapter]),
    ]

    def update() -> Tensor:
        first, second = (
            _exact(a) @ _exact(b) if core is None else formulas.tucker(_exact(core), _exact(a), _exact(b))
            for core, a, b in stored
        )
        return formulas.loha(first, second, scale)

    return _added(layer.get_base_layer(), update)


def _lokr(layer: Any, adapter: str) -> Rule | None:
    names = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    w1, w1_a, w1_b, w2, w2_a, w2_b, core = (getattr(layer, f"lokr_{name}").get(adapter) for name in names)
    if (w1 is None and w1_a is None) or (w2 is not None and w2.dim() == 3):
        return None  # PEFT 0.21 trains another product of the factors where w2 is whole, on nn.Conv1d
    scale = float(layer.alpha[adapter] / layer.r[adapter])

    def second() -> Tensor:
        if w2 is not None:
            return _exact(w2)
        if core is not None:
            return formulas.tucker(_exact(core), _exact(w2_a), _exact(w2_b))
        return _exact(w2_a) @ _exact(w2_b)

    return _added(
        layer.get_base_layer(),
        lambda: formulas.lokr(_exact(w1) if w1 is not None else _exact(w1_a) @ _exact(w1_b), second(), scale),
    )


def _oft(layer: Any, adapter: str) -> Rule | None:
    base = layer.get_base_layer()
    is_embedding = isinstance(base, nn.Embedding)
    parts = layer.oft_embedding_R if is_embedding else layer.oft_R
    if adapter not in parts or _is_grouped(base):
        return None
    part = parts[adapter]
    if part.use_cayley_neumann and part.num_cayley_neumann_terms < 3:
        return None

    def rotations() -> Tensor:
        skewed = formulas.skew(_exact(part.weight), part.block_size)
        if part.coft:
            skewed = formulas.within(skewed, part.eps)
        if part.use_cayley_neumann:
            # PEFT counts the powers from 1 to Q^(order + 1); of three and four it takes the same sum.
            return formulas.cayley_series(skewed, max(part.num_cayley_neumann_terms, 4) - 2)
        return formulas.cayley(-skewed)  # here PEFT stores the inverse rotation

    if is_embedding:  # what it looks up is rotated: its rows [tokens, N], by R
        return Rule("weight", lambda weight: formulas.oft(weight, rotations().mT))
    return Rule("weight", _changed(base, lambda weight: formulas.oft(weight, rotations())))
