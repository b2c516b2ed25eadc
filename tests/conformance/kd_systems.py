"""The systems of kd_conformance.py, and peftlab among them."""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from tests.conformance.kd_peers import distillkit_on_logits, distillkit_step, liger_step, torchtune_step
from tests.conformance.kd_problems import IGNORED, LM, Outcome, Problem, accumulated
from tests.conformance.kd_trl import (
    trl_distillation_step,
    trl_gkd_step,
    trl_gold_step,
    trl_jsd_on_logits,
    trl_tail_on_logits,
)

Step = Callable[[Problem], Outcome]
OnLogits = Callable[[Tensor, Tensor, int | None], Tensor]


@dataclass(frozen=True)
class System:
    """Args: module: must be importable. step: a whole optimizer step; None if the system has only a loss.
    on_logits: per-token losses of given logits, or their sum."""

    name: str
    module: str
    step: Step | None = None
    on_logits: OnLogits | None = None
    packages: tuple[str, ...] = ()

    def version(self) -> str | None:
        """The version, None if the system is not installed. A source tree on PYTHONPATH gives its commit."""
        try:
            module = importlib.import_module(self.module)
        except ImportError:
            return None
        package = self.module.split(".")[0]
        for name in (*self.packages, package):
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        folder = Path(str(module.__file__)).parent
        done = subprocess.run(
            ["git", "rev-parse", "--short=9", "HEAD"], cwd=folder, capture_output=True, text=True, check=False
        )
        return done.stdout.strip() or "source tree"


def peftlab_step(problem: Problem, *, fused: bool = False) -> Outcome:
    from peftlab.distillation import Objective, as_teacher, num_targets, select, select_targets
    from peftlab.distillation.vocabulary import Comparison, shared_width
    from peftlab.ops import DenseWeight, Head, OnlineTeacher

    chosen = problem.settings
    goal = Objective(chosen.kind, chosen.temperature, chosen.share, chosen.hard_weight, chosen.t2)
    masks = [batch["labels"] != IGNORED for batch in problem.batches()]
    weight = sum(map(num_targets, masks))
    widths = [model.head.weight.shape[0] for model in (problem.student, problem.teacher)]
    columns, _ = shared_width(Comparison(problem.student.base_model.weight.shape[0], None), *widths)

    def hidden_and_head(model: LM, ids: Tensor, trained: Tensor) -> tuple[Tensor, Head]:
        config = model.config
        head = Head(
            DenseWeight(model.head.weight),
            softcap=config.final_logit_softcapping,
            scale=config.logit_scale or 1.0,
            num_classes=columns,
        )
        return select(model.base_model(ids).last_hidden_state, trained), head

    def loss(batch: dict[str, Tensor]) -> Tensor:
        ids, trained = batch["input_ids"], batch["labels"] != IGNORED
        if fused:
            with as_teacher(problem.teacher):
                taught_online = OnlineTeacher(*hidden_and_head(problem.teacher, ids, trained))
            own_hidden, head = hidden_and_head(problem.student, ids, trained)
            return goal.linear_loss_sum(own_hidden, head, select_targets(ids, trained), taught_online) / weight
        with as_teacher(problem.teacher):
            taught = select(problem.teacher(ids).logits, trained)[:, :columns]
        own = select(problem.student(ids).logits, trained)[:, :columns]
        return goal.loss_sum(own, select_targets(ids, trained), taught) / weight

    return accumulated(problem, loss)


def peftlab_on_logits(student: Tensor, teacher: Tensor, k: int | None) -> Tensor:
    from peftlab.distillation import Objective, SparseTarget

    return Objective().soft_losses(student, teacher if k is None else SparseTarget.from_logits(teacher, k))


def peftlab_fused_on_logits(student: Tensor, teacher: Tensor, k: int | None) -> Tensor:
    """Uses logits as hidden states with an identity head. The operation returns sums, so it gets one token at a time."""
    from peftlab.distillation import Objective, SparseTarget
    from peftlab.ops import DenseWeight, Head

    head = Head(DenseWeight(torch.eye(student.shape[-1], dtype=student.dtype)))
    losses = []
    for own, their in zip(student.split(1), teacher.split(1), strict=True):
        taught = their if k is None else SparseTarget.from_logits(their, k)
        losses.append(Objective().linear_loss_sum(own, head, None, taught))
    return torch.stack(losses)


SYSTEMS = (
    System("peftlab", "peftlab.distillation", peftlab_step, peftlab_on_logits),
    System("peftlab fused", "peftlab.distillation", partial(peftlab_step, fused=True), peftlab_fused_on_logits),
    System("TRL GKD", "trl.experimental.gkd", trl_gkd_step, trl_jsd_on_logits),
    System("TRL GOLD", "trl.experimental.gold", trl_gold_step),
    System("TRL Distillation", "trl.trainer.distillation_trainer", trl_distillation_step),
    System("TRL SDFT loss", "trl.experimental.sdft", None, trl_tail_on_logits),
    System("Liger JSD", "liger_kernel.chunked_loss", liger_step, packages=("liger-kernel",)),
    System("torchtune KL", "torchtune.modules.loss", torchtune_step),
    System("DistillKit", "distillkit.trainer", distillkit_step, distillkit_on_logits),
)
