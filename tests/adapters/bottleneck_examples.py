"""Tiny models with bottlenecks, for the tests of bottleneck adapters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftlab.adapters.bottleneck import BottleneckConfig, add_bottlenecks
from tests.family_examples import CLASSIFIERS, READERS_OF_IMAGES, WRITERS, make_config, make_model


def make(family: str, **values: Any) -> Any:
    """A tiny random classifier of a family, or the language model of one that has no classifier."""
    if family in READERS_OF_IMAGES:
        return make_model(make_config(family, READERS_OF_IMAGES, **values), "AutoModelForImageClassification")
    start = {"decoder_start_token_id": 0} if family == "T5Config" else {}
    known = CLASSIFIERS if family in CLASSIFIERS else WRITERS
    auto_class = "AutoModelForSequenceClassification" if family in CLASSIFIERS else "AutoModelForCausalLM"
    config = make_config(family, known, **start, **values)
    if family in CLASSIFIERS and config.pad_token_id is None:
        config.pad_token_id = 0
    return make_model(config, auto_class)


def inputs_of(model: Any) -> dict[str, Tensor]:
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))}
    ids = torch.arange(20).view(2, 10) + 3
    if model.config.is_encoder_decoder:
        ids[:, -1] = model.config.eos_token_id  # their heads read there
    return {"input_ids": ids}


def logits(model: Any, **changed: Any) -> Tensor:
    inputs = inputs_of(model) | changed
    with torch.no_grad():
        return model(**inputs).logits


def filled(model: Any, seed: int = 0) -> Any:
    """The model with random numbers in its trained parameters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def config_of(style: Any, **options: Any) -> BottleneckConfig:
    return BottleneckConfig(style, **{"reduction_factor": 4, "non_linearity": "swish", **options})


def adapted(family: str = "BertConfig", style: str = "houlsby", **options: Any) -> Any:
    return filled(add_bottlenecks(make(family), config_of(style, **options)))
