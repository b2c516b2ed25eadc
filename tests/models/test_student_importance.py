"""Importance of layers: distances against plain formulas, layers of known importance, and costs that do not add up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from peftlab.errors import RecipeError, VerificationError
from peftlab.models.student import cosine_distance, kl_divergence, layers_by_importance
from peftlab.models.student import importance as importance_module

IDS = torch.randint(3, 97, (6, 10), generator=torch.Generator().manual_seed(0))


def _teacher(num_layers: int = 4) -> Any:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=num_layers, num_attention_heads=4,
        mlp_bias=True, initializer_range=0.2,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config).eval().requires_grad_(False)


def _outputs(model: nn.Module) -> Iterator[Tensor]:
    for ids in IDS.split(2):
        yield model(input_ids=ids).logits.flatten(0, 1)


def _silence(layer: Any) -> None:
    """Makes the layer pass on its input unchanged."""
    for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
        nn.init.zeros_(linear.weight)
    nn.init.zeros_(layer.mlp.down_proj.bias)


def test_kl_divergence_sums_over_classes_and_ignores_masked_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(3, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    by_hand = [
        sum(a * (a / b).log() for a, b in zip(x, y, strict=True))
        for x, y in zip(p.softmax(1), q.softmax(1), strict=True)
    ]
    torch.testing.assert_close(kl_divergence(p, q), torch.stack(by_hand), rtol=1e-12, atol=0)
    assert torch.equal(kl_divergence(p, p), torch.zeros(3, dtype=torch.float64))
    padding = torch.full((3, 2), -torch.inf, dtype=torch.float64)
    masked = kl_divergence(torch.cat([p, padding], 1), torch.cat([q, padding], 1))
    torch.testing.assert_close(masked, kl_divergence(p, q), rtol=1e-12, atol=0)


def test_cosine_distance_is_one_minus_the_cosine() -> None:
    a, b = torch.tensor([[1.0, 0.0], [2.0, 2.0]]), torch.tensor([[0.0, 3.0], [1.0, 1.0]])
    torch.testing.assert_close(cosine_distance(a, b), torch.tensor([1.0, 0.0]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rows", [256, 7])
def test_costs_equal_the_mean_kl_of_a_model_without_the_layer(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance_module, "_ROWS", rows)
    model = _teacher()
    reference = torch.cat(list(_outputs(model))).double().log_softmax(-1)
    importance = layers_by_importance(model, 3, outputs=_outputs)
    for layer, cost in importance.rounds[0]:
        other = _teacher()
        del other.model.layers[layer]
        other.config.num_hidden_layers = 3
        other.config.use_cache = False
        output = torch.cat(list(_outputs(other))).double().log_softmax(-1)
        expected = (reference.exp() * (reference - output)).sum(-1).mean()
        assert cost == pytest.approx(float(expected), rel=1e-4)  # float32 log-softmax of 97 classes
    assert importance.num_positions == 60 and len(importance.rounds) == 1 and importance.seconds > 0
    assert importance.distance == min(cost for _, cost in importance.rounds[0])


@pytest.mark.parametrize("search", ["greedy", "once"])
def test_layers_that_do_nothing_are_removed_first_at_no_cost(search: Any) -> None:
    model = _teacher(5)
    _silence(model.model.layers[1])
    _silence(model.model.layers[3])
    importance = layers_by_importance(model, 3, outputs=_outputs, search=search)
    assert importance.kept == (0, 2, 4) and set(importance.removed) == {1, 3}
    assert importance.distance == pytest.approx(0.0, abs=1e-9)
    assert [len(r) for r in importance.rounds] == ([5, 4] if search == "greedy" else [5])


def _redundant() -> Any:
    """Layers 1 and 2 both push every position far along one channel, and either suffices, because the last norm removes
    the length. Layers 0 and 3 do more than one of them adds to the other."""
    model = _teacher(4)
    for layer in (1, 2):
        _silence(model.model.layers[layer])
        model.model.layers[layer].mlp.down_proj.bias[0] = 20.0
    for layer in (0, 3):
        model.model.layers[layer].self_attn.o_proj.weight.mul_(3.0)
        model.model.layers[layer].mlp.down_proj.weight.mul_(3.0)
    return model


def test_greedy_search_keeps_one_of_two_redundant_layers() -> None:
    model = _redundant()
    once = layers_by_importance(model, 2, outputs=_outputs, search="once")
    greedy = layers_by_importance(model, 2, outputs=_outputs, search="greedy")
    assert set(once.removed) == {1, 2}  # each is cheap alone
    assert set(greedy.removed) != {1, 2} and greedy.removed[0] in {1, 2}
    assert greedy.distance < once.distance / 2


def test_model_is_restored_after_an_error() -> None:
    model = _teacher().train()
    before = torch.cat(list(_outputs(model)))
    calls = 0

    def failing(each: nn.Module) -> Iterator[Tensor]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("on purpose")
        yield from _outputs(each)

    with pytest.raises(RuntimeError, match="on purpose"):
        layers_by_importance(model, 2, outputs=failing)
    assert torch.equal(torch.cat(list(_outputs(model))), before)
    assert model.training and len(model.model.layers) == model.config.num_hidden_layers == 4


def test_max_positions_limits_what_is_computed() -> None:
    asked = 0

    def counting(model: nn.Module) -> Iterator[Tensor]:
        nonlocal asked
        for chunk in _outputs(model):
            asked += 1
            yield chunk

    importance = layers_by_importance(_teacher(), 3, outputs=counting, max_positions=25)
    assert importance.num_positions == 25
    assert asked == 2 * (1 + 4)  # two of the three chunks, for the reference and for each of four layers


def test_embeddings_are_compared_by_cosine_distance() -> None:
    torch.manual_seed(0)
    config = tf.BertConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4
    )
    model = tf.BertModel(config).eval()

    def pooled(each: nn.Module) -> Iterator[Tensor]:
        yield each(input_ids=IDS)[0].mean(1)

    importance = layers_by_importance(model, 2, outputs=pooled, distance=cosine_distance)
    assert len(importance.kept) == 2 and 0.0 < importance.distance < 2.0 and importance.num_positions == 6


def test_layer_bound_to_its_place_is_never_removed() -> None:
    torch.manual_seed(0)
    config = tf.ModernBertConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
    )  # fmt: skip
    model = tf.ModernBertForMaskedLM(config).eval()
    importance = layers_by_importance(model, 1, outputs=_outputs)
    assert importance.kept == (0,) and all(0 not in dict(round_) for round_ in importance.rounds)
    scaled = tf.GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=2)
    scaled.scale_attn_by_inverse_layer_idx = True
    gpt2 = tf.GPT2LMHeadModel(scaled).eval()  # only its last layers can go
    assert layers_by_importance(gpt2, 1, outputs=_outputs).removed == (2, 1)
    with pytest.raises(RecipeError, match="cannot be cut to 1 layers by importance"):
        layers_by_importance(gpt2, 1, outputs=_outputs, search="once")


def test_nan_outputs_of_the_teacher_are_an_error() -> None:
    model = _teacher()
    model.lm_head.weight[3] = torch.nan
    with pytest.raises(VerificationError, match="are NaN on the sample"):
        layers_by_importance(model, 3, outputs=_outputs)
