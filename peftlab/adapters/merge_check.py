"""Checks a merge of an adapter, layer by layer and independently of PEFT's merge code (contract C6)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from peftlab.adapters.inject import base_name
from peftlab.adapters.layer_rules import Rule, rule_of
from peftlab.adapters.target_modules import is_norm

_ROWS = 16
# Error of a value after rounding, relative to the value.
_ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# What a merge may lose of an update, and how many times the typical rounding error of outputs, before it is wrong.
_LOST, _ROUNDINGS = 1e-3, 4.0
# Error of float32 arithmetic in a weight, relative to the weights of its output: sums of some hundred terms.
_ARITHMETIC = 2.0**-18
# Values to compare at a time: few enough for a processor's cache, which makes it ten times as fast.
_BLOCK = 2**16
# Share of an update that rounding may change before the layer counts as losing it.
_MOST = 0.5


@dataclass(frozen=True)
class LayerError:
    """Difference between merged layers and the layers with their adapters.

    Attributes:
        by_formula: layers whose weights were compared with W' of the method's formula; those that run on their own were compared
            by outputs too. by_probes: layers that have no formula here, compared by their outputs on random inputs. unchecked:
            adapted layers that were not compared one by one; only the outputs of the model check them.
        relative: the difference, relative to what the adapter changes; 1 for a merge that lost its update. Over all layers.
        wrong: number of layers whose difference rounding does not explain.
        worst: the layer with the largest difference beyond rounding. worst_relative: its ``relative``.
        num_lost: layers that rounding changes by more than half of what the adapter changes. most_lost, most_lost_relative: the
            layer where it is the most, if any.
    """

    by_formula: int
    by_probes: int
    unchecked: int
    relative: float
    wrong: int
    worst: str
    worst_relative: float
    num_lost: int
    most_lost: str
    most_lost_relative: float


@dataclass(frozen=True)
class _Difference:
    """Of one layer, as squared norms, what a merge changes and what the adapter changes; excess: above 1 if rounding cannot be why."""

    lost: float
    moved: float
    excess: float

    @property
    def relative(self) -> float:
        return float((self.lost / max(self.moved, 1e-300)) ** 0.5)


class MergeCheck:
    """The expected weights and outputs of each adapted layer, recorded before a merge and compared with the merged files."""

    def __init__(self, model: Any, weights: Mapping[str, Tensor] | None = None) -> None:
        """Records a ``PeftModel``. ``weights``: weights [N, K] of linears by name that are in memory anyway.

        Memory: the weights of layers with a formula once more, on the CPU, in 16 bits if that loses nothing.
        """
        self._probes = Probes(model)
        self._formulas = Formulas(model, weights or {})
        names = [base_name(name) for name, _ in _adapted_layers(model)]
        ruled = [name for name, _ in self._formulas.layers]
        others = [n for n in names if n not in ruled]
        probed = [n for n in others if any(n == p or n.startswith(f"{p}.") for p in self._probes.names)]
        self.by_formula, self.by_probes, self.unchecked = len(ruled), len(probed), len(others) - len(probed)

    @torch.no_grad()
    def error(self, merged: nn.Module, dtype: torch.dtype) -> LayerError | None:
        """Compares with the layers of ``merged``, a plain model whose weights were rounded to ``dtype``; None without layers."""
        weights = dict(self._formulas.differences(merged, dtype))
        outputs = dict(self._probes.differences(merged, dtype))
        if not weights and not outputs:
            return None
        # A layer's weights say what it lost; of its outputs only the verdict counts then.
        found = [(name, outputs[name]) for name in outputs if name not in weights] + list(weights.items())
        verdicts = [*outputs.items(), *weights.items()]
        worst, difference = max(verdicts, key=lambda pair: pair[1].excess)
        lost = [(name, d) for name, d in found if d.relative > _MOST]
        most_lost, most = max(lost, key=lambda pair: pair[1].relative) if lost else ("", None)
        moved = sum(d.moved for _, d in found)
        return LayerError(
            self.by_formula,
            self.by_probes,
            self.unchecked,
            relative=(sum(d.lost for _, d in found) / moved) ** 0.5 if moved else 0.0,
            wrong=len({name for name, d in verdicts if d.excess > 1}),
            worst=worst,
            worst_relative=difference.relative,
            num_lost=len(lost),
            most_lost=most_lost,
            most_lost_relative=most.relative if most else 0.0,
        )


class Formulas:
    """The formula of each adapted layer that has one, with the weight that it starts from."""

    def __init__(self, model: Any, weights: Mapping[str, Tensor]) -> None:
        rules: dict[tuple[str, str], tuple[Any, Rule | None]] = {}
        inside = tuple(
            f"{p}." for p, m in _adapted_layers(model) if isinstance(m.get_base_layer(), nn.MultiheadAttention)
        )
        for path, layer in _adapted_layers(model):
            # PEFT 0.21 trains torch's attention with twice the update of the output projection, and merges it so.
            rule = None if path.startswith(inside) else rule_of(layer)
            key = base_name(path), rule.parameter if rule else "weight"
            # Two adapters on one parameter, such as trained tokens of an adapted embedding: no formula for their sum.
            rules[key] = (layer.get_base_layer(), None if key in rules else rule)
        self.layers: list[tuple[str, Rule]] = []
        self._before: list[tuple[Callable[[], Tensor], Tensor | None]] = []
        for (name, parameter), (base, rule) in rules.items():
            if rule is not None:
                self.layers.append((name, rule))
                bias = getattr(base, "bias", None) if parameter == "weight" else None
                weight = _kept(getattr(base, parameter).detach(), name, weights if parameter == "weight" else {})
                self._before.append((weight, None if bias is None else bias.detach().clone()))

    def differences(self, merged: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, _Difference]]:
        """Yields the layers by name, with the names of parameters that are no weight of their module."""
        modules = dict(merged.named_modules())
        for (name, rule), (weight, bias) in zip(self.layers, self._before, strict=True):
            module = modules[name]
            parts = [_compare(weight().double(), rule.weight, getattr(module, rule.parameter), dtype)]
            if bias is not None:
                parts.append(_compare(bias.double().cpu(), rule.bias, module.bias, dtype))
            label = name if rule.parameter == "weight" else f"{name}.{rule.parameter}"
            yield label, _sum(parts)


def _compare(before: Tensor, change: Callable[[Tensor], Tensor], found: Any, dtype: torch.dtype) -> _Difference:
    """Compares each value of a merged parameter with the expected one."""
    expected, values = change(before), found.detach().cpu()
    if values.shape != expected.shape:
        raise ValueError(f"expected a merged parameter of shape {list(expected.shape)}, found {list(values.shape)}")
    w, wanted, got = _rows(before), _rows(expected), _rows(values)
    step = max(1, _BLOCK // max(1, w.shape[1]))
    blocks = [slice(start, start + step) for start in range(0, len(w), step)]
    return _sum(_compare_rows(w[block], wanted[block], got[block], dtype) for block in blocks)


def _rows(values: Tensor) -> Tensor:
    """[rows, columns] of a parameter; an expert's rows each for themselves."""
    if values.dim() == 1:
        return values[None]
    return values.flatten(0, 1) if values.dim() == 3 and values.shape[2] > 16 else values.flatten(1)


