"""The training loop: stops that lose nothing, and resumed runs with the same bytes. test_normalisation.py has its
normalisation."""

from __future__ import annotations

import math
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from peftlab.adapters import HeadLoss, save_adapter
from peftlab.data import BatchPlan, Rows
from peftlab.data.chat import Formatter
from peftlab.data.rows import Origin
from peftlab.errors import ArtifactError, Interrupted, VerificationError
from peftlab.tasks.causal_lm import CausalLM
from peftlab.training.checkpoint import list_checkpoints
from peftlab.training.loop import LoopSettings, TrainingLoop
from peftlab.training.metrics_log import MetricsLog, read_metrics
from peftlab.training.progress import SilentProgress

QUIET = LoopSettings(max_grad_norm=0.0, schedule="constant", warmup=0, lr=1e-2)


class Recorder(SilentProgress):
    """Keeps what the loop reports, and calls back after every step."""

    def __init__(self, after_step: Callable[[int], None] | None = None) -> None:
        self.steps: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self._after_step = after_step

    def step(self, step: int, values: Any) -> None:
        self.steps.append({"step": step, **values})
        if self._after_step:
            self._after_step(step)

    def note(self, text: str) -> None:
        self.notes.append(text)


def make_rows(count: int, marked: int | None = None) -> Rows:
    """Rows of unequal length, as lines 2, 3, ... of a.csv; ``marked`` has an @ in its completion."""
    rng = np.random.default_rng(0)
    prompts = ["why " * int(rng.integers(0, 6)) + str(i) for i in range(count)]
    completions = ["because " * int(rng.integers(0, 4)) + ("@" if i == marked else "so") for i in range(count)]
    return Rows(
        name="a.csv",
        columns={"prompt": prompts, "completion": completions},
        fingerprint="",
        origins=(Origin("a.csv", "line"),),
        origin_index=np.zeros(count, dtype=np.int64),
        positions=np.arange(2, count + 2),
    )


class Bench:
    """What a loop needs, so that a test states only its subject."""

    def __init__(self, tiny: Any, tokenizer: Any, accelerator: Any, folder: Path, **options: Any) -> None:
        self.rows = make_rows(options.pop("count", 12), options.pop("marked", None))
        formatter = Formatter(tokenizer, columns={}, template=None, available=list(self.rows.columns))
        self.task: Any = CausalLM(tokenizer, formatter, head_loss=HeadLoss())
        self.train = self.task.encode(self.rows, max_length=512, too_long="error", training=True)
        self.folder = folder
        self._tiny, self._accelerator, self._options = tiny, accelerator, options

    def loop(
        self,
        settings: LoopSettings = QUIET,
        *,
        progress: Any = None,
        evaluate: Any = None,
        folder: Path | None = None,
        **plan: Any,
    ) -> TrainingLoop:
        folder = folder or self.folder
        if "batch_tokens" not in plan:
            plan = {"batch_size": 4} | plan
        self.model = self._tiny("tiny:llama", **self._options)
        torch.manual_seed(0)
        return TrainingLoop(
            model=self.model,
            task=self.task,
            train=self.train.examples,
            plan=BatchPlan(self.train.lengths, **plan),
            settings=settings,
            accelerator=self._accelerator,
            folder=folder,
            log=MetricsLog(folder / "metrics.jsonl"),
            progress=progress or SilentProgress(),
            where=self.rows.where,
            evaluate=evaluate,
            resume_hint="peftlab train RUN --resume",
        )

    def adapter_bytes(self, name: str = "out") -> bytes:
        save_adapter(self.model, self.folder / name)
        return (self.folder / name / "adapter_model.safetensors").read_bytes()

    def weights(self) -> dict[str, Any]:
        return {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}


@pytest.fixture
def bench(tiny: Any, tokenizer_of: Any, accelerator: Any, tmp_path: Path) -> Callable[..., Bench]:
    return lambda **options: Bench(tiny, tokenizer_of("tiny:llama"), accelerator, tmp_path, **options)


def test_loop_logs_learning_rate_loss_and_counts(bench: Callable[..., Bench]) -> None:
    b, recorder = bench(), Recorder()
    settings = LoopSettings(lr=3.0e-3, schedule="linear", warmup=2, max_grad_norm=1.0)
    result = b.loop(settings, progress=recorder, max_steps=5).run()
    assert [s["lr"] for s in recorder.steps] == pytest.approx([1e-3, 2e-3, 3e-3, 2e-3, 1e-3])
    assert result.steps == 5
    records = read_metrics(b.folder / "metrics.jsonl")
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5]
    assert [r["loss"] for r in records] == [s["loss"] for s in recorder.steps]
    assert [r["rows"] for r in records] == [4] * 5
    assert sum(r["trained_tokens"] for r in records[:3]) == sum(int(e.trained.sum()) for e in b.train.examples)
    assert sum(r["tokens"] for r in records) == result.tokens


