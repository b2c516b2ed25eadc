"""The systems of kd_conformance.py: each runs its own code for one optimizer step, called as its trainer calls it.

A setting that a system has no argument for raises ``NotOffered``. Trainers' methods run on a stand-in for the trainer
that holds what they read from it; what a Trainer does around them (dividing by the accumulated micro-batches where
``model_accepts_loss_kwargs`` is off) is done here.
"""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import torch
from _kd_cases import IGNORED, Outcome, Problem, gradients
from torch import Tensor

Step = Callable[[Problem], Outcome]
OnLogits = Callable[[Tensor, Tensor, int | None], Tensor]


class NotOffered(Exception):
    """The system has no such setting."""


@dataclass(frozen=True)
class System:
    """Args: module: has to be importable. step: a whole optimizer step; None where the system has only a loss.
    on_logits: per-token losses, or their sum, of logits as they are."""

    name: str
    module: str
    step: Step | None = None
    on_logits: OnLogits | None = None
    packages: tuple[str, ...] = ()

    def version(self) -> str | None:
        """None where it is not installed. A source tree on PYTHONPATH gives its commit."""
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


def _beta(problem: Problem) -> float:
    """The settings as the beta of a generalized JSD."""
    kind, share = problem.settings.kind, problem.settings.share
    if kind == "jsd":
        return share
    ends = {"forward_kl": 0.0, "reverse_kl": 1.0}
    if kind not in ends:
        raise NotOffered
    return ends[kind]


def _without_labels(problem: Problem) -> None:
    if problem.settings.hard_weight:
        raise NotOffered


def _accumulated(
    problem: Problem, micro_batch_loss: Callable[[dict[str, Tensor]], Tensor], factor: float = 1.0
) -> Outcome:
    loss = torch.zeros(())
    for batch in problem.batches():
        part = micro_batch_loss(batch) * factor
        part.backward()
        loss = loss + part.detach()
    return gradients(problem, loss)


def peftlab_step(problem: Problem) -> Outcome:
    from peftlab.distill import Objective, as_teacher, num_targets, select, select_targets
    from peftlab.distill.vocabulary import Comparison, shared_width

    chosen = problem.settings
    goal = Objective(chosen.kind, chosen.temperature, chosen.share, chosen.hard_weight, chosen.t2)
    masks = [batch["labels"] != IGNORED for batch in problem.batches()]
    weight = sum(map(num_targets, masks))
    widths = [model.head.weight.shape[0] for model in (problem.student, problem.teacher)]
    columns, _ = shared_width(Comparison(problem.student.base_model.weight.shape[0], None), *widths)

    def loss(batch: dict[str, Tensor]) -> Tensor:
        ids, trained = batch["input_ids"], batch["labels"] != IGNORED
        with as_teacher(problem.teacher):
            taught = select(problem.teacher(ids).logits, trained)[:, :columns]
        own = select(problem.student(ids).logits, trained)[:, :columns]
        return goal.loss_sum(own, select_targets(ids, trained), taught) / weight

    return _accumulated(problem, loss)


def peftlab_on_logits(student: Tensor, teacher: Tensor, k: int | None) -> Tensor:
    from peftlab.distill import Objective, SparseTarget

    return Objective().soft_losses(student, teacher if k is None else SparseTarget.from_logits(teacher, k))


def trl_gkd_step(problem: Problem) -> Outcome:
    from trl.experimental.gkd import GKDTrainer

    _without_labels(problem)
    trainer = SimpleNamespace(
        teacher_model=problem.teacher,
        beta=_beta(problem),
        temperature=problem.settings.temperature,
        generalized_jsd_loss=GKDTrainer.generalized_jsd_loss,
    )
    items = torch.tensor(problem.num_targets)
    return _accumulated(
        problem, lambda batch: GKDTrainer.compute_loss(trainer, problem.student, batch, num_items_in_batch=items)
    )