def _compare_rows(before: Tensor, expected: Tensor, found: Tensor, dtype: torch.dtype) -> _Difference:
    """Arithmetic may move a value a little before it is rounded to ``dtype``."""
    values, update = found.double(), expected - before
    noise = _LOST * _typical(update) + _ARITHMETIC * (expected.abs() + _typical(expected))
    # Rounding keeps the order of values, so a right one lies between the bounds, rounded alike.
    low, high = ((expected + sign * noise).to(dtype).double() for sign in (-1, 1))
    beyond = torch.maximum(low - values, values - high) / noise.clamp(min=1e-300)
    excess = 1 + float(beyond.max()) if torch.isfinite(values).all() else float("inf")
    return _Difference(float((values - expected).square().sum()), float(update.square().sum()), excess)


def _typical(rows: Tensor) -> Tensor:
    """[rows, 1] root mean squares."""
    return rows.square().mean(dim=1, keepdim=True).sqrt()


def _sum(parts: Iterable[_Difference]) -> _Difference:
    listed = list(parts)
    return _Difference(sum(p.lost for p in listed), sum(p.moved for p in listed), max(p.excess for p in listed))


def _kept(weight: Tensor, name: str, elsewhere: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """A function that gives the values of ``weight`` later: from ``elsewhere`` if it has the same, else from a copy on the CPU."""
    same = elsewhere.get(name)
    if same is not None and same.shape == weight.shape and torch.equal(same, weight.to(same)):
        return functools.partial(elsewhere.__getitem__, name)
    kept = weight.to("cpu", copy=True)
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal((short := kept.to(dtype)).to(kept.dtype), kept):
            kept = short
            break
    return lambda: kept


class Probes:
    """The outputs of each adapted layer on random inputs, recorded before a merge by the adapter's own forward.

    This knows no formula of any method, and every kind of layer that can be called: linear layers, GPT-2's Conv1D,
    convolutions and embeddings.
    """

    def __init__(self, model: Any) -> None:
        self._inputs: dict[str, Tensor] = {}
        self._adapted: dict[str, Tensor] = {}
        self._plain: dict[str, Tensor] = {}
        for name, layer in _outermost(model):
            x = _input_of(layer)
            if x is None:
                continue
            try:
                adapted, plain = _outputs(layer, x)
            except RuntimeError:  # AdaMSS computes in the dtype that its layer was made with
                x = x.float() if x.is_floating_point() else x
                adapted, plain = _outputs(layer, x, torch.float32)
            self._inputs[name], self._adapted[name], self._plain[name] = x, adapted.double(), plain.double()

    @property
    def names(self) -> list[str]:
        return list(self._inputs)

    def differences(self, merged: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, _Difference]]:
        modules = dict(merged.named_modules())
        for name, x in self._inputs.items():
            y = _called(copy.deepcopy(modules[name]).cpu().double().eval(), x.double() if x.is_floating_point() else x)
            adapted = self._adapted[name]
            lost = float((y - adapted).norm())
            update = float((adapted - self._plain[name]).norm())
            allowed = _LOST * update + _ROUNDINGS * _ROUNDING.get(dtype, 0.0) * float(adapted.norm())
            excess = lost / max(allowed, 1e-300) if lost == lost else float("inf")
            yield name, _Difference(lost**2, update**2, excess)


