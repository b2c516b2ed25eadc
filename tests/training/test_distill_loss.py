"""The loss of a distillation against a plain loop over single rows: full logits, torch's own functions, float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from test_normalisation import CLASS_WEIGHTS, NAMES, TARGETS, exact_norms, letters
from torch import Tensor
from torch.nn import functional as F

from peftlab.adapters import HeadLoss
from peftlab.adapters.fused import set_kernels
from peftlab.data import Rows
from peftlab.data.chat import Formatter
from peftlab.distillation import Objective
from peftlab.models.tiny import tiny_config
from peftlab.tasks import Example, collate_packed
from peftlab.tasks.causal_lm import CausalLM
from peftlab.tasks.classification import Labels
from peftlab.tasks.seq_cls import SequenceClassification
from peftlab.training import distill_loss, teacher_outputs
from peftlab.training.distill_loss import DistillLoss, Share, TaughtLogits
from peftlab.training.teacher_outputs import BackboneTeacher, Columns, ModelTeacher

KINDS = ["forward_kl", "reverse_kl", "skew_forward_kl", "skew_reverse_kl", "jsd", "tvd"]
# (tokens before the answer, trained tokens) of a text; its number of tokens is the sum.
TEXTS = [(3, 1), (5, 4), (1, 6), (7, 2), (4, 4)]
# Tokens and class.
CLASSIFIED = [(5, "neg"), (9, "mid"), (2, "pos"), (12, "pos")]
ORDER = (2, 0, 1)  # the student's class i is the teacher's class ORDER[i]


def plain_divergence(kind: str, student: Tensor, teacher: Tensor, *, temperature: float, share: float) -> Tensor:
    """[] summed over rows, T^2 included, from the definitions."""
    p, q = ((z / temperature).softmax(-1) for z in (teacher, student))

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(b.log(), a, reduction="sum")

    if kind == "tvd":
        return temperature**2 * (p - q).abs().sum() / 2
    mixture = share * p + (1 - share) * q
    value = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "skew_forward_kl": lambda: kl(p, mixture),
        "skew_reverse_kl": lambda: kl(q, (1 - share) * p + share * q),
        "jsd": lambda: share * kl(p, mixture) + (1 - share) * kl(q, mixture),
    }[kind]()
    return temperature**2 * value


@dataclass(frozen=True)
class Goal:
    """The goal in plain values. losses: (kind, weight)."""

    losses: Sequence[tuple[str, float]] = (("forward_kl", 1.0),)
    hard_weight: float = 0.0
    temperature: float = 1.0
    share: float = 0.5


# A teacher of the reference: a function that gives logits for one row [1, T], its weight, and whether it teaches the
# row.
Voice = tuple[Callable[[Any, Tensor], Tensor], float, Callable[[Tensor], bool]]


class Bench:
    """A student, a batch, and the loss that they should give."""

    task: Any

    def __init__(self, student: Any, kernels: str = "auto") -> None:
        self.student, self.kernels = student, kernels
        self.examples: list[Example] = []
        self.columns = Columns()
        exact_norms(student)
        set_kernels(student, kernels)

    def loss(self, goal: Goal, shares: Sequence[Share]) -> DistillLoss:
        terms = [(w, Objective(kind, goal.temperature, goal.share)) for kind, w in goal.losses]
        return DistillLoss(
            self.task, terms, shares, hard_weight=goal.hard_weight, columns=self.columns, kernels=self.kernels
        )

    def batch(self, *, packed: bool = False) -> Any:
        return (
            collate_packed(self.examples, device="cpu")
            if packed
            else self.task.collate(self.examples, torch.device("cpu"))
        )

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        trained = {n: p for n, p in self.student.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
        return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(trained.items(), grads, strict=True)}

    def row(self, model: Any, example: Example) -> tuple[Tensor, Tensor | None]:
        """Logits [n, C] at the scored positions, and the labels there."""
        raise NotImplementedError

    def wanted(self, goal: Goal, voices: Sequence[Voice]) -> Tensor:
        set_kernels(self.student, "reference")
        total = torch.zeros((), dtype=torch.float64)
        for example in self.examples:
            own, labels = self.row(lambda ids: self.student(input_ids=ids).logits, example)
            weight = 1.0 if self.task.spec.generates else example.weight
            loss = torch.zeros((), dtype=torch.float64)
            if goal.hard_weight:
                loss = loss + goal.hard_weight * F.cross_entropy(own, labels, reduction="sum")
            ids = torch.tensor(example.ids, dtype=torch.int64)
            mine = [(say, w) for say, w, takes in voices if takes(ids)]
            for say, w in mine:
                with torch.no_grad():
                    taught, _ = self.row(lambda ids, say=say: say(self.student, ids), example)
                share = w / sum(x for _, x in mine)
                for kind, of_loss in goal.losses:
                    part = plain_divergence(kind, own, taught, temperature=goal.temperature, share=goal.share)
                    loss = loss + (1 - goal.hard_weight) * share * of_loss * part
            total = total + weight * loss
        set_kernels(self.student, self.kernels)
        return total

    def check(self, goal: Goal, shares: Sequence[Share], voices: Sequence[Voice], *, packed: bool = False) -> None:
        """Loss and all gradients, on the training path and on the reference path of the parity gate."""
        want = self.wanted(goal, voices)
        right = self.gradients(want)
        largest = max(float(g.abs().max()) for g in right.values())
        assert largest > 1e-3
        loss = self.loss(goal, shares)
        self.student.train()
        paths = {
            "training": lambda: loss(self.student, self.batch(packed=packed)),
            "reference": lambda: loss.reference(self.student, self.examples, torch.device("cpu")),
        }
        for name, run in paths.items():
            got = run()
            assert float(got.detach()) == pytest.approx(float(want.detach()), rel=1e-9), f"loss, {name} path"
            for parameter, gradient in self.gradients(got).items():
                error = float((gradient - right[parameter]).abs().max())
                assert error <= 1e-9 * largest, f"gradient of {parameter}, {name} path"


class Texts(Bench):
    def __init__(self, student: Any, tokenizer: Any, kernels: str = "auto", width: int | None = None) -> None:
        super().__init__(student, kernels)
        formatter = Formatter(tokenizer, columns={}, template=None, available=["prompt", "completion"])
        self.task = CausalLM(tokenizer, formatter, head_loss=HeadLoss(kernels))
        self.columns, self._width = Columns(width), width
        rows = [
            {"prompt": letters(before, i), "completion": letters(trained - 1, before + i) + "<|im_end|>"}
            for i, (before, trained) in enumerate(TEXTS)
        ]
        encoded = self.task.encode(Rows.from_dicts(rows, name="a.csv"), max_length=64, too_long="error", training=True)
        self.examples = encoded.examples

    def row(self, model: Any, example: Example) -> tuple[Tensor, Tensor | None]:
        before, trained = TEXTS[example.row]
        ids = torch.tensor(example.ids, dtype=torch.int64)
        assert len(ids) == before + trained
        logits = model(ids[None])[0, before - 1 : -1, : self._width]
        return logits, ids[before:]


class Classes(Bench):
    def __init__(self, student: Any, tokenizer: Any, *, labelled: bool = True) -> None:
        super().__init__(student)
        self.task = SequenceClassification(tokenizer, labels=Labels(NAMES, class_weights=CLASS_WEIGHTS))
        rows = [{"text": letters(n, i), "label": name} for i, (n, name) in enumerate(CLASSIFIED)]
        rows = rows if labelled else [{"text": row["text"]} for row in rows]
        encoded = self.task.encode(
            Rows.from_dicts(rows, name="b.csv"), max_length=64, too_long="error", training=True, labelled=labelled
        )
        self.examples = encoded.examples

    def row(self, model: Any, example: Example) -> tuple[Tensor, Tensor | None]:
        logits = model(torch.tensor(example.ids, dtype=torch.int64)[None])
        return logits, torch.tensor([NAMES.index(CLASSIFIED[example.row][1])])


def moved(model: Any, seed: int, scale: float = 0.3) -> Any:
    """The model with other weights, so that a student can learn from it."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=g, dtype=parameter.dtype) * scale * parameter.std())
    exact_norms(model)
    return model.eval()


