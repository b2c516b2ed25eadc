"""Losses between layers against plain loops over single rows, with hooks of the test and the model's eager attention."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_distill_loss import TEXTS, Classes, Texts, moved
from test_normalisation import CLASS_WEIGHTS
from torch import Tensor

from peftlab.distillation import Objective
from peftlab.errors import RecipeError
from peftlab.models import inner
from peftlab.models.inner import recording
from peftlab.tasks import collate_packed
from peftlab.training import inner_losses
from peftlab.training.distill_loss import DistillLoss, Share
from peftlab.training.inner_losses import InnerLosses, InnerTerm, plan_inner_losses
from peftlab.training.teacher_outputs import BackboneTeacher, ModelTeacher

CPU = torch.device("cpu")
LAYERS = ((0, 1), (1, 0))


def layer_output(model: Any, path: str, ids: Tensor) -> Tensor:
    """[T, H]: the output of the module at ``path`` for one row."""
    outputs = []
    hook = model.get_submodule(path).register_forward_hook(lambda m, a, out: outputs.append(out))
    model(input_ids=ids[None])
    hook.remove()
    (output,) = outputs
    return (output[0] if isinstance(output, tuple) else output)[0]


def attention_of(model: Any, ids: Tensor, layer: int) -> Tensor:
    """[A, T, T] probabilities, by transformers' eager attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    probabilities = model(input_ids=ids[None], output_attentions=True).attentions[layer][0]
    model.set_attn_implementation(before)
    return probabilities


def plain_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """[] mean over heads and queries of sum p log(p / q), 0 log 0 = 0."""
    seen = teacher > 0
    ratio = torch.where(seen, teacher, 1.0).log() - torch.where(seen, student, 1.0).log()
    return (torch.where(seen, teacher, 0.0) * ratio).sum(-1).mean()


def plain_relation(student: Tensor, teacher: Tensor, heads: int, *, causal: bool) -> Tensor:
    """[] of [T, H] queries, keys or values."""

    def relation(x: Tensor) -> Tensor:
        split = x.reshape(len(x), heads, -1).permute(1, 0, 2)
        scores = split @ split.mT / split.shape[-1] ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), float("-inf"))
        return scores.softmax(-1)

    return plain_kl(relation(student), relation(teacher))


def plain(
    kind: str, student: Any, teacher: Any, ids: Tensor, layers: tuple[tuple[int, int], ...], names: dict[str, str]
) -> Tensor:
    """[] of one row by definition. Args: names: path of a layer, and of its query, key and value."""
    losses = []
    for mine, other in layers:
        if kind.startswith("hidden"):
            a = layer_output(student, names["layer"].format(mine), ids)
            b = layer_output(teacher, names["layer"].format(other), ids).detach()
            each = (
                (a - b).square().mean(-1)
                if kind == "hidden_mse"
                else 1 - (a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)
            )
            losses.append(each.mean())
        elif kind == "attention_kl":
            losses.append(plain_kl(attention_of(student, ids, mine), attention_of(teacher, ids, other).detach()))
        else:
            parts = []
            for part in ("query", "key", "value"):
                a = layer_output(student, names[part].format(mine), ids)
                b = layer_output(teacher, names[part].format(other), ids).detach()
                parts.append(plain_relation(a, b, 2, causal=False))
            losses.append(sum(parts) / 3)
    return sum(losses) / len(losses)


# transformers' eager attention rounds its probabilities to float32, and the loss is a small difference between two.
WITHIN = {"attention_kl": 1e-5}
LLAMA = {"layer": "model.layers.{}"}
BERT = {
    "layer": "bert.encoder.layer.{}",
    "query": "bert.encoder.layer.{}.attention.self.query",
    "key": "bert.encoder.layer.{}.attention.self.key",
    "value": "bert.encoder.layer.{}.attention.self.value",
}


def check(bench: Any, loss: DistillLoss, want: Tensor, *, packed: bool = False, within: float = 1e-9) -> None:
    """Loss and every gradient on the training path and the reference path; float64."""
    right = bench.gradients(want)
    largest = max(float(g.abs().max()) for g in right.values())
    assert largest > 1e-4
    paths: dict[str, Callable[[], Tensor]] = {
        "training": lambda: loss(bench.student, bench.batch(packed=packed)),
        "reference": lambda: loss.reference(bench.student, bench.examples, CPU),
    }
    for name, run in paths.items():
        got = run()
        assert float(got.detach()) == pytest.approx(float(want.detach()), rel=within), f"loss, {name} path"
        for parameter, gradient in bench.gradients(got).items():
            assert float((gradient - right[parameter]).abs().max()) <= within * largest, f"{parameter}, {name} path"