def trl_gold_step(problem: Problem) -> Outcome:
    from trl.experimental.gold import GOLDTrainer

    _without_labels(problem)
    trainer = SimpleNamespace(
        teacher_model=problem.teacher,
        teacher_tokenizer=None,
        use_uld_loss=False,
        beta=_beta(problem),
        temperature=problem.settings.temperature,
        generalized_jsd_loss=GOLDTrainer.generalized_jsd_loss,
        _get_model_forward_kwargs=lambda inputs: {},
    )
    items = torch.tensor(problem.num_targets)
    return _accumulated(
        problem, lambda batch: GOLDTrainer.compute_loss(trainer, problem.student, batch, num_items_in_batch=items)
    )


def trl_distillation_step(problem: Problem) -> Outcome:
    """Prompts padded on the left and completions on the right, as it makes them; left padding is not a choice."""
    from trl import DistillationTrainer

    _without_labels(problem)
    trainer = SimpleNamespace(
        teacher_model=problem.teacher,
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
        model_kwarg_keys=set(),
        beta=_beta(problem),
        temperature=problem.settings.temperature,
        _is_vlm=False,
        _forward_redirection=lambda wrapper, inner, method, *args, **kwargs: method(*args, **kwargs),
    )
    trainer._get_last_hidden_state = lambda *args, **kwargs: DistillationTrainer._get_last_hidden_state(
        trainer, *args, **kwargs
    )
    items = torch.tensor(problem.num_targets)
    loss = torch.zeros(())
    for texts in problem.micro_batches:
        sides = [[text.ids[: text.prompt] for text in texts], [text.ids[text.prompt :] for text in texts]]
        inputs: dict[str, Tensor] = {}
        for name, rows, left in (("prompt", sides[0], True), ("completion", sides[1], False)):
            length = max(map(len, rows)) + problem.extra_padding
            ids, mask = [], []
            for text, row in zip(texts, rows, strict=True):
                pad, kept = [0] * (length - len(row)), [int(left or text.trained)] * len(row)
                ids.append([*pad, *row] if left else [*row, *pad])
                mask.append(pad + kept if left else kept + pad)
            inputs |= {f"{name}_ids": torch.tensor(ids), f"{name}_mask": torch.tensor(mask)}
        part, _, _ = DistillationTrainer._compute_loss(trainer, problem.student, inputs, items)
        part.backward()
        loss = loss + part.detach()
    return gradients(problem, loss)


def trl_tail_on_logits(student: Tensor, teacher: Tensor, k: int | None) -> Tensor:
    from trl.experimental.sdft.loss_utils import (
        compute_full_logit_self_distillation_loss,
        compute_topk_self_distillation_loss,
    )

    if k is None:
        return compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=0.0)
    return compute_topk_self_distillation_loss(
        student, teacher, distillation_topk=k, distillation_alpha=0.0, distillation_add_tail=True
    )


def trl_jsd_on_logits(student: Tensor, teacher: Tensor, k: int | None) -> Tensor:
    from trl.experimental.gkd import GKDTrainer

    if k is not None:
        raise NotOffered
    return GKDTrainer.generalized_jsd_loss(student, teacher, beta=0.0, reduction="none").sum(-1)


