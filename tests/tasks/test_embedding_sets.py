"""Rows of several texts: encoding, vectors, the parity gate, and bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import peftlab
from peftlab.adapters import inject, planned_modules
from peftlab.bench.cells import text_examples
from peftlab.data import Rows
from peftlab.errors import PeftlabError, VerificationError
from peftlab.models import find_pretrained, load_model, load_tokenizer
from peftlab.tasks.contrast import Objective
from peftlab.tasks.embedding import Embedding
from peftlab.tasks.embedding_sets import EmbeddingPairs, EmbeddingScores, EmbeddingTriplets
from peftlab.training.parity import check_parity
from peftlab.training.progress import SilentProgress

OPTIONS: dict[str, Any] = {"max_length": 64, "too_long": "error", "training": True}
ROWS = Rows.from_dicts(
    [
        {"anchor": f"a cat {'so ' * (i % 3)}{i}", "positive": f"dog {i}", "negative": "x" * (i + 1), "extra": i}
        for i in range(6)
    ],
    name="made",
)


def made(kind: Any = EmbeddingPairs, **options: Any) -> tuple[Any, Any]:
    pretrained = find_pretrained("tiny:bert")
    task = kind(load_tokenizer(pretrained), **{"pooling": "mean", "normalize": False, **options})
    torch.manual_seed(0)
    return load_model(pretrained, auto_class="AutoModel", device="cpu"), task


@pytest.mark.parametrize("padding", ["right", "none"])
@pytest.mark.parametrize("kind", [EmbeddingPairs, EmbeddingTriplets])
def test_vectors_of_a_batch_equal_those_of_each_text_alone(kind: Any, padding: Any) -> None:
    model, task = made(kind, padding=padding)
    single = Embedding(task.tokenizer, pooling="mean", normalize=False)
    model = model.double()
    examples = task.encode(ROWS, **OPTIONS).examples
    batch = task.collate(examples, "cpu")
    outputs = task.outputs(model, batch)
    assert list(outputs.counts) == [len(task.roles)] * 6 and batch.weights.sum() == outputs.weights.sum()
    wanted = []
    for i in range(6):
        for role in task.roles:
            one = Rows.from_dicts([{"text": ROWS.columns[role][i]}], name="one")
            alone = single.encode(one, **OPTIONS).examples
            wanted.append(single.outputs(model, single.collate(alone, "cpu")).values[0])
    torch.testing.assert_close(outputs.values, torch.stack(wanted), rtol=1e-9, atol=1e-12)
    reference = task.reference_outputs(model, examples, "cpu")
    torch.testing.assert_close(reference.values, outputs.values, rtol=1e-9, atol=1e-12)
    chosen = [4, 1]
    part = task.outputs(model, batch.rows(chosen))
    count = len(task.roles)
    torch.testing.assert_close(part.values.unflatten(0, (-1, count)), outputs.values.unflatten(0, (-1, count))[chosen])


def test_too_long_texts_are_cut_alone_and_dropped_with_their_row() -> None:
    _, task = made()
    rows = Rows.from_dicts([{"anchor": "ab", "positive": "c" * 50}, {"anchor": "d", "positive": "e"}], name="made")
    cut = task.encode(rows, max_length=10, too_long="truncate", training=False)
    assert [e.sizes for e in cut.examples] == [(2, 10), (1, 1)]
    (where,) = cut.ledger.left_out.values()
    assert where.tolist() == [0] and cut.ledger.report()["tokens"] == 14
    dropped = task.encode(rows, max_length=10, too_long="drop", training=False)
    assert [e.row for e in dropped.examples] == [1] and list(dropped.ledger.lengths) == [2]


def test_parity_gate_compares_rows_and_finds_swapped_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The deliberate fault: the texts of a batch in another order. Long rows are cut so that some fit."""
    import peftlab.tasks.embedding as module

    model, task = made()
    planned = planned_modules(model, peft_type=task.spec.peft_type, targets="all-linear")
    adapted = inject(model, "lora", peft_type=task.spec.peft_type, rank=4, alpha=8.0)
    long = Rows.from_dicts([{"anchor": f"{i} " * 150, "positive": f"{i}{i} " * 120} for i in range(6)], name="made")
    examples = task.encode(long, max_length=512, too_long="error", training=True).examples
    options: dict[str, Any] = {"planned": planned, "kernels": "auto", "device": "cpu", "where": str}
    report = check_parity(adapted, task, examples, **options)
    assert report.rows >= 3 and report.loss_fast > 0.01 and report.num_zero_gradients < report.num_parameters
    right = module.collate_texts

    def swapped(examples: Any, **options: Any) -> Any:
        batch = right(examples, **options)
        turned = torch.arange(len(batch.input_ids)).roll(1)
        return replace(batch, inputs={name: tensor[turned] for name, tensor in batch.inputs.items()})

    monkeypatch.setattr(module, "collate_texts", swapped)
    with pytest.raises(VerificationError, match="the training path"):
        check_parity(adapted, task, examples, **options)


