"""One pass over held-out examples, without keeping logits (contract C10)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from peftlab.data import eval_batches
from peftlab.evaluation.scorer import Columns, Scorer
from peftlab.ranks import num_ranks, rank
from peftlab.specs.metrics import METRICS


def answer_signatures(metrics: Sequence[str]) -> dict[str, str]:
    """How those of the metrics that have several variants are computed, by name: sacrebleu's signatures."""
    if not any(name in METRICS and METRICS[name].of_answers for name in metrics):
        return {}
    from peftlab.evaluation.text_scores import signatures  # slow to import

    return {name: text for name, text in signatures().items() if name in metrics}


@torch.no_grad()
def evaluate_examples(
    model: Any,
    task: Any,
    encoded: Any,
    *,
    metrics: list[str],
    batch_tokens: int,
    device: Any,
    autocast: Any,
    shared: bool = False,
) -> dict[str, float | None]:
    """Returns the metrics of ``model`` on ``encoded`` examples, by flat name; None: of a class that no example has.

    Args:
        task: a ``tasks.Task``; its ``score`` is called per padded batch of at most ``batch_tokens`` tokens. Metrics of texts that the
            model writes need its ``score_answers`` too, which takes much longer.
        metrics: empty for a task without labels.
        autocast: a zero-argument callable that returns the context of the forward passes.
        shared: all ranks of the launch call this. Each scores its part of the batches, and all get the metrics of all rows,
            to the bit as from one process.
    """
    if not metrics:
        return {}
    modes = {module: module.training for module in model.modules()}
    model.eval()
    scorer, parts = Scorer(metrics, class_names=task.class_names), []
    writes = not scorer.columns.isdisjoint(task.spec.answer_scores)
    batches = eval_batches(encoded.lengths, batch_tokens)
    own, ranks = (rank(), num_ranks()) if shared else (0, 1)
    try:
        for first in range(0, len(batches), ranks):
            scored = []
            for part in batches[first : first + ranks][own : own + 1]:
                batch = task.collate([encoded.examples[i] for i in part], device)
                with autocast():
                    columns = task.score(model, batch)
                    if writes:
                        columns |= task.score_answers(model, batch)
                scored.append(columns)
            for columns in _of_all_ranks(scored) if ranks > 1 else scored:
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


def _of_all_ranks(scored: list[Columns]) -> list[Columns]:
    """What each rank scored, in the order of the ranks, which is that of the batches."""
    from accelerate.utils import gather_object, send_to_device

    columns: list[Columns] = gather_object(send_to_device(scored, "cpu"))
    return columns
