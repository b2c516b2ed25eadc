"""What an adapter leaves out is said in one line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from peftlab.adapters import idle_towers, inject, new_modules, planned_modules, reach_notes
from peftlab.adapters.merge import fold
from peftlab.errors import RecipeError
from peftlab.specs.heads import head_modules
from tests.family_examples import AUTO_CLASSES, CLASSIFIERS, READERS_OF_IMAGES, WRITERS, make_config, make_model

PEFT_TYPES = {"causal_lm": "CAUSAL_LM", "seq_cls": "SEQ_CLS", "image_cls": None}


def family(name: str, task: str) -> Any:
    tables = {"causal_lm": WRITERS, "seq_cls": CLASSIFIERS, "image_cls": READERS_OF_IMAGES}
    return make_model(make_config(name, tables[task]), AUTO_CLASSES[task])


def notes(name: str, task: str, targets: Any = "all-linear", *, quantized: bool = False) -> list[str]:
    model = family(name, task)
    planned = planned_modules(model, peft_type=PEFT_TYPES[task], targets=targets)
    return reach_notes(model, planned, targets=targets, quantized=quantized)


@pytest.mark.parametrize(
    ("name", "task", "wanted"),
    [
        ("LlamaConfig", "causal_lm", []),
        ("GPT2Config", "causal_lm", []),
        ("RobertaConfig", "seq_cls", []),
        ("ViTConfig", "image_cls", []),
        ("MixtralConfig", "causal_lm", []),
        (
            "Qwen2MoeConfig",
            "causal_lm",
            ["routed experts are not adapted: down_proj x2, gate_up_proj x2 (24,576 of 54,112 parameters)"],
        ),
        ("MambaConfig", "causal_lm", ["all-linear leaves out out_proj x2, which PEFT cannot adapt in this family"]),
        (
            "SqueezeBertConfig",
            "seq_cls",
            [
                "the adapter reaches only dense x1; 85% of the weights in layers are elsewhere: conv1d x6, key x2, query x2, "
                "value x2 (Conv1d); name them in adapter.targets"
            ],
        ),
    ],
)
def test_reach_notes_of_families(name: str, task: str, wanted: list[str]) -> None:
    assert notes(name, task) == wanted


def test_reach_notes_of_quantized_experts() -> None:
    (note,) = notes("GraniteMoeConfig", "causal_lm", quantized=True)
    assert note.startswith("routed experts are not adapted and not quantized: ")
    (note,) = notes("MixtralConfig", "causal_lm", quantized=True)
    assert note.startswith("routed experts are not quantized: down_proj x2, gate_up_proj x2")


class Eyes(nn.Module):
    main_input_name = "pixel_values"

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(12, 32)


def test_encoders_that_text_does_not_reach_are_left_out_or_named() -> None:
    model = family("LlamaConfig", "causal_lm")
    model.model.vision_tower = Eyes()
    assert idle_towers(model) == ["model.vision_tower"]
    planned = planned_modules(model, peft_type="CAUSAL_LM", targets="all-linear")
    assert len(planned) == 14 and not any("vision" in name for name in planned)
    assert reach_notes(model, planned, targets="all-linear", quantized=False) == [
        "model.vision_tower is not adapted (1 layers): this task's text does not reach it"
    ]
    targets = ["q_proj", "patches"]
    planned = planned_modules(model, peft_type="CAUSAL_LM", targets=targets)
    (note,) = reach_notes(model, planned, targets=targets, quantized=False)
    assert note == "1 of the 3 adapted modules are in model.vision_tower, which this task's text does not reach"


@pytest.mark.parametrize("name", ["ResNetConfig", "RegNetConfig", "EfficientNetConfig"])
def test_body_without_linear_layers_has_its_ungrouped_convolutions_adapted(name: str) -> None:
    (note,) = notes(name, "image_cls")
    assert note.startswith("the body has no linear layer, so all-linear adapts its convolutions: ")
    model = family(name, "image_cls")
    head = head_modules(model)
    convolutions = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and n.split(".")[0] not in head}
    planned = planned_modules(model, peft_type=None, targets="all-linear")
    assert planned == [n for n, m in convolutions.items() if m.groups == 1]
    grouped = len(convolutions) - len(planned)
    assert (f"x{grouped} are grouped" in note) == (grouped > 0) == (name != "ResNetConfig")
    assert fold(inject(model, "lora", peft_type=None, targets="all-linear", rank=4)) is not None


def test_body_without_layers_is_refused() -> None:
    model = family("ResNetConfig", "image_cls")
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.groups = 2
    with pytest.raises(
        RecipeError, match="has no linear layer, and no convolution that PEFT can merge, outside"
    ) as info:
        planned_modules(model, peft_type=None, targets="all-linear")
    assert info.value.key == "adapter.targets"


def test_new_modules_are_the_largest_that_are_new() -> None:
    model = family("DistilBertConfig", "seq_cls")
    names = [n for n, _ in model.named_parameters()]
    assert new_modules(model, [n for n in names if "classifier" in n]) == ["classifier", "pre_classifier"]
    assert new_modules(model, ["classifier.bias"]) == ["classifier"]
    inside = [n for n in names if n.startswith("distilbert.transformer.layer.0.")]
    assert new_modules(model, inside) == ["distilbert.transformer.layer.0"]


def test_new_parameter_without_a_module_is_refused() -> None:
    model = family("LlamaConfig", "causal_lm")
    model.temperature = nn.Parameter(torch.ones(1))
    with pytest.raises(RecipeError, match=r"lack temperature, which belongs to no module"):
        new_modules(model, ["temperature"])


def test_blocks_that_the_recipe_leaves_out_are_no_news() -> None:
    model = family("LlamaConfig", "causal_lm")
    where = {"peft_type": "CAUSAL_LM", "targets": "all-linear"}
    every, planned = planned_modules(model, **where), planned_modules(model, **where, layers=[1])
    assert reach_notes(model, planned, targets="all-linear", quantized=False, everywhere=every) == []
    (note,) = reach_notes(model, planned, targets="all-linear", quantized=False, everywhere=every[1:])
    assert note.startswith("all-linear leaves out q_proj x1")


def test_head_in_a_body_of_timm_is_a_head() -> None:
    """transformers' wrapper of timm has one child, the model with its head, which timm names itself."""

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv_stem, self.classifier = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)

        def get_classifier(self) -> nn.Module:
            return self.classifier

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.timm_model = Body()

        @property
        def base_model(self) -> nn.Module:
            return self.timm_model

    assert head_modules(Wrapper()) == ["timm_model.classifier"]