def test_bench_measures_rows_of_several_texts(tmp_path: Path) -> None:
    _, task = made(EmbeddingTriplets)
    np.savez(tmp_path / "texts.npz", ids=np.arange(3, 100, dtype=np.int32), labels=np.full(97, -1))
    rows = text_examples(tmp_path / "texts.npz", rows=4, length=30, task=task)
    assert [(len(e), e.sizes, e.row) for e in rows] == [(30, (10, 10, 10), i) for i in range(4)]


def test_scores_are_read_and_scaled() -> None:
    _, task = made(EmbeddingScores, score_range=(0.0, 5.0), objective=Objective("cosine"))
    pairs = [{"sentence1": "a", "sentence2": "b", "score": score} for score in ("5", 2.5, 0)]
    examples = task.encode(Rows.from_dicts(pairs, name="made"), **OPTIONS).examples
    assert [e.label for e in examples] == [1.0, 0.5, 0.0]


PAIRS, SCORES = {"anchor": "a", "positive": "b"}, {"sentence1": "a", "sentence2": "b", "score": "s"}


@pytest.mark.parametrize(
    ("columns", "rows", "sections", "message"),
    [
        (PAIRS, [{"a": "x", "c": "y"}, {"a": "z", "c": "y"}], {}, "no column 'b'"),
        (PAIRS, [{"a": "x", "b": " "}], {}, r"rows\.jsonl:1: the positive is empty"),
        (PAIRS, [{"a": "x", "b": ["y"]}], {}, r"rows\.jsonl:1: expected text, found \['y'\]"),
        (PAIRS, [{"a": f"x {i}", "b": "y"} for i in range(4)], {}, "there are no negatives"),
        (PAIRS, [{"a": "x", "b": "y"}], {"train": {"batch_size": 1}}, "one row per step has no other row"),
        (PAIRS, [{"a": "x", "b": "y"}], {"train": {"objective": "cosine"}}, "expected in_batch for rows with anchor"),
        (PAIRS, [{"a": "x", "b": "y"}], {"train": {"margin": 0.2}}, "has no effect"),
        (
            PAIRS,
            [{"a": f"x {i}", "b": f"{i}"} for i in range(4)],
            {"train": {"matryoshka": [128]}},
            "found the width 128",
        ),
        ({**PAIRS, "score": "s"}, [{"a": "x"}], {}, "has the columns sentence1, sentence2, score"),
        (SCORES, [{"a": "x", "b": "y", "s": 4}], {}, r"the score 4 is outside -1\.\.1.*data\.score_range"),
        (SCORES, [{"a": "x", "b": "y", "s": "high"}], {}, "expected a finite number in the column 's', found 'high'"),
        (SCORES, [{"a": "x", "b": "y", "s": None}], {}, "no number in the column"),
        (SCORES, [{"a": "x", "b": "y", "s": 1}], {"train": {"embedding_scale": 9}}, "train.objective: cosine"),
    ],
)
def test_bad_input_is_one_clear_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    columns: dict[str, str],
    rows: list[dict[str, Any]],
    sections: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    good = [{"a": f"good {i}", "b": f"fine {i}", "s": 0.5} for i in range(4)]
    every = rows if len(rows) > 1 else [*rows, *good]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in every))
    document = {
        "task": "embedding",
        "model": {"name": "tiny:bert"},
        "data": {"train": "rows.jsonl", "columns": columns},
    }
    with pytest.raises(PeftlabError, match=message):
        peftlab.check(document | sections, progress=SilentProgress())
