"""Contract C3 for a distillation: for any split of a step, its loss and gradient equal those of its rows one by one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from test_distill_loss import Goal, even, even_ids, moved, plain_divergence, voice, without_adapter
from test_normalisation import (
    CLASSIFIED,
    LM_MODEL,
    MORE_TEXTS,
    NAMES,
    ONE_BY_ONE,
    PACKED_PARTIAL,
    PARTIAL,
    TEXTS,
    UNEVEN,
    ClassLab,
    LanguageLab,
    assert_same,
    fresh_accelerator,
    plans,
    two_processes,
)
from torch import Tensor
from torch.nn import functional as F

from peftlab.distillation import Objective
from peftlab.training.distill_loss import DistillLoss, Share
from peftlab.training.teacher_outputs import BackboneTeacher, Columns, ModelTeacher

GOAL = Goal(losses=[("forward_kl", 1.0), ("jsd", 0.5)], hard_weight=0.3, temperature=2.0)
ORDER = (1, 2, 0)
module_accelerator = pytest.fixture(scope="module", name="module_accelerator")(fresh_accelerator)


def terms() -> list[tuple[float, Objective]]:
    return [(weight, Objective(kind, GOAL.temperature)) for kind, weight in GOAL.losses]


def soft(own: Tensor, taught: Tensor) -> Tensor:
    return sum(
        weight * plain_divergence(kind, own, taught, temperature=GOAL.temperature, share=GOAL.share)
        for kind, weight in GOAL.losses
    )  # type: ignore[return-value]


class DistillLab(LanguageLab):
    """Two losses from two teachers: a model for texts of an even length, and the backbone for all texts."""

    def __init__(self, model: Any, tokenizer: Any, accelerator: Any, folder: Path, teacher: Any) -> None:
        super().__init__(model, tokenizer, accelerator, folder)
        self._voices = [voice(teacher, 2.0, even_ids), (without_adapter, 1.0, lambda ids: True)]
        shares = [Share(ModelTeacher(teacher, self.task, device="cpu"), 2.0, even), Share(BackboneTeacher(self.task))]
        self.loss_sum = DistillLoss(self.task, terms(), shares, hard_weight=GOAL.hard_weight)

    def row_sum(self, shape: Any, ids: Tensor) -> Tensor:
        def answers(logits: Tensor) -> Tensor:
            return logits[0, shape[0] - 1 : -1]

        own = answers(self.model(input_ids=ids).logits)
        loss = GOAL.hard_weight * F.cross_entropy(own, ids[0, shape[0] :], reduction="sum")
        mine = [(say, weight) for say, weight, takes in self._voices if takes(ids[0])]
        for say, weight in mine:
            with torch.no_grad():
                taught = answers(say(self.model, ids))
            loss = loss + (1 - GOAL.hard_weight) * weight / sum(w for _, w in mine) * soft(own, taught)
        return loss


class DistillClasses(ClassLab):
    """A teacher whose classes are in another order. Each row weighs as much as its class."""

    def __init__(self, tiny: Any, tokenizer: Any, accelerator: Any, folder: Path, teacher: Any) -> None:
        super().__init__(tiny, tokenizer, accelerator, folder)
        self._teacher = teacher
        share = Share(ModelTeacher(teacher, self.task, device="cpu", columns=Columns(order=ORDER)))
        self.loss_sum = DistillLoss(self.task, terms(), [share], hard_weight=GOAL.hard_weight)

    def row_sum(self, shape: Any, ids: Tensor) -> Tensor:
        own = self.model(input_ids=ids).logits
        taught = self._teacher(input_ids=ids).logits[:, list(ORDER)]
        hard = F.cross_entropy(own, torch.tensor([NAMES.index(shape[1])]), reduction="sum")
        return self.share(shape) * (GOAL.hard_weight * hard + (1 - GOAL.hard_weight) * soft(own, taught))


def language_lab(tiny: Any, tokenizer: Any, accelerator: Any, folder: Path) -> DistillLab:
    teacher = moved(tiny("tiny:llama", dtype="float64", adapter=False), 1)
    return DistillLab(tiny("tiny:llama", **LM_MODEL), tokenizer, accelerator, folder, teacher)


@pytest.fixture(scope="module")
def texts(tiny: Any, tokenizer_of: Any, module_accelerator: Any, tmp_path_factory: Any) -> DistillLab:
    return language_lab(tiny, tokenizer_of("tiny:llama"), module_accelerator, tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def classes(tiny: Any, tokenizer_of: Any, module_accelerator: Any, tmp_path_factory: Any) -> DistillClasses:
    teacher = moved(tiny("tiny:bert", dtype="float64", adapter=False, num_labels=3), 2)
    folder = tmp_path_factory.mktemp("classes")
    return DistillClasses(tiny, tokenizer_of("tiny:bert"), module_accelerator, folder, teacher)


few = partial(settings, max_examples=12, deadline=None)


@few()
@given(shapes=TEXTS, plan=plans())
@example(shapes=UNEVEN, plan=PARTIAL)
@example(shapes=UNEVEN, plan={"batch_tokens": 1000, "grouping": "step", "split_cost": 0})
def test_distill_step_of_texts_does_not_depend_on_the_split(texts: DistillLab, shapes: Any, plan: Any) -> None:
    texts.check(shapes, plan)


@few()
@given(shapes=MORE_TEXTS, plan=plans(packed=True))
@example(shapes=UNEVEN, plan=PACKED_PARTIAL)
@example(shapes=UNEVEN, plan={"batch_size": 1, "packing": 1000})
def test_distill_step_does_not_depend_on_packing(texts: DistillLab, shapes: Any, plan: Any) -> None:
    texts.check(shapes, plan)


@few()
@given(shapes=CLASSIFIED, plan=plans())
@example(shapes=[(n, NAMES[n % 3]) for n in range(1, 10)], plan=PARTIAL)
def test_distill_step_of_classes_does_not_depend_on_the_split(classes: DistillClasses, shapes: Any, plan: Any) -> None:
    classes.check(shapes, plan)


def test_distill_step_that_averages_micro_batches_is_caught(texts: DistillLab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault is a mean over each micro-batch, as in most distillation code."""
    right = DistillLoss.__call__

    def mean(self: Any, student: Any, batch: Any) -> Tensor:
        return right(self, student, batch) / batch.trained.sum() * float(np.mean([n for _, n in UNEVEN]))

    monkeypatch.setattr(DistillLoss, "__call__", mean)
    with pytest.raises(AssertionError, match="loss of step 0"):
        texts.check(UNEVEN, PARTIAL)


