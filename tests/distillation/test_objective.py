"""The step loss does not depend on how a step is cut, and one check catches each of the common bugs.

Student and teacher are small enough to compute their step loss token by token in float64. Logits at a position are
``W E[token]``, so that padding, packing and micro-batches change nothing that a model computes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from peftlab.distillation import losses, objective
from peftlab.distillation.objective import Objective
from peftlab.distillation.targets import SparseTarget
from peftlab.errors import RecipeError
from peftlab.ops import DIVERGENCES, DenseWeight, Head, OnlineTeacher, token_divergence

V = 13
PAD = 0


@dataclass
class Bigram:
    """[V, H] embeddings and [V', H] head."""

    E: Tensor
    W: Tensor

    @staticmethod
    def random(seed: int, H: int, *, dtype: torch.dtype = torch.float64) -> Bigram:
        g = torch.Generator().manual_seed(seed)
        E, W = torch.randn(V, H, generator=g, dtype=dtype), torch.randn(V, H, generator=g, dtype=dtype)
        return Bigram(E, W)

    def leaves(self) -> Bigram:
        return Bigram(*(x.detach().clone().requires_grad_() for x in (self.E, self.W)))


@dataclass(frozen=True)
class Text:
    """Token ids, trained from ``prompt`` on."""

    ids: tuple[int, ...]
    prompt: int

    @property
    def trained(self) -> list[bool]:
        return [i >= max(self.prompt, 1) for i in range(len(self.ids))]


# A long prompt with one trained token, a text without a prompt, and a trained last token in the longest row.
TEXTS = (Text((3, 4, 5, 6, 7), 4), Text((8, 9, 1), 0), Text((2, 2, 10, 11, 12, 3, 1), 3), Text((5, 1), 1))


@dataclass
class Layout:
    """How texts become micro-batches. The step loss does not depend on it."""

    micro_batches: Sequence[Sequence[Text]] = (TEXTS,)
    left: bool = False
    extra_padding: int = 0
    packed: bool = False
    chunk: int | None = None
    pad_ids: Sequence[int] = field(default_factory=lambda: [PAD])


def batch(texts: Sequence[Text], layout: Layout) -> tuple[Tensor, Tensor]:
    rows = [([*t.ids], t.trained) for t in texts]
    if layout.packed:
        rows = [([i for ids, _ in rows for i in ids], [x for _, mask in rows for x in mask])]
    length = max(len(ids) for ids, _ in rows) + layout.extra_padding
    input_ids, trained = [], []
    for ids, mask in rows:
        missing = length - len(ids)
        filler = [layout.pad_ids[i % len(layout.pad_ids)] for i in range(missing)]
        input_ids.append(filler + ids if layout.left else ids + filler)
        trained.append([False] * missing + mask if layout.left else mask + [False] * missing)
    return torch.tensor(input_ids), torch.tensor(trained)


def step(
    student: Bigram, teacher: Bigram, choice: dict[str, Any], layout: Layout, *, k: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Step loss and the gradients of the student's E and W, as the training loop computes them."""
    own = student.leaves()
    batches = [batch(texts, layout) for texts in layout.micro_batches]
    weight = sum(objective.num_targets(trained) for _, trained in batches)
    loss = torch.zeros((), dtype=own.E.dtype)
    goal = Objective(**choice)
    for input_ids, trained in batches:
        hidden = objective.select(own.E[input_ids], trained)
        taught = objective.select(teacher.E[input_ids], trained)
        targets = objective.select_targets(input_ids, trained)
        size = layout.chunk or max(1, len(targets))
        parts = [slice(i, i + size) for i in range(0, max(1, len(targets)), size)]
        for part in parts:
            logits, against = (hidden[part] @ own.W.T)[:, :V], (taught[part] @ teacher.W.T)[:, :V]
            stored = SparseTarget.from_logits(against, k, temperature=goal.temperature) if k else against
            part_sum = goal.loss_sum(logits, targets[part], stored) / weight
            part_sum.backward(retain_graph=True)
            loss = loss + part_sum.detach()
    return loss, *(torch.zeros_like(x) if x.grad is None else x.grad for x in (own.E, own.W))


def truth(
    student: Bigram, teacher: Bigram, *, temperature: float, hard_weight: float, **_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for forward KL, from the texts alone. The token before predicts each trained token."""
    E, W = student.E.double(), student.W.double()
    pairs = [(t.ids[i - 1], t.ids[i]) for t in TEXTS for i in range(1, len(t.ids)) if i >= t.prompt]
    loss, grad_E, grad_W = 0.0, torch.zeros_like(E), torch.zeros_like(W)
    for before, token in pairs:
        z, z_t = [(m.W.double() @ m.E[before].double()).tolist() for m in (student, teacher)]
        q1, q, p = _softmax(z, 1.0), _softmax(z, temperature), _softmax(z_t, temperature)
        kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        loss += hard_weight * -math.log(q1[token]) + (1 - hard_weight) * temperature**2 * kl
        for v in range(V):
            hard = q1[v] - (v == token)
            g = hard_weight * hard + (1 - hard_weight) * temperature * (q[v] - p[v])
            grad_W[v] += g * E[before]
            grad_E[before] += g * W[v]
    n = len(pairs)
    return torch.tensor(loss / n, dtype=torch.float64), grad_E / n, grad_W / n


def _softmax(z: Sequence[float], temperature: float) -> list[float]:
    e = [math.exp((x - max(z)) / temperature) for x in z]
    return [x / sum(e) for x in e]


def assert_same(actual: Sequence[Tensor], want: Sequence[Tensor], *, tolerance: float = 1e-11) -> None:
    for a, b in zip(actual, want, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


STUDENT, TEACHER = Bigram.random(0, 4), Bigram.random(1, 6)
MIXED = {"kind": "forward_kl", "temperature": 2.0, "hard_weight": 0.3}
choices = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(["forward_kl", "reverse_kl", "skew_forward_kl", "skew_reverse_kl", "jsd", "tvd"]),
        "temperature": st.sampled_from([0.5, 1.0, 3.0]),
        "share": st.sampled_from([0.1, 0.5]),
        "hard_weight": st.sampled_from([0.0, 0.3, 1.0]),
        "scale_by_t2": st.booleans(),
    }
)


def check() -> None:
    """Compares uneven micro-batches with sums over the texts. Every bug below must fail it."""
    for layout in (
        Layout(),
        Layout([TEXTS[:1], TEXTS[1:3], TEXTS[3:]], extra_padding=2),
        Layout(left=True, pad_ids=[4, 1]),
    ):
        assert_same(step(STUDENT, TEACHER, MIXED, layout), truth(STUDENT, TEACHER, **MIXED))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("hard_weight", [0.0, 0.3, 1.0])
def test_step_loss_equals_the_sum_over_the_texts(temperature: float, hard_weight: float) -> None:
    choice = {"temperature": temperature, "hard_weight": hard_weight}
    assert_same(step(STUDENT, TEACHER, choice, Layout()), truth(STUDENT, TEACHER, **choice))
    check()


@settings(max_examples=50, deadline=None)
@given(
    choice=choices,
    order=st.permutations(TEXTS),
    cuts=st.sets(st.integers(1, len(TEXTS) - 1)),
    left=st.booleans(),
    extra=st.integers(0, 4),
    pad_ids=st.lists(st.integers(0, V - 1), min_size=1, max_size=3),
    packed=st.booleans(),
    chunk=st.none() | st.integers(1, 9),
)
def test_step_loss_does_not_depend_on_how_a_step_is_cut(
    choice: dict[str, Any],
    order: list[Text],
    cuts: set[int],
    left: bool,
    extra: int,
    pad_ids: list[int],
    packed: bool,
    chunk: int | None,
) -> None:
    """Varies micro-batch split, order, padding side, amount and ids, packing, and chunk size (contract C3)."""
    bounds = [0, *sorted(cuts), len(order)]
    parts = [order[a:b] for a, b in itertools.pairwise(bounds)]
    layout = Layout(parts, left=left, extra_padding=extra, packed=packed, chunk=chunk, pad_ids=pad_ids)
    assert_same(step(STUDENT, TEACHER, choice, layout), step(STUDENT, TEACHER, choice, Layout()))


@settings(max_examples=30, deadline=None)
@given(choice=choices, own=st.integers(0, 5), taught=st.integers(0, 5), std=st.floats(0.0, 20.0))
def test_step_loss_ignores_padded_columns_of_either_side(
    choice: dict[str, Any], own: int, taught: int, std: float
) -> None:
    """Columns beyond the shared width may hold anything. They are cut off and get neither probability nor gradient."""
    g = torch.Generator().manual_seed(5)
    wide = [
        Bigram(m.E, torch.cat([m.W, std * torch.randn(n, m.W.shape[1], generator=g, dtype=torch.float64)]))
        for m, n in ((STUDENT, own), (TEACHER, taught))
    ]
    loss, grad_E, grad_W = step(*wide, choice, Layout())
    assert_same((loss, grad_E, grad_W[:V]), step(STUDENT, TEACHER, choice, Layout()))
    assert not grad_W[V:].any()


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 99),
    temperature=st.sampled_from([1.0, 4.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_hard_weight_1_is_cross_entropy_to_the_bit(seed: int, temperature: float, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(seed)
    logits, targets = torch.randn(9, 31, generator=g).to(dtype), torch.randint(31, (9,), generator=g)
    for teacher in (None, torch.full_like(logits, math.nan)):
        a, b = (logits.clone().requires_grad_() for _ in range(2))
        loss = Objective(temperature=temperature, hard_weight=1.0).loss_sum(a, targets, teacher)
        want = nn.functional.cross_entropy(b.float(), targets, reduction="none").sum()
        loss.backward(), want.backward()
        assert torch.equal(loss, want) and torch.equal(a.grad, b.grad)


def test_hard_weight_0_needs_no_labels() -> None:
    logits = torch.randn(4, 7)
    loss = Objective().loss_sum(logits, None, logits + 1)
    assert float(loss) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_step_loss_with_all_classes_stored_is_dense(temperature: float) -> None:
    choice = {"temperature": temperature, "hard_weight": 0.3}
    assert_same(step(STUDENT, TEACHER, choice, Layout(), k=V), step(STUDENT, TEACHER, choice, Layout()))


@settings(max_examples=20, deadline=None)
@given(choice=choices.filter(lambda c: c["kind"] != "tvd"))
def test_step_loss_of_a_perfect_student_is_0_without_gradient(choice: dict[str, Any]) -> None:
    perfect = step(TEACHER, TEACHER, {**choice, "hard_weight": 0.0}, Layout())
    assert_same(perfect, [torch.zeros_like(x) for x in perfect])


def test_select_counts_the_first_and_last_completion_token() -> None:
    """Trains one token of a text at a time. The selected row is the one before it."""
    ids = torch.tensor([[3, 4, 5, 6, 7]])
    for at in range(1, 5):
        trained = torch.zeros(1, 5, dtype=torch.bool)
        trained[0, at] = True
        assert objective.select(ids[..., None], trained).tolist() == [[at + 2]]
        assert objective.select_targets(ids, trained).tolist() == [at + 3]
        assert objective.num_targets(trained) == 1
    first = torch.tensor([[True, False, False, False, False]])
    assert objective.num_targets(first) == len(objective.select(ids, first)) == 0


# Common bugs: each replaces the right code, and the check above must notice it.


def test_bug_mean_over_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "token_divergence", lambda s, t, **kw: token_divergence(s, t, **kw) / s.shape[-1])
    caught()


def test_bug_batchmean_divides_by_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "num_targets", lambda trained: len(trained))
    caught()


def test_bug_mean_of_means_over_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bug is right for one micro-batch, and for several only if they have equally many targets."""
    monkeypatch.setattr(objective, "num_targets", lambda trained: 1)
    right = objective.combine

    def mean(hard: Tensor, soft: Tensor, **options: Any) -> Tensor:
        return right(hard, soft, **options) / len(hard)

    monkeypatch.setattr(objective, "combine", mean)
    assert_same(step(STUDENT, TEACHER, MIXED, Layout()), truth(STUDENT, TEACHER, **MIXED))
    caught()


def test_bug_t2_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "divergence", _without("scale_by_t2", False, losses.divergence))
    caught()


def test_bug_t2_on_the_cross_entropy_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "cross_entropy", lambda z, y: 4.0 * losses.cross_entropy(z, y))
    caught()


def test_bug_temperature_in_the_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "cross_entropy", lambda z, y: losses.cross_entropy(z / 2.0, y))
    caught()


