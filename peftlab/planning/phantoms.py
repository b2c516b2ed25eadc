"""Models whose weights have a shape, a dtype and a device, and take no memory: every element is the same four bytes.

They are built by transformers, bitsandbytes and PEFT, as real ones are, so that their layers are of the real classes. Only
``Rehearsal`` can run them.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from peftlab.models import Pretrained, import_bitsandbytes, load_skeleton, quiet
from peftlab.models.load import quantization_of

_BLOCK, _NESTED_BLOCK = 64, 256  # bitsandbytes' values per scale of NF4, and scales per scale of the scales


def phantom(shape: Any, dtype: torch.dtype) -> Tensor:
    """A CPU tensor of ``shape`` on one element of memory."""
    return torch.zeros(1, dtype=dtype).expand(shape) if len(shape) else torch.zeros((), dtype=dtype)


def is_phantom(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size()


class Building(TorchDispatchMode):
    """While active, new floating-point tensors and results of phantoms are phantoms: PEFT then adds an adapter of any size at
    once. Writing to a phantom has no effect."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors: list[Tensor] = []
        tree_map_only(Tensor, tensors.append, (args, kwargs))
        phantoms = [t for t in tensors if is_phantom(t)]
        if phantoms and func is torch.ops.aten._local_scalar_dense.default:
            return 0.0
        written = func._schema.is_mutable
        if not phantoms and (tensors or written):
            return func(*args, **kwargs)
        if written:
            return args[0]
        if tensors:
            args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (args, kwargs))
        if not tensors or "device" in kwargs:
            kwargs = {**kwargs, "device": "meta"}
        made = func(*args, **kwargs)
        if not tensors and not _is_large(made):
            return func(*args, **{**kwargs, "device": "cpu"})
        return tree_map_only(Tensor, lambda t: phantom(t.shape, t.dtype), made)


def _is_large(made: Any) -> bool:
    return isinstance(made, Tensor) and made.is_floating_point() and made.numel() > 1


def load_phantom(
    pretrained: Pretrained,
    *,
    auto_class: str,
    quantize: str,
    double_quant: bool,
    compute_dtype: torch.dtype,
    dtype: torch.dtype,
    attention: str = "auto",
    resize_token_embeddings: int | None = None,
    num_layers: int | None = None,
    **model_kwargs: Any,
) -> Any:
    """The frozen model in eval mode, without weights. Arguments: as ``models.load_model``, with dtypes resolved; num_layers: keep only
    the first layers of a model with ``one_stack``."""
    if attention != "auto":
        model_kwargs["attn_implementation"] = attention
    model = load_skeleton(pretrained, auto_class=auto_class, **model_kwargs)
    if resize_token_embeddings is not None:
        with quiet(), contextlib.suppress(NotImplementedError, AttributeError), torch.device("meta"):
            model.resize_token_embeddings(resize_token_embeddings, mean_resizing=False)
    if num_layers is not None:
        stack = one_stack(model)
        assert stack is not None
        del stack[num_layers:]
        model.config.get_text_config().num_hidden_layers = num_layers
    if quantize != "none":
        _quantize(model, quantize, double_quant, compute_dtype, model_kwargs.get("num_labels", 0))
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_meta:
                continue
            if id(parameter) not in made:  # tied weights stay tied
                wanted = dtype if parameter.is_floating_point() else parameter.dtype
                made[id(parameter)] = nn.Parameter(phantom(parameter.shape, wanted), requires_grad=False)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = _buffer(buffer)
    return model.eval()


