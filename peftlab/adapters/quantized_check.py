"""Whether a method that nobody tried on quantized weights computes with the weights, or with the bytes that store them.

PEFT puts many methods on a layer of bitsandbytes as on any linear layer, and some of them then read its bytes. So one layer of each
kind is compared with a layer that has the dequantized weight: with the same draws, both have to give the same outputs.
"""

from __future__ import annotations

import copy
import random
import time
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peftlab.adapters.merge import dequantizer
from peftlab.errors import RecipeError
from peftlab.specs.methods import METHODS

_ROWS = 8
# Relative to the adapter's own effect, to the output, and to what bitsandbytes' products differ by without an adapter. Bytes in
# place of weights are off by the whole effect, and mostly by orders of magnitude.
_OF_EFFECT, _OF_OUTPUT, _OF_PRODUCTS = 0.05, 1e-3, 4.0
# Sizes of the noise on the adapter's parameters; the first that changes the output by half is used.
_NOISE, _ENOUGH = (0.02, 0.2, 2.0), 0.5
# Settings that concern other modules of the model.
_OF_OTHERS = ("modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters")


@dataclass(frozen=True)
class QuantizedCheck:
    """What was compared. Attributes: layers: their names. worst: largest difference of outputs, relative to what is allowed.
    left_out: why layers could not be compared outside of their model; empty if all were."""

    methods: tuple[str, ...]
    layers: tuple[str, ...]
    worst: float
    seconds: float
    left_out: str = ""

    def __str__(self) -> str:
        labels = " and ".join(METHODS[name].label for name in self.methods)
        text = f"{labels} was not tried on quantized weights before"
        if self.layers:
            text += (
                f"; {len(self.layers)} layers give what they give on the dequantized weights (difference {self.worst:.1%} of what "
                f"rounding explains, {self.seconds:.1f} s)"
            )
        return f"{text}; not compared: {self.left_out}" if self.left_out else text


def check_untried(
    model: Any, adapters: Mapping[str, Any], places: Mapping[str, Collection[str]]
) -> QuantizedCheck | None:
    """Compares methods that nobody tried on quantized weights with themselves on dequantized ones: as they start, and after noise
    on their parameters. The model and all random state stay as they are; one layer at a time is copied.

    Args:
        model: without adapters. adapters: PEFT's configurations of such methods. places: names of the modules to adapt, by method.
    Returns: None if no adapted layer is quantized.
    Raises: RecipeError if a layer gives something else.
    """
    started = time.perf_counter()
    worst, compared, methods, left_out = 0.0, [], [], ""
    for method, config in adapters.items():
        kinds = _kinds(model, places[method])
        if kinds:
            methods.append(method)
        for name in kinds:
            with _kept_draws():
                found = _excess(model, method, config, name)
            if isinstance(found, str):
                left_out = f"{method} in {name} ({found})"
                continue
            compared.append(name)
            worst = max(worst, found)
    if not methods:
        return None
    return QuantizedCheck(tuple(methods), tuple(compared), worst, time.perf_counter() - started, left_out)


def _kinds(model: nn.Module, names: Collection[str]) -> list[str]:
    """One quantized layer of each kind: last part of the name, and shape."""
    modules = dict(model.named_modules())
    found: dict[tuple[str, int, int], str] = {}
    for name in names:
        layer: Any = modules.get(name)
        if layer is not None and dequantizer(layer) is not None:
            found.setdefault((name.rpartition(".")[2], layer.in_features, layer.out_features), name)
    return list(found.values())