@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
def test_bug_temperature_on_one_side(monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    def one_sided(*both: Tensor, temperature: float, **kw: Any) -> Tensor:
        other = [z * temperature if i != side else z for i, z in enumerate(both)]
        return token_divergence(*other, temperature=temperature, **kw)

    monkeypatch.setattr(losses, "token_divergence", one_sided)
    caught()


def test_bug_logits_not_shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "select", lambda values, trained: values[:, 1:][trained[:, 1:]])
    caught()


def test_bug_mask_not_shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bug skips the first completion token and distills the position after the last one."""
    monkeypatch.setattr(objective, "select", lambda values, trained: values[:, :-1][trained[:, :-1]])
    monkeypatch.setattr(objective, "select_targets", lambda ids, trained: ids[:, 1:][trained[:, :-1]])
    monkeypatch.setattr(objective, "num_targets", lambda trained: int(trained[:, :-1].sum()))
    caught()


def test_bug_targets_offset_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers return with a prompt's token the distribution that it was drawn from, and None for the first. This is one
    position later than logits."""
    right = objective.select
    calls: list[int] = []

    def teacher_one_late(values: Tensor, trained: Tensor) -> Tensor:
        calls.append(1)
        return right(values.roll(1, dims=1) if len(calls) % 2 == 0 else values, trained)

    monkeypatch.setattr(objective, "select", teacher_one_late)
    caught()


