"""PEFT's LoRA linears with a fused forward: subclasses of PEFT's layers, registered through its custom-module mapping.

Injection, files, merging, hot swapping and every tool that reads PEFT keep working, because only ``forward`` differs, and
``unmerge`` of a dense weight, which is exact.
What the fused operation does not support runs through PEFT's own forward, and is listed with its reason (contract C7).
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from peftlab import ops
from peftlab.adapters.unmerge import ExactUnmerge

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer
else:
    LoraLayer = object

# Values of run.kernels; "compared" is PEFT's forward with the dropout masks of the fused one.
MODES = ("auto", "triton", *ops.CPU_OPERANDS, "reference", "compared")


class Factors(NamedTuple):
    """A LoRA adapter: A [R, K], B [N, R], scaling, and the current dropout probability on its input."""

    A_RK: Tensor
    B_NR: Tensor
    scale: float
    dropout: float


class FusedLora(LoraLayer):
    """Mixin before a PEFT LoRA layer.

    Each forward reads everything that decides how it runs, so nothing can be stale. Caching the decision would save nothing:
    validating it reads the same values. The reads are cheap instead: ``_modules`` and ``parameter`` avoid
    ``nn.Module.__getattr__``, ``plain_reads`` avoids the Python code behind each property of an NF4 weight.
    """

    kernels = "auto"
    kept_slow: str | None = None
    """Set by the layer: why its last forward was PEFT's own; None when it was fused."""

    def _get_name(self) -> str:
        return type(self).__name__.removeprefix("Fused")  # PEFT's tools and tests read this name in a printed model

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        reason = self.slow_reason(x, args, kwargs)
        if reason != self.kept_slow:  # nn.Module's __setattr__ is slow: not on every forward
            self.kept_slow = reason
        if reason is None:
            return self._fused(x)
        _settle_int8(self.get_base_layer())
        if self.kernels == "compared" and self.slow_reason(x, args, kwargs, kernels="auto") is None:
            with self._drawn_dropout():
                return super().forward(x, *args, **kwargs)  # type: ignore[misc, no-any-return]
        return super().forward(x, *args, **kwargs)  # type: ignore[misc, no-any-return]

    def slow_reason(
        self,
        x: Tensor | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        kernels: str = "",
    ) -> str | None:
        """Why a forward on ``x`` takes PEFT's path, or None; without ``x``, as far as known before a forward."""
        layer: Any = self
        if (kernels or layer.kernels) in ("reference", "compared"):
            return "run.kernels=reference"
        if args or kwargs:
            return "the call has arguments other than its input"
        if layer.disable_adapters or layer.merged:
            return "no adapter is active"
        modules = layer._modules
        adapters = modules["lora_A"]._modules
        active = [name for name in layer.active_adapters if name in adapters]
        if len(active) != 1:
            return f"{len(active)} adapters are active at once"
        (name,) = active
        if name in layer.lora_variant:
            return f"it is a variant of LoRA ({type(layer.lora_variant[name]).__name__.removesuffix('LinearVariant')})"
        down, up = adapters[name], modules["lora_B"]._modules[name]
        if not (_is_matrix(down) and _is_matrix(up)):
            return "its factors are not plain matrices"
        dropout = modules["lora_dropout"]._modules[name]
        if type(dropout) is not nn.Dropout and type(dropout) is not nn.Identity:
            return f"its dropout is a {type(dropout).__name__}"
        if not isinstance(layer.scaling[name], (int, float)):
            return "its scaling is a tensor"
        base = modules["base_layer"]
        if "base_layer" in base._modules:
            return "its base layer is adapted itself"
        if is_hooked(base) or is_hooked(down) or is_hooked(up) or is_hooked(dropout):
            return "a hook is registered inside it"
        weight = parameter(base, "weight")
        with plain_reads():
            if weight.requires_grad:
                return "its base weight is trained"
            return self._base_reason(base, weight, x) or (self._input_reason(weight, x) if x is not None else None)

    def _input_reason(self, weight: Tensor, x: Tensor) -> str | None:
        if not x.is_floating_point():
            return f"its input is {x.dtype}"
        if x.device != weight.device:
            return f"its input is on {x.device}, its weight on {weight.device}"
        # A trace would follow this check into the kernel; the operator checks again when it runs.
        asks = self.kernels == "triton" and not torch.compiler.is_compiling()
        if asks and (problem := ops.triton_problem(x.device, products=True)):
            return problem
        if self.kernels in ops.CPU_OPERANDS:
            return f"its input is on {x.device}" if x.device.type != "cpu" else ops.operands_problem(self.kernels)
        return None

    def _base_reason(self, base: Any, weight: Any, x: Tensor | None) -> str | None:
        raise NotImplementedError

    def _base_weight(self, base: Any) -> ops.BaseWeight:
        """The base weight of a layer without a ``slow_reason``."""
        raise NotImplementedError

    def factors(self) -> Factors:
        """The factors of the single active adapter."""
        layer: Any = self
        modules = layer._modules
        adapters = modules["lora_A"]._modules
        name = next(name for name in layer.active_adapters if name in adapters)
        dropout = modules["lora_dropout"]._modules[name]
        return Factors(
            parameter(adapters[name], "weight"),
            parameter(modules["lora_B"]._modules[name], "weight"),
            layer.scaling[name],
            dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0,
        )

    def _fused(self, x: Tensor) -> Tensor:
        layer: Any = self
        base, factors = layer._modules["base_layer"], self.factors()
        weight, dtype = self._base_weight(base), compute_dtype(x)
        # A head or another layer that was loaded in floating point has no int8 product.
        exact = self.kernels == "cpu-int8" and not isinstance(weight, ops.Int8Weight)
        return ops.lora_linear(
            x if x.dtype == dtype else x.to(dtype),
            weight,
            factors.A_RK,
            factors.B_NR,
            scale=factors.scale,
            bias_N=parameter(base, "bias"),
            dropout=factors.dropout,
            seed=ops.new_seed(x.device) if factors.dropout else None,
            backend="auto" if exact else self.kernels,
        )

    @contextlib.contextmanager
    def _drawn_dropout(self) -> Iterator[None]:
        """Makes the active dropout draw the same mask as the fused operation."""
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
    """The dtype of products with ``x``: autocast's if it is on, else that of ``x``."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def parameter(module: nn.Module, name: str) -> Any:
    """``module.name``, without ``nn.Module.__getattr__`` if it is a parameter."""
    parameters = module._parameters
    # Replicas of DataParallel and FSDP1's flat shards have plain attributes instead.
    return parameters[name] if name in parameters else getattr(module, name)


def plain_reads() -> Any:
    """A context in which properties of a bitsandbytes weight are read like any tensor's, without ``__torch_function__``."""
    return torch._C.DisableTorchFunctionSubclass()


