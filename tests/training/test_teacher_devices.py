"""A teacher and the device of the student. The meta device stands for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from peftlab import ops
from peftlab.adapters import HeadLoss
from peftlab.data.chat import Formatter
from peftlab.models import find_pretrained, load_model
from peftlab.tasks import Example
from peftlab.tasks.causal_lm import CausalLM
from peftlab.training.teacher_outputs import ModelTeacher, _is_at


@pytest.fixture
def task(tokenizer_of: Callable[[str], Any]) -> CausalLM:
    tokenizer = tokenizer_of("tiny:llama")
    formatter = Formatter(tokenizer, columns={}, template=None, available=["prompt", "completion"])
    return CausalLM(tokenizer, formatter, head_loss=HeadLoss())


def test_teacher_on_another_device_sends_logits(task: CausalLM) -> None:
    """The student's device cannot multiply with the teacher's head."""
    model = load_model(find_pretrained("tiny:llama"), auto_class="AutoModelForCausalLM", device="cpu")
    trained = np.array([False, True, True, True])
    examples = [Example(np.arange(4, 8, dtype=np.int32), 0, 3.0, trained)]
    teacher = ModelTeacher(model, task, device="cpu")
    local = teacher(model, task.collate(examples, "cpu"))
    assert isinstance(local, ops.OnlineTeacher)
    elsewhere = teacher(model, task.collate(examples, "meta"))
    assert isinstance(elsewhere, torch.Tensor)
    assert elsewhere.device.type == "meta" and elsewhere.shape == (3, model.config.vocab_size)


@pytest.mark.parametrize(
    ("device", "place", "same"),
    [("cuda:0", "cuda", True), ("cuda:1", "cuda:1", True), ("cuda:0", "cuda:1", False), ("cuda:0", "cpu", False)],
)
def test_is_at_treats_cuda_as_the_current_device(device: str, place: str, same: bool) -> None:
    assert _is_at(torch.device(device), place) is same
