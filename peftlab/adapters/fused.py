"""PEFT's LoRA linears with a fused forward: subclasses of its own layers, entered through its custom-module mapping.

Injection, files, merging, hot swapping and every tool that reads PEFT go on working, because only ``forward`` differs.
What the fused operation does not cover runs through PEFT's own forward, and is listed with its reason (contract C7).
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from peftlab import ops

# The value of run.kernels a layer runs under; "compared" is PEFT's forward with the dropout masks of the fused one.
MODES = ("auto", "triton", *ops.CPU_OPERANDS, "reference", "compared")


class Factors(NamedTuple):
    """A LoRA adapter: A [R, K], B [N, R], scaling, and the probability of a zero in its input now."""

    A_RK: Tensor
    B_NR: Tensor
    scale: float
    dropout: float


class FusedLora:
    """Mixed in before a PEFT LoRA layer."""

    kernels = "auto"
    kept_slow: str | None = None
    """Set by the layer: why its last forward was PEFT's own; None when it was fused."""

    def _get_name(self) -> str:
        return type(self).__name__.removeprefix("Fused")  # what PEFT's tools and tests read in a printed model

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        reason = self.slow_reason(x, args, kwargs)
        if reason != self.kept_slow:  # nn.Module's __setattr__ is slow: not on every forward
            self.kept_slow = reason
        if reason is None:
            return self._fused(x)
        if self.kernels == "compared" and self.slow_reason(x, args, kwargs, kernels="auto") is None:
            with self._drawn_dropout():
                return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]

    def slow_reason(
        self,
        x: Tensor | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        kernels: str = "",
    ) -> str | None:
        """Why a forward on ``x`` takes PEFT's path; without ``x``, what is known before one."""
        layer: Any = self
        if (kernels or layer.kernels) in ("reference", "compared"):
            return "run.kernels=reference"
        if args or kwargs:
            return "the call has arguments beside its input"
        if layer.disable_adapters or layer.merged:
            return "no adapter is active"
        active = [name for name in layer.active_adapters if name in layer.lora_A]
        if len(active) != 1:
            return f"{len(active)} adapters are active at once"
        (name,) = active
        if name in layer.lora_variant:
            return f"it is a variant of LoRA ({type(layer.lora_variant[name]).__name__.removesuffix('LinearVariant')})"
        parts = (layer.lora_A[name], layer.lora_B[name])
        if any(type(part) is not nn.Linear or part.bias is not None for part in parts):
            return "its factors are not plain matrices"
        if type(layer.lora_dropout[name]) not in (nn.Dropout, nn.Identity):
            return f"its dropout is a {type(layer.lora_dropout[name]).__name__}"
        if not isinstance(layer.scaling[name], int | float):
            return "its scaling is a tensor"
        base = layer.get_base_layer()
        if any(is_hooked(part) for part in (base, *parts)):
            return "a hook is registered inside it"
        if base.weight.requires_grad:
            return "its base weight is trained"
        return self._base_reason(base, x) or (self._input_reason(base, x) if x is not None else None)

    def _input_reason(self, base: Any, x: Tensor) -> str | None:
        if not x.is_floating_point():
            return f"its input is {x.dtype}"
        if x.device != base.weight.device:
            return f"its input is on {x.device}, its weight on {base.weight.device}"
        if self.kernels == "triton" and (problem := ops.triton_problem(x.device, products=True)):
            return problem
        if self.kernels in ops.CPU_OPERANDS:
            return f"its input is on {x.device}" if x.device.type != "cpu" else ops.operands_problem(self.kernels)
        return None

    def _base_reason(self, base: Any, x: Tensor | None) -> str | None:
        raise NotImplementedError

    def factors(self) -> Factors:
        """Those of the one active adapter."""
        layer: Any = self
        name = next(name for name in layer.active_adapters if name in layer.lora_A)
        dropout = layer.lora_dropout[name]
        return Factors(
            layer.lora_A[name].weight,
            layer.lora_B[name].weight,
            layer.scaling[name],
            dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0,
        )

    def _fused(self, x: Tensor) -> Tensor:
        layer: Any = self
        base, factors = layer.get_base_layer(), self.factors()
        weight = frozen_weight(base)
        assert weight is not None
        # A head or another layer that loading left in floating point has no int8 product.
        exact = self.kernels == "cpu-int8" and not isinstance(weight, ops.Int8Weight)
        return ops.lora_linear(
            x.to(compute_dtype(x)),
            weight,
            factors.A_RK,
            factors.B_NR,
            scale=factors.scale,
            bias_N=base.bias,
            dropout=factors.dropout,
            seed=ops.new_seed(x.device) if factors.dropout else None,
            backend="auto" if exact else self.kernels,
        )

    @contextlib.contextmanager
    def _drawn_dropout(self) -> Iterator[None]:
        """The active dropout draws the very mask that the fused operation would draw here."""
        layer: Any = self
        name = next(name for name in layer.active_adapters if name in layer.lora_A)
        dropout = layer.lora_dropout[name]
        if not (isinstance(dropout, nn.Dropout) and dropout.training and dropout.p):
            yield
            return
        layer.lora_dropout[name] = _DrawnDropout(dropout.p)
        try:
            yield
        finally:
            layer.lora_dropout[name] = dropout