def texts_case(tiny: Any, tokenizer_of: Any) -> tuple[Texts, Any]:
    bench = Texts(tiny("tiny:llama", dtype="float64"), tokenizer_of("tiny:llama"), kernels="reference")
    teacher = moved(tiny("tiny:llama", dtype="float64", adapter=False), 3)
    bench.student.eval()
    return bench, teacher


def wanted_of_texts(bench: Texts, teacher: Any, kind: str, layers: tuple[tuple[int, int], ...] = LAYERS) -> Tensor:
    """Each row counts as often as it has trained tokens."""
    student = bench.student.get_base_model()
    return sum(
        trained * plain(kind, student, teacher, torch.tensor(e.ids, dtype=torch.int64), layers, LLAMA)
        for e, (_, trained) in zip(bench.examples, TEXTS, strict=True)
    )


def inner_loss(bench: Any, teacher: Any, kind: str, **settings: Any) -> DistillLoss:
    term = InnerTerm(kind, 1.0, LAYERS, **({"relation_heads": 2} if kind == "relation_kl" else {}))
    shares = [Share(ModelTeacher(teacher, bench.task, device="cpu"))]
    return DistillLoss(bench.task, [], shares, inner=InnerLosses([term]), kernels="reference", **settings)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["hidden_mse", "hidden_cosine", "attention_kl"])
def test_inner_losses_of_texts_equal_the_definition(kind: str, packed: bool, tiny: Any, tokenizer_of: Any) -> None:
    bench, teacher = texts_case(tiny, tokenizer_of)
    want = wanted_of_texts(bench, teacher, kind)
    check(bench, inner_loss(bench, teacher, kind), want, packed=packed, within=WITHIN.get(kind, 1e-9))


@pytest.mark.parametrize("kind", ["hidden_mse", "attention_kl", "relation_kl"])
def test_inner_losses_of_weighted_classes_equal_the_definition(kind: str, tiny: Any, tokenizer_of: Any) -> None:
    bench = Classes(tiny("tiny:bert", dtype="float64", num_labels=3), tokenizer_of("tiny:bert"))
    teacher = moved(tiny("tiny:bert", dtype="float64", num_labels=3, adapter=False), 3)
    bench.student.eval()
    student = bench.student.get_base_model()
    want = sum(
        CLASS_WEIGHTS[bench.task.class_names[e.label]]
        * plain(kind, student, teacher, torch.tensor(e.ids, dtype=torch.int64), LAYERS, BERT)
        for e in bench.examples
    )
    check(bench, inner_loss(bench, teacher, kind), want, within=WITHIN.get(kind, 1e-9))


def test_inner_losses_add_to_a_divergence_and_labels(tiny: Any, tokenizer_of: Any) -> None:
    """The share of the labels is taken from the sum of both losses. Each loss has its weight."""
    bench, teacher = texts_case(tiny, tokenizer_of)
    shares = [Share(ModelTeacher(teacher, bench.task, device="cpu"))]
    inner = InnerLosses([InnerTerm("hidden_mse", 0.3, LAYERS)])
    both = DistillLoss(bench.task, [(1.0, Objective())], shares, inner=inner, hard_weight=0.25, kernels="reference")
    answers = DistillLoss(bench.task, [(1.0, Objective())], shares, hard_weight=0.25, kernels="reference")
    want = answers(bench.student, bench.batch()) + 0.75 * 0.3 * wanted_of_texts(bench, teacher, "hidden_mse")
    check(bench, both, want)


@pytest.mark.parametrize("kind", ["hidden_cosine", "attention_mse", "relation_kl"])
def test_inner_losses_do_not_depend_on_the_split_or_packing(kind: str, tiny: Any, tokenizer_of: Any) -> None:
    bench, teacher = texts_case(tiny, tokenizer_of)
    loss = inner_loss(bench, teacher, kind)
    whole = bench.gradients(loss(bench.student, bench.batch()))
    parts = [bench.task.collate(bench.examples[a:b], CPU) for a, b in ((0, 1), (1, 4), (4, 5))]
    cut = [bench.gradients(loss(bench.student, part)) for part in [*parts[:2], parts[2]]]
    packed = bench.gradients(loss(bench.student, collate_packed(bench.examples, device="cpu")))
    for name, gradient in whole.items():
        scale = float(gradient.abs().max()) + 1e-12
        assert float((sum(g[name] for g in cut) - gradient).abs().max()) <= 1e-9 * max(scale, 1.0)
        assert float((packed[name] - gradient).abs().max()) <= 1e-9 * max(scale, 1.0)