def _excess(model: nn.Module, method: str, config: Any, name: str) -> float | str:
    """The largest difference relative to what is allowed, or why the layer cannot run outside of its model.

    Raises: RecipeError if it is larger than 1.
    """
    quantized: Any = copy.deepcopy(model.get_submodule(name))
    dense = _dequantized(quantized)
    x = torch.randn(_ROWS, quantized.in_features, generator=torch.Generator().manual_seed(0)).to(dense.weight.device)
    plain = dense(x)
    products = float((quantized(x) - plain).norm())
    try:
        wanted = _Alone(model, name, dense, config)
        start = wanted(x)
    except Exception as error:  # of any kind: a method may need its whole model
        return _first_line(error)
    try:
        found = _Alone(model, name, quantized, config)
        at_start = _compare(found(x), start, plain, products)
        moved = wanted.move(x, plain)
        found.take(wanted)
        worst, off = max(at_start, _compare(found(x), moved, plain, products))
    except Exception as error:
        raise _refusal(model, method, name, f"it fails ({_first_line(error)}) and runs") from error
    if not worst <= 1:
        raise _refusal(model, method, name, f"its outputs differ by {off:.2g} times their size from those")
    return worst


def _compare(found: Tensor, wanted: Tensor, plain: Tensor, products: float) -> tuple[float, float]:
    """The difference relative to what is allowed, and to the outputs."""
    off, size = float((found - wanted).norm()), float(wanted.norm())
    allowed = _OF_EFFECT * float((wanted - plain).norm()) + _OF_OUTPUT * size + _OF_PRODUCTS * products
    return off / allowed, off / size


def _refusal(model: nn.Module, method: str, name: str, what: str) -> RecipeError:
    return RecipeError(
        f"nobody tried {METHODS[method].label} on quantized weights, and PEFT does not compute with the weights there: in {name}, "
        f"{what} on the dequantized weight; set model.quantize: none, or use another method",
        key="adapter.method",
    )


class _Alone:
    """One layer with an adapter, as the only one of its model, under its full name."""

    def __init__(self, model: Any, name: str, layer: nn.Module, config: Any) -> None:
        import peft

        skeleton: Any = nn.Module()
        skeleton.config = model.config
        for flag in ("is_loaded_in_8bit", "is_loaded_in_4bit") if dequantizer(layer) is not None else ():
            setattr(skeleton, flag, getattr(model, flag, False))
        *parents, last = name.split(".")
        inner = skeleton
        for part in parents:
            inner.add_module(part, nn.Module())
            inner = inner.get_submodule(part)
        inner.add_module(last, layer)
        own = copy.deepcopy(config)
        own.target_modules, own.task_type = [name], None
        for setting in _OF_OTHERS:
            if getattr(own, setting, None) is not None:
                setattr(own, setting, None)
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        peft.get_peft_model(skeleton, own)
        self._layer = skeleton.eval().get_submodule(name)
        self._trained = {n: p for n, p in skeleton.named_parameters() if p.requires_grad}

    def __call__(self, x: Tensor) -> Tensor:
        outputs: Tensor = self._layer(x)
        return outputs

    def move(self, x: Tensor, plain: Tensor) -> Tensor:
        """Adds noise to the adapter's parameters that changes the outputs visibly; returns the outputs."""
        start = {name: parameter.clone() for name, parameter in self._trained.items()}
        generator = torch.Generator().manual_seed(1)
        for size in _NOISE:
            for name, value in start.items():
                noise = torch.randn(value.shape, generator=generator).to(value)
                self._trained[name].copy_(value + size * noise)
            outputs = self(x)
            if float((outputs - plain).norm()) >= _ENOUGH * float(plain.norm()):
                break
        return outputs

    def take(self, other: _Alone) -> None:
        """Takes the values of the adapter's parameters from another one."""
        if self._trained.keys() != other._trained.keys():
            raise ValueError(f"other parameters: {', '.join(sorted(self._trained.keys() ^ other._trained.keys()))}")
        for name, parameter in self._trained.items():
            parameter.copy_(other._trained[name])


def _dequantized(layer: Any) -> nn.Linear:
    read = dequantizer(layer)
    assert read is not None
    dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    dense.weight = nn.Parameter(read().float(), requires_grad=False)
    if layer.bias is not None:
        dense.bias = nn.Parameter(layer.bias.detach().float(), requires_grad=False)
    return dense


@contextmanager
def _kept_draws() -> Iterator[None]:
    """Restores all random generators at the end of the block."""
    python, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