def _is_matrix(factor: nn.Module) -> bool:
    return type(factor) is nn.Linear and parameter(factor, "bias") is None


def is_hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__  # accelerate's offloading replaces it
    )


def _is_sharded(weight: Tensor) -> bool:
    """FSDP2 keeps a DTensor, which is a plain parameter while the module runs."""
    return hasattr(weight, "placements")


class _PlainLinear(type):
    """For ``isinstance`` in PEFT's mapping: matches only nn.Linear itself with an ordinary tensor as weight.

    Quantized linears of other libraries subclass nn.Linear or hold tensor subclasses; those stay with PEFT.
    """

    def __instancecheck__(cls, module: object) -> bool:
        return type(module) is nn.Linear and type(parameter(module, "weight")) is nn.Parameter


class PlainLinear(metaclass=_PlainLinear):
    """Key of the mapping; see ``_PlainLinear``."""


def fused_classes() -> dict[type, type]:
    """Base layer type -> fused LoRA layer, in the order to try; with bitsandbytes' types if it was imported."""
    bnb = sys.modules.get("bitsandbytes")
    classes: dict[type, type] = {}
    if bnb is not None:
        classes = {bnb.nn.Linear4bit: _fused_4bit(), bnb.nn.Linear8bitLt: _fused_8bit()}
    return {**classes, PlainLinear: _fused_dense()}


def __getattr__(name: str) -> type:
    """The fused classes by name, for pickle. They are created at their first use, because PEFT is slow to import."""
    factories = {"FusedLinear": _fused_dense, "FusedLinear4bit": _fused_4bit, "FusedLinear8bitLt": _fused_8bit}
    if name not in factories:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return factories[name]()