def voice(model: Any, weight: float = 1.0, takes: Callable[[Tensor], bool] = lambda ids: True) -> Voice:
    def say(student: Any, ids: Tensor) -> Tensor:
        training = model.training
        model.eval()
        logits = model(input_ids=ids).logits
        model.train(training)
        return logits

    return say, weight, takes


def without_adapter(student: Any, ids: Tensor) -> Tensor:
    with student.disable_adapter():
        return student(input_ids=ids).logits


@dataclass(frozen=True)
class Lab:
    texts: Texts
    classes: Classes
    lm: Any
    other_lm: Any
    classifier: Any


@pytest.fixture(scope="module")
def lab(tiny: Any, tokenizer_of: Any) -> Lab:
    kwargs = {"num_labels": 3}
    student = tiny("tiny:llama", dtype="float64", rank=2, targets=TARGETS)
    return Lab(
        Texts(student, tokenizer_of("tiny:llama")),
        Classes(tiny("tiny:bert", dtype="float64", rank=2, **kwargs), tokenizer_of("tiny:bert")),
        # An adapter with dropout: in training mode this teacher would contradict itself.
        moved(tiny("tiny:llama", dtype="float64", dropout=0.5, targets=TARGETS), 1),
        moved(tiny("tiny:llama", dtype="float64", adapter=False), 2),
        moved(tiny("tiny:bert", dtype="float64", adapter=False, **kwargs), 3),
    )


