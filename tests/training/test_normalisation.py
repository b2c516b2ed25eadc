"""Contract C3: for any split, the loss of a step is its sum over trained tokens divided once by their number.

The reference has no batches: each row alone and unpadded, PEFT's own layers, all logits, float64. A step is the sum
over its rows divided by their total weight. The weights of the model do not move, so every row is computed once.
Packed steps are also compared with all their rows in one padded batch.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from peftlab.adapters import HeadLoss
from peftlab.adapters.fused import fusion_report, set_kernels
from peftlab.data import BatchPlan, Rows
from peftlab.data.chat import Formatter
from peftlab.tasks import Batch, Example, collate_packed
from peftlab.tasks.causal_lm import CausalLM
from peftlab.tasks.classification import Labels
from peftlab.tasks.seq_cls import SequenceClassification
from peftlab.training import loop as loop_module
from peftlab.training.loop import LoopSettings, TrainingLoop
from peftlab.training.metrics_log import MetricsLog, read_metrics
from peftlab.training.progress import SilentProgress

# The head is a target too, so that PEFT's own path computes its logits.
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
LM_MODEL = {"dtype": "float64", "rank": 2, "targets": TARGETS}
CLASS_WEIGHTS = {"mid": 1.0, "neg": 0.3, "pos": 7.1}
NAMES = list(CLASS_WEIGHTS)

Gradient = dict[str, Tensor]
# The gradients that the optimizer got in each step, and the metrics of the step.
Steps = list[tuple[Gradient, dict[str, Any]]]


class Seen(SilentProgress):
    """What the loop reports on a rank that writes no metrics."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def step(self, step: int, values: Any) -> None:
        self.seen.append(dict(values))


class Lab:
    """One model, and the real loop over rows of chosen shapes; ``row_sum`` is the reference."""

    task: Any
    kernels = "auto"
    loss_sum: Callable[..., Tensor] | None = None  # of the loop; None: the task's own

    def __init__(self, model: Any, accelerator: Any, folder: Path) -> None:
        self.model, self._accelerator, self._folder = model, accelerator, folder
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._start = {n: p.detach().clone() for n, p in self.trained.items()}
        self._known: dict[Any, tuple[Gradient, float]] = {}
        self._runs = 0

    def rows(self, shapes: Any) -> Rows:
        raise NotImplementedError

    def share(self, shape: Any) -> float:
        """What a row adds to the divisor of its step."""
        raise NotImplementedError

    def row_sum(self, shape: Any, ids: Tensor) -> Tensor:
        """Summed loss of one row, ids [1, T]."""
        raise NotImplementedError

    def steps(self, shapes: Any, plan: dict[str, Any], lr: float = 0.0) -> Steps:
        """Trains, then puts the weights back."""
        rows, gradients, progress = self.rows(shapes), [], Seen()
        self._runs += 1
        path = self._folder / f"{self._runs}.jsonl"
        train = self.task.encode(rows, max_length=512, too_long="error", training=True)
        loop = TrainingLoop(
            model=self.model,
            task=self.task,
            train=train.examples,
            plan=BatchPlan(train.lengths, **plan),
            settings=LoopSettings(lr=lr, max_grad_norm=0.0, schedule="constant", warmup=0),
            accelerator=self._accelerator,
            folder=self._folder,
            log=MetricsLog(path),
            progress=progress,
            where=rows.where,
            loss_sum=self.loss_sum,
        )

        def take(optimizer: Any, args: Any, kwargs: Any) -> None:
            gradients.append({n: p.grad.clone() for n, p in self.trained.items()})

        loop._inner_optimizer().register_step_pre_hook(take)
        loop.run()
        self.fusion = fusion_report(self.model)
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(self._start[name])
        records = read_metrics(path) if self._accelerator.is_main_process else progress.seen
        return list(zip(gradients, records, strict=True))

    def check(self, shapes: Any, plan: dict[str, Any]) -> None:
        self.assert_right(shapes, plan, self.steps(shapes, plan))

    def assert_right(self, shapes: Any, plan: dict[str, Any], got: Steps) -> None:
        examples, steps = self.planned(shapes, plan)
        want = []
        for chosen in steps:
            sums = [self._row(shapes[i], examples[i].ids) for i in chosen]
            weight = sum(self.share(shapes[i]) for i in chosen)
            gradient = {n: sum(s[0][n] for s in sums) / weight for n in self.trained}
            want.append((gradient, {"loss": sum(s[1] for s in sums) / weight}))
        assert_same(got, want)

    def planned(self, shapes: Any, plan: dict[str, Any]) -> tuple[list[Example], list[list[int]]]:
        """The examples, and the indices of those of each step."""
        examples = self.task.encode(self.rows(shapes), max_length=512, too_long="error", training=True).examples
        order = BatchPlan([len(e) for e in examples], **plan)
        planned = map(order.step, range(order.total_steps))
        steps = [[int(i) for part in step.micro_batches for i in part] for step in planned]
        first_epoch = [i for chosen in steps for i in chosen][: len(examples)]
        assert sorted(first_epoch) == list(range(len(examples))), "the plan loses a row, and the reference with it"
        return examples, steps

    def _row(self, shape: Any, ids: np.ndarray) -> tuple[Gradient, float]:
        key = (shape, ids.tobytes())
        if key not in self._known:
            set_kernels(self.model, "reference")
            loss = self.row_sum(shape, torch.tensor(ids, dtype=torch.int64)[None])
            grads = torch.autograd.grad(loss, list(self.trained.values()))
            set_kernels(self.model, self.kernels)
            self._known[key] = dict(zip(self.trained, grads, strict=True)), float(loss.detach())
        return self._known[key]