def _top_level(layer: type) -> type:
    """``layer``, a class defined in a function, renamed as if it were defined at the top level of this file."""
    layer.__qualname__ = layer.__name__
    return layer


@functools.cache
def _fused_dense() -> type:
    from peft.tuners import lora

    class FusedLinear(ExactUnmerge, FusedLora, lora.Linear):
        def _base_reason(self, base: Any, weight: Any, x: Tensor | None) -> str | None:
            if type(base) is not nn.Linear:
                return f"its base layer is a {type(base).__name__}"
            if type(weight) is not nn.Parameter and not (x is None and _is_sharded(weight)):
                return f"its base weight is a {type(weight).__name__}"
            if x is not None and x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
                return f"its input is {x.dtype}, its weight {weight.dtype}"
            return None

        def _base_weight(self, base: Any) -> ops.BaseWeight:
            return ops.DenseWeight(parameter(base, "weight"))

    return _top_level(FusedLinear)


@functools.cache
def _fused_4bit() -> type:
    from bitsandbytes import nn as bnb
    from peft.tuners.lora.bnb import Linear4bit

    class FusedLinear4bit(FusedLora, Linear4bit):
        def _base_reason(self, base: Any, weight: Any, x: Tensor | None) -> str | None:
            if type(base) is not bnb.Linear4bit:
                return f"its base layer is a {type(base).__name__}"
            if reason := _nf4_reason(base, weight):
                return reason
            if x is not None and base.compute_dtype not in (None, compute_dtype(x)):
                return f"its compute type is {base.compute_dtype}, that of its input {compute_dtype(x)}"
            return None

        def _base_weight(self, base: Any) -> ops.BaseWeight:
            return _nf4_weight(base, parameter(base, "weight"))

    return _top_level(FusedLinear4bit)


@functools.cache
def _fused_8bit() -> type:
    from bitsandbytes import nn as bnb
    from peft.tuners.lora.bnb import Linear8bitLt

    class FusedLinear8bitLt(FusedLora, Linear8bitLt):
        def _base_reason(self, base: Any, weight: Any, x: Tensor | None) -> str | None:
            if type(base) is not bnb.Linear8bitLt:
                return f"its base layer is a {type(base).__name__}"
            if reason := _int8_reason(base, weight):
                return reason
            if not base.training and weight.device.type == "cpu" and self.kernels not in ops.CPU_OPERANDS:
                return "bitsandbytes multiplies int8 by int8 on a CPU outside training"
            return None

        def _base_weight(self, base: Any) -> ops.BaseWeight:
            return _int8_weight(base, parameter(base, "weight"))

    return _top_level(FusedLinear8bitLt)


def frozen_weight(base: Any) -> ops.BaseWeight | None:
    """The weight of a linear in the form that the operations take; None for an unsupported linear."""
    bnb = sys.modules.get("bitsandbytes")
    if isinstance(base, PlainLinear):
        return ops.DenseWeight(parameter(cast(nn.Linear, base), "weight"))
    if bnb is None:
        return None
    if type(base) is bnb.nn.Linear4bit and _nf4_reason(base, base.weight) is None:
        return _nf4_weight(base, base.weight)
    if type(base) is bnb.nn.Linear8bitLt and _int8_reason(base, base.weight) is None:
        return _int8_weight(base, base.weight)
    return None


def _nf4_weight(base: Any, weight: Any) -> ops.NF4Weight:
    state = weight.quant_state
    with plain_reads():
        packed = weight.data
    nested = (state.state2.code, state.state2.absmax, state.offset) if state.nested else None
    return ops.NF4Weight(
        packed,
        state.absmax,
        state.code,
        (base.out_features, base.in_features),
        state.blocksize,
        nested,
        state.state2.blocksize if state.nested else 256,
    )


def _settle_int8(base: Any) -> None:
    """Keeps the scales of an int8 layer whose weight PEFT (0.21) moved to read it, as DoRA does at each forward on a CPU: the moved
    weight has none, and bitsandbytes would take that for the scales."""
    weight, state = base.weight, getattr(base, "state", None)
    if getattr(weight, "CB", None) is not None and weight.SCB is None and state is not None and state.SCB is not None:
        weight.CB, state.CB = None, weight.data