# Name -> (rows, plan, learning rate).
RANK_CASES: dict[str, tuple[Any, dict[str, Any], float]] = {
    "an odd number, then one": (UNEVEN[:4], {**ONE_BY_ONE, "accumulate": 3}, 0.0),
    "fewer than ranks": (UNEVEN[:3], {"batch_size": 3}, 0.0),
    "packed": (UNEVEN, PACKED_PARTIAL, 0.0),
    "moving weights": (UNEVEN, {"batch_size": 2, "accumulate": 2}, 1e-2),
}
RANK = """
import sys
import torch
from pathlib import Path
from accelerate import Accelerator
from conftest import _tiny
from test_distill_loss_steps import RANK_CASES, language_lab
from peftlab.models import find_pretrained, load_tokenizer

folder = Path(sys.argv[1])
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
lab = language_lab(_tiny, load_tokenizer(find_pretrained("tiny:llama")), accelerator, folder)
found = {name: lab.steps(*case) for name, case in RANK_CASES.items()}
torch.save(found, folder / f"{accelerator.process_index}.pt")
"""


def test_distill_step_on_two_ranks_equals_one_process(process: Any, texts: DistillLab, tmp_path: Path) -> None:
    for steps in two_processes(process, tmp_path, RANK):
        for name, (shapes, plan, lr) in RANK_CASES.items():
            if lr:
                assert_same(steps[name], texts.steps(shapes, plan, lr))
            else:
                texts.assert_right(shapes, plan, steps[name])
