"""The head on models of transformers: soft-cap, logit scale, an adapter on the head, a teacher that is the base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from peftlab.distillation import Objective, as_teacher, num_targets, select, select_targets
from peftlab.errors import RecipeError
from peftlab.ops import linear_cross_entropy
from peftlab.tasks import lm_head
from peftlab.tasks.lm_head import LMHead

V = 61
SHAPE = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


def small(family: str, *, seed: int, **options: Any) -> Any:
    from transformers import (
        CohereConfig,
        CohereForCausalLM,
        Gemma2Config,
        Gemma2ForCausalLM,
        GraniteConfig,
        GraniteForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
        RecurrentGemmaConfig,
        RecurrentGemmaForCausalLM,
    )

    kinds: dict[str, Any] = {
        "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"final_logit_softcapping": 2.0}),
        "cohere": (CohereForCausalLM, CohereConfig, {"logit_scale": 0.5}),
        "granite": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 4.0}),
        "recurrent_gemma": (RecurrentGemmaForCausalLM, RecurrentGemmaConfig, {"logits_soft_cap": 2.0}),
        "llama": (LlamaForCausalLM, LlamaConfig, {}),
    }
    model, config, own = kinds[family]
    torch.manual_seed(seed)
    return model(config(**{**SHAPE, **own, **options})).eval()


def batch() -> tuple[dict[str, Tensor], Tensor]:
    """Rows of two lengths, padded on the right, with untrained prompts."""
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(1, V, (3, 9), generator=g)
    mask = torch.arange(9) < torch.tensor([9, 6, 4])[:, None]
    trained = mask & (torch.arange(9) >= torch.tensor([5, 1, 3])[:, None])
    return {"input_ids": ids * mask, "attention_mask": mask.long()}, trained


def step_loss(
    student: Any, teacher: Any, goal: Objective, logits_of: Callable[[Any, dict[str, Tensor]], Tensor]
) -> Tensor:
    """``logits_of`` gives [B, T, V]."""
    inputs, trained = batch()
    with as_teacher(teacher):
        taught = select(logits_of(teacher, inputs), trained)
    own = select(logits_of(student, inputs), trained)
    return goal.loss_sum(own, select_targets(inputs["input_ids"], trained), taught) / num_targets(trained)


def of_the_model(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs, use_cache=False).logits.float()


def of_the_head(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    head = LMHead(linear_cross_entropy)
    hidden = head.hidden_states(model, inputs)
    return head.logits(model, hidden.flatten(0, 1)).view(*hidden.shape[:2], -1)


@pytest.mark.parametrize("teacher", ["llama", "gemma2", "cohere", "granite"])
@pytest.mark.parametrize("student", ["llama", "gemma2"])
def test_loss_of_the_head_with_soft_cap_or_logit_scale_equals_the_models(student: str, teacher: str) -> None:
    own, taught = small(student, seed=0), small(teacher, seed=1, hidden_size=24)
    goal = Objective(temperature=2.0, hard_weight=0.25)
    want = step_loss(own, taught, goal, of_the_model)
    loss = step_loss(own, taught, goal, of_the_head)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    names = [name for name, p in own.named_parameters() if p.requires_grad]
    parameters = [p for p in own.parameters() if p.requires_grad]
    for name, a, b in zip(
        names, torch.autograd.grad(loss, parameters), torch.autograd.grad(want, parameters), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)
    assert all(p.grad is None for p in taught.parameters())


@pytest.mark.parametrize("teacher", ["gemma2", "cohere", "granite"])
def test_head_without_soft_cap_or_scale_is_caught(monkeypatch: pytest.MonkeyPatch, teacher: str) -> None:
    """The value is wrong, and the head finds it before it computes a loss."""
    own, taught = small("llama", seed=0), small(teacher, seed=1)
    goal = Objective()
    want = step_loss(own, taught, goal, of_the_model)
    monkeypatch.setattr(lm_head, "logit_transform", lambda config: (None, 1.0))
    with pytest.raises(RecipeError, match="differ from the model's own"):
        step_loss(own, taught, goal, of_the_head)
    monkeypatch.setattr(LMHead, "_verify", lambda *_: None)
    assert (step_loss(own, taught, goal, of_the_head) - want).abs() > 0.05 * want


def test_soft_cap_of_recurrent_gemma_has_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (inputs, _) = small("recurrent_gemma", seed=0), batch()
    model.lm_head.weight.data *= 30  # so that the cap is felt
    want = of_the_model(model, inputs)
    torch.testing.assert_close(of_the_head(model, inputs), want, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(lm_head, "logit_transform", lambda config: (None, 1.0))
    with pytest.raises(RecipeError, match="differ from the model's own"):
        of_the_head(model, inputs)


def test_head_with_an_adapter_uses_it() -> None:
    from peft import LoraConfig, get_peft_model

    taught = small("llama", seed=1)
    own = get_peft_model(
        small("llama", seed=0, tie_word_embeddings=False),
        LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False),
    )
    goal = Objective()
    want = step_loss(own, taught, goal, of_the_model)
    loss = step_loss(own, taught, goal, of_the_head)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for name, p in own.named_parameters() if "lora_" in name)

    def without_adapter(model: Any, inputs: dict[str, Tensor]) -> Tensor:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        head = base.get_output_embeddings()
        return base.model(**inputs, use_cache=False)[0] @ getattr(head, "base_layer", head).weight.T

    assert (step_loss(own, taught, goal, without_adapter) - want).abs() > 0.01 * want


def test_teacher_that_is_the_base_of_the_student_has_no_dropout_or_adapter() -> None:
    """One set of weights has both roles in turn. The teacher has dropout and adapter off, the student has both on."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        small("llama", seed=0), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5)
    ).train()
    inputs, trained = batch()
    with model.disable_adapter(), as_teacher(model):
        taught = select(of_the_model(model, inputs), trained)
    assert model.training and not taught.requires_grad
    own = select(of_the_model(model, inputs), trained)
    loss = Objective().loss_sum(own, None, taught)
    assert float(loss.detach()) == pytest.approx(0.0, abs=1e-4), "B = 0: the student starts as the teacher"
    loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, _ in model.named_parameters() if "lora_" in name
    }


def test_layers_before_the_head_are_part_of_the_model() -> None:
    """ModernBERT's decoder has a dense layer and a norm between its body and its output layer."""
    from transformers import ModernBertDecoderConfig, ModernBertDecoderForCausalLM

    torch.manual_seed(0)
    shape = {name: value for name, value in SHAPE.items() if name not in ("num_key_value_heads", "head_dim")}
    own = ModernBertDecoderForCausalLM(
        ModernBertDecoderConfig(**{**shape, "bos_token_id": 1, "eos_token_id": 2})
    ).eval()
    goal, taught = Objective(), small("llama", seed=1)
    want = step_loss(own, taught, goal, of_the_model)
    loss = step_loss(own, taught, goal, of_the_head)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    parameters = [p for p in own.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(x, parameters, allow_unused=True) for x in (loss, want))
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
