"""Checks a merge of an adapter into the weights, layer by layer and independently of PEFT's merge code (contract C6)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftlab.adapters.inject import base_name
from peftlab.adapters.target_modules import is_norm

_ROWS = 16
# Error of a value after rounding, relative to the value.
_ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# What a merge may lose of an update, and how many times the typical rounding error, before it is wrong.
_LOST, _ROUNDINGS = 1e-3, 4.0


@dataclass(frozen=True)
class LayerError:
    """Difference between the outputs of merged layers and of the layers with their adapters, on random inputs in float64.

    Attributes:
        relative: the difference, relative to what the adapter changes; 1 for a merge that lost its update. Over all layers.
        worst: the layer with the largest difference beyond rounding. worst_relative: its ``relative``.
        wrong: number of layers whose difference rounding does not explain.
        num_modules: layers compared. num_unchecked: adapted modules that cannot be run on their own, such as routed experts;
            only the outputs of the model check them.
    """

    relative: float
    worst: str
    worst_relative: float
    wrong: int
    num_modules: int
    num_unchecked: int


def fold(model: Any) -> Any:
    """The base model of a ``PeftModel`` with the adapter in its weights. Raises: what PEFT raises if it cannot merge."""
    if any(getattr(config, "layer_replication", None) for config in model.peft_config.values()):
        _unshare(model.get_base_model())
    _unwrap(model.get_base_model())
    return model.merge_and_unload(safe_merge=True)


def _unwrap(model: nn.Module) -> None:
    """Puts modules that were trained in full in place of PEFT's wrappers. PEFT 0.21.2 forgets them for LayerNorm tuning, so that a
    merged file would have a new head, and fails for most methods if such a head is more than one layer, as RoBERTa's."""
    from peft.utils import AuxiliaryTrainingWrapper

    for name, module in list(model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            plain = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, plain)


