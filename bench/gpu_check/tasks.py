"""gpu-check: every task of a recipe on CUDA, with a tiny model: trained, opened again, merged."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from bench.gpu_check.base import Device, Row, Task
from bench.gpu_check.models import agreement_on_cpu

_FILMS = [
    {"text": f"{word} film {'so ' * (i % 3)}{i}", "label": label, "other": f"a film {i} that is {word}", "right": right}
    for i in range(8)
    for word, label, right in (("good", "pos", 1), ("fine", "pos", 1), ("bad", "neg", 0), ("poor", "neg", 0))
]
_ENTITIES = [{"text": f["text"], "spans": [[0, len(str(f["text"]).split()[0]), f["label"]]]} for f in _FILMS]
_QUESTIONS = [
    {"question": f"What is film {i}?", "context": f["text"], "answers": [str(f["text"]).split()[0]] if i % 4 else []}
    for i, f in enumerate(_FILMS)
]
# Model, rows or the name of data, and roles of their columns, by task and variant.
RECIPES: dict[str, tuple[str, Any, dict[str, str]]] = {
    "causal_lm": ("tiny:llama", _FILMS, {"prompt": "text", "completion": "other"}),
    "seq2seq": ("tiny:t5", _FILMS, {"source": "text", "target": "other"}),
    "masked_lm": ("tiny:bert", _FILMS, {}),
    "seq_cls": ("tiny:bert", _FILMS, {}),
    "seq_cls, numbers": ("tiny:bert", _FILMS, {"score": "right"}),
    "extractive_qa": ("tiny:bert", _QUESTIONS, {}),
    "token_cls": ("tiny:bert", _ENTITIES, {}),
    "image_cls": ("tiny:vit", "sklearn:digits", {}),
    "object_detection": ("tiny:yolos", "shapes:40", {}),
    "image_segmentation": ("tiny:segformer", "shapes:40", {}),
    "reranking": ("tiny:bert", _FILMS, {"query": "text", "document": "other", "score": "right"}),
    "embedding": ("tiny:bert", _FILMS, {"anchor": "text", "positive": "other"}),
}


def every_task(device: Device) -> Iterator[Task]:
    """Trains each task, and opens and merges the run."""
    for name in device.pick(list(RECIPES), ["seq_cls"]):
        for quantize in device.pick(("none", "nf4"), ("none",)):
            what = {"check": "a task", "task": name, "quantize": quantize}
            yield Task(what, partial(_train, device, name, quantize), seconds=15)


def _train(device: Device, name: str, quantize: str) -> Row:
    import peftlab

    model, rows, columns = RECIPES[name]
    with tempfile.TemporaryDirectory() as folder:
        data = rows
        if not isinstance(rows, str):
            data = f"{folder}/rows.jsonl"
            Path(data).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        recipe = {
            "task": name.partition(",")[0],
            "model": {"name": model, "quantize": quantize},
            "data": {"train": data, "eval_rows": 8} | ({"columns": columns} if columns else {}),
            "train": {"max_steps": 6, "batch_size": 4},
            # The figures of a task may need packages that the machine lacks.
            "eval": {"before": False} | ({"metrics": ["loss"]} if name != "embedding" else {}),
            "run": {
                "dir": f"{folder}/run",
                "device": device.kind,
                "merge": "original" if quantize == "none" else "dequantized",
            },
        }
        run = peftlab.train(recipe)
        figure = "mrr" if name == "embedding" else "loss"
        before = run.summary["after"][figure]
        again = peftlab.evaluate(str(run.folder))["metrics"][figure]
        on_cpu = agreement_on_cpu(run.folder)
    parity = run.summary["parity"]
    return {
        figure: before,
        f"{figure}_reopened": again,
        "witness_on_cpu": asdict(on_cpu),
        "fused": [parity["num_fused"], parity["num_adapted"]],
        "ok": abs(again - before) <= 1e-3 * before and run.summary["merge"]["verified"],
    }
