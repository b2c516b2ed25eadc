"""Cutting widths: exact if the removed part is zero, chosen by plain formulas, refused if impossible."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from peftlab.errors import RecipeError
from peftlab.models.student import cut_width, kl_divergence
from peftlab.models.student import width as width_module
from peftlab.models.student.activations import Observer, Total, magnitude

IDS = torch.randint(3, 97, (6, 10), generator=torch.Generator().manual_seed(0))
SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DECODERS: dict[str, tuple[Any, Any]] = {
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig),
    "mistral": (tf.MistralForCausalLM, tf.MistralConfig),
    "qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config),
}
ENCODERS = {
    f"{family}{task}": (getattr(tf, f"{family}{task}"), getattr(tf, f"{family}Config"))
    for family in ("Bert", "Roberta")
    for task in ("Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "ForMaskedLM")
}
ENCODERS["XLMRobertaForMaskedLM"] = (tf.XLMRobertaForMaskedLM, tf.XLMRobertaConfig)
ENCODERS["CamembertForSequenceClassification"] = (tf.CamembertForSequenceClassification, tf.CamembertConfig)
ENCODERS["BertForPreTraining"] = (tf.BertForPreTraining, tf.BertConfig)
# Rounding in float64 of a few hundred operations on values up to 100.
EXACT = {"rtol": 1e-9, "atol": 1e-10}
# transformers' RMSNorm computes in float32, also in a float64 model: 2^-24 of logits near 10, through a few norms.
EXACT_RMS = {"rtol": 0.0, "atol": 1e-5}


def _sample(model: nn.Module) -> Iterator[Tensor]:
    yield model(input_ids=IDS)[0].flatten(0, 1)


@torch.no_grad()
def _output(model: Any) -> Tensor:
    return model(input_ids=IDS)[0]


def _make(model_class: Any, config_class: Any, **options: Any) -> Any:
    """Random weights in float64, including norms and biases."""
    options = {**SIZES, "initializer_range": 0.2, **options}
    torch.manual_seed(0)
    model = model_class(config_class(**options)).double().eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.normal_(1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0, 0.3)
    model.tie_weights()
    return model


def _decoder(name: str = "llama", **options: Any) -> Any:
    # Qwen2's config has no entry for the size of a head: a cut has to add one.
    options = {"num_key_value_heads": 2, "tie_word_embeddings": False, **options}
    if name == "qwen3":
        options["head_dim"] = 8
    return _make(*DECODERS[name], **options)


def _silence_channels(model: Any, gone: Tensor) -> None:
    """Removes every write to the channels ``gone`` of the residual stream."""
    model.model.embed_tokens.weight[:, gone] = 0.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[gone] = 0.0
        layer.mlp.down_proj.weight[gone] = 0.0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", DECODERS)
def test_silent_channels_of_a_decoder_can_be_cut_exactly(name: str, tied: bool) -> None:
    # Qwen3's head norms share their epsilon with the others: it must be far below the variance.
    model = _decoder(name, tie_word_embeddings=tied, rms_norm_eps=1e-12 if name == "qwen3" else 1e-2)
    _silence_channels(model, torch.arange(1, 32, 4))
    whole = _output(model)
    report = cut_width(model, hidden_size=24, sample=_sample)
    torch.testing.assert_close(_output(model), whole, **EXACT_RMS)
    assert report.kept_share == {"hidden_size": pytest.approx(1.0)}
    assert model.model.embed_tokens.weight.shape == (97, 24)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("fault", ["old scale", "old epsilon"])
def test_norms_that_are_not_rescaled_change_the_output(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deliberate faults for the test above."""
    model = _decoder(rms_norm_eps=1e-2)
    _silence_channels(model, torch.arange(1, 32, 4))
    whole = _output(model)
    if fault == "old scale":
        monkeypatch.setattr(width_module, "_scale_norms", lambda *_: None)
    cut_width(model, hidden_size=24, sample=_sample)
    if fault == "old epsilon":
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon = 1e-2
    assert float((_output(model) - whole).abs().max()) > 1e-3 * float(whole.abs().max())


