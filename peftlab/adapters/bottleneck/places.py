"""Finds where the adapters of a model belong: by what is added to the residual stream when the model runs, not by names."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peftlab.adapters.bottleneck.trace import Block, Watch
from peftlab.errors import RecipeError

_NUM_TOKENS = 8
_IMAGE_SIZE = 64  # for convolutional models, which read images of any size
_METHOD = "adapter.method"


def find_blocks(model: Any) -> list[Block]:
    """The blocks of a transformers model that attend, in the order of its modules.

    Runs the body once on a short text or an image of zeros, without gradients, in evaluation mode.

    Raises: RecipeError for a model that does not run so, or has no such block.
    """
    watch = Watch(model)
    with watch.hooked(), _evaluating(model), torch.no_grad(), watch:
        try:
            model.base_model(**_probe(model))
        except (
            RuntimeError,
            ValueError,
            TypeError,
            IndexError,
            KeyError,
            AttributeError,
            NotImplementedError,
        ) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RecipeError(
                f"{type(model).__name__} does not run on a short probe, so the places of its bottlenecks are not found: "
                f"{reason}; use another method",
                key=_METHOD,
            ) from error
    blocks = [trace.block() for trace in watch.traces.values() if trace.attends]
    if not blocks:
        raise RecipeError(
            f"bottlenecks need blocks of attention and feed-forward, and {type(model).__name__} has no list of equal blocks "
            "with attention; use another method, such as lora",
            key=_METHOD,
        )
    return blocks


def check_blocks(skeleton: Any) -> None:
    """Raises RecipeError as ``find_blocks``, for a model on the meta device. One that reads values when it runs is not judged."""
    try:
        find_blocks(skeleton)
    except RecipeError as error:
        if not isinstance(error.__cause__, RuntimeError):
            raise


def _probe(model: Any) -> dict[str, Tensor]:
    """Arguments of the model's body: eight tokens, or an image of zeros."""
    body, config = model.base_model, model.config
    if body.main_input_name == "pixel_values":
        size = getattr(config, "image_size", None) or _IMAGE_SIZE
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        channels = getattr(config, "num_channels", None) or config.backbone_config.num_channels
        return {"pixel_values": torch.zeros(1, channels, height, width, device=model.device, dtype=_floating(model))}
    if body.main_input_name != "input_ids":
        raise RecipeError(
            f"bottlenecks are for models of text and images, and {type(model).__name__} reads {body.main_input_name}; use "
            "another method, such as lora",
            key=_METHOD,
        )
    text = config.get_text_config()
    special = {
        getattr(text, f"{kind}_token_id", None) for kind in ("pad", "bos", "eos")
    }  # padding would ask for a mask
    plain = list(itertools.islice((i for i in range(text.vocab_size) if i not in special), _NUM_TOKENS))
    ids = torch.tensor([plain], device=model.device)
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})


def _floating(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
