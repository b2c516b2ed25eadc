"""The planned peak of a training step against the bytes that PyTorch's allocator gives, for recipes of every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from peftlab.assembly import Assembly
from peftlab.assembly.plan import make_plan
from peftlab.assembly.prepare import trainable
from peftlab.measuring.tensor_bytes import held_bytes, peak_allocated
from peftlab.ops import release_scratch
from peftlab.planning.budget import plan_disk, plan_memory
from peftlab.planning.memory import optimizer_bytes
from peftlab.planning.phantoms import stored_tensors
from peftlab.planning.rehearsal import Rehearsal
from peftlab.planning.stage import Machine, Stage, largest
from peftlab.runs import open_source
from peftlab.tasks import collate_packed
from peftlab.training.loop import LossModule

LLAMA: dict[str, Any] = {"task": "causal_lm", "model": {"name": "tiny:llama"}, "data": {"columns": {"text": "text"}}}
BERT: dict[str, Any] = {"model": {"name": "tiny:bert"}}
IMAGES: dict[str, Any] = {"task": "image_cls", "data": {"train": "sklearn:digits:train", "eval": "sklearn:digits:test"}}
RECIPES: dict[str, dict[str, Any]] = {
    "dense": LLAMA,
    "nf4": LLAMA | {"model": {"name": "tiny:llama", "quantize": "nf4"}},
    "nf4 in bfloat16": LLAMA
    | {
        "model": {"name": "tiny:llama", "quantize": "nf4", "dtype": "bfloat16", "compute_dtype": "bfloat16"},
        "train": {"precision": "bfloat16"},
    },
    "int8": LLAMA | {"model": {"name": "tiny:llama", "quantize": "int8"}},
    "bfloat16": LLAMA | {"model": {"name": "tiny:llama", "dtype": "bfloat16"}, "train": {"precision": "bfloat16"}},
    "checkpointing": LLAMA | {"train": {"gradient_checkpointing": True}},
    "packing": LLAMA | {"data": {"columns": {"text": "text"}, "packing": True, "max_length": 256}},
    "dropout": LLAMA | {"adapter": {"dropout": 0.1}},
    "no adapter": LLAMA | {"adapter": {"method": "none"}},
    "dora": LLAMA | {"adapter": {"dora": True}},
    "bottleneck": LLAMA | {"adapter": {"method": "bottleneck"}},
    "ia3": LLAMA | {"adapter": {"method": "ia3"}},
    "vera": LLAMA | {"adapter": {"method": "vera"}},
    "seq_cls": BERT | {"task": "seq_cls", "data": {"columns": {"label": "label"}}},
    "token_cls": BERT | {"task": "token_cls", "data": {"columns": {"tokens": "words", "tags": "tags"}}},
    "masked_lm": BERT | {"task": "masked_lm", "data": {"columns": {"text": "text"}}},
    "seq2seq": {
        "task": "seq2seq",
        "model": {"name": "tiny:t5"},
        "data": {"columns": {"source": "text", "target": "answer"}},
    },
    "embedding": BERT | {"task": "embedding", "data": {"columns": {"anchor": "text", "positive": "answer"}}},
    "vit": IMAGES | {"model": {"name": "tiny:vit"}, "adapter": {"method": "none"}},
    "vit with lora": IMAGES | {"model": {"name": "tiny:vit"}},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator, path = np.random.default_rng(0), tmp_path_factory.mktemp("plan") / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for index in range(80):
            words = [
                str(w) for w in generator.choice(["alpha", "beta", "gamma", "delta"], size=generator.integers(5, 20))
            ]
            row: dict[str, Any] = {"text": f"{' '.join(words)} {index}", "words": words}
            row |= {"tags": ["B-X" if len(w) == 4 else "O" for w in words], "label": ["a", "b"][index % 2]}
            file.write(json.dumps(row | {"answer": f"{words[-1]} {index}"}) + "\n")
    return path


def assembly_of(recipe: dict[str, Any], rows: Path, **train: Any) -> Assembly:
    data = {"train": str(rows), "eval_rows": 16, "max_length": 200, **recipe["data"]}
    if str(data["train"]).startswith("sklearn"):
        data = recipe["data"]
    adapter = {"rank": 4, **recipe.get("adapter", {})}
    if adapter.get("method", "lora") in ("none", "bottleneck", "ia3"):
        del adapter["rank"]
    train = {"max_steps": 3, "batch_size": 8, **recipe.get("train", {}), **train}
    values = recipe | {"data": data, "adapter": adapter, "train": train, "run": {"dir": str(rows.parent / "run")}}
    loaded, _ = open_source(values, [])
    return Assembly(loaded)


def measured_peak(assembly: Assembly) -> int:
    """Bytes of the model's tensors, AdamW's state, and the most that a real training step allocates beside them."""
    recipe, train = assembly.recipe, assembly.train
    model, *_ = trainable(assembly, assembly.model(), num_steps=3, train=train)
    model.train()
    if recipe.train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    plan = make_plan(assembly, train.lengths, packing=assembly.limit if recipe.data.packing else None)
    examples, _, _ = largest(assembly, plan)
    module = LossModule(model, assembly.task.loss_sum)

    def step() -> None:
        batch = collate_packed(examples, device="cpu") if plan.packed else assembly.task.collate(examples, "cpu")
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.train.precision == "bfloat16"):
            loss = module(batch)
        loss.backward()

    step()
    model.zero_grad(set_to_none=True)
    release_scratch()
    trained = [p for p in model.parameters() if p.requires_grad]
    state = sum(8 * p.numel() for p in trained)
    return held_bytes(t for _, t in stored_tensors(model)) + state + peak_allocated(step)


QUICK = ("dense", "nf4", "checkpointing", "seq_cls")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_planned_peak_is_within_ten_percent_of_the_allocated_bytes(name: str, rows: Path) -> None:
    assembly = assembly_of(RECIPES[name], rows)
    planned = plan_memory(assembly, Machine("cpu")).phase("training").num_bytes
    assert planned == pytest.approx(measured_peak(assembly), rel=0.1)


def test_a_dropped_term_is_caught(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assembly = assembly_of(LLAMA, rows)
    count = Rehearsal._count

    def forgets_products(self: Rehearsal, tensor: torch.Tensor, func: Any) -> None:
        if func.name() == "aten::mul.Tensor":
            self._held[tensor.untyped_storage()._cdata] = tensor
        count(self, tensor, func)

    monkeypatch.setattr(Rehearsal, "_count", forgets_products)
    planned = plan_memory(assembly, Machine("cpu")).phase("training").num_bytes
    assert planned < 0.9 * measured_peak(assembly)


@pytest.mark.slow
def test_counted_layers_equal_run_layers(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = {**LLAMA, "model": {"name": "shape:smollm2-135m"}}
    assembly = assembly_of(changed, rows, batch_size=2)
    counted = plan_memory(assembly, Machine("cpu")).phase("training").num_bytes
    monkeypatch.setattr(Stage, "is_uniform", False)
    run = plan_memory(assembly, Machine("cpu")).phase("training").num_bytes
    assert counted == pytest.approx(run, rel=0.02)


@pytest.mark.slow
def test_nf4_weights_of_a_large_model_take_the_published_bits(rows: Path) -> None:
    changed = {**LLAMA, "model": {"name": "shape:llama-3-8b", "quantize": "nf4"}}
    stage = Stage(assembly_of(changed, rows), Machine("cuda", 24 * 2**30))
    linears, others = 6_979_321_856, 1_050_939_392
    scales = linears / 64 + 4 * linears / 64 / 256  # QLoRA, arXiv:2305.14314, section 3
    assert stage.held()[0] == pytest.approx(linears / 2 + scales + 2 * others, rel=0.001)


def test_optimizer_bytes() -> None:
    assert optimizer_bytes("adamw", [5000, 100]) == (8 * 5100, 0)
    assert optimizer_bytes("adamw_8bit", [5120, 100]) == (2 * 5120 + 8 * 20 + 800, 0)
    assert optimizer_bytes("paged_adamw", [5000]) == (0, 40000)


def test_disk_counts_checkpoints(rows: Path) -> None:
    assembly = assembly_of(LLAMA, rows).derive({"run.save_every": 1, "run.keep": 2})
    stage = Stage(assembly, Machine("cpu"))
    _, trained = stage.held()
    assert plan_disk(assembly, stage) == {"adapter": trained, "checkpoints": 9 * trained}
