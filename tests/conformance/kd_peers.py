"""Losses of Liger, torchtune and DistillKit for kd_conformance.py.

Each function runs the project's own code for one optimizer step, or on logits. A trainer's method runs on a stand-in
that holds what the method reads from the trainer. This file does what the Trainer does around the method.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from tests.conformance.kd_problems import IGNORED, NotOffered, Outcome, Problem, accumulated, beta, without_labels


def liger_step(problem: Problem) -> Outcome:
    """Calls Liger's kernel. The caller shifts the labels and weights the mean of a micro-batch by its targets."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    if problem.teacher.config.final_logit_softcapping or problem.teacher.config.logit_scale:
        raise NotOffered
    chosen = problem.settings
    function = LigerFusedLinearJSDLoss(
        weight_hard_loss=chosen.hard_weight,
        weight_soft_loss=1 - chosen.hard_weight,
        beta=beta(problem),
        temperature=chosen.temperature,
        compiled=False,
    )

    def loss(batch: dict[str, Tensor]) -> Tensor:
        ids, labels = batch["input_ids"], batch["labels"][:, 1:].flatten()
        hidden = [
            model.base_model(ids).last_hidden_state[:, :-1].flatten(0, 1)
            for model in (problem.student, problem.teacher)
        ]
        heads = problem.student.head.weight, problem.teacher.head.weight.detach()
        mean = function(hidden[0], heads[0], hidden[1].detach(), heads[1], labels)
        return mean * (labels != IGNORED).sum() / problem.num_targets

    problem.teacher.eval()
    return accumulated(problem, loss)


def torchtune_step(problem: Problem) -> Outcome:
    """Divides torchtune's summed losses by the targets of the step. The caller shifts the labels; the teacher is in eval mode."""
    from torchtune.modules.loss import ForwardKLLoss, ReverseKLLoss

    without_labels(problem)
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

    return accumulated(problem, loss, 1 / problem.num_targets)


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
    return accumulated(
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