def taught_by(bench: Bench, model: Any, **options: Any) -> ModelTeacher:
    return ModelTeacher(model, bench.task, device="cpu", kernels=bench.kernels, **{"columns": bench.columns, **options})


def even(example: Example) -> bool:
    return len(example.ids) % 2 == 0


def even_ids(ids: Tensor) -> bool:
    return len(ids) % 2 == 0


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("hard_weight", [0.0, 0.3, 1.0])
def test_distill_loss_of_one_teacher_of_texts(lab: Lab, hard_weight: float, packed: bool) -> None:
    goal = Goal(hard_weight=hard_weight, temperature=2.0)
    lab.texts.check(goal, [Share(taught_by(lab.texts, lab.lm))], [voice(lab.lm)], packed=packed)


@pytest.mark.parametrize("kind", KINDS)
def test_divergences_equal_the_reference(lab: Lab, kind: str) -> None:
    goal = Goal(losses=[(kind, 1.0)], hard_weight=0.3, temperature=2.0, share=0.3)
    lab.texts.check(goal, [Share(taught_by(lab.texts, lab.lm))], [voice(lab.lm)])
    lab.classes.check(goal, [Share(taught_by(lab.classes, lab.classifier))], [voice(lab.classifier)])


def test_distill_loss_of_several_weighted_losses(lab: Lab) -> None:
    goal = Goal(losses=[("forward_kl", 2.0), ("jsd", 0.5), ("tvd", 0.25)], hard_weight=0.3, temperature=1.5)
    lab.texts.check(goal, [Share(taught_by(lab.texts, lab.lm))], [voice(lab.lm)])


def test_distill_loss_of_two_weighted_teachers(lab: Lab) -> None:
    shares = [Share(taught_by(lab.texts, lab.lm), 3.0), Share(taught_by(lab.texts, lab.other_lm), 1.0)]
    lab.texts.check(Goal(hard_weight=0.3), shares, [voice(lab.lm, 3.0), voice(lab.other_lm, 1.0)])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_distill_loss_of_routed_teachers_and_the_backbone(lab: Lab, packed: bool) -> None:
    """A row of one teacher weighs as much as a row of three teachers."""
    backbone = BackboneTeacher(lab.texts.task, columns=lab.texts.columns)
    shares = [
        Share(taught_by(lab.texts, lab.lm), 2.0, even),
        Share(taught_by(lab.texts, lab.other_lm), 1.0, lambda e: not even(e)),
        Share(backbone, 0.5),
    ]
    voices = [voice(lab.lm, 2.0, even_ids), voice(lab.other_lm, 1.0, lambda ids: not even_ids(ids))]
    voices.append((without_adapter, 0.5, lambda ids: True))
    assert {even(e) for e in lab.texts.examples} == {True, False}
    lab.texts.check(Goal(hard_weight=0.3, temperature=2.0), shares, voices, packed=packed)


@pytest.mark.parametrize("hard_weight", [0.0, 0.3, 1.0])
def test_distill_loss_of_weighted_classes(lab: Lab, hard_weight: float) -> None:
    goal = Goal(hard_weight=hard_weight, temperature=4.0)
    lab.classes.check(goal, [Share(taught_by(lab.classes, lab.classifier))], [voice(lab.classifier)])


def test_distill_loss_of_a_teacher_with_another_order_of_classes(lab: Lab) -> None:
    def say(student: Any, ids: Tensor) -> Tensor:
        return lab.classifier(input_ids=ids).logits[:, list(ORDER)]

    teacher = taught_by(lab.classes, lab.classifier, columns=Columns(order=ORDER))
    lab.classes.check(Goal(hard_weight=0.3), [Share(teacher)], [(say, 1.0, lambda ids: True)])


