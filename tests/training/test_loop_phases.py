"""A run whose steps are planned in spans: the spans of the plan, and a loop that stops at the end of one and resumes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from peftlab.adapters import HeadLoss
from peftlab.data import BatchPlan, Rows
from peftlab.data.chat import Formatter
from peftlab.tasks.causal_lm import CausalLM
from peftlab.training.checkpoint import list_checkpoints
from peftlab.training.loop import LoopSettings, TrainingLoop
from peftlab.training.metrics_log import MetricsLog
from peftlab.training.progress import SilentProgress
from peftlab.training.schedules import learning_rate

LENGTHS = [5, 9, 3, 7, 4, 6]


def rows_of(step: Any) -> list[list[int]]:
    return [part.tolist() for part in step.micro_batches]


def test_span_takes_the_first_steps_of_its_own_rows() -> None:
    whole = BatchPlan(LENGTHS, batch_size=2, seed=3, max_steps=9)
    part = BatchPlan(LENGTHS, batch_size=2, seed=3, max_steps=9, span=(4, 8))
    assert (whole.first_step, whole.end_step, whole.total_steps) == (0, 9, 9)
    assert (part.first_step, part.end_step, part.total_steps) == (4, 8, 9)
    for i in range(4):
        assert rows_of(part.step(4 + i)) == rows_of(whole.step(i)) and part.step(4 + i).epoch == whole.step(i).epoch
    assert part.times_seen().sum() == 4 * 2


@pytest.mark.parametrize("span", [(0, 10), (3, 3), (-1, 2)])
def test_span_must_lie_within_the_run(span: tuple[int, int]) -> None:
    with pytest.raises(AssertionError):
        BatchPlan(LENGTHS, batch_size=2, max_steps=9, span=span)


class Rates(SilentProgress):
    def __init__(self) -> None:
        self.rates: list[float] = []

    def step(self, step: int, values: Any) -> None:
        self.rates.append(values["lr"])


def test_spans_on_the_same_rows_equal_the_whole_run(
    tiny: Any, tokenizer_of: Callable[[str], Any], accelerator: Any, tmp_path: Path
) -> None:
    """Two spans of three steps, with a checkpoint and another model between them, give the weights and counts of six
    steps. The second span sees the rows of its second epoch, as the whole run does."""
    tokenizer = tokenizer_of("tiny:llama")
    rows = Rows.from_dicts([{"prompt": "why " * i, "completion": "so" * (1 + i % 3)} for i in range(6)], name="rows")
    formatter = Formatter(tokenizer, columns={}, template=None, available=list(rows.columns))
    task: Any = CausalLM(tokenizer, formatter, head_loss=HeadLoss())
    train = task.encode(rows, max_length=512, too_long="error", training=True)
    settings = LoopSettings(lr=1e-2, warmup=0.2)

    def loop(examples: list[Any], plan: BatchPlan, folder: Path, progress: Rates) -> tuple[TrainingLoop, Any]:
        model = tiny("tiny:llama", dropout=0.1)
        made = TrainingLoop(
            model=model,
            task=task,
            train=examples,
            plan=plan,
            settings=settings,
            accelerator=accelerator,
            folder=folder,
            log=MetricsLog(folder / "metrics.jsonl"),
            progress=progress,
            where=rows.where,
        )
        return made, model

    torch.manual_seed(1)
    plan = BatchPlan([len(e) for e in train.examples], batch_size=2, max_steps=6)
    seen = Rates()
    (tmp_path / "whole").mkdir()
    whole, expected = loop(train.examples, plan, tmp_path / "whole", seen)
    result = whole.run()
    assert not list_checkpoints(tmp_path / "whole" / "checkpoints")

    class Later(BatchPlan):
        """The second epoch of ``plan``, as the first epoch of its own plan."""

        def step(self, index: int) -> Any:
            return plan.step(index)

    torch.manual_seed(1)
    rates = Rates()
    (tmp_path / "parts").mkdir()
    lengths = [len(e) for e in train.examples]
    first, _ = loop(
        train.examples, BatchPlan(lengths, batch_size=2, max_steps=6, span=(0, 3)), tmp_path / "parts", rates
    )
    half = first.run()
    assert half.steps == 3
    (checkpoint,) = list_checkpoints(tmp_path / "parts" / "checkpoints")
    assert checkpoint.name == "step-00000003"
    torch.manual_seed(99)
    second, model = loop(
        train.examples, Later(lengths, batch_size=2, max_steps=6, span=(3, 6)), tmp_path / "parts", rates
    )
    assert second.resume(checkpoint) == 3
    done = second.run()
    assert rates.rates == seen.rates
    assert rates.rates == [learning_rate(i, total_steps=6, peak=1e-2, schedule="linear", warmup=0.2) for i in range(6)]
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert (done.rows, done.tokens, done.trained_tokens) == (result.rows, result.tokens, result.trained_tokens)
    assert done.seconds > half.seconds