@pytest.mark.parametrize("limit", [0.0, 0.25, 1e6])
def test_loop_clips_the_gradient_norm(bench: Callable[..., Bench], limit: float) -> None:
    b, recorder, norms = bench(), Recorder(), []
    settings = LoopSettings(lr=1e-3, schedule="constant", warmup=0, max_grad_norm=limit)
    loop = b.loop(settings, progress=recorder, max_steps=1)

    def take(optimizer: Any, args: Any, kwargs: Any) -> None:
        grads = [p.grad.double() for group in optimizer.param_groups for p in group["params"]]
        norms.append(float(torch.stack([g.square().sum() for g in grads]).sum().sqrt()))

    loop._inner_optimizer().register_step_pre_hook(take)
    loop.run()
    before = recorder.steps[0]["grad_norm"]
    assert before > 0.25
    assert norms[0] == pytest.approx(0.25 if limit == 0.25 else before, rel=1e-4)


@pytest.mark.parametrize(("batch_size", "marked"), [(4, 7), (12, 7), (12, 0), (12, 3), (12, 11)])
def test_loop_nan_stops_before_the_weights_change(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, tokenizer_of: Any, batch_size: int, marked: int
) -> None:
    b = bench(marked=marked)
    (at,) = tokenizer_of("tiny:llama")("@")["input_ids"]
    right, snapshots = CausalLM.loss_sum, {}

    def poisoned(self: Any, model: Any, batch: Any) -> Any:
        return right(self, model, batch) * (float("nan") if (batch.input_ids == at).any() else 1.0)

    monkeypatch.setattr(CausalLM, "loss_sum", poisoned)
    loop = b.loop(progress=Recorder(lambda step: snapshots.update({step: b.weights()})), batch_size=batch_size)
    snapshots[0] = b.weights()
    with pytest.raises(VerificationError) as caught:
        loop.run()
    bad = max(snapshots)
    for name, value in b.weights().items():
        assert torch.equal(value, snapshots[bad][name]), name
    assert f"the loss of step {bad + 1} is nan" in str(caught.value)
    assert re.search(rf"a\.csv:{marked + 2}\b", str(caught.value)), "the row with the NaN is not named"
    assert caught.value.exit_code == 6
    saved = list_checkpoints(b.folder / "checkpoints")
    assert [p.name for p in saved] == ([f"step-{bad:08d}"] if bad else [])
    assert all(str(p) in str(caught.value) for p in saved)


