"""The configuration of a model, and what it determines without weights: labels, modules and shapes."""

from __future__ import annotations

from typing import Any

from peftlab.models.load_errors import load_errors, quiet
from peftlab.models.pretrained import Pretrained
from peftlab.models.tiny import tiny_config


def load_config(pretrained: Pretrained, **kwargs: Any) -> Any:
    """The model's config, with ``kwargs`` set in it. Raises: RecipeError."""
    from transformers import AutoConfig

    if pretrained.source.kind == "tiny":
        return tiny_config(pretrained.source.path, **kwargs)
    with quiet(), load_errors(pretrained, "config"):
        return AutoConfig.from_pretrained(pretrained.location, **pretrained.hub_kwargs, **kwargs)


def label_names(pretrained: Pretrained) -> list[str]:
    """Class names in a classifier's config, by index; transformers' default LABEL_0, LABEL_1 if unnamed."""
    named = load_config(pretrained).id2label
    return [str(named[i]) for i in sorted(named)]


def load_skeleton(pretrained: Pretrained, *, auto_class: str, **model_kwargs: Any) -> Any:
    """The model without weights, on the meta device: its modules and shapes. Arguments and errors as ``load_model``."""
    import torch
    import transformers

    with quiet(), load_errors(pretrained, "model"), torch.device("meta"):
        options = {"trust_remote_code": True} if pretrained.trust_remote_code else {}
        return getattr(transformers, auto_class).from_config(load_config(pretrained, **model_kwargs), **options)
