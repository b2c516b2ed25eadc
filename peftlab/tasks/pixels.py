"""Pixel values of images, also of different size in one batch, each of which runs through the model without padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn


def padded_pixels(pixels: Sequence[Tensor]) -> dict[str, Tensor]:
    """``pixel_values`` [B, C, H, W] of images [C, h, w], padded at their ends, and ``pixel_mask`` [B, H, W] if one is padded."""
    height, width = (max(p.shape[axis] for p in pixels) for axis in (1, 2))
    inputs = {"pixel_values": torch.zeros(len(pixels), pixels[0].shape[0], height, width)}
    mask = torch.zeros(len(pixels), height, width, dtype=torch.int64)
    for i, one in enumerate(pixels):
        inputs["pixel_values"][i, :, : one.shape[1], : one.shape[2]] = one
        mask[i, : one.shape[1], : one.shape[2]] = 1
    return inputs if mask.all() else inputs | {"pixel_mask": mask}


def by_size(call: Callable[[Tensor], Tensor], inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """The output of ``call`` for each image, computed for the images of one size at a time, without padding, smallest first.

    Args: call: pixels [b, C, h, w] -> outputs [b, ...]. inputs: from ``padded_pixels``.
    """
    pixels, mask = inputs["pixel_values"], inputs.get("pixel_mask")
    if mask is None:
        return list(call(pixels))
    sizes = torch.stack([mask[:, :, 0].sum(1), mask[:, 0].sum(1)], 1)
    outputs: dict[int, Tensor] = {}
    for height, width in sizes.unique(dim=0).tolist():
        chosen = ((sizes[:, 0] == height) & (sizes[:, 1] == width)).nonzero()[:, 0]
        outputs |= zip(chosen.tolist(), call(pixels[chosen, :, :height, :width]), strict=True)
    return [outputs[i] for i in range(len(pixels))]


def as_weights(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pixel values in the dtype of the model's weights, which convolutions require."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return {name: value.to(dtype) for name, value in inputs.items()}