@pytest.mark.parametrize("name", DECODERS)
def test_silent_neurons_and_groups_of_heads_can_be_cut_exactly(name: str) -> None:
    model = _decoder(name)
    for number, layer in enumerate(model.model.layers):
        layer.mlp.up_proj.weight[number::3] = 0.0
        layer.self_attn.v_proj.weight[8 * number : 8 * number + 8] = 0.0  # one key/value head, two query heads
        if layer.self_attn.v_proj.bias is not None:
            layer.self_attn.v_proj.bias[8 * number : 8 * number + 8] = 0.0
    whole = _output(model)
    report = cut_width(model, intermediate_size=32, num_key_value_heads=1, sample=_sample)
    torch.testing.assert_close(_output(model), whole, **EXACT_RMS)
    assert report.heads == ((2, 3), (0, 1))
    assert (report.after.num_heads, report.after.num_key_value_heads, report.after.head_dim) == (2, 1, 8)


def test_unread_head_of_a_group_can_be_cut_exactly() -> None:
    """Each group keeps its louder head. A trial cut finds it; then the readers of the others are silenced."""
    trial = _decoder(num_hidden_layers=1)
    (kept,) = cut_width(trial, num_heads=2, sample=_sample).heads or ()
    assert kept[0] in (0, 1) and kept[1] in (2, 3)
    model = _decoder(num_hidden_layers=1)
    for head in set(range(4)) - set(kept):
        model.model.layers[0].self_attn.o_proj.weight[:, 8 * head : 8 * head + 8] = 0.0
    whole = _output(model)
    cut_width(model, num_heads=2, sample=_sample)
    torch.testing.assert_close(_output(model), whole, **EXACT_RMS)


def _silence_encoder(model: Any, gone: Tensor, head: int) -> None:
    """Keeps the channels ``gone`` at zero and the mean of the others as well, so that every LayerNorm gives the same
    without them."""
    kept = torch.tensor([i for i in range(32) if i not in gone.tolist()])

    def write_centred(weight: Tensor, dim: int) -> None:
        rows = weight.movedim(dim, 0)
        rows[gone] = 0.0
        rows[kept] -= rows[kept].mean(0)

    base = model.base_model
    for module in base.embeddings.modules():
        if isinstance(module, nn.Embedding):
            write_centred(module.weight, 1)
    norms = [base.embeddings.LayerNorm]
    for layer in base.encoder.layer:
        rows = slice(8 * head, 8 * head + 8)
        layer.attention.self.value.weight[rows] = 0.0
        layer.attention.self.value.bias[rows] = 0.0
        for block in (layer.attention.output, layer.output):
            write_centred(block.dense.weight, 0)
            write_centred(block.dense.bias, 0)
            norms.append(block.LayerNorm)
    for norm in norms:
        norm.weight.fill_(0.7)
        norm.weight[gone] = 0.0
        write_centred(norm.bias, 0)


@pytest.mark.parametrize("name", ["BertModel", "RobertaForTokenClassification", "BertForQuestionAnswering"])
def test_silent_channels_and_heads_of_an_encoder_can_be_cut_exactly(name: str) -> None:
    model = _make(*ENCODERS[name], layer_norm_eps=1e-2)
    gone = torch.arange(2, 32, 4)
    _silence_encoder(model, gone, head=1)
    whole = _output(model)
    report = cut_width(model, hidden_size=24, num_heads=3, sample=_sample)
    assert report.heads == ((0, 2, 3), (0, 2, 3))
    if name == "BertModel":
        whole = whole[..., [i for i in range(32) if i not in gone.tolist()]]
    torch.testing.assert_close(_output(model), whole, **EXACT)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "RobertaForSequenceClassification"])
def test_pooler_keeps_its_own_largest_outputs(name: str) -> None:
    """The pooler's channels are not the hidden ones. It removes its own silent channels, whatever their numbers are in
    the residual stream."""
    model = _make(*ENCODERS[name], layer_norm_eps=1e-2)
    _silence_encoder(model, torch.arange(2, 32, 4), head=1)
    dense = model.bert.pooler.dense if name.startswith("Bert") else model.classifier.dense
    dense.weight[:8], dense.bias[:8] = 0.0, 0.0
    whole = _output(model)
    cut_width(model, hidden_size=24, num_heads=3, sample=_sample)
    torch.testing.assert_close(_output(model), whole, **EXACT)


CUTS: list[dict[str, int]] = [
    {"hidden_size": 24},
    {"num_heads": 2},
    {"num_key_value_heads": 1},
    {"intermediate_size": 20},
    {"hidden_size": 16, "num_heads": 2, "num_key_value_heads": 1, "intermediate_size": 9},
]