def _unshare(model: Any) -> None:
    """Gives each replicated layer weights of its own. PEFT would add the updates of all to one, and transformers would not
    write the files. A head that is tied to the embeddings stays tied."""
    ends = {id(end.weight) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None}
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen - ends:
                setattr(module, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
            seen.add(id(parameter))


class Probes:
    """The outputs of each adapted layer on random inputs, recorded before a merge by the adapter's own forward.

    This knows no formula of any method, and every kind of layer that can be called: linear layers, GPT-2's Conv1D,
    convolutions and embeddings.
    """

    def __init__(self, model: Any) -> None:
        self._inputs: dict[str, Tensor] = {}
        self._adapted: dict[str, Tensor] = {}
        self._plain: dict[str, Tensor] = {}
        self.num_unchecked = 0
        for name, layer in _outermost(model):
            x = _input_of(layer)
            if x is None:
                self.num_unchecked += 1
                continue
            try:
                adapted, plain = _outputs(layer, x)
            except RuntimeError:  # AdaMSS computes in the dtype that its layer was made with
                x = x.float() if x.is_floating_point() else x
                adapted, plain = _outputs(layer, x, torch.float32)
            self._inputs[name], self._adapted[name], self._plain[name] = x, adapted.double(), plain.double()

    def __len__(self) -> int:
        return len(self._inputs)

    @torch.no_grad()
    def error(self, merged: nn.Module, dtype: torch.dtype) -> LayerError | None:
        """Compares with the layers of ``merged``, a plain model whose weights were rounded to ``dtype``; None without layers."""
        if not self._inputs:
            return None
        modules = dict(merged.named_modules())
        lost, moved, wrong = 0.0, 0.0, 0
        worst, worst_excess, worst_relative = "", -1.0, 0.0
        for name, x in self._inputs.items():
            y = copy.deepcopy(modules[name]).cpu().double().eval()(x.double() if x.is_floating_point() else x)
            adapted = self._adapted[name]
            difference = float((y - adapted).norm())
            update = float((adapted - self._plain[name]).norm())
            allowed = _LOST * update + _ROUNDINGS * _ROUNDING.get(dtype, 0.0) * float(adapted.norm())
            excess = difference / max(allowed, 1e-300)
            wrong += not difference <= allowed
            lost, moved = lost + difference**2, moved + update**2
            if not excess <= worst_excess:
                worst, worst_excess, worst_relative = name, excess, difference / max(update, 1e-300)
        return LayerError(
            (lost / moved) ** 0.5 if moved else 0.0,
            worst,
            worst_relative,
            wrong,
            len(self._inputs),
            self.num_unchecked,
        )


@torch.no_grad()
def _outputs(layer: Any, x: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The outputs of a copy of an adapted layer on the CPU, with and without its adapter."""
    exact = copy.deepcopy(layer).cpu().to(dtype).eval()
    if hasattr(exact, "kernels"):
        exact.kernels = "reference"  # PEFT's forward, and no fused one
    adapted = exact(x)
    exact.enable_adapters(False)
    return adapted, exact(x)


def _outermost(model: Any) -> Iterator[tuple[str, Any]]:
    """The adapted layers by their name in the base model, without layers inside others."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    inside: list[str] = []
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer) and not name.startswith(tuple(inside)):
            inside.append(f"{name}.")
            yield base_name(name), module


def _input_of(adapted: Any) -> Tensor | None:
    """A random input for an adapted layer; None for a kind that cannot be called with one tensor."""
    layer = adapted.get_base_layer()
    generator = torch.Generator().manual_seed(0)
    if isinstance(layer, nn.Embedding):
        trained = sorted({i for rows in getattr(adapted, "token_indices", {}).values() for i in rows})
        ids = torch.randint(layer.num_embeddings, (_ROWS, 4), generator=generator)
        return torch.cat([ids.flatten(), torch.tensor(trained, dtype=torch.long)])
    if isinstance(layer, nn.modules.conv._ConvNd):
        extent = [d * (k - 1) + 3 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        return torch.randn(2, layer.in_channels, *extent, generator=generator, dtype=torch.float64)
    if isinstance(layer, nn.modules.batchnorm._NormBase | nn.GroupNorm):
        dims = {"BatchNorm1d": 0, "BatchNorm3d": 3}.get(type(layer).__name__, 2)
        return torch.randn(2, len(layer.weight), *([3] * dims), generator=generator, dtype=torch.float64)
    if is_norm(layer) and layer.weight.dim() == 1:
        return torch.randn(_ROWS, len(layer.weight), generator=generator, dtype=torch.float64)
    if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D":
        width = layer.in_features if isinstance(layer, nn.Linear) else cast(Any, layer).nx
        return torch.randn(_ROWS, width, generator=generator, dtype=torch.float64)
    return None


def dequantizer(module: nn.Module) -> Callable[[], Tensor] | None:
    """A function that dequantizes the weight of a bitsandbytes linear and changes nothing in it; None for another module.

    PEFT's own (0.21) moves an int8 weight, which then lacks the scales that its next forward needs.
    """
    import bitsandbytes as bnb

    if isinstance(module, bnb.nn.Linear4bit):
        packed = cast(bnb.nn.Params4bit, module.weight)
        return functools.partial(bnb.functional.dequantize_4bit, packed.data, packed.quant_state)
    if isinstance(module, bnb.nn.Linear8bitLt):
        rows = cast(bnb.nn.Int8Params, module.weight)
        scale = cast(Tensor, rows.SCB if rows.SCB is not None else module.state.SCB)
        return functools.partial(bnb.functional.int8_vectorwise_dequant, rows.data, scale)
    return None


class DequantizedWeights(Mapping[str, Tensor]):
    """The bitsandbytes linears of a model as float32 [out, in] weights on the CPU, by module name.

    Each is dequantized on access; only the quantized storage is kept, an eighth of the size.
    """

    def __init__(self, model: nn.Module) -> None:
        self._stored: dict[str, Callable[[], Tensor]] = {}
        for name, module in model.named_modules():
            if (read := dequantizer(module)) is not None:
                self._stored[name.removesuffix(".base_layer").removeprefix("base_model.model.")] = read

    def __getitem__(self, name: str) -> Tensor:
        return self._stored[name]().float().cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