class _DrawnDropout(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        keep, keep_scale = ops.dropout_mask(x.to(compute_dtype(x)), self.p, ops.new_seed(x.device))
        return x * keep * keep_scale


def compute_dtype(x: Tensor) -> torch.dtype:
    """The type products of ``x`` run in: autocast's where it is on, else that of ``x``."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks) or (
        "forward" in module.__dict__  # accelerate's offloading replaces it
    )


def _is_sharded(weight: Tensor) -> bool:
    """FSDP2 keeps a DTensor, which is a plain parameter while the module runs."""
    return hasattr(weight, "placements")


class _PlainLinear(type):
    """What PEFT's mapping is asked with ``isinstance``: an nn.Linear itself, whose weight is an ordinary tensor.

    Quantized linears of other libraries subclass nn.Linear or put tensor subclasses into it; those stay with PEFT.
    """

    def __instancecheck__(cls, module: object) -> bool:
        return type(module) is nn.Linear and type(module.weight) is nn.Parameter


class PlainLinear(metaclass=_PlainLinear):
    """Key of the mapping; see ``_PlainLinear``."""


def fused_classes() -> dict[type, type]:
    """Base layer type -> fused LoRA layer, in the order to try; bitsandbytes' types once it has been imported."""
    bnb = sys.modules.get("bitsandbytes")
    classes: dict[type, type] = {}
    if bnb is not None:
        classes = {bnb.nn.Linear4bit: _fused_4bit(), bnb.nn.Linear8bitLt: _fused_8bit()}
    return {**classes, PlainLinear: _fused_dense()}


@functools.cache
def _fused_dense() -> type:
    from peft.tuners import lora

    class FusedLinear(FusedLora, lora.Linear):  # type: ignore[misc]
        def _base_reason(self, base: Any, x: Tensor | None) -> str | None:
            if type(base) is not nn.Linear:
                return f"its base layer is a {type(base).__name__}"
            if type(base.weight) is not nn.Parameter and not (x is None and _is_sharded(base.weight)):
                return f"its base weight is a {type(base.weight).__name__}"
            if x is not None and not torch.is_autocast_enabled(x.device.type) and x.dtype != base.weight.dtype:
                return f"its input is {x.dtype}, its weight {base.weight.dtype}"
            return None

    return FusedLinear


@functools.cache
def _fused_4bit() -> type:
    from peft.tuners.lora.bnb import Linear4bit

    class FusedLinear4bit(FusedLora, Linear4bit):  # type: ignore[misc]
        def _base_reason(self, base: Any, x: Tensor | None) -> str | None:
            if reason := _nf4_reason(base):
                return reason
            if x is not None and base.compute_dtype not in (None, compute_dtype(x)):
                return f"its compute type is {base.compute_dtype}, that of its input {compute_dtype(x)}"
            return None

    return FusedLinear4bit


@functools.cache
def _fused_8bit() -> type:
    from peft.tuners.lora.bnb import Linear8bitLt

    class FusedLinear8bitLt(FusedLora, Linear8bitLt):  # type: ignore[misc]
        def _base_reason(self, base: Any, x: Tensor | None) -> str | None:
            if reason := _int8_reason(base):
                return reason
            if not base.training and base.weight.device.type == "cpu" and self.kernels not in ops.CPU_OPERANDS:
                return "bitsandbytes multiplies int8 by int8 on a CPU outside training"
            return None

    return FusedLinear8bitLt


def frozen_weight(base: Any) -> ops.BaseWeight | None:
    """The weight of a linear as the operations take it; None for a linear they do not know."""
    bnb = sys.modules.get("bitsandbytes")
    if isinstance(base, PlainLinear):
        return ops.DenseWeight(base.weight)  # type: ignore[attr-defined]
    if bnb is None:
        return None
    if type(base) is bnb.nn.Linear4bit and _nf4_reason(base) is None:
        state = base.weight.quant_state
        nested = (state.state2.code, state.state2.absmax, state.offset) if state.nested else None
        return ops.NF4Weight(
            base.weight.data,
            state.absmax,
            state.code,
            (base.out_features, base.in_features),
            state.blocksize,
            nested,
            state.state2.blocksize if state.nested else 256,
        )
    if type(base) is bnb.nn.Linear8bitLt and _int8_reason(base) is None:
        if base.weight.CB is not None:
            base.init_8bit_state()
        weight = ops.Int8Weight(base.state.CB, base.state.SCB, float(base.state.threshold))
        base.weight.data = base.state.CB  # as bitsandbytes does, so that the weight is still what gets saved
        return weight
    return None


def _nf4_reason(base: Any) -> str | None:
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        return "its weight is not quantized yet"
    if state.quant_type != "nf4":
        return f"its weight is {state.quant_type}, not nf4"
    if getattr(state, "packing_format_for_cpu", False):
        return "its weight was repacked for AVX512"
    if len(state.shape) != 2 or tuple(state.shape) != (base.out_features, base.in_features):
        return f"its weight was quantized as {list(state.shape)}"
    return None


def _int8_reason(base: Any) -> str | None:
    if base.state.has_fp16_weights:
        return "its weight is kept in 16 bits"
    if base.weight.CB is None and base.state.CB is None:
        return "its weight is not quantized yet"
    return None


def register(config: Any) -> Any:
    """``config`` (a LoraConfig), with the fused layers in its custom-module mapping; nothing of it is saved."""
    config._register_custom_module({base: _maker(layer) for base, layer in fused_classes().items()})
    return config


def _maker(layer: type) -> Callable[..., Any]:
    def make(target: nn.Module, adapter_name: str, **options: Any) -> Any:
        if options.get("parameter_name") is not None:
            return None  # an adapter on a bare parameter: PEFT goes on to its own layers
        return layer(target, adapter_name, **options)

    return make


def set_kernels(model: nn.Module, kernels: str) -> None:
    """Sets the mode of every fused layer: one of ``MODES``."""
    if kernels not in MODES:
        raise ValueError(f"expected kernels as one of {', '.join(MODES)}, found {kernels!r}")
    for module in model.modules():
        if isinstance(module, FusedLora):
            module.kernels = kernels


@dataclass(frozen=True)
class FusionReport:
    """fused: names of modules on the fused path; slow: name -> reason of those on PEFT's own."""

    fused: list[str]
    slow: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.slow.items():
            by_reason.setdefault(reason, []).append(name)
        parts = [f"{len(self.fused)} of {len(self.fused) + len(self.slow)} adapted modules run fused"]
        parts += [
            f"{len(names)} through PEFT, because {reason} ({names[0]}{', ...' if len(names) > 1 else ''})"
            for reason, names in by_reason.items()
        ]
        return "; ".join(parts)


def fusion_report(model: nn.Module) -> FusionReport:
    """Which adapted modules run fused, and why the others do not; after a forward it is what that one did."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    fused, slow = [], {}
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if isinstance(module, FusedLora):
            reason = module.slow_reason() or module.kept_slow
        else:
            reason = f"{type(module.get_base_layer()).__name__} has no fused form"
        if reason is None:
            fused.append(name)
        else:
            slow[name] = reason
    return FusionReport(fused, slow)