@pytest.mark.parametrize(
    ("name", "cut"),
    [(name, cut) for name in DECODERS for cut in CUTS]
    + [(name, {"hidden_size": 16, "num_heads": 2, "intermediate_size": 30}) for name in ENCODERS],
    ids=str,
)
def test_narrow_model_reloads_and_learns_the_same(name: str, cut: dict[str, int], tmp_path: Path) -> None:
    model = _decoder(name, tie_word_embeddings=True) if name in DECODERS else _make(*ENCODERS[name])
    report = cut_width(model, **cut, sample=_sample)
    assert {k: getattr(report.after, k) for k in cut} == cut
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    parameters, others = dict(model.named_parameters()), dict(again.named_parameters())
    assert parameters.keys() == others.keys()
    assert all(torch.equal(p, others[n]) for n, p in parameters.items())
    for each in (model.requires_grad_(True), again):
        each(input_ids=IDS)[0].square().sum().backward()
    # The same numbers at another address; some processors' libraries then add them in another order.
    torch.testing.assert_close(_output(again), _output(model), **EXACT)
    for name, parameter in parameters.items():
        torch.testing.assert_close(
            others[name].grad, parameter.grad, **EXACT, msg=lambda message, n=name: f"{n}: {message}"
        )


@pytest.mark.parametrize("name", ["llama", "BertForMaskedLM"])
def test_cut_width_to_the_same_sizes_changes_nothing(name: str) -> None:
    model = _decoder(name) if name in DECODERS else _make(*ENCODERS[name])
    whole = _output(model)
    report = cut_width(model, hidden_size=32, num_heads=4, intermediate_size=48, sample=_sample)
    assert torch.equal(_output(model), whole)
    assert report.before == report.after and report.kept_share == {} and report.heads is None