@torch.no_grad()
def _outputs(layer: Any, x: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The outputs of a copy of an adapted layer on the CPU, with and without its adapter."""
    exact = copy.deepcopy(layer).cpu().to(dtype).eval()
    if hasattr(exact, "kernels"):
        exact.kernels = "reference"  # PEFT's forward, and no fused one
    adapted = _called(exact, x)
    exact.enable_adapters(False)
    return adapted, _called(exact, x)


def _called(layer: Any, x: Tensor) -> Tensor:
    """The output of a plain or adapted layer; torch's attention attends to its own input."""
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    result: Tensor = layer(x, x, x)[0] if isinstance(base, nn.MultiheadAttention) else layer(x)
    return result


def _adapted_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """All adapted layers of the base model, also those inside others."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in model.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def _outermost(model: Any) -> Iterator[tuple[str, Any]]:
    """The adapted layers by their name in the base model, without layers inside others."""
    inside: list[str] = []
    for name, layer in _adapted_layers(model):
        if not name.startswith(tuple(inside)):
            inside.append(f"{name}.")
            yield base_name(name), layer


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
    if isinstance(layer, nn.MultiheadAttention) and layer.kdim == layer.vdim == layer.embed_dim:
        return torch.randn(_ROWS, 1, layer.embed_dim, generator=generator, dtype=torch.float64)
    if isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D":
        width = layer.in_features if isinstance(layer, nn.Linear) else cast(Any, layer).nx
        return torch.randn(_ROWS, width, generator=generator, dtype=torch.float64)
    return None