def liger_step(problem: Problem) -> Outcome:
    """A loss over the targets of one micro-batch, which it divides by their number; the caller shifts."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    if problem.teacher.config.final_logit_softcapping or problem.teacher.config.logit_scale:
        raise NotOffered
    chosen = problem.settings
    function = LigerFusedLinearJSDLoss(
        weight_hard_loss=chosen.hard_weight,
        weight_soft_loss=1 - chosen.hard_weight,
        beta=_beta(problem),
        temperature=chosen.temperature,
        compiled=False,
    )

    def loss(batch: dict[str, Tensor]) -> Tensor:
        ids, labels = batch["input_ids"], batch["labels"][:, 1:].flatten()
        hidden = [
            model.base_model(ids).last_hidden_state[:, :-1].flatten(0, 1)
            for model in (problem.student, problem.teacher)
        ]
        return function(
            hidden[0], problem.student.head.weight, hidden[1].detach(), problem.teacher.head.weight.detach(), labels
        )

    problem.teacher.eval()
    return _accumulated(problem, loss, 1 / len(problem.micro_batches))


def torchtune_step(problem: Problem) -> Outcome:
    """Its losses as sums, divided by the targets of the step; labels shifted by the caller, teacher in eval mode."""
    from torchtune.modules.loss import ForwardKLLoss, ReverseKLLoss

    _without_labels(problem)
    if problem.settings.temperature != 1:
        raise NotOffered
    kinds = {"forward_kl": ForwardKLLoss, "reverse_kl": ReverseKLLoss}
    if problem.settings.kind not in kinds:
        raise NotOffered
    function = kinds[problem.settings.kind]()
    problem.teacher.eval()

    def loss(batch: dict[str, Tensor]) -> Tensor:
        labels = batch["labels"][:, 1:].flatten()
        own, taught = (m(batch["input_ids"]).logits[:, :-1].flatten(0, 1) for m in (problem.student, problem.teacher))
        return function(own, taught.detach(), labels, normalize=False)

    return _accumulated(problem, loss, 1 / problem.num_targets)


def distillkit_step(problem: Problem) -> Outcome:
    from distillkit.lossfuncs import CrossEntropyLoss, JSDLoss, KLDLoss, TVDLoss
    from distillkit.signals import OnlineSignalSource
    from distillkit.trainer import DistillationTrainer

    chosen = problem.settings
    kinds = {"forward_kl": KLDLoss, "tvd": TVDLoss, "jsd": JSDLoss if chosen.share == 0.5 else None}
    if kinds.get(chosen.kind) is None:
        raise NotOffered
    parts = [(kinds[chosen.kind](temperature=chosen.temperature), 1 - chosen.hard_weight)]
    if chosen.hard_weight:
        parts.append((CrossEntropyLoss(), chosen.hard_weight))
    weights = [SimpleNamespace(weight=w, function=SimpleNamespace(value=f.name())) for f, w in parts]
    real = problem.student.base_model.weight.shape[0]
    trainer = SimpleNamespace(
        config=SimpleNamespace(dataset=SimpleNamespace(eos_label_token_ids=None), loss_functions=weights),
        loss_functions=[function for function, _ in parts],
        need_hidden_states=False,
        hidden_state_mapping=None,
        true_vocab_size=real,
        signal_source=OnlineSignalSource(problem.teacher, real),
        log=lambda values: None,
    )
    trainer.total_distillation_loss = lambda *args, **kwargs: DistillationTrainer.total_distillation_loss(
        trainer, *args, **kwargs
    )
    # It switches model_accepts_loss_kwargs off: Trainer then divides by the number of micro-batches.
    return _accumulated(
        problem,
        lambda batch: DistillationTrainer.compute_loss(trainer, problem.student, batch),
        1 / len(problem.micro_batches),
    )


def distillkit_on_logits(student: Tensor, teacher: Tensor, k: int | None) -> Tensor:
    from distillkit.lossfuncs.kl import dense_kl_div, sparse_kl_div
    from distillkit.missing_probability import MissingProbabilityHandling

    rows = []
    for own, taught in zip(student, teacher, strict=True):
        if k is None:
            rows.append(dense_kl_div(own[None, None], taught[None, None]))
            continue
        values, ids = taught.log_softmax(-1).topk(k)
        tail = MissingProbabilityHandling.SYMMETRIC_UNIFORM
        rows.append(sparse_kl_div(own[None, None], ids[None, None], values[None, None], missing=tail))
    return torch.stack(rows)


SYSTEMS = (
    System("peftlab", "peftlab.distill", peftlab_step, peftlab_on_logits),
    System("TRL GKD", "trl.experimental.gkd", trl_gkd_step, trl_jsd_on_logits),
    System("TRL GOLD", "trl.experimental.gold", trl_gold_step),
    System("TRL Distillation", "trl.trainer.distillation_trainer", trl_distillation_step),
    System("TRL SDFT loss", "trl.experimental.sdft", None, trl_tail_on_logits),
    System("Liger JSD", "liger_kernel.chunked_loss", liger_step, packages=("liger-kernel",)),
    System("torchtune KL", "torchtune.modules.loss", torchtune_step),
    System("DistillKit", "distillkit.trainer", distillkit_step, distillkit_on_logits),
)
