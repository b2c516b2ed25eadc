"""Contract C3 for losses over a whole step: any cut into micro-batches gives the loss and gradient of the step in one graph.

The reference has no cache of gradients: all vectors of the step in one graph, and the loss of sentence-transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_normalisation import two_processes
from torch import Tensor

from peftlab.adapters import inject
from peftlab.data import BatchPlan, Rows
from peftlab.models import find_pretrained, load_model, load_tokenizer
from peftlab.tasks.contrast import Objective
from peftlab.tasks.embedding_sets import EmbeddingPairs, EmbeddingScores, EmbeddingTriplets
from peftlab.training import loop as loop_module
from peftlab.training.loop import LoopSettings, TrainingLoop
from peftlab.training.metrics_log import MetricsLog, read_metrics
from peftlab.training.progress import SilentProgress

WORDS = ["sun", "moon", "star", "cloud", "rain", "snow", "wind", "fire", "stone", "tree", "river", "bird", "fish"]
ROWS = Rows.from_dicts(
    [
        {
            "anchor": f"{word} {'so ' * (i % 4)}",
            "positive": f"{word * 2} {i}",
            "negative": f"no {word} {'x ' * (i % 3)}",
            "sentence1": word,
            "sentence2": f"{word} of {i}",
            "score": (i * 7 % 8) / 8,
        }
        for i, word in enumerate(WORDS)
    ],
    name="made",
)
ONE = {"batch_size": 13}
SPLITS = {
    "one by one": {"batch_size": 1, "accumulate": 13, "grouping": "none"},
    "uneven": {"batch_size": 5, "accumulate": 3, "grouping": "none"},
    "by cost": {"batch_size": 13, "split_cost": 0},
}
TASKS: dict[str, tuple[Any, Any]] = {
    "in_batch": (EmbeddingPairs, "MultipleNegativesRankingLoss"),
    "in_batch of triplets": (EmbeddingTriplets, "MultipleNegativesRankingLoss"),
    "cosent": (EmbeddingScores, "CoSENTLoss"),
}


class Lab:
    """A tiny model in float64, and the real loop over ``ROWS``."""

    def __init__(self, name: str, accelerator: Any, folder: Path, *, dropout: float = 0.0) -> None:
        pretrained = find_pretrained("tiny:bert")
        kind, self._loss = TASKS[name]
        objective = Objective(name.split()[0])
        self.task = kind(load_tokenizer(pretrained), objective=objective, pooling="mean", normalize=False)
        torch.manual_seed(0)
        model = load_model(pretrained, auto_class="AutoModel", device="cpu", dtype="float64")
        self.model = inject(model, "lora", peft_type="FEATURE_EXTRACTION", rank=4, alpha=8, dropout=dropout)
        for parameter_name, parameter in self.model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=0.2)
            if "pooler" in parameter_name:  # unused, and processes wait for the gradients of all that is trained
                parameter.requires_grad_(False)
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.examples = self.task.encode(ROWS, max_length=64, too_long="error", training=True).examples
        self._accelerator, self._folder, self._runs = accelerator, folder, 0

    def step(self, plan: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradients of the loop's only step."""
        self._runs += 1
        path, found = self._folder / f"{self._runs}.jsonl", {}
        loop = TrainingLoop(
            model=self.model,
            task=self.task,
            train=self.examples,
            plan=BatchPlan([len(e) for e in self.examples], max_steps=1, **plan),
            settings=LoopSettings(lr=0.0, max_grad_norm=0.0, schedule="constant", warmup=0),
            accelerator=self._accelerator,
            folder=self._folder,
            log=MetricsLog(path),
            progress=SilentProgress(),
            where=ROWS.where,
        )

        def take(*_: Any) -> None:
            found.update({n: p.grad.clone() for n, p in self.trained.items()})

        loop._inner_optimizer().register_step_pre_hook(take)
        torch.manual_seed(7)
        result = loop.run()
        assert self._accelerator.num_processes > 1 or read_metrics(path)[0]["loss"] == result.last_loss
        return result.last_loss, found

    def wanted(self, plan: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
        """The same from one graph over all vectors, with the dropout masks of these micro-batches."""
        from sentence_transformers.sentence_transformer import losses

        planned = BatchPlan([len(e) for e in self.examples], max_steps=1, **plan).step(0).micro_batches
        self.model.train()
        torch.manual_seed(7)
        parts = [
            self.task.outputs(self.model, self.task.collate([self.examples[i] for i in part], "cpu")).values
            for part in planned
        ]
        count = len(self.task.roles)
        vectors = torch.cat(parts).unflatten(0, (-1, count))
        chosen = [self.examples[i] for part in planned for i in part]
        scores = torch.tensor([0.0 if e.label is None else float(e.label) for e in chosen], dtype=torch.float64)
        loss = getattr(losses, self._loss)(None).compute_loss_from_embeddings(
            [vectors[:, i] for i in range(count)], scores
        )
        gradients = torch.autograd.grad(loss, list(self.trained.values()))
        return float(loss), dict(zip(self.trained, gradients, strict=True))


def assert_same(got: tuple[float, dict[str, Tensor]], wanted: tuple[float, dict[str, Tensor]]) -> None:
    assert got[0] == pytest.approx(wanted[0], rel=1e-9)
    largest = max(float(g.abs().max()) for g in wanted[1].values())
    for name, gradient in wanted[1].items():
        assert float((got[1][name] - gradient).abs().max()) <= 1e-9 * largest, name


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", TASKS)
def test_any_cut_gives_the_step_in_one_graph(name: str, split: str, accelerator: Any, tmp_path: Path) -> None:
    lab = Lab(name, accelerator, tmp_path)
    whole = lab.wanted(ONE)
    assert_same(lab.step(ONE), whole)
    assert_same(lab.step(SPLITS[split]), whole)


@pytest.mark.parametrize("split", SPLITS)
def test_both_passes_draw_the_same_dropout_masks(split: str, accelerator: Any, tmp_path: Path) -> None:
    lab = Lab("in_batch", accelerator, tmp_path, dropout=0.3)
    got = lab.step(SPLITS[split])
    assert_same(got, lab.wanted(SPLITS[split]))
    assert got[0] != lab.wanted(ONE)[0], "the masks of one batch are others"


def test_negatives_of_the_micro_batch_alone_are_caught(
    accelerator: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deliberate faults: no cache of gradients, and other dropout masks in the second pass."""
    lab = Lab("in_batch", accelerator, tmp_path, dropout=0.3)
    wanted = lab.wanted(SPLITS["uneven"])
    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "_shared", lambda self, batches, joins: batches)
        with pytest.raises(AssertionError):
            assert_same(lab.step(SPLITS["uneven"]), wanted)
    with monkeypatch.context() as patch:
        patch.setattr(loop_module.RngState, "restore", lambda self: None)
        with pytest.raises(AssertionError):
            assert_same(lab.step(SPLITS["uneven"]), wanted)


RANK = """
import sys
import torch
from pathlib import Path
from accelerate import Accelerator
from test_contrast_steps import ONE, SPLITS, Lab

folder = Path(sys.argv[1])
accelerator = Accelerator(cpu=True)
lab = Lab("in_batch", accelerator, folder)
assert accelerator.num_processes == 2
torch.save({name: lab.step(plan) for name, plan in {"one": ONE, **SPLITS}.items()}, folder / f"{accelerator.process_index}.pt")
"""


def test_two_ranks_have_the_negatives_of_both(process: Any, accelerator: Any, tmp_path: Path) -> None:
    whole = Lab("in_batch", accelerator, tmp_path).wanted(ONE)
    for results in two_processes(process, tmp_path, RANK):
        assert results.keys() == {"one", *SPLITS}
        for got in results.values():
            assert_same(got, whole)