@pytest.mark.parametrize("kind", ["hidden_mse", "hidden_cosine", "attention_mse", "attention_kl", "relation_kl"])
def test_inner_losses_of_a_perfect_student_are_zero(kind: str, tiny: Any, tokenizer_of: Any) -> None:
    bench, _ = texts_case(tiny, tokenizer_of)
    term = InnerTerm(kind, 1.0, ((0, 0), (1, 1)))
    with bench.student.disable_adapter():
        shares = [Share(BackboneTeacher(bench.task))]
        loss = DistillLoss(bench.task, [], shares, inner=InnerLosses([term]))
        assert float(loss(bench.student, bench.batch()).abs()) < 1e-9
    assert float(DistillLoss(bench.task, [], shares, inner=InnerLosses([term]))(bench.student, bench.batch())) > 1e-6


def test_inner_losses_do_not_change_under_gradient_checkpointing(tiny: Any, tokenizer_of: Any) -> None:
    bench, teacher = texts_case(tiny, tokenizer_of)
    for kind in ("hidden_mse", "relation_kl"):
        loss = inner_loss(bench, teacher, kind)
        bench.student.train()
        want = bench.gradients(loss(bench.student, bench.batch()))
        other = copy.deepcopy(bench.student)
        other.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        other.train()
        got = loss(other, bench.batch())
        names = [n for n, p in other.named_parameters() if p.requires_grad]
        grads = torch.autograd.grad(got, [p for p in other.parameters() if p.requires_grad], allow_unused=True)
        for name, gradient in zip(names, grads, strict=True):
            assert torch.allclose(want[name], torch.zeros_like(want[name]) if gradient is None else gradient, rtol=1e-9)


def test_recording_restores_the_model(tiny: Any, tokenizer_of: Any) -> None:
    bench, _ = texts_case(tiny, tokenizer_of)
    model = bench.student.get_base_model()
    inputs = bench.batch().inputs
    before = model(**inputs).logits
    with recording(bench.student, hidden=[1], attention=[0]) as states:
        assert torch.equal(model(**inputs).logits, before)
        with pytest.raises(RuntimeError):
            model(input_ids=torch.zeros(1, 1, dtype=torch.float64))
    assert set(states.hidden) == {1} and set(states.attention) == {0}
    assert model.config._attn_implementation == "sdpa" and inner._recording.get() is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_plan_inner_losses_refuses_layers_that_cannot_be_compared(tiny: Any) -> None:
    model = tiny("tiny:llama", adapter=False)
    other = tiny("tiny:bert", adapter=False)
    other.config.hidden_size, other.config.num_attention_heads = 48, 3
    with pytest.raises(RecipeError, match=r"hidden_mse: the teacher has 2 layers, 0 to 1; found layer 7"):
        plan_inner_losses([("hidden_mse", 1.0, {0: 7}, None)], model, model)
    with pytest.raises(RecipeError, match=r"64 values, the teacher's 48; use relation_kl"):
        plan_inner_losses([("hidden_mse", 1.0, None, None)], model, other)
    with pytest.raises(RecipeError, match=r"the student has 4 attention heads, the teacher 3; use relation_kl"):
        plan_inner_losses([("attention_kl", 1.0, None, None)], model, other)
    with pytest.raises(
        RecipeError, match=r"the student's queries, keys and values have 64 and 32 values, not a multiple of 5"
    ):
        plan_inner_losses([("relation_kl", 1.0, None, 5)], model, other)
    (term,) = plan_inner_losses([("relation_kl", 0.5, None, None)], model, other)
    assert term == InnerTerm("relation_kl", 0.5, ((1, 1),))
    model.config._attn_implementation = "eager"
    expected = pytest.raises(RecipeError, match=r"attention losses need sdpa attention, found 'eager'")
    with expected, recording(model, attention=[0]):
        pass
    model.config._attn_implementation = "sdpa"


def test_inner_losses_deliberate_faults_are_caught(
    tiny: Any, tokenizer_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The faults: padding counts as tokens, all rows have one weight, the causal mask is missing."""
    bench, teacher = texts_case(tiny, tokenizer_of)

    def fails(kind: str) -> None:
        want = wanted_of_texts(bench, teacher, kind)
        with pytest.raises(AssertionError):
            check(bench, inner_loss(bench, teacher, kind), want, within=WITHIN.get(kind, 1e-9))

    with monkeypatch.context() as m:
        m.setattr(inner_losses, "_places", lambda s, e: [(i, slice(0, max(map(len, e)))) for i in range(len(e))])
        fails("hidden_mse")
    with monkeypatch.context() as m:
        real = InnerLosses.loss_sum
        m.setattr(InnerLosses, "loss_sum", lambda s, a, b, e, c: real(s, a, b, e, torch.ones_like(c)))
        fails("hidden_mse")
    with monkeypatch.context() as m:
        m.setattr(inner.Attention, "visible", lambda s: torch.ones(1, 1, *s.query.shape[2:3] * 2, dtype=torch.bool))
        fails("attention_kl")