def test_bug_prompt_not_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Text, "trained", property(lambda text: [i > 0 for i in range(len(text.ids))]))
    caught()


def test_bug_padding_not_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    right = batch

    def unmasked(texts: Sequence[Text], layout: Layout) -> tuple[Tensor, Tensor]:
        ids, trained = right(texts, layout)
        return ids, trained | (ids == PAD)

    monkeypatch.setitem(globals(), "batch", unmasked)
    caught()


def test_bug_packed_text_predicted_from_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bug is harmless for texts in separate rows, where nothing precedes a first token."""
    monkeypatch.setattr(Text, "trained", property(lambda text: [i >= text.prompt for i in range(len(text.ids))]))
    want = truth(STUDENT, TEACHER, **MIXED)
    assert_same(step(STUDENT, TEACHER, MIXED, Layout()), want)
    with pytest.raises(AssertionError):
        assert_same(step(STUDENT, TEACHER, MIXED, Layout(packed=True)), want)


def test_bug_padded_vocabulary_filled_with_zeros() -> None:
    """Missing columns of a narrower model hold probability if they are 0, but not if they are -inf or both are cut."""
    wide = Bigram(TEACHER.E, torch.cat([TEACHER.W, torch.zeros(4, 6, dtype=torch.float64)]))
    hidden = torch.arange(V)
    own, taught = STUDENT.E[hidden] @ STUDENT.W.T, wide.E[hidden] @ wide.W.T
    taught[:, V:] = -math.inf
    want = Objective().soft_losses(own, taught[:, :V])
    for filler, same in ((-math.inf, True), (0.0, False)):
        padded = torch.cat([own, torch.full((V, 4), filler, dtype=torch.float64)], -1)
        assert torch.allclose(Objective().soft_losses(padded, taught), want) is same
    with pytest.raises(ValueError, match=r"found \[13, 13\] and \[13, 17\]"):
        Objective().soft_losses(own, taught)


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Dropout(0.5), nn.Linear(8, V)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x))


def test_bug_teacher_in_train_mode_or_with_a_graph() -> None:
    model, x = Dropping(), torch.randn(4, 8)
    model.train()
    model.head.eval()
    want = model.head(x)
    with objective.as_teacher(model):
        output = model(x)
        assert torch.equal(output, want) and not output.requires_grad
    assert model.training and model.inner.training and not model.head.training
    assert not torch.equal(model(x), want), "in train mode the check above would fail"
    with pytest.raises(RuntimeError, match="inside"), objective.as_teacher(model):
        raise RuntimeError("inside")
    assert model.inner.training


def test_bug_teacher_width_taken_from_the_student() -> None:
    """select uses each model's own width. The toy teacher has width 6 and the student 4."""
    ids, trained = batch(TEXTS, Layout())
    assert objective.select(TEACHER.E[ids], trained).shape == (len(objective.select_targets(ids, trained)), 6)
    assert objective.select(STUDENT.E[ids], trained).shape[1] == 4


