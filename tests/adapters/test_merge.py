"""The figures that verify a merge, checked with PEFT's own merge and with wrong merges."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from peftlab.adapters.merge import DequantizedWeights, agreement, exact_updates, expected_weight, weight_error

OPTIONS = [
    pytest.param({}, id="lora"),
    pytest.param({"rslora": True}, id="rslora"),
    pytest.param({"dora": True}, id="dora"),
    pytest.param({"targets": ["q_proj", "lm_head"]}, id="head"),
    pytest.param({"targets": ["q_proj", "embed_tokens"]}, id="embedding"),
]


def weights(model: Any, names: Any) -> dict[str, Any]:
    modules = dict(model.named_modules())
    return {n: modules[n].weight.detach().clone() for n in names}


def merged(tiny: Callable[..., Any], **options: Any) -> tuple[Any, Any, Any]:
    """Weights before, weights as PEFT merges them, and the updates read from the adapter."""
    model = tiny("tiny:llama", **options)
    updates = exact_updates(model)
    base = weights(tiny("tiny:llama", adapter=False), updates)
    return base, weights(model.merge_and_unload(), updates), updates


@pytest.mark.parametrize("options", OPTIONS)
def test_weight_error_of_pefts_merge_is_zero(tiny: Callable[..., Any], options: Any) -> None:
    base, after, updates = merged(tiny, **options)
    error = weight_error(base, after, updates)
    assert error.max_error < 1e-6
    assert error.relative < 1e-5
    assert error.num_modules == len(updates) > 0


def test_exact_updates_cover_every_adapted_module(tiny: Callable[..., Any]) -> None:
    for name, options in (("tiny:llama", {}), ("tiny:bert", {"targets": ["query", "word_embeddings"]})):
        model = tiny(name, **options)
        from peft.tuners.tuners_utils import BaseTunerLayer

        adapted = {n for n, m in model.get_base_model().named_modules() if isinstance(m, BaseTunerLayer)}
        assert set(exact_updates(model)) == adapted


def _lost(base: Any, after: Any, updates: Any) -> Any:
    return base


def _dropped_scaling(base: Any, after: Any, updates: Any) -> Any:
    return {n: base[n] + updates[n]["B"] @ updates[n]["A"] for n in base}


def _twice(base: Any, after: Any, updates: Any) -> Any:
    return {n: after[n] + (after[n] - base[n]) for n in base}


def _one_module_lost(base: Any, after: Any, updates: Any) -> Any:
    first = sorted(base)[0]
    return {**after, first: base[first]}


@pytest.mark.parametrize(
    ("fault", "relative"), [(_lost, 1.0), (_dropped_scaling, 0.5), (_twice, 1.0), (_one_module_lost, None)]
)
def test_weight_error_catches_wrong_merges(tiny: Callable[..., Any], fault: Any, relative: float | None) -> None:
    base, after, updates = merged(tiny)
    assert {float(u["scaling"]) for u in updates.values()} == {2.0}
    error = weight_error(base, fault(base, after, updates), updates)
    assert error.relative > 0.01
    if relative is not None:
        assert error.relative == pytest.approx(relative, rel=1e-4)


def test_expected_weight_of_dora_equals_the_values_by_hand() -> None:
    w, a, b = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0], [0.0]])
    update = {"A": a, "B": b, "scaling": torch.tensor(2.0, dtype=torch.float64)}
    assert expected_weight(w, update).tolist() == [[3.0, 4.0], [0.0, 2.0]]
    scaled = expected_weight(w, update | {"magnitude": torch.tensor([10.0, 1.0])})
    assert scaled.tolist() == [[6.0, 8.0], [0.0, 1.0]]


def test_agreement_of_equal_logits_is_perfect() -> None:
    logits = [torch.randn(3, 5), torch.randn(2, 5)]
    same = agreement(logits, [x + 7.0 for x in logits])
    assert same.kl_max < 1e-6 and same.top1 == 1.0 and same.num_positions == 5


def test_agreement_equals_the_kl_by_hand() -> None:
    p, q = torch.tensor([[0.75, 0.25]]), torch.tensor([[0.5, 0.5]])
    got = agreement([p.log()], [q.log()])
    assert got.kl_mean == got.kl_max == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_agreement_catches_swapped_logits() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(40, 9) * 3, torch.randn(40, 9) * 3
    swapped = agreement([a, b], [b, a])
    assert swapped.kl_mean > 1 and swapped.top1 < 0.5
    assert agreement([a], [a.flip(-1)]).top1 < 0.5


def test_agreement_catches_infinities() -> None:
    """A broken head must not pass as agreement because of a NaN."""
    a = torch.randn(4, 5)
    broken = a.clone()
    broken[0, 0] = float("nan")
    assert not agreement([a], [broken]).kl_mean <= 1e9


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_dequantized_weights_are_those_the_forward_uses(tiny: Callable[..., Any], quantize: str) -> None:
    plain = dict(tiny("tiny:llama", adapter=False).named_modules())
    model = tiny("tiny:llama", adapter=False, quantize=quantize)
    dequantized = DequantizedWeights(model)
    assert len(dequantized) == 14 and "lm_head" not in dequantized
    for name, weight in dequantized.items():
        module = dict(model.named_modules())[name]
        original = plain[name].weight.detach()
        assert weight.shape == original.shape
        assert 0 < float((weight - original).norm() / original.norm()) < (0.2 if quantize == "nf4" else 0.02)
        columns = module(torch.eye(weight.shape[1]))
        tolerance = 1e-5 if quantize == "nf4" else 0.02 * float(weight.abs().max())
        torch.testing.assert_close(columns.T, weight, rtol=0, atol=tolerance)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_dequantized_weights_have_the_same_names_with_an_adapter(tiny: Callable[..., Any], quantize: str) -> None:
    adapted = DequantizedWeights(tiny("tiny:llama", quantize=quantize).get_base_model())
    bare = DequantizedWeights(tiny("tiny:llama", adapter=False, quantize=quantize))
    assert adapted.keys() == bare.keys()
    assert all(torch.equal(adapted[n], bare[n]) for n in bare)
