"""Checks a merge of an adapter into the weights, and measures its error (contract C6)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class WeightError:
    """Error of merged weights against ``W + scaling * B A`` in float64, over all adapted modules.

    Attributes:
        max_error, mean_error: absolute, in units of the weights. relative: mean error / mean |update|; 1 for a merge that
            lost its update.
    """

    max_error: float
    mean_error: float
    relative: float
    num_modules: int


@dataclass(frozen=True)
class Agreement:
    """Agreement of merged model and base + adapter on held-out positions: mean and max KL in nats, share of equal top-1."""

    kl_mean: float
    kl_max: float
    top1: float
    num_positions: int


def exact_updates(model: Any) -> dict[str, dict[str, Tensor]]:
    """For each adapted module of a ``PeftModel``, the tensors that determine its merged weight, on the CPU.

    Written from the formulas (Hu et al. 2021, section 4.1; Liu et al. 2024, equation 5 for DoRA), not from PEFT's
    merge code, so that each checks the other.
    """
    updates = {}
    base = model.get_base_model()
    for name, module in base.named_modules():
        if "default" in getattr(module, "lora_embedding_A", {}):  # W is [vocabulary, hidden]: the update is transposed
            entry = {
                "A": module.lora_embedding_B["default"].T,
                "B": module.lora_embedding_A["default"].T,
                "scaling": torch.tensor(module.scaling["default"], dtype=torch.float64),
            }
            updates[name] = {k: v.detach().cpu().clone() for k, v in entry.items()}
        elif "default" in getattr(module, "lora_A", {}):
            entry = {
                "A": module.lora_A["default"].weight,
                "B": module.lora_B["default"].weight,
                "scaling": torch.tensor(module.scaling["default"], dtype=torch.float64),
            }
            if module.use_dora.get("default"):
                entry["magnitude"] = module.lora_magnitude_vector["default"].weight
            updates[name] = {k: v.detach().cpu().clone() for k, v in entry.items()}
    return updates


def expected_weight(weight: Tensor, update: dict[str, Tensor]) -> Tensor:
    """``W + s B A`` in float64, [out, in]; with a DoRA magnitude m: ``m * (W + s B A) / ||W + s B A||_row``."""
    delta = update["scaling"] * (update["B"].double() @ update["A"].double())
    merged = weight.double() + delta
    if "magnitude" in update:
        merged = merged * (update["magnitude"].double() / merged.norm(dim=1))[:, None]
    return merged


def weight_error(
    base_weights: Mapping[str, Tensor], merged_weights: Mapping[str, Tensor], updates: dict[str, dict[str, Tensor]]
) -> WeightError | None:
    """Compares merged weights with ``expected_weight`` of the base weights; all are keyed by module name. None without
    updates, as for a method without a formula here."""
    if not updates:
        return None
    worst, total, moved, count = 0.0, 0.0, 0.0, 0
    for name, update in updates.items():
        base = base_weights[name].cpu()
        expected = expected_weight(base, update)
        difference = (merged_weights[name].cpu().double() - expected).abs()
        worst = max(worst, float(difference.max()))
        total += float(difference.sum())
        moved += float((expected - base.double()).abs().sum())
        count += difference.numel()
    return WeightError(worst, total / count, total / moved if moved else 0.0, len(updates))


def agreement(reference: list[Tensor], merged: list[Tensor]) -> Agreement:
    """KL(reference || merged) per position and top-1 agreement of two lists of [N, C] float32 logits."""
    kl, same = [], []
    for a, b in zip(reference, merged, strict=True):
        log_p, log_q = F.log_softmax(a.double(), -1), F.log_softmax(b.double(), -1)
        kl.append(F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1))
        same.append(a.argmax(-1) == b.argmax(-1))
    all_kl, all_same = torch.cat(kl), torch.cat(same)
    return Agreement(float(all_kl.mean()), float(all_kl.max()), float(all_same.float().mean()), len(all_kl))


class DequantizedWeights(Mapping[str, Tensor]):
    """The bitsandbytes linears of a model as float32 [out, in] weights on the CPU, by module name.

    Each is dequantized on access; only the quantized storage is kept, an eighth of the size.
    """

    def __init__(self, model: nn.Module) -> None:
        import bitsandbytes as bnb

        self._stored: dict[str, Callable[[], Tensor]] = {}
        for name, module in model.named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                packed = cast(bnb.nn.Params4bit, module.weight)
                read = functools.partial(bnb.functional.dequantize_4bit, packed.data, packed.quant_state)
            elif isinstance(module, bnb.nn.Linear8bitLt):
                rows = cast(bnb.nn.Int8Params, module.weight)
                scale = cast(Tensor, rows.SCB if rows.SCB is not None else module.state.SCB)
                read = functools.partial(bnb.functional.int8_vectorwise_dequant, rows.data, scale)
            else:
                continue
            self._stored[name.removesuffix(".base_layer").removeprefix("base_model.model.")] = read

    def __getitem__(self, name: str) -> Tensor:
        return self._stored[name]().float().cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)
