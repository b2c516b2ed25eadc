"""Image processors: turn images into pixel values as a model's files specify."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from peftlab.errors import RecipeError
from peftlab.models.config import load_config
from peftlab.models.load_errors import load_errors, quiet
from peftlab.models.pretrained import Pretrained

# Patch size for models without patches, such as convolutional networks; used only to batch images.
_PATCH = 16


class ImageReader:
    """Pixel values [B, C, H, W] float32 of PIL images, as from the model's ``AutoImageProcessor``.

    Attributes:
        mode: PIL's name for the colours the model sees, RGB or L. shape: [C, H, W] that an image of 64 x 48 pixels becomes.
        length: its positions in the model.
    """

    def __init__(self, processor: Any, *, channels: int, patch: int) -> None:
        import PIL.Image

        self._processor = processor
        self.mode = "L" if channels == 1 else "RGB"
        self.shape = tuple(self([PIL.Image.new(self.mode, (64, 48))]).shape[1:])
        *_, height, width = self.shape
        self.length = math.ceil(height / patch) * math.ceil(width / patch) + 1

    def __call__(self, images: Sequence[Any]) -> Any:
        return self._processor(images=list(images), return_tensors="pt")["pixel_values"]

    @property
    def fingerprint(self) -> str:
        """sha256 over all settings that affect pixel values."""
        settings = {k: v for k, v in self._processor.to_dict().items() if not k.startswith("_") and "type" not in k}
        return hashlib.sha256(json.dumps([self.mode, settings], sort_keys=True, default=str).encode()).hexdigest()

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``preprocessor_config.json``, which ``AutoImageProcessor`` loads."""
        self._processor.save_pretrained(folder)


def load_image_reader(pretrained: Pretrained) -> ImageReader:
    """The image processor of a model. Raises: RecipeError if it has none."""
    config = load_config(pretrained)
    patch = getattr(config, "patch_size", None) or _PATCH
    patch = patch if isinstance(patch, int) else max(patch)
    channels = getattr(config, "num_channels", 3)
    if pretrained.source.kind == "tiny":
        if getattr(config, "image_size", None) is None:
            raise RecipeError(f"{pretrained.source.name} reads texts; tiny:vit reads images", key="model.name")
        size = config.image_size
        side = size if isinstance(size, int) else size[0]
        return ImageReader(tiny_image_processor(side, channels), channels=channels, patch=patch)
    from transformers import AutoImageProcessor

    with quiet(), load_errors(pretrained, "image processor"):
        processor = AutoImageProcessor.from_pretrained(pretrained.location, **pretrained.hub_kwargs)
        return ImageReader(processor, channels=channels, patch=patch)


def tiny_image_processor(side: int = 8, channels: int = 1) -> Any:
    """The image processor of ``tiny:vit``: 8 x 8 pixels, or of ``tiny:yolos`` with 64 x 64, from -1 to 1."""
    with quiet():
        from transformers import ViTImageProcessor

        half = [0.5] * channels
        return ViTImageProcessor(size={"height": side, "width": side}, image_mean=half, image_std=half)


def runs_on_zeros(model: Any, shape: Sequence[int]) -> Callable[[], None]:
    """A forward pass of a model on the meta device over one image [C, H, W], for counters and hooks of the caller."""
    import torch

    def run(model: Any, device: str) -> None:
        with torch.no_grad():
            model(pixel_values=torch.zeros(1, *shape, device=device))

    # Frozen: under no_grad, PyTorch's counter does not take a trained parameter as the input of a layer (Deformable DETR).
    model = copy.deepcopy(model).eval().requires_grad_(False)
    try:
        run(model, "meta")
        return functools.partial(run, model, "meta")
    except RuntimeError:  # its forward pass reads values: DETR looks for padding
        model = model.to_empty(device="cpu")
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.detach().zero_()
        return functools.partial(run, model, "cpu")


def reads_grids(model: Any, shape: Sequence[int]) -> bool:
    """Whether a linear layer of a model on the meta device reads more than [B, T, features], as in Swin v2 and ConvNeXt."""
    from torch import nn

    found: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args: found.add(args[0].dim()))
    runs_on_zeros(model, shape)()
    return max(found, default=0) > 3