def _int8_weight(base: Any, weight: Any) -> ops.Int8Weight:
    if weight.CB is not None:
        base.init_8bit_state()
    state = base.state
    weight.data = state.CB  # as bitsandbytes does, so that this weight is saved
    return ops.Int8Weight(state.CB, state.SCB, float(state.threshold))


def _nf4_reason(base: Any, weight: Any) -> str | None:
    state = getattr(weight, "quant_state", None)
    if state is None:
        return "its weight is not quantized yet"
    if state.quant_type != "nf4":
        return f"its weight is {state.quant_type}, not nf4"
    if vars(state).get("packing_format_for_cpu"):
        return "its weight was repacked for AVX512"
    if len(state.shape) != 2 or tuple(state.shape) != (base.out_features, base.in_features):
        return f"its weight was quantized as {list(state.shape)}"
    return None


def _int8_reason(base: Any, weight: Any) -> str | None:
    if base.state.has_fp16_weights:
        return "its weight is kept in 16 bits"
    if weight.CB is None and base.state.CB is None:
        return "its weight is not quantized yet"
    return None


def register(config: Any) -> Any:
    """``config`` (a LoraConfig) with the fused layers in its custom-module mapping; the mapping is not saved."""
    # Not closures: the configuration is pickled with its model.
    config._register_custom_module({base: functools.partial(_make, layer) for base, layer in fused_classes().items()})
    return config


def _make(layer: type, target: nn.Module, adapter_name: str, **options: Any) -> Any:
    if options.get("parameter_name") is not None:
        return None  # an adapter on a bare parameter: PEFT uses its own layers
    return layer(target, adapter_name, **options)


def set_kernels(model: nn.Module, kernels: str) -> None:
    """Sets the mode of every fused layer: one of ``MODES``."""
    if kernels not in MODES:
        raise ValueError(f"expected kernels as one of {', '.join(MODES)}, found {kernels!r}")
    for module in model.modules():
        if isinstance(module, FusedLora):
            module.kernels = kernels


@contextlib.contextmanager
def exact_products(model: nn.Module) -> Iterator[bool]:
    """Eval mode with the most exact products, for comparisons of outputs: float32 for NF4 weights, no rounded operands, and
    dequantized int8 weights. Yields whether that holds for every layer: without a fused layer, bitsandbytes rounds rows of x to
    8 bits, in a way that depends on the other rows."""
    modes = {module: module.training for module in model.modules()}
    bnb = sys.modules.get("bitsandbytes")
    nf4 = [m for m in model.modules() if bnb is not None and isinstance(m, bnb.nn.Linear4bit)]
    dtypes: dict[Any, Any] = {module: module.compute_dtype for module in nf4}
    layers = [m for m in model.modules() if isinstance(m, FusedLora)]
    rounded = next((m.kernels for m in layers if m.kernels in ops.CPU_OPERANDS), None)
    int8 = [m for m in model.modules() if bnb is not None and isinstance(m, bnb.nn.Linear8bitLt)]
    model.eval()
    try:
        for module in dtypes:
            module.compute_dtype = torch.float32
        if rounded is not None:
            set_kernels(model, "auto")
        for module in int8:
            module.training = True  # the fused layers then dequantize it
        bases = {id(layer.get_base_layer()) for layer in layers if layer.slow_reason() is None}
        yield all(id(module) in bases for module in int8)
    finally:
        for module, dtype in dtypes.items():
            module.compute_dtype = dtype
        if rounded is not None:
            set_kernels(model, rounded)
        for module, training in modes.items():
            module.training = training


@dataclass(frozen=True)
class FusionReport:
    """fused: names of modules on the fused path; slow: name -> reason of modules on PEFT's path."""

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
    """Which adapted modules run fused, and why the others do not; after a forward, what that forward did."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    fused, slow = [], {}
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if isinstance(module, FusedLora):
            reason = module.slow_reason() or module.kept_slow
        elif hasattr(module, "lora_A"):
            reason = f"{type(module.get_base_layer()).__name__} has no fused form"
        else:
            reason = "only LoRA has a fused form"
        if reason is None:
            fused.append(name)
        else:
            slow[name] = reason
    return FusionReport(fused, slow)
