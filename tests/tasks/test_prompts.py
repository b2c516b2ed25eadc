"""Adapters that put virtual tokens before each row: the loss, the scores and the answers see them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from peftlab.adapters import HeadLoss, inject
from peftlab.tasks import Example
from peftlab.tasks.lm_head import LMHead

METHODS = ["prompt_tuning", "p_tuning", "prefix_tuning", "cartridge"]
IDS = torch.arange(3, 27).reshape(2, 12)


@pytest.fixture(params=METHODS)
def prompted(request: pytest.FixtureRequest, tiny: Callable[..., Any]) -> Any:
    torch.manual_seed(0)
    base = tiny("tiny:llama", adapter=False)
    method = request.param
    more = {"num_frozen_tokens": 0} if method == "cartridge" else {}
    model = inject(base, method, peft_type="CAUSAL_LM", num_virtual_tokens=5, **more)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    return model.eval()


def test_hidden_states_give_the_logits_of_pefts_own_forward(prompted: Any) -> None:
    mask = torch.ones_like(IDS)
    mask[1, 8:] = 0
    head = LMHead(HeadLoss("reference"))
    hidden = head.hidden_states(prompted, {"input_ids": IDS, "attention_mask": mask})
    assert hidden.shape[:2] == IDS.shape
    want = prompted(input_ids=IDS, attention_mask=mask).logits[:, -IDS.shape[1] :]
    torch.testing.assert_close(head.logits(prompted, hidden.flatten(0, 1)), want.flatten(0, 1), rtol=1e-5, atol=1e-5)
    # The deliberate fault: the decoder alone, which is what a model without virtual tokens needs.
    alone = prompted.get_base_model()(input_ids=IDS, attention_mask=mask).logits
    assert float((alone - want).abs().max()) > 0.01


def test_loss_has_the_gradient_of_pefts_own_loss(prompted: Any) -> None:
    head = LMHead(HeadLoss("auto"))
    hidden = head.hidden_states(prompted, {"input_ids": IDS})[:, :-1]
    loss = head.cross_entropy_sum(prompted, hidden.flatten(0, 1), IDS[:, 1:].flatten())
    trained = [p for p in prompted.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, trained)
    logits = prompted(input_ids=IDS).logits[:, -IDS.shape[1] :][:, :-1]
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-4)
    for got, wanted in zip(gradients, torch.autograd.grad(want, trained), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
        assert wanted.any()


def test_model_without_its_virtual_tokens_is_the_base(prompted: Any) -> None:
    head = LMHead(HeadLoss("reference"))
    with prompted.disable_adapter():
        off = head.hidden_states(prompted, {"input_ids": IDS})
    want = prompted.get_base_model().model(input_ids=IDS)[0]
    torch.testing.assert_close(off, want, rtol=1e-5, atol=1e-5)


def test_invocation_tokens_switch_alora_on(tiny: Callable[..., Any]) -> None:
    base = tiny("tiny:llama", adapter=False)
    model = inject(base, "lora", peft_type="CAUSAL_LM", rank=4, alpha=8, alora_invocation_tokens=[7])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    head = LMHead(HeadLoss("auto"))
    hidden = head.hidden_states(model.eval(), {"input_ids": IDS[:1]})
    plain = base.model(input_ids=IDS[:1])[0]
    at = int((IDS[0] == 7).nonzero())
    torch.testing.assert_close(hidden[:, :at], plain[:, :at])
    assert float((hidden[:, at:] - plain[:, at:]).abs().max()) > 0.01


def test_row_alone_and_in_a_batch_get_the_same_hidden_states(prompted: Any) -> None:
    from peftlab.tasks.batch import collate

    examples = [Example(np.arange(3, 3 + n), i, 1.0) for i, n in enumerate((12, 5, 9))]
    head = LMHead(HeadLoss("reference"))
    together = head.hidden_states(prompted, collate(examples, pad_id=0, device="cpu").inputs)
    for i, example in enumerate(examples):
        alone = head.hidden_states(prompted, collate([example], pad_id=0, device="cpu").inputs)
        torch.testing.assert_close(together[i, : len(example)], alone[0], rtol=1e-4, atol=1e-5)