@pytest.mark.parametrize(
    ("choice", "k"), [({}, None), ({}, 3), ({"hard_weight": 1.0}, None), ({"hard_weight": 0.5, "kind": "jsd"}, None)]
)
def test_bug_nan_of_a_micro_batch_without_targets(choice: dict[str, Any], k: int | None) -> None:
    masked = Text((3, 4, 5), 3)
    with_masked = step(STUDENT, TEACHER, choice, Layout([[masked], TEXTS]), k=k)
    assert_same(with_masked, step(STUDENT, TEACHER, choice, Layout(), k=k))
    student = torch.randn(0, V, requires_grad=True)
    loss = Objective(**choice).loss_sum(student, torch.zeros(0, dtype=torch.int64), torch.zeros(0, V))
    loss.backward()
    assert float(loss.detach()) == 0.0 and student.grad is not None


def test_bug_bfloat16_log_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        losses,
        "token_divergence",
        lambda s, t, **kw: token_divergence(s.bfloat16().double(), t.bfloat16().double(), **kw),
    )
    caught()


def test_bug_teacher_and_student_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "token_divergence", lambda s, t, **kw: token_divergence(t, s, **kw))
    caught()


def test_bug_weights_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    right = objective.combine
    monkeypatch.setattr(
        objective,
        "combine",
        lambda hard, soft, *, hard_weight, **rest: right(hard, soft, hard_weight=1 - hard_weight, **rest),
    )
    caught()


