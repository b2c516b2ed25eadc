"""Folds an adapter into the weights of its model, and reads quantized weights for it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn


def fold(model: Any) -> Any:
    """The base model of a ``PeftModel`` with the adapter in its weights. Raises: what PEFT raises if it cannot merge."""
    if any(getattr(config, "layer_replication", None) for config in model.peft_config.values()):
        _unshare(model.get_base_model())
    _unwrap(model.get_base_model())
    with _full_float32():
        return model.merge_and_unload(safe_merge=True)


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """Keeps products of float32 on a GPU from using TF32, which has 10 bits; cuDNN does by default, for LoRA's convolutions."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


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
