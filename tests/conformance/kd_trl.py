"""TRL's distillation losses for kd_conformance.py.

Each function runs the project's own code for one optimizer step, or on logits. A trainer's method runs on a stand-in
that holds what the method reads from the trainer. This file does what the Trainer does around the method.
"""

from __future__ import annotations

import tempfile
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.conformance.kd_problems import NotOffered, Outcome, Problem, accumulated, beta, gradients, without_labels


def _construct(trainer: Any, config: Any, problem: Problem) -> None:
    """Constructs the real trainer on tiny models whose widths differ as the problem's do. It may refuse them."""
    from datasets import Dataset
    from transformers import LlamaForCausalLM

    from peftlab.models.tiny import tiny_config, tiny_tokenizer

    tokenizer, models = tiny_tokenizer(), []
    for model in (problem.student, problem.teacher):
        shape = tiny_config("tiny:llama")
        shape.vocab_size = len(tokenizer) + model.head.weight.shape[0] - model.base_model.weight.shape[0]
        models.append(LlamaForCausalLM(shape))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": turns, "prompt": "a"}]
    with tempfile.TemporaryDirectory() as folder:
        trainer(
            model=models[0],
            teacher_model=models[1],
            args=config(output_dir=folder, bf16=False, report_to=[], use_cpu=True),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )


def _unequal(problem: Problem) -> bool:
    return problem.student.head.weight.shape != problem.teacher.head.weight.shape


def trl_gkd_step(problem: Problem) -> Outcome:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    without_labels(problem)
    if _unequal(problem):
        _construct(GKDTrainer, GKDConfig, problem)
    trainer = SimpleNamespace(
        teacher_model=problem.teacher,
        beta=beta(problem),
        temperature=problem.settings.temperature,
        generalized_jsd_loss=GKDTrainer.generalized_jsd_loss,
    )
    items = torch.tensor(problem.num_targets)
    return accumulated(
        problem, lambda batch: GKDTrainer.compute_loss(trainer, problem.student, batch, num_items_in_batch=items)
    )


def trl_gold_step(problem: Problem) -> Outcome:
    from transformers import PreTrainedModel
    from trl.experimental.gold import GOLDTrainer

    without_labels(problem)
    if _unequal(problem):
        # Its constructor calls teacher_model.resize_token_embeddings(the student's vocab_size). This is the head's part.
        columns = problem.student.head.weight.shape[0]
        blank = PreTrainedModel.__new__(PreTrainedModel)
        problem.teacher.head = blank._get_resized_lm_head(problem.teacher.head, columns, mean_resizing=True)
    trainer = SimpleNamespace(
        teacher_model=problem.teacher,
        teacher_tokenizer=None,
        use_uld_loss=False,
        beta=beta(problem),
        temperature=problem.settings.temperature,
        generalized_jsd_loss=GOLDTrainer.generalized_jsd_loss,
        _get_model_forward_kwargs=lambda inputs: {},
    )
    items = torch.tensor(problem.num_targets)
    return accumulated(
        problem, lambda batch: GOLDTrainer.compute_loss(trainer, problem.student, batch, num_items_in_batch=items)
    )


def trl_distillation_step(problem: Problem) -> Outcome:
    """Pads prompts on the left and completions on the right, as the trainer does. Left padding is not an option."""
    from trl import DistillationConfig, DistillationTrainer

    without_labels(problem)
    if _unequal(problem):
        _construct(DistillationTrainer, DistillationConfig, problem)
    trainer = SimpleNamespace(
        teacher_model=problem.teacher,
        accelerator=SimpleNamespace(unwrap_model=lambda model: model, is_main_process=True),
        model_kwarg_keys=set(),
        beta=beta(problem),
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
