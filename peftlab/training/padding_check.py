"""The padding check: whether a row gets the same outputs in a padded batch as alone."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peftlab.adapters.fused import exact_products
from peftlab.errors import PeftlabError, RecipeError
from peftlab.models import base_model
from peftlab.tasks import Example, Task
from peftlab.training.checkpoint import RngState
from peftlab.training.parity import coarsest_dtype

_TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps in the sun until the evening."
# Tokens of the two rows: the shorter one gets more padding than most rows of a batch.
_LONG, _SHORT = 24, 7
# Differences of outputs, relative to the largest, that are rounding. A row that reads padding is off by more.
_TOLERANCES = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def check_padding(
    model: nn.Module, task: Task, *, max_length: int, device: Any, autocast: Any = contextlib.nullcontext
) -> str | None:
    """Compares a short row alone with the same row beside a longer one, in eval mode. If the outputs differ, ``task`` is set
    to run rows of different length separately, and the reason is returned.

    Args: max_length: the longest row in tokens. autocast: the context of training or evaluation.
    Raises: RecipeError if the model cannot run, or is no causal language model but the task writes text.
    """
    if task.spec.reader != "tokenizer" or max_length <= _SHORT:
        return None
    base = base_model(model)
    who = f"{type(base).__name__} ({base.config.model_type})"
    long, short = _rows(task, min(_LONG, max_length))
    writes = task.spec.generates
    rng = RngState.capture()
    try:
        with exact_products(model) as exact, torch.no_grad(), autocast():
            if not exact:
                return None  # rounding hides what padding does; what is known of the family decides
            alone = _outputs(model, task, [short], device)
            n = len(alone)
            batch = _outputs(model, task, [short, *([_changed_end(short)] if writes else []), long], device)
            padded, changed = batch[:n], batch[n : 2 * n]
            size = float(alone.abs().max())
            allowed = _TOLERANCES[coarsest_dtype(model, autocast, device)]
            difference = _difference(padded, alone, size)
            leak = _difference(changed[: n - 1], padded[: n - 1], size) if writes else 0.0
            if not max(difference, leak) <= allowed:
                unpadded = _outputs(model, task, [short, short], device)[:n]
                allowed = max(allowed, 4 * _difference(unpadded, alone, size))
    except (PeftlabError, torch.cuda.OutOfMemoryError):
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RecipeError(
            f"{who} cannot run on a short text: {reason}; use another model, or set what this says in its config.json",
            key="model.name",
        ) from error
    finally:
        rng.restore()
    if not leak <= allowed:
        raise RecipeError(
            f"{who} reads the tokens after the one that it predicts, so it is no causal language model; use a model for "
            "causal language modelling, or set is_decoder to true in its config.json",
            key="model.name",
        )
    if task.padding == "none" or difference <= allowed:
        return None
    if writes:
        raise RecipeError(
            f"the logits of {who} for a row differ by {difference:.2g} of the largest in a padded batch (rounding: "
            f"{allowed:.2g}), so it reads padding; use another model, or set train.batch_size=1",
            key="model.name",
        )
    task.padding = "none"
    return (
        f"the outputs of {who} for a row differ by {difference:.2g} of the largest in a padded batch (rounding: "
        f"{allowed:.2g}); only rows of the same length run together, which is slower"
    )


def _rows(task: Task, length: int) -> tuple[Example, Example]:
    """A row of ``length`` tokens, and a short one; both end as texts of the tokenizer do."""
    ids = np.asarray(task.tokenizer(_TEXT, verbose=False)["input_ids"], dtype=np.int32)
    body = np.resize(ids[:-1] if len(ids) > 1 else ids, length - 1)
    return task.probe(np.append(body, ids[-1])), task.probe(np.append(body[: _SHORT - 1], ids[-1]))


def _changed_end(example: Example) -> Example:
    """``example`` with another token before its last, which only the last prediction may read; or the same if there is no
    other. The last token itself starts the decoder of some families."""
    ids = example.ids.copy()
    ids[-2] = next((i for i in ids if i != ids[-2]), ids[-2])
    return Example(ids, 0, example.weight, trained=example.trained, label=example.label)


def _outputs(model: nn.Module, task: Task, examples: list[Example], device: Any) -> Tensor:
    """[N, ...] logits or vectors at the scored positions, row by row; 0 for classes that do not exist."""
    outputs = task.outputs(model, task.collate(examples, device))
    values = (outputs.values if outputs.vectors else outputs.logits()).float()
    return values.masked_fill(values.isneginf(), 0.0)


def _difference(actual: Tensor, expected: Tensor, size: float) -> float:
    return float((actual - expected).abs().max()) / max(size, 1e-30) if len(expected) else 0.0