def test_loop_rank_without_a_micro_batch_names_the_first(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle rank computes the first micro-batch times 0, and NaN times 0 is NaN."""
    b = bench()
    right = CausalLM.loss_sum
    monkeypatch.setattr(CausalLM, "loss_sum", lambda *args: right(*args) * float("nan"))
    loop = b.loop(batch_size=12)
    idle = SimpleNamespace(
        num_processes=2, process_index=1, device="cpu", backward=torch.Tensor.backward, reduce=lambda x, reduction: x
    )
    loop._accelerator = idle
    loss, bad = loop._accumulate([b.train.examples], 1.0)
    assert math.isnan(loss) and bad == 0


def test_loop_infinite_gradient_stops_too(bench: Callable[..., Bench]) -> None:
    b = bench()
    loop = b.loop()
    before = b.weights()
    next(p for p in b.model.parameters() if p.requires_grad).register_hook(lambda g: g * float("inf"))
    with pytest.raises(VerificationError, match="the gradient norm of step 1 is"):
        loop.run()
    assert all(torch.equal(before[n], w) for n, w in b.weights().items())


def interrupt_at(step: int) -> Recorder:
    return Recorder(lambda now: os.kill(os.getpid(), signal.SIGINT) if now == step else None)


def test_loop_ctrl_c_saves_and_says_how_to_resume(bench: Callable[..., Bench]) -> None:
    b, handler = bench(), signal.getsignal(signal.SIGINT)
    recorder = interrupt_at(3)
    loop = b.loop(progress=recorder, max_steps=9)
    with pytest.raises(
        Interrupted, match=r"step 3 is saved in .*step-00000003\. Resume with: peftlab train RUN --resume"
    ):
        loop.run()
    assert [p.name for p in list_checkpoints(b.folder / "checkpoints")] == ["step-00000003"]
    assert len(recorder.steps) == 3
    assert any("Ctrl-C" in note for note in recorder.notes)
    assert signal.getsignal(signal.SIGINT) is handler


def test_loop_ctrl_c_before_the_first_step_saves_nothing(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    b, right = bench(), CausalLM.loss_sum

    def impatient(self: Any, model: Any, batch: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return right(self, model, batch)

    monkeypatch.setattr(CausalLM, "loss_sum", impatient)
    with pytest.raises(Interrupted, match="nothing to resume"):
        b.loop().run()
    assert not (b.folder / "checkpoints").exists()


def test_loop_ctrl_c_within_a_step_loses_only_that_step(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the micro-batches of step 3 are done. Neither their gradients nor their random numbers may stay."""
    b, right, calls = bench(dropout=0.3), CausalLM.loss_sum, []
    plan = {"batch_size": 2, "accumulate": 2, "grouping": "none", "max_steps": 6}
    b.loop(**plan).run()
    want = b.adapter_bytes("whole")

    def impatient(self: Any, model: Any, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return right(self, model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(CausalLM, "loss_sum", impatient)
        with pytest.raises(Interrupted, match="step 2 is saved"):
            b.loop(**plan).run()
    assert len(calls) == 5
    loop = b.loop(**plan)
    torch.manual_seed(99)
    assert loop.resume(b.folder / "checkpoints/step-00000002") == 2
    loop.run()
    assert b.adapter_bytes("resumed") == want


@pytest.mark.parametrize("stop", [3, 5])
def test_loop_resumed_run_ends_with_the_same_bytes(bench: Callable[..., Bench], stop: int) -> None:
    b = bench(dropout=0.3)
    settings = LoopSettings(lr=1e-2, schedule="cosine", warmup=2, save_every=3)
    b.loop(settings, max_steps=8).run()
    want = b.adapter_bytes("whole")
    for path in list_checkpoints(b.folder / "checkpoints"):
        assert path.name in ("step-00000003", "step-00000006")
    other = b.folder / "stopped"
    with pytest.raises(Interrupted):
        b.loop(settings, progress=interrupt_at(stop), folder=other, max_steps=8).run()
    recorder = Recorder()
    loop = b.loop(settings, folder=other, progress=recorder, max_steps=8)
    torch.manual_seed(99)
    newest = list_checkpoints(other / "checkpoints")[-1]
    assert loop.resume(newest) == stop
    loop.run()
    assert [s["step"] for s in recorder.steps] == list(range(stop + 1, 9))
    assert b.adapter_bytes("resumed") == want


def test_loop_resume_without_the_generators_is_caught(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftlab.training.checkpoint import RngState

    monkeypatch.setattr(RngState, "restore", lambda self: None)
    with pytest.raises(AssertionError):
        test_loop_resumed_run_ends_with_the_same_bytes(bench, 3)


def test_loop_damaged_checkpoint_is_refused_on_resume(bench: Callable[..., Bench]) -> None:
    b = bench()
    settings = LoopSettings(lr=1e-2, save_every=2, keep=3)
    b.loop(settings, max_steps=6).run()
    early, late = list_checkpoints(b.folder / "checkpoints")
    path = late / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(ArtifactError, match=rf"optimizer.safetensors .*resume from {early.name}"):
        b.loop(settings, max_steps=6).resume(late)


def test_loop_keeps_the_best_and_stops_after_patience(bench: Callable[..., Bench]) -> None:
    b, seen = bench(), {}
    values = iter([3.0, 2.0, 2.5, 2.0, 9.0])

    def evaluate() -> dict[str, float]:
        seen[len(seen) + 1] = b.weights()
        return {"loss": next(values)}

    recorder = Recorder()
    settings = LoopSettings(lr=1e-2, eval_every=2, best="loss", patience=2)
    loop = b.loop(settings, evaluate=evaluate, progress=recorder, max_steps=20)
    result = loop.run()
    assert (result.steps, result.stopped_early) == (8, True)
    assert (result.best_step, result.best_value) == (4, 2.0)
    assert any("stopped after step 8" in note for note in recorder.notes)
    loop.finish({"loss": 0.1})
    assert result.best_step == 4, "the last step was evaluated already"
    from safetensors.torch import load_file

    best = load_file(str(b.folder / "best/adapter_model.safetensors"))
    for name, value in seen[2].items():
        assert torch.equal(best[name.replace(".default", "")], value), name


def test_loop_keeps_the_best_of_a_metric_to_maximize(bench: Callable[..., Bench]) -> None:
    b, values = bench(), iter([0.5, 0.7, 0.6])
    settings = LoopSettings(lr=1e-2, eval_every=1, best="accuracy")
    loop = b.loop(settings, evaluate=lambda: {"accuracy": next(values)}, max_steps=4)
    assert loop.run().best_step == 2
    loop.finish({"accuracy": 0.9})
    assert loop.result.best_step == 4


def test_loop_patience_survives_a_resume(bench: Callable[..., Bench]) -> None:
    b = bench()
    settings = LoopSettings(lr=1e-2, eval_every=1, best="loss", patience=3, save_every=1)
    values = [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    whole, first, second = iter(values), iter(values), iter(values[2:])
    assert b.loop(settings, evaluate=lambda: {"loss": next(whole)}, folder=b.folder / "a", max_steps=6).run().steps == 4
    with pytest.raises(Interrupted):
        b.loop(settings, evaluate=lambda: {"loss": next(first)}, progress=interrupt_at(2), max_steps=6).run()
    loop = b.loop(settings, evaluate=lambda: {"loss": next(second)}, max_steps=6)
    loop.resume(list_checkpoints(b.folder / "checkpoints")[-1])
    result = loop.run()
    assert (result.steps, result.best_step) == (4, 1)