def caught() -> None:
    with pytest.raises(AssertionError):
        check()


def _without(name: str, value: Any, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: function(*args, **{**kwargs, name: value})


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"kind": "kl"}, "expected a divergence out of forward_kl"),
        ({"temperature": 0.0}, "expected a temperature above 0, found 0"),
        ({"hard_weight": 1.5}, "expected a hard_weight from 0 .* found 1.5"),
        ({"kind": "skew_forward_kl", "share": 1.0}, "expected a share"),
    ],
)
def test_objective_refuses_settings_out_of_range(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Objective(**choice)


def test_objective_on_stored_classes_supports_forward_kl_only() -> None:
    target = SparseTarget.from_logits(torch.randn(2, V), 3)
    with pytest.raises(RecipeError, match="only support forward_kl, found jsd"):
        Objective(kind="jsd").loss_sum(torch.randn(2, V), None, target)
    with pytest.raises(RecipeError, match="stored at temperature 1, but the loss needs 2"):
        Objective(temperature=2.0).loss_sum(torch.randn(2, V), None, target)


def test_objective_refuses_a_missing_part() -> None:
    for hard_weight, arguments in ((0.5, (None, torch.zeros(2, V))), (0.5, (torch.zeros(2, dtype=torch.int64), None))):
        with pytest.raises(ValueError, match="losses of both parts"):
            Objective(hard_weight=hard_weight).loss_sum(torch.zeros(2, V), *arguments)
    with pytest.raises(ValueError, match="trained"):
        objective.select(torch.zeros(2, 3, 4), torch.zeros(2, 3))


@pytest.mark.parametrize("kind", [*DIVERGENCES, "bucket", "renormalized", "none"])
@pytest.mark.parametrize("hard_weight", [0.0, 0.4, 1.0])
def test_linear_loss_sum_equals_loss_sum(kind: str, hard_weight: float) -> None:
    """Compares losses and gradients of hidden and head, with soft-cap, logit scale and padded vocabulary on both heads."""
    g = torch.Generator().manual_seed(0)
    hidden, taught = torch.randn(9, 6, generator=g).double(), torch.randn(9, 4, generator=g).double()
    W, TW = torch.randn(V + 3, 6, generator=g).double(), torch.randn(V + 5, 4, generator=g).double()
    targets = torch.randint(V, (9,), generator=g)
    teacher_logits = 3.0 * torch.tanh(0.8 * (taught @ TW.T)[:, :V] / 3.0)
    sparse = kind not in DIVERGENCES
    choice = Objective("forward_kl" if sparse else kind, temperature=2.0, share=0.3, hard_weight=hard_weight)
    teacher = SparseTarget.from_logits(teacher_logits, 4, temperature=2.0, tail="bucket") if sparse else teacher_logits
    if isinstance(teacher, SparseTarget):
        teacher = SparseTarget(teacher.ids, teacher.probs, 2.0, kind)
    online = OnlineTeacher(taught, Head(DenseWeight(TW), softcap=3.0, scale=0.8, num_classes=V))

    def plain(h: Tensor, w: Tensor) -> Tensor:
        return choice.loss_sum(3.0 * torch.tanh(1.5 * (h @ w.T)[:, :V] / 3.0), targets, teacher)

    def fused(h: Tensor, w: Tensor) -> Tensor:
        head = Head(DenseWeight(w), softcap=3.0, scale=1.5, num_classes=V)
        return choice.linear_loss_sum(h, head, targets, teacher if sparse else online)

    results = []
    for loss in (plain, fused):
        leaves = [t.clone().requires_grad_() for t in (hidden, W)]
        value = loss(*leaves)
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    for want, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, want, rtol=1e-6 if sparse else 1e-10, atol=1e-7 if sparse else 1e-12)


@pytest.mark.parametrize("hard_weight", [0.0, 0.4, 1.0])
def test_linear_loss_sum_gives_the_head_adapter_its_own_input(hard_weight: float) -> None:
    """Dropout before the adapter changes the adapter's input, but not the head's."""
    g = torch.Generator().manual_seed(0)
    hidden, dropped, W, A, B, teacher = (
        torch.randn(*shape, generator=g, dtype=torch.float64)
        for shape in ((5, 4), (5, 4), (V, 4), (2, 4), (V, 2), (5, V))
    )
    targets = torch.randint(V, (5,), generator=g)
    choice = Objective(hard_weight=hard_weight)
    head = Head(DenseWeight(W), low_rank=(A, B, 0.5))
    loss = choice.linear_loss_sum(hidden, head, targets, teacher, adapter_hidden=dropped)
    want = choice.loss_sum(hidden @ W.T + 0.5 * dropped @ A.T @ B.T, targets, teacher)
    torch.testing.assert_close(loss, want)
    assert not torch.isclose(choice.linear_loss_sum(hidden, head, targets, teacher), want)