def assert_same(got: Steps, want: Steps, tolerance: float = 1e-9) -> None:
    assert len(got) == len(want)
    for number, ((gradient, record), (right, reported)) in enumerate(zip(got, want, strict=True)):
        assert record["loss"] == pytest.approx(reported["loss"], rel=tolerance), f"loss of step {number}"
        assert gradient.keys() == right.keys()
        largest = max(float(g.abs().max()) for g in right.values())
        assert largest > 0
        for name, value in right.items():
            # If a sum cancels to nothing (attention to a single token), only rounding is left.
            allowed = tolerance * (float(value.abs().max()) + 1e-5 * largest)
            assert float((gradient[name] - value).abs().max()) <= allowed, f"{name} of step {number}"


class LanguageLab(Lab):
    """Shapes are (tokens before the answer, trained tokens)."""

    def __init__(self, model: Any, tokenizer: Any, accelerator: Any, folder: Path, kernels: str = "auto") -> None:
        exact_norms(model)
        super().__init__(model, accelerator, folder)
        formatter = Formatter(tokenizer, columns={}, template=None, available=["prompt", "completion"])
        self.task, self.kernels = CausalLM(tokenizer, formatter, head_loss=HeadLoss(kernels)), kernels
        set_kernels(model, kernels)

    def rows(self, shapes: Any) -> Rows:
        # One byte is one token; the end of the text is a trained one.
        texts = [
            {"prompt": letters(before, i), "completion": letters(trained - 1, before + i) + "<|im_end|>"}
            for i, (before, trained) in enumerate(shapes)
        ]
        return Rows.from_dicts(texts, name="a.csv")

    def share(self, shape: Any) -> float:
        return float(shape[1])

    def row_sum(self, shape: Any, ids: Tensor) -> Tensor:
        assert ids.shape[1] == sum(shape)
        labels = ids[0].clone()
        labels[: shape[0]] = -100
        return F.cross_entropy(self.model(input_ids=ids).logits[0, :-1], labels[1:], reduction="sum")

    def assert_as_one_padded_batch(self, shapes: Any, plan: dict[str, Any], got: Steps) -> None:
        """Compares each step with the plain mean over the labels of all its rows."""
        examples, steps = self.planned(shapes, plan)
        set_kernels(self.model, "reference")
        want = []
        for chosen in steps:
            inputs = padded([(shapes[i], examples[i]) for i in chosen])
            labels = inputs.pop("labels")
            loss = F.cross_entropy(self.model(**inputs).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
            grads = torch.autograd.grad(loss, list(self.trained.values()))
            want.append((dict(zip(self.trained, grads, strict=True)), {"loss": float(loss.detach())}))
        set_kernels(self.model, self.kernels)
        assert_same(got, want)


def padded(rows: list[tuple[Any, Example]]) -> dict[str, Tensor]:
    """Rows of one batch in the form of transformers, with labels made from their shapes."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(e.ids, dtype=torch.int64) for _, e in rows], batch_first=True)
    labels = torch.full_like(ids, -100)
    for label, row, (shape, e) in zip(labels, ids, rows, strict=True):
        label[shape[0] : len(e)] = row[shape[0] : len(e)]
    lengths = torch.tensor([len(e) for _, e in rows])[:, None]
    return {"input_ids": ids, "labels": labels, "attention_mask": (torch.arange(ids.shape[1]) < lengths).long()}


class ClassLab(Lab):
    """Shapes are (tokens, class)."""

    def __init__(self, tiny: Any, tokenizer: Any, accelerator: Any, folder: Path) -> None:
        self.task = SequenceClassification(tokenizer, labels=Labels(NAMES, class_weights=CLASS_WEIGHTS))
        super().__init__(tiny("tiny:bert", dtype="float64", **self.task.model_kwargs()), accelerator, folder)

    def rows(self, shapes: Any) -> Rows:
        return Rows.from_dicts([{"text": letters(n, i), "label": name} for i, (n, name) in enumerate(shapes)], name="b")

    def share(self, shape: Any) -> float:
        return CLASS_WEIGHTS[shape[1]]

    def row_sum(self, shape: Any, ids: Tensor) -> Tensor:
        weight = torch.tensor([CLASS_WEIGHTS[n] for n in NAMES], dtype=torch.float64)
        label = torch.tensor([NAMES.index(shape[1])])
        return F.cross_entropy(self.model(input_ids=ids).logits, label, weight=weight, reduction="sum")


def letters(count: int, seed: int) -> str:
    return "".join(chr(97 + (seed + i * i) % 26) for i in range(count))


def exact_norms(model: Any) -> None:
    """Llama's norms compute in float32 in every model. In float64 their rounding would exceed 1e-9."""
    for parent in list(model.modules()):
        for name, norm in list(parent.named_children()):
            if type(norm).__name__ == "LlamaRMSNorm":
                exact = nn.RMSNorm(norm.weight.shape[0], eps=norm.variance_epsilon)
                exact.weight = norm.weight
                setattr(parent, name, exact)


def fresh_accelerator() -> Iterator[Any]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


# Hypothesis runs a test many times within one setup, so no fixture here is per test.
module_accelerator = pytest.fixture(scope="module", name="module_accelerator")(fresh_accelerator)


@pytest.fixture(scope="module")
def labs(tiny: Any, tokenizer_of: Any, module_accelerator: Any, tmp_path_factory: Any) -> dict[str, Lab]:
    folder = partial(tmp_path_factory.mktemp, "lab")
    made = {
        kernels: LanguageLab(
            tiny("tiny:llama", **LM_MODEL), tokenizer_of("tiny:llama"), module_accelerator, folder(), kernels
        )
        for kernels in ("auto", "reference")
    }
    return {**made, "classes": ClassLab(tiny, tokenizer_of("tiny:bert"), module_accelerator, folder())}


@st.composite
def plans(draw: st.DrawFn, *, packed: bool = False) -> dict[str, Any]:
    size = draw(st.sampled_from(["batch_size", "batch_tokens"]))
    # There are fewer packs than rows. With as many of them in a step, most epochs would be one step.
    most, windows = (2, 3) if packed else (5, 4)
    plan: dict[str, Any] = {
        size: draw(st.integers(1, most) if size == "batch_size" else st.integers(1, 60)),
        "accumulate": draw(st.integers(1, windows)),
        "epochs": draw(st.sampled_from([1.0, 1.5])),
        "seed": draw(st.integers(0, 3)),
    }
    if packed:
        # From less than one long row, which is then alone in its pack, to several rows.
        return plan | {"packing": draw(st.integers(8, 48))}
    plan["grouping"] = draw(st.sampled_from(["none", "step", "epoch"]))
    plan["split_cost"] = draw(st.sampled_from([0, 8, 64]))
    if plan["grouping"] != "none":
        plan["most_tokens"] = draw(st.none() | st.integers(1, 60))
    return plan


# One trained token next to many: a mean of means is far from the mean.
TRAINED = st.just(1) | st.integers(1, 9)
TEXT = st.tuples(st.integers(1, 12), TRAINED)
TEXTS = st.lists(TEXT, min_size=1, max_size=9)
# Enough for several packs of several rows.
MORE_TEXTS = st.lists(TEXT, min_size=5, max_size=11)
CLASSIFIED = st.lists(st.tuples(st.integers(1, 16), st.sampled_from(NAMES)), min_size=1, max_size=9)
UNEVEN = [(3, 1), (9, 9), (1, 4), (6, 1), (2, 7), (12, 2), (5, 1), (4, 8), (7, 3)]
# Two micro-batches a step; the last of 5 steps is one row.
PARTIAL = {"batch_size": 1, "accumulate": 2, "grouping": "none"}
# Three packs, then one; each holds two or three rows.
PACKED_PARTIAL = {"batch_size": 1, "accumulate": 3, "packing": 24}


@pytest.mark.parametrize("kernels", ["auto", "reference"], ids=["fused", "peft"])
@settings(max_examples=40, deadline=None)
@given(shapes=TEXTS, plan=plans())
@example(shapes=UNEVEN, plan=PARTIAL)
@example(shapes=UNEVEN, plan={"batch_tokens": 1000, "grouping": "step", "split_cost": 0})
def test_step_is_the_mean_over_trained_tokens_for_any_split(labs: Any, kernels: str, shapes: Any, plan: Any) -> None:
    lab = labs[kernels]
    lab.check(shapes, plan)
    # The fused loss enters the head without its forward, which last ran for the reference.
    slow = [name for name in lab.fusion.slow if not name.endswith("lm_head")]
    assert len(slow) == (0 if kernels == "auto" else 14), str(lab.fusion)


@pytest.mark.parametrize("kernels", ["auto", "reference"], ids=["fused", "peft"])
@settings(max_examples=40, deadline=None)
@given(shapes=MORE_TEXTS, plan=plans(packed=True))
@example(shapes=UNEVEN, plan=PACKED_PARTIAL)
@example(shapes=UNEVEN, plan={"batch_tokens": 25, "accumulate": 2, "packing": 24})
@example(shapes=UNEVEN, plan={"batch_size": 1, "packing": 1000})
def test_step_is_the_mean_over_trained_tokens_for_any_packing(labs: Any, kernels: str, shapes: Any, plan: Any) -> None:
    lab = labs[kernels]
    got = lab.steps(shapes, plan)
    lab.assert_right(shapes, plan, got)
    lab.assert_as_one_padded_batch(shapes, plan, got)


@settings(max_examples=40, deadline=None)
@given(shapes=CLASSIFIED, plan=plans())
@example(shapes=[(n, NAMES[n % 3]) for n in range(1, 10)], plan=PARTIAL)
def test_step_is_the_mean_weighted_by_class_for_any_split(labs: Any, shapes: Any, plan: Any) -> None:
    labs["classes"].check(shapes, plan)


def divide_by(patch: Any, weight_of: Callable[[Any, Any, float], float]) -> None:
    """A loop that divides its steps by something else than the weight of their rows."""
    right = TrainingLoop._accumulate
    patch.setattr(
        TrainingLoop, "_accumulate", lambda self, rows, weight: right(self, rows, weight_of(self, rows, weight))
    )


def mean_of_means(patch: Any) -> None:
    right = CausalLM.loss_sum
    patch.setattr(CausalLM, "loss_sum", lambda self, model, batch: right(self, model, batch) / batch.trained.sum())
    divide_by(patch, lambda loop, rows, weight: len(rows))


def all_tokens(patch: Any) -> None:
    divide_by(patch, lambda loop, rows, weight: sum(len(e) for part in rows for e in part))


def size_of_a_full_step(patch: Any) -> None:
    """Every window counts as if it had as many rows, or packs, as a full one."""

    def of_a_full_step(loop: Any, rows: Any, weight: float) -> float:
        held = len(rows) if loop._plan.packed else sum(map(len, rows))
        return weight * loop._plan._batch_size * loop._plan._accumulate / held

    divide_by(patch, of_a_full_step)


def forgotten_world(patch: Any) -> None:
    divide_by(patch, lambda loop, rows, weight: weight * loop._accelerator.num_processes)


def own_divisor(patch: Any) -> None:
    """Each rank divides by the weight of its own rows, and the ranks are averaged."""

    def own(loop: Any, rows: Any, weight: float) -> float:
        world = loop._accelerator.num_processes
        return world * sum(e.weight for part in rows[loop._accelerator.process_index :: world] for e in part)

    divide_by(patch, own)


def idle_rank_trains(patch: Any) -> None:
    """A rank without a micro-batch adds the first one again."""
    right = TrainingLoop._accumulate

    def again(self: Any, rows: Any, weight: float) -> Any:
        return right(self, [*rows, *rows[: max(0, self._accelerator.num_processes - len(rows))]], weight)

    patch.setattr(TrainingLoop, "_accumulate", again)


def full_packs(patch: Any) -> None:
    divide_by(patch, lambda loop, rows, weight: len(rows) * loop._plan._packing)


def change_packs(patch: Any, changes: Callable[[Batch], dict[str, Any]]) -> None:
    """A loop that gives the model wrong tensors for its packs."""

    def changed(examples: Any, *, device: Any) -> Batch:
        batch = collate_packed(examples, device=device)
        changed = changes(batch)
        trained = changed.pop("trained", batch.trained)
        return dataclasses.replace(batch, inputs=batch.inputs | changed, trained=trained)

    patch.setattr(loop_module, "collate_packed", changed)


def positions_go_on(patch: Any) -> None:
    change_packs(patch, lambda batch: {"position_ids": torch.arange(batch.input_ids.shape[1])[None]})


def documents_see_each_other(patch: Any) -> None:
    """Positions restart, but transformers separates documents by them only without a mask."""
    change_packs(patch, lambda batch: {"attention_mask": torch.ones_like(batch.input_ids)})


def first_tokens_trained(patch: Any) -> None:
    change_packs(patch, lambda batch: {"trained": batch.trained | (batch.inputs["position_ids"] == 0)})


FAULTS = {
    f.__name__: f
    for f in (
        mean_of_means,
        all_tokens,
        size_of_a_full_step,
        forgotten_world,
        own_divisor,
        idle_rank_trains,
        full_packs,
        positions_go_on,
        documents_see_each_other,
        first_tokens_trained,
    )
}


@pytest.mark.parametrize(
    ("fault", "step"), [("mean_of_means", 0), ("all_tokens", 0), ("size_of_a_full_step", 4)], ids=str
)
def test_step_with_a_wrong_divisor_is_caught(labs: Any, monkeypatch: pytest.MonkeyPatch, fault: str, step: int) -> None:
    FAULTS[fault](monkeypatch)
    with pytest.raises(AssertionError, match=f"loss of step {step}"):
        labs["auto"].check(UNEVEN, PARTIAL)


@pytest.mark.parametrize(
    ("fault", "step"),
    [
        ("mean_of_means", 0),
        ("all_tokens", 0),
        ("full_packs", 0),
        ("size_of_a_full_step", 1),
        ("positions_go_on", 0),
        ("documents_see_each_other", 0),
        ("first_tokens_trained", 0),
    ],
    ids=str,
)
def test_step_with_a_fault_of_packing_is_caught(
    labs: Any, monkeypatch: pytest.MonkeyPatch, fault: str, step: int
) -> None:
    lab = labs["auto"]
    FAULTS[fault](monkeypatch)
    got = lab.steps(UNEVEN, PACKED_PARTIAL)
    assert [record["micro_batches"] for _, record in got] == [3, 1]
    for compare in (lab.assert_right, lab.assert_as_one_padded_batch):
        with pytest.raises(AssertionError, match=f"loss of step {step}"):
            compare(UNEVEN, PACKED_PARTIAL, got)


def test_step_with_a_wrong_gradient_and_a_right_loss_is_caught(labs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss and the gradient are each compared on their own."""
    right = CausalLM.loss_sum

    def mean(self: Any, model: Any, batch: Any) -> Any:
        loss = right(self, model, batch)
        share = loss / batch.trained.sum()
        return loss.detach() + share - share.detach()

    monkeypatch.setattr(CausalLM, "loss_sum", mean)
    with pytest.raises(AssertionError, match=r"lora_A.* of step 0"):
        labs["auto"].check(UNEVEN, PARTIAL)


RANK = """
import sys
import pytest
import torch
from pathlib import Path
from accelerate import Accelerator
from conftest import _tiny
from test_normalisation import FAULTS, LM_MODEL, RANK_CASES, LanguageLab
from peftlab.models import find_pretrained, load_tokenizer

folder = Path(sys.argv[1])
accelerator = Accelerator(cpu=True)  # first, as train does: a model has to load on every rank of a process group
model = _tiny("tiny:llama", **LM_MODEL)
lab = LanguageLab(model, load_tokenizer(find_pretrained("tiny:llama")), accelerator, folder)
assert accelerator.num_processes == 2
found = {}
for name, (fault, shapes, plan, lr) in RANK_CASES.items():
    with pytest.MonkeyPatch.context() as patch:
        if fault:
            FAULTS[fault](patch)
        found[name] = lab.steps(shapes, plan, lr)
found["drawn"] = [(shapes, plan, lab.steps(shapes, plan)) for shapes, plan in torch.load(folder / "drawn.pt")]
torch.save(found, folder / f"{accelerator.process_index}.pt")
"""

ONE_BY_ONE = {"batch_size": 1, "grouping": "none"}
# Name -> (fault, rows, plan, learning rate).
RANK_CASES: dict[str, tuple[str | None, Any, dict[str, Any], float]] = {
    "more micro-batches than ranks": (None, UNEVEN[:4], {**ONE_BY_ONE, "accumulate": 4}, 0.0),
    "an odd number, then one": (None, UNEVEN[:4], {**ONE_BY_ONE, "accumulate": 3}, 0.0),
    "fewer than ranks": (None, UNEVEN[:3], {"batch_size": 3}, 0.0),
    "cut by cost": (None, UNEVEN, {"batch_size": 8, "split_cost": 0, "epochs": 2}, 0.0),
    "mean_of_means": ("mean_of_means", UNEVEN, {**ONE_BY_ONE, "accumulate": 4}, 0.0),
    "forgotten_world": ("forgotten_world", UNEVEN, {**ONE_BY_ONE, "accumulate": 4}, 0.0),
    "moving weights": (None, UNEVEN, {"batch_size": 2, "accumulate": 2, "epochs": 2}, 1e-2),
    "an odd number of packs, then one": (None, UNEVEN, PACKED_PARTIAL, 0.0),
    "one pack for both ranks": (None, UNEVEN, {"batch_size": 2, "packing": 1000}, 0.0),
    "packs of so many tokens": (None, UNEVEN, {"batch_tokens": 25, "accumulate": 2, "packing": 24}, 0.0),
    "own_divisor": ("own_divisor", UNEVEN, {**PACKED_PARTIAL, "accumulate": 2}, 0.0),
    "idle_rank_trains": ("idle_rank_trains", UNEVEN, {"batch_size": 2, "packing": 1000}, 0.0),
    "positions_go_on": ("positions_go_on", UNEVEN, PACKED_PARTIAL, 0.0),
    "moving weights, packed": (None, UNEVEN, {**PACKED_PARTIAL, "epochs": 3}, 1e-2),
}


def drawn(count: int, *, packed: bool) -> list[tuple[Any, dict[str, Any]]]:
    """Rows and plans for the ranks, which cannot run hypothesis. They are the same in every run of the tests."""
    cases: list[tuple[Any, dict[str, Any]]] = []

    @settings(max_examples=count, derandomize=True, database=None)
    @given(shapes=MORE_TEXTS, plan=plans(packed=packed))
    def take(shapes: Any, plan: dict[str, Any]) -> None:
        cases.append((shapes, plan))

    take()
    return cases


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: Any, process: Any) -> list[dict[str, Any]]:
    """The results of two processes over gloo for ``RANK_CASES``, and for each ``drawn`` case with its rows and plan."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(drawn(6, packed=False) + drawn(24, packed=True), folder / "drawn.pt")
    return two_processes(process, folder, RANK)


def two_processes(process: Any, folder: Path, script: str) -> list[dict[str, Any]]:
    """What ``script`` wrote to RANK.pt in the folder, its argument. It runs as two ranks over gloo."""
    (folder / "rank.py").write_text(script)
    tests = Path(__file__).parents[1]
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": os.pathsep.join(map(str, [tests.parent, tests.parent / "kernels", tests, Path(__file__).parent])),
    }
    process.run_ranks([folder / "rank.py", folder], env=env)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", [name for name, case in RANK_CASES.items() if not case[0] and not case[3]])
def test_step_on_two_ranks_is_the_mean_of_the_whole_step(labs: Any, ranks: Any, name: str) -> None:
    _, shapes, plan, _ = RANK_CASES[name]
    for results in ranks:
        labs["auto"].assert_right(shapes, plan, results[name])
        labs["auto"].assert_as_one_padded_batch(shapes, plan, results[name])


def test_step_on_two_ranks_is_the_mean_for_drawn_plans(labs: Any, ranks: Any) -> None:
    packs = set()
    for results in ranks:
        for shapes, plan, got in results["drawn"]:
            try:
                labs["auto"].assert_right(shapes, plan, got)
                labs["auto"].assert_as_one_padded_batch(shapes, plan, got)
            except AssertionError as error:
                raise AssertionError(f"{error} with shapes={shapes}, plan={plan}") from error
            packs |= {record["micro_batches"] for _, record in got if "packing" in plan}
    assert {1, 2, 3} <= packs, "no step in which a rank had no pack, as many as the other, or fewer"


@pytest.mark.parametrize(("name", "num_steps"), [("moving weights", 6), ("moving weights, packed", 6)])
def test_step_on_two_ranks_trains_as_one_process(labs: Any, ranks: Any, name: str, num_steps: int) -> None:
    _, shapes, plan, lr = RANK_CASES[name]
    one = labs["auto"].steps(shapes, plan, lr)
    assert len(one) == num_steps
    for results in ranks:
        assert_same(results[name], one)


@pytest.mark.parametrize("name", [name for name, case in RANK_CASES.items() if case[0]])
def test_step_with_a_fault_on_two_ranks_is_caught(labs: Any, ranks: Any, name: str) -> None:
    _, shapes, plan, _ = RANK_CASES[name]
    for compare in (labs["auto"].assert_right, labs["auto"].assert_as_one_padded_batch):
        with pytest.raises(AssertionError, match="loss of step 0"):
            compare(shapes, plan, ranks[0][name])


@pytest.mark.slow
def test_step_equals_transformers_trainer(
    tiny: Any, tokenizer_of: Any, module_accelerator: Any, tmp_path: Path
) -> None:
    """The reference is ``num_items_in_batch`` on one process, PEFT's own layers, float32. The last of 3 steps has 3
    micro-batches."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model = tiny("tiny:llama", **LM_MODEL | {"dtype": "float32"})
    lab = LanguageLab(model, tokenizer_of("tiny:llama"), module_accelerator, tmp_path, "reference")
    shapes = [*UNEVEN, *UNEVEN[:5], *UNEVEN[2:9]]
    plan = {"batch_size": 2, "accumulate": 4, "grouping": "none"}
    ours = lab.steps(shapes, plan)
    examples, _ = lab.planned(shapes, plan)
    order = BatchPlan([len(e) for e in examples], **plan)
    parts = [part for i in range(order.total_steps) for part in order.step(i).micro_batches]
    assert [len(parts), len(ours)] == [11, 3]

    losses: list[float] = []
    theirs: Steps = []

    class InOrder(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

    class Take(TrainerCallback):  # type: ignore[misc]
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            theirs.append(({n: p.grad.clone() for n, p in lab.trained.items()}, {"loss": sum(losses)}))
            losses.clear()

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        average_tokens_across_devices=True,
        num_train_epochs=1,
        learning_rate=0.0,
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    rows = [(shapes[i], examples[i]) for part in parts for i in part]
    InOrder(model=model, args=arguments, train_dataset=rows, data_collator=padded, callbacks=[Take()]).train()
    assert_same(ours, theirs, 1e-6)
