"""The adapter itself, and the layer of PEFT's kind that puts it at the end of a sublayer."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peftlab.adapters.bottleneck.config import BottleneckConfig, Style
from peftlab.adapters.bottleneck.trace import Place, first_tensor


class Bottleneck(nn.Module):
    """``dropout(scaling * up(f(down(x))))`` of ``x`` [..., width]; 0 at the start, because ``up`` starts at 0.

    ``down`` starts as in He et al. 2021 (Kaiming's uniform distribution with a = sqrt(5)), its bias at 0.
    """

    def __init__(self, width: int, config: BottleneckConfig, *, dtype: torch.dtype, device: torch.device) -> None:
        from transformers.activations import ACT2FN

        super().__init__()
        inner = max(1, int(width // config.reduction_factor))
        self.down = nn.Linear(width, inner, dtype=dtype, device=device)
        self.non_linearity = ACT2FN[config.non_linearity]
        self.up = nn.Linear(inner, width, dtype=dtype, device=device)
        self.dropout = nn.Dropout(config.dropout)
        self.scaling: float | nn.Parameter
        if config.scaling == "learned":
            self.scaling = nn.Parameter(torch.ones(1, dtype=dtype, device=device))
        else:
            self.scaling = float(config.scaling)
        self.non_linearity.to(dtype=dtype, device=device)  # some have parameters
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for start in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(start)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(self.scaling * self.up(self.non_linearity(self.down(x))))
        return y


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A module of the base model with adapters on its output, or before and after it if it is a layer norm.

    Args: base_layer: the end of a sublayer; for ``pfeiffer`` in a post-norm block its layer norm.
    """

    adapter_layer_names = ("bottleneck",)

    def __init__(self, base_layer: nn.Module, place: Place, style: Style) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck = nn.ModuleDict()
        self.place, self.style = place, style
        self.wraps_norm = style == "pfeiffer" and place.norm is not None
        self._residual: Tensor | None = None
        self.cast_input_dtype_enabled = True  # peft.helpers.disable_input_dtype_casting reads it

    def add(self, name: str, config: BottleneckConfig) -> None:
        """Adds an adapter: float64 beside a base that computes in float64, else float32, as PEFT's beside 16 bits."""
        dtype = torch.float64 if self.place.dtype == torch.float64 else torch.float32
        self.bottleneck[name] = Bottleneck(self.place.width, config, dtype=dtype, device=self.place.device)
        self.bottleneck[name].train(self.training)

    def remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook before the module that reads the residual stream: keeps the stream for this sublayer's adapter."""
        if self._active():
            self._residual = first_tensor(args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self._active():
            return self.base_layer(*args, **kwargs)
        if self.wraps_norm:
            normed = self.base_layer(*args, **kwargs)
            return self.base_layer(self._added(args[0], normed), *args[1:], **kwargs)
        output = self.base_layer(*args, **kwargs)
        if not isinstance(output, tuple | list):
            return self._added(output, self._input(output))
        return type(output)([self._added(output[0], self._input(output[0])), *output[1:]])

    def _added(self, value: Tensor, x: Tensor) -> Tensor:
        """``value`` plus the outputs of the active adapters for ``x``, in the dtype of ``value``."""
        for adapter in self._active():
            weights = adapter.down.weight
            value = value + adapter(self._cast_input_dtype(x, weights.dtype)).to(value.dtype)
        return value

    def _input(self, h: Tensor) -> Tensor:
        """What the adapter reads beside or after a sublayer with the output ``h``."""
        if self.style == "houlsby":
            return h
        residual, self._residual = self._residual, None
        assert residual is not None
        residual = residual.reshape(h.shape)  # OPT flattens its batch
        return residual if self.style == "parallel" else h + residual

    def _active(self) -> list[Any]:
        if self.disable_adapters:
            return []
        return [self.bottleneck[name] for name in self.active_adapters if name in self.bottleneck]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        refuse_merge()

    def __getattr__(self, name: str) -> Any:
        """Attributes of the base layer: models read some, such as the dtype of a layer's weight."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)


def refuse_merge() -> None:
    raise ValueError(
        "a bottleneck adapter cannot be merged: a non-linearity stands between its two matrices, so no weight of the base "
        "model equals it"
    )