def one_stack(model: Any) -> nn.ModuleList | None:
    """The layers of a model that has one list of them, as decoders and encoders do; None for any other."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    stacks = [m for m in lists if all(isinstance(layer, GradientCheckpointingLayer) for layer in m)]
    same = len(stacks) == 1 and len({type(layer) for layer in stacks[0]}) == 1
    counted = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    return stacks[0] if same and counted == len(stacks[0]) else None


def _buffer(empty: Tensor) -> Tensor:
    """Positions and the like are read by a forward pass: they are real, and count up."""
    if not empty.is_floating_point() and empty.numel():
        width = empty.shape[-1] if empty.dim() else 1
        return torch.arange(width, dtype=empty.dtype).expand(empty.shape).clone()
    return torch.zeros(empty.shape, dtype=empty.dtype)


def _quantize(model: Any, quantize: str, double_quant: bool, compute_dtype: torch.dtype, num_labels: int) -> None:
    """Replaces the linear layers by quantized ones, as ``from_pretrained`` does."""
    from transformers.quantizers import AutoHfQuantizer

    bnb = import_bitsandbytes()
    config = quantization_of(model, quantize, double_quant, compute_dtype, num_labels)
    quantizer: Any = AutoHfQuantizer.from_config(config, pre_quantized=False)
    with quiet():
        quantizer.preprocess_model(model=model, dtype=compute_dtype, device_map={"": "cpu"})
    model.hf_quantizer = quantizer
    setattr(model, "is_loaded_in_4bit" if quantize == "nf4" else "is_loaded_in_8bit", True)
    for module in model.modules():
        if type(module) is bnb.nn.Linear4bit:
            module.weight = _nf4(module, double_quant)
            module.support_avx512bf16_for_cpu = False
            module.compute_dtype, module.compute_type_is_set = compute_dtype, True
        elif type(module) is bnb.nn.Linear8bitLt:
            module.weight = _int8(module)


def _nf4(module: Any, double_quant: bool) -> Any:
    bnb = import_bitsandbytes()
    shape = (module.out_features, module.in_features)
    blocks = math.ceil(math.prod(shape) / _BLOCK)
    scales, offset, nested = phantom([blocks], torch.float32), None, None
    if double_quant:
        scales, offset = phantom([blocks], torch.uint8), phantom([], torch.float32)
        nested = bnb.functional.QuantState(
            absmax=phantom([math.ceil(blocks / _NESTED_BLOCK)], torch.float32),
            code=phantom([256], torch.float32),
            blocksize=_NESTED_BLOCK,
            dtype=torch.float32,
        )
    state = bnb.functional.QuantState(
        absmax=scales,
        shape=torch.Size(shape),
        code=phantom([16], torch.float32),
        blocksize=_BLOCK,
        quant_type="nf4",
        dtype=module.compute_dtype or torch.float32,
        offset=offset,
        state2=nested,
    )
    packed = phantom([math.ceil(math.prod(shape) / 2), 1], torch.uint8)
    weight = bnb.nn.Params4bit(
        packed,
        quant_state=state,
        blocksize=_BLOCK,
        compress_statistics=double_quant,
        quant_type="nf4",
        bnb_quantized=True,
    )
    weight.module = module
    module.quant_state = state
    return weight


def _int8(module: Any) -> Any:
    bnb = import_bitsandbytes()
    data = phantom((module.out_features, module.in_features), torch.int8)
    return bnb.nn.Int8Params(
        data, requires_grad=False, has_fp16_weights=False, CB=data, SCB=phantom([module.out_features], torch.float32)
    )


def stored_tensors(model: Any) -> list[tuple[str, Tensor]]:
    """Every tensor that a model holds, by the name of its parameter or buffer: with the scales of quantized weights. Tensors of
    one memory appear once."""
    held: dict[int, tuple[str, Tensor]] = {}

    def add(name: str, tensor: Any) -> None:
        if isinstance(tensor, Tensor):
            held.setdefault(tensor.untyped_storage()._cdata, (name, tensor))

    for name, parameter in model.named_parameters():
        add(name, parameter)
        state = getattr(parameter, "quant_state", None)
        for part in (state, getattr(state, "state2", None)):
            for of_state in ("absmax", "code", "offset"):
                add(name, getattr(part, of_state, None))
        for of_int8 in ("CB", "SCB"):
            add(name, getattr(parameter, of_int8, None))
    for name, buffer in model.named_buffers():
        add(name, buffer)
    return list(held.values())


def tensor_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
