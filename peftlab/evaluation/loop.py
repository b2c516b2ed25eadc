"""One pass over held-out examples, without keeping logits (contract C10)."""

from __future__ import annotations

from typing import Any

import torch

from peftlab.data import eval_batches
from peftlab.evaluation.scorer import Scorer


@torch.no_grad()
def evaluate_examples(
    model: Any, task: Any, encoded: Any, *, metrics: list[str], batch_tokens: int, device: Any, autocast: Any
) -> dict[str, float | None]:
    """Returns the metrics of ``model`` on ``encoded`` examples, by flat name; None: of a class that no example has.

    Args:
        task: a ``tasks.Task``; its ``score`` is called per padded batch of at most ``batch_tokens`` tokens.
        metrics: empty for a task without labels.
        autocast: a zero-argument callable that returns the context of the forward passes.
    """
    if not metrics:
        return {}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    scorer, parts = Scorer(metrics, class_names=task.class_names), []
    try:
        for part in eval_batches(encoded.lengths, batch_tokens):
            batch = task.collate([encoded.examples[i] for i in part], device)
            with autocast():
                columns = task.score(model, batch)
            if task.spec.gathers:
                parts.append(columns)
            else:
                scorer.add(columns)
    finally:
        for module, training in modes.items():
            module.training = training
    if parts:
        scorer.add(task.gathered(parts))
    return scorer.compute()