def test_distill_loss_of_a_teacher_with_its_own_tokenizer(lab: Lab) -> None:
    own = {e.key: replace(e, ids=np.append(e.ids[::-1], [7]).astype(np.int32)) for e in lab.classes.examples}

    def say(student: Any, ids: Tensor) -> Tensor:
        (row,) = [e.key for e in lab.classes.examples if e.ids.tolist() == ids[0].tolist()]
        return lab.classifier(input_ids=torch.tensor(own[row].ids, dtype=torch.int64)[None]).logits

    teacher = taught_by(lab.classes, lab.classifier, examples=own)
    lab.classes.check(Goal(hard_weight=0.3), [Share(teacher)], [(say, 1.0, lambda ids: True)])


def test_distill_loss_of_rows_without_labels(lab: Lab) -> None:
    """Such rows have weight 1 and no class that a loss could read."""
    bench = Classes(lab.classes.student, lab.classes.task.tokenizer, labelled=False)
    assert [(e.weight, e.label) for e in bench.examples] == [(1.0, None)] * len(CLASSIFIED)
    bench.check(Goal(temperature=2.0), [Share(taught_by(bench, lab.classifier))], [voice(lab.classifier)])


def padded_vocabulary(tiny: Any, tokenizer_of: Any) -> tuple[Texts, Any]:
    """A student and a teacher whose logits have four columns beyond the vocabulary. The teacher's have much weight."""
    from transformers import AutoModelForCausalLM

    config = tiny_config("tiny:llama", dtype=torch.float64)
    config.vocab_size, config.tie_word_embeddings = 264, False
    student, teacher = (AutoModelForCausalLM.from_config(config).double() for _ in range(2))
    with torch.no_grad():
        teacher.lm_head.weight[260:] *= 50
    return Texts(student, tokenizer_of("tiny:llama"), "reference", width=260), moved(teacher, 4)


def test_distill_loss_cuts_padded_columns(tiny: Any, tokenizer_of: Any) -> None:
    torch.manual_seed(0)
    bench, teacher = padded_vocabulary(tiny, tokenizer_of)
    bench.check(Goal(hard_weight=0.3), [Share(taught_by(bench, teacher))], [voice(teacher)])
    bench.kernels = "auto"
    bench.check(Goal(hard_weight=0.3), [Share(taught_by(bench, teacher))], [voice(teacher)])


def test_taught_logits_equal_the_mixture_of_teachers(lab: Lab) -> None:
    shares = [Share(taught_by(lab.texts, lab.lm), 3.0, even), Share(taught_by(lab.texts, lab.other_lm), 1.0)]
    batch = lab.texts.batch()
    counts = lab.texts.task.outputs(lab.texts.student, batch).counts
    mixture = TaughtLogits(shares, lab.texts.student, batch, counts)
    want = []
    for example in lab.texts.examples:
        both = [
            lab.texts.row(lambda ids, m=m: voice(m)[0](None, ids), example)[0].softmax(-1)
            for m in (lab.lm, lab.other_lm)
        ]
        want.append(0.75 * both[0] + 0.25 * both[1] if even(example) else both[1])
    right = torch.cat(want).detach()
    for chosen in (slice(0, 3), slice(3, len(right))):
        torch.testing.assert_close(mixture.rows(chosen).softmax(-1), right[chosen], rtol=1e-9, atol=1e-12)


# Deliberate faults, each with the check that must find it.


@contextlib.contextmanager
def no_eval(model: Any) -> Any:
    model.train()
    with torch.no_grad():
        yield


def teacher_in_training_mode(patch: Any) -> None:
    patch.setattr(teacher_outputs, "as_teacher", no_eval)


def temperature_of_one_side(patch: Any) -> None:
    right = Objective.linear_loss_sum

    def wrong(self: Any, hidden: Any, head: Any, targets: Any, teacher: Any, **options: Any) -> Tensor:
        cold = replace(teacher, head=replace(teacher.head, scale=teacher.head.scale * self.temperature))
        return right(self, hidden, head, targets, cold, **options)

    patch.setattr(Objective, "linear_loss_sum", wrong)


def without_t_squared(patch: Any) -> None:
    right = DistillLoss._loss_sum
    patch.setattr(
        DistillLoss, "_loss_sum", lambda self, goal, *rest: right(self, replace(goal, scale_by_t2=False), *rest)
    )


