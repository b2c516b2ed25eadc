"""One fused layer of each storage, and what its output is compared with."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from peftlab.adapters.fused import FusedLora, register

STORAGES = ("none", "nf4", "int8")
# bitsandbytes 0.50 dequantizes rows shorter than a block of 64 wrongly on a CPU.
N, K = 96, 64


def linear(storage: str, seed: int = 0) -> Any:
    from peftlab.models.bnb import import_bitsandbytes

    torch.manual_seed(seed)
    plain = nn.Linear(K, N)
    if storage == "none":
        return plain.requires_grad_(False)
    bnb = import_bitsandbytes()
    made = {
        "nf4": lambda: bnb.nn.Linear4bit(K, N, quant_type="nf4"),
        "int8": lambda: bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False),
    }[storage]()
    made.load_state_dict(plain.state_dict())
    return made.to("cpu").requires_grad_(False)  # the move quantizes it


def fused_layer(storage: str = "none", dropout: float = 0.0) -> Any:
    """A fused layer with adapters ``default``, which is active, and ``other``."""
    from peft import LoraConfig, get_peft_model

    base = nn.Sequential()
    base.add_module("linear", linear(storage))
    config = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=dropout, init_lora_weights=False, target_modules=["linear"]
    )  # fmt: skip
    model = get_peft_model(base, register(config))
    model.add_adapter("other", config)
    layer = model.base_model.model.linear.train()
    assert isinstance(layer, FusedLora)
    return layer


def rows(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(1))
    return x.to(dtype).requires_grad_()


def run(layer: Any, x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(2)  # seeds the dropout mask
    return layer(x)


def assert_as_peft(layer: Any, x: torch.Tensor | None = None) -> torch.Tensor:
    """The layer's output, checked against PEFT's own forward on a copy of the layer."""
    x = rows() if x is None else x
    truth = copy.deepcopy(layer)
    truth.kernels = "compared" if layer.kernels == "auto" else layer.kernels
    y = run(layer, x)
    tolerance = 1e-2 if y.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(y, run(truth, x), rtol=tolerance, atol=tolerance)
    return y.detach()


def replace(layer: Any, of: str, part: nn.Module) -> None:
    getattr(layer, of)["default"] = part
