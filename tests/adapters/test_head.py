"""The fused loss of an output head equals the loss of the head's own logits, with every kind of adapter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from peftlab import ops
from peftlab.adapters import HeadLoss, head_reason
from peftlab.adapters.fused import set_kernels
from peftlab.adapters.head import head_input
from peftlab.ops import DenseWeight, Int8Weight, NF4Weight

HEADS: dict[str, dict[str, Any]] = {
    "frozen": {"targets": ["q_proj"]},
    "adapter": {"targets": ["q_proj", "lm_head"]},
    "adapter with dropout": {"targets": ["q_proj", "lm_head"], "dropout": 0.3},
    "saved whole": {"targets": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def head_of(model: Any) -> Any:
    return model.get_base_model().get_output_embeddings()


def losses(model: Any, hidden: torch.Tensor, targets: torch.Tensor, fused: bool) -> dict[str, torch.Tensor]:
    head, hidden = head_of(model), hidden.clone().requires_grad_()
    torch.manual_seed(0)
    if fused:
        loss = HeadLoss()(head, hidden, targets, softcap=None, scale=1.0)
        assert loss is not None
    else:
        loss = F.cross_entropy(head(hidden), targets, reduction="sum")
    trained = {n: p for n, p in head.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, [hidden, *trained.values()])
    return {"loss": loss.detach(), **dict(zip(["hidden", *trained], gradients, strict=True))}


@pytest.mark.parametrize("name", HEADS)
def test_head_loss_equals_the_loss_of_the_heads_logits(tiny: Callable[..., Any], name: str) -> None:
    model = tiny("tiny:llama", dtype="float64", **HEADS[name]).train()
    config = model.get_base_model().config
    hidden = torch.randn(9, config.hidden_size, dtype=torch.float64)
    targets = torch.randint(config.vocab_size, (9,))
    fused, plain = (losses(model, hidden, targets, way) for way in (True, False))
    assert len(fused) == (2 if name == "frozen" else 3 if name == "saved whole" else 4)
    for key, want in plain.items():
        assert want.any()
        torch.testing.assert_close(fused[key], want, rtol=1e-9, atol=1e-11, msg=key)


@pytest.mark.parametrize(("storage", "kind"), [("nf4", NF4Weight), ("int8", Int8Weight)])
def test_head_input_knows_quantized_heads(storage: str, kind: type) -> None:
    from peftlab.models.bnb import import_bitsandbytes

    bnb = import_bitsandbytes()
    torch.manual_seed(0)
    plain = torch.nn.Linear(64, 96, bias=False)
    head = bnb.nn.Linear4bit(64, 96, bias=False, quant_type="nf4") if storage == "nf4" else bnb.nn.Linear8bitLt(
        64, 96, bias=False, has_fp16_weights=False
    )  # fmt: skip
    head.load_state_dict(plain.state_dict())
    head = head.to("cpu").train()
    if storage == "int8" and head.weight.CB is None and head.state.CB is None:
        head(torch.zeros(1, 64))  # bitsandbytes quantizes at the first call
    parts = head_input(head, torch.randn(5, 64))
    if parts is None:
        pytest.fail(f"a {storage} head is not known")
    assert isinstance(parts.head.weight, kind)
    hidden, targets = torch.randn(5, 64), torch.randint(96, (5,))
    loss = HeadLoss()(head, hidden, targets, softcap=None, scale=1.0)
    assert loss is not None
    want = F.cross_entropy(plain(hidden), targets, reduction="sum")  # quantization changes it by a few percent
    torch.testing.assert_close(loss, want.detach(), rtol=0.1, atol=0)


def test_head_input_has_the_dtype_of_the_modules_forward(tiny: Callable[..., Any]) -> None:
    model = tiny("tiny:llama", **HEADS["frozen"])
    head = head_of(model)
    hidden = torch.randn(3, head.weight.shape[1])
    for given in (torch.float32, torch.bfloat16):
        inside = head_input(head, hidden.to(given))
        assert inside is not None and inside.hidden.dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = head_input(head, hidden.to(given))
        assert inside is not None and inside.hidden.dtype == torch.bfloat16
    assert isinstance(inside.head.weight, DenseWeight)


def test_head_loss_reference_leaves_the_loss_to_the_modules_logits(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("tiny:llama", **HEADS["frozen"])
    hidden, targets = torch.randn(3, model.get_base_model().config.hidden_size), torch.tensor([1, 2, 3])
    monkeypatch.setattr(ops, "linear_cross_entropy", None)
    assert HeadLoss("reference")(head_of(model), hidden, targets, softcap=None, scale=1.0) is None
    with pytest.raises(TypeError):
        HeadLoss()(head_of(model), hidden, targets, softcap=None, scale=1.0)


def test_head_input_refuses_heads_that_it_does_not_cover(tiny: Callable[..., Any]) -> None:
    def known(model: Any) -> bool:
        return head_input(head_of(model), torch.randn(3, model.get_base_model().config.hidden_size)) is not None

    assert not known(tiny("tiny:llama", targets=["lm_head", "q_proj"], dora=True))
    model = tiny("tiny:llama", **HEADS["adapter"])
    assert known(model)
    set_kernels(model, "reference")
    assert not known(model), "run.kernels=reference"
    set_kernels(model, "auto")
    with model.disable_adapter():
        assert known(model)
        inside = head_input(head_of(model), torch.randn(3, model.get_base_model().config.hidden_size))
        assert inside is not None and inside.head.low_rank is None
    head_of(model).get_base_layer().register_forward_hook(lambda *_: None)
    assert not known(model)
    assert head_reason(head_of(model)) == "a hook is registered inside it"
    own = type("OwnLinear", (torch.nn.Linear,), {})(4, 8)
    assert head_reason(own) == "it is a OwnLinear that the fused loss does not know"