def _by_hand(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Importance of the hidden channels, and of layer 0's neurons and heads, from the formulas on the true hidden states."""
    with torch.no_grad():
        states = model(input_ids=IDS, output_hidden_states=True, output_attentions=True)
    layer, first = model.model.layers[0], states.hidden_states[0]

    def norm(x: Tensor, module: Any) -> Tensor:
        return module.weight * x / (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt()

    inner = norm(first, layer.input_layernorm)
    values = layer.self_attn.v_proj(inner).view(6, 10, 2, 8).repeat_interleave(2, dim=2)
    heads = torch.einsum("bhqk,bkhd->bqhd", states.attentions[0], values)
    attended = first + layer.self_attn.o_proj(heads.flatten(2))
    into_mlp = norm(attended, layer.post_attention_layernorm)
    neurons = nn.functional.silu(layer.mlp.gate_proj(into_mlp)) * layer.mlp.up_proj(into_mlp)
    after = attended + layer.mlp.down_proj(neurons)
    outputs = (inner, into_mlp, norm(after, model.model.norm))
    channels = torch.stack([y.abs().mean((0, 1)) for y in outputs]).sum(0)
    return channels, neurons.abs().mean((0, 1)), heads.norm(dim=-1).mean((0, 1))


def test_cut_width_keeps_the_largest_by_the_formulas() -> None:
    model = _decoder(num_hidden_layers=1, attn_implementation="eager")
    channels, neurons, heads = _by_hand(model)
    layer = model.model.layers[0]
    embedding, gate, query = (
        m.weight.clone() for m in (model.model.embed_tokens, layer.mlp.gate_proj, layer.self_attn.q_proj)
    )
    report = cut_width(model, hidden_size=24, num_heads=2, intermediate_size=20, sample=_sample)
    kept = channels.topk(24).indices.sort().values
    assert torch.equal(model.model.embed_tokens.weight, embedding[:, kept])
    best = neurons.topk(20).indices.sort().values
    assert torch.equal(layer.mlp.gate_proj.weight, gate[best][:, kept])
    chosen = [int(heads[:2].argmax()), 2 + int(heads[2:].argmax())]
    assert report.heads == (tuple(chosen),)
    rows = torch.cat([torch.arange(8 * h, 8 * h + 8) for h in chosen])
    assert torch.equal(layer.self_attn.q_proj.weight, query[rows][:, kept])
    assert report.kept_share["hidden_size"] == pytest.approx(float(channels[kept].sum() / channels.sum()), rel=1e-6)
    assert report.kept_share["intermediate_size"] == pytest.approx(float(neurons[best].sum() / neurons.sum()), rel=1e-6)
    assert report.num_positions == 60


def _uneven() -> Any:
    """A decoder whose channels, heads and neurons differ in size by factors of up to twenty, as in trained models."""
    model = _decoder()
    generator = torch.Generator().manual_seed(3)

    def spread(count: int) -> Tensor:
        return (torch.rand(count, generator=generator, dtype=torch.float64) * 3 - 3).exp()

    channels = spread(32)
    model.model.embed_tokens.weight.mul_(channels)
    for layer in model.model.layers:
        layer.mlp.up_proj.weight.mul_(spread(48)[:, None])
        layer.self_attn.v_proj.weight.mul_(spread(2).repeat_interleave(8)[:, None])
        layer.self_attn.o_proj.weight.mul_(channels[:, None])
        layer.mlp.down_proj.weight.mul_(channels[:, None])
    return model


def _damage(cut: dict[str, int]) -> float:
    model = _uneven()
    whole = _output(model).flatten(0, 1)
    cut_width(model, **cut, sample=_sample)
    return float(kl_divergence(whole, _output(model).flatten(0, 1)).mean())


@pytest.mark.parametrize("cut", [{"hidden_size": 24}, {"num_key_value_heads": 1}, {"intermediate_size": 24}], ids=str)
def test_cut_width_of_the_largest_hurts_more_than_of_the_smallest(
    cut: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet_gone = _damage(cut)
    best, loudest_heads = width_module.largest, width_module.largest_heads
    monkeypatch.setattr(width_module, "largest", lambda scores, count: best(-scores, count))
    monkeypatch.setattr(width_module, "largest_heads", lambda scores, **sizes: loudest_heads(-scores, **sizes))
    assert _damage(cut) > 2 * quiet_gone > 0


def test_padding_does_not_change_the_observed_means() -> None:
    model = _decoder()
    padded = torch.cat([IDS, torch.zeros(6, 5, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones_like(IDS), torch.zeros(6, 5, dtype=torch.long)], 1)

    def with_padding(each: nn.Module) -> Iterator[Tensor]:
        yield each(input_ids=padded, attention_mask=mask)[0][:, :10].flatten(0, 1)

    def mean_of(sample: Callable[[nn.Module], Iterator[Tensor]]) -> Tensor:
        total, observer = Total(magnitude), Observer(model)
        observer.inputs_of(model.model.layers[1].mlp.down_proj, total)
        observer.run(sample)
        return total.mean

    torch.testing.assert_close(mean_of(with_padding), mean_of(_sample), rtol=1e-6, atol=0)  # norms in float32


def test_hooks_are_removed_after_an_error() -> None:
    model = _decoder().train()

    def failing(each: nn.Module) -> Iterator[Tensor]:
        yield from _sample(each)
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        cut_width(model, hidden_size=24, sample=failing)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.training and model.config.hidden_size == 32


@pytest.mark.parametrize(
    ("name", "cut", "key", "expected"),
    [
        ("llama", {"hidden_size": 64}, "hidden_size", "expected hidden_size from 1 to the model's 32, found 64"),
        ("llama", {"intermediate_size": 0}, "intermediate_size", "from 1 to the model's 48, found 0"),
        ("llama", {"num_heads": 3}, "num_heads", "a multiple of the 2 key/value heads, found 3"),
        ("llama", {"num_heads": 4, "num_key_value_heads": 1}, "num_heads", "at most 2 query heads per key/value head"),
        ("llama", {"hidden_size": 30}, "hidden_size", "hidden size (30) is not a multiple of the number of attention heads (4)"),
        ("BertModel", {"hidden_size": 16}, "hidden_size", "heads keep their 8 channels; set num_heads=2 as well"),
        ("BertModel", {"hidden_size": 20}, "hidden_size", "choose a multiple of 8 and the num_heads for it"),
        ("BertModel", {"num_heads": 2}, "num_heads", "with num_heads=2 set hidden_size=16"),
        ("BertModel", {"num_key_value_heads": 2}, "num_key_value_heads", "set num_heads"),
    ],
)  # fmt: skip
def test_cut_width_refuses_impossible_sizes(name: str, cut: dict[str, int], key: str, expected: str) -> None:
    model = _decoder(name) if name in DECODERS else _make(*ENCODERS[name])
    whole, config = _output(model), model.config.to_dict()
    with pytest.raises(RecipeError) as caught:
        cut_width(model, **cut, sample=_sample)
    assert expected in str(caught.value) and caught.value.key == f"distill.student_init.{key}"
    assert torch.equal(_output(model), whole) and model.config.to_dict() == config


def test_cut_width_refuses_other_architectures() -> None:
    gpt2 = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4))
    with pytest.raises(RecipeError, match=r"can be cut \(llama, mistral, .*\), found gpt2; cut layers instead"):
        cut_width(gpt2, intermediate_size=16, sample=_sample)