def mask_shifted(patch: Any) -> None:
    """The teacher answers at each trained token instead of before it."""
    right = ModelTeacher._own

    def later(self: Any, batch: Any) -> Any:
        own = right(self, batch)
        # If the first prediction is that of the second token, none is lost.
        return replace(own, trained=torch.where(own.trained[:, 1:2], own.trained, own.trained.roll(-1, 1)))

    patch.setattr(ModelTeacher, "_own", later)


def weights_not_normalised(patch: Any) -> None:
    patch.setattr(distill_loss, "_sums", lambda parts, count: [1.0] * count)


def rows_in_another_order(patch: Any) -> None:
    right = distill_loss._only

    def flipped(share: Any, batch: Any) -> Any:
        own = right(share, batch)
        trained = None if own.trained is None else own.trained.flip(0)
        return replace(own, inputs={name: tensor.flip(0) for name, tensor in own.inputs.items()}, trained=trained)

    patch.setattr(distill_loss, "_only", flipped)


def adapter_left_on(patch: Any) -> None:
    patch.setattr(BackboneTeacher, "_switched", lambda self, student: contextlib.nullcontext())


def labels_on_top(patch: Any) -> None:
    """CE + D instead of their weighted mean."""
    right = DistillLoss._loss_sum

    def wrong(self: Any, goal: Any, outputs: Any, taught: Any, weights: Any) -> Tensor:
        soft = right(self, replace(goal, hard_weight=0.0), outputs, taught, weights)
        hard = right(self, replace(goal, hard_weight=1.0), outputs, None, weights)
        return soft + goal.hard_weight * hard

    patch.setattr(DistillLoss, "_loss_sum", wrong)


def class_weights_forgotten(patch: Any) -> None:
    right = DistillLoss._loss_sum
    patch.setattr(
        DistillLoss, "_loss_sum", lambda self, goal, outputs, taught, weights: right(self, goal, outputs, taught, None)
    )


def columns_not_cut(patch: Any) -> None:
    patch.setattr(Columns, "of", lambda self, logits: logits)


def order_ignored(patch: Any) -> None:
    columns_not_cut(patch)


def packs_mixed(patch: Any) -> None:
    """The teacher reads a pack as one text."""
    right = ModelTeacher._own
    patch.setattr(
        ModelTeacher,
        "_own",
        lambda self, batch: replace(
            right(self, batch),
            inputs={"input_ids": batch.input_ids, "position_ids": torch.arange(batch.input_ids.shape[1])[None]},
        ),
    )


ONE = (test_distill_loss_of_one_teacher_of_texts, {"hard_weight": 0.3, "packed": False})
ROUTED = (test_distill_loss_of_routed_teachers_and_the_backbone, {"packed": False})
CAUGHT_BY: list[tuple[Callable[[Any], None], tuple[Any, dict[str, Any]]]] = [
    (teacher_in_training_mode, ONE),
    (temperature_of_one_side, ONE),
    (without_t_squared, ONE),
    (mask_shifted, ONE),
    (labels_on_top, ONE),
    (packs_mixed, (test_distill_loss_of_one_teacher_of_texts, {"hard_weight": 0.3, "packed": True})),
    (weights_not_normalised, (test_distill_loss_of_two_weighted_teachers, {})),
    (weights_not_normalised, ROUTED),
    (rows_in_another_order, ROUTED),
    (adapter_left_on, ROUTED),
    (class_weights_forgotten, (test_distill_loss_of_weighted_classes, {"hard_weight": 0.3})),
    (order_ignored, (test_distill_loss_of_a_teacher_with_another_order_of_classes, {})),
]


@pytest.mark.parametrize(("fault", "caught"), CAUGHT_BY, ids=lambda x: getattr(x, "__name__", None))
def test_distill_loss_deliberate_faults_are_caught(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, fault: Any, caught: Any
) -> None:
    check, arguments = caught
    fault(monkeypatch)
    with pytest.raises(AssertionError, match=r"(loss|gradient).* path"):
        check(lab, **arguments)
    lab.lm.eval()


def test_distill_loss_with_uncut_columns_is_caught(
    tiny: Any, tokenizer_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns_not_cut(monkeypatch)
    torch.manual_seed(0)
    bench, teacher = padded_vocabulary(tiny, tokenizer_of)
    with pytest.raises(AssertionError, match="loss"):
        bench.check(Goal(hard_weight=0.3), [Share(taught_by(bench, teacher))], [voice(teacher)])
