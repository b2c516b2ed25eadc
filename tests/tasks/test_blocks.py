"""Plain text that is split into blocks: every token is trained once, as transformers trains the same blocks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from peftlab.data import block_bounds
from peftlab.data.chat import Formatter
from peftlab.errors import RecipeError
from peftlab.tasks.causal_lm import CausalLM
from tests.masked_examples import rows_of

TEXT = "".join(chr(97 + i % 26) for i in range(61))


def make(tokenizer: Any, **options: Any) -> CausalLM:
    formatter = Formatter(
        tokenizer, **{"columns": {}, "template": None, "available": ["text"], "sample": {}, **options}
    )
    return CausalLM(tokenizer, formatter, head_loss=lambda *_, **__: None)


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("length", range(1, 30))
def test_blocks_cover_every_token(length: int, overlap: int) -> None:
    bounds = block_bounds(length, 7, overlap=overlap)
    assert bounds[0][0] == 0 and bounds[-1][1] == length
    assert all(0 < end - start <= 7 for start, end in bounds)
    assert all(a[1] - b[0] == overlap for a, b in pairwise(bounds))


def test_every_token_of_a_long_text_is_trained_once(tokenizer_of: Callable[[str], Any]) -> None:
    tokenizer = tokenizer_of("tiny:llama")
    encoded = make(tokenizer).encode(rows_of([TEXT, "abc"]), max_length=16, too_long="split", training=True)
    blocks = [e for e in encoded.examples if e.row == 0]
    whole = [*tokenizer(TEXT)["input_ids"], tokenizer.eos_token_id]
    trained = [int(i) for e in blocks for i in e.ids[e.trained]]
    assert trained == whole[1:]  # nothing predicts the first token of a text
    assert all(len(e) <= 16 and e.trained is not None and not e.trained[0] for e in blocks)
    assert [int(e.ids[0]) for e in blocks[1:]] == [int(e.ids[-1]) for e in blocks[:-1]]
    report = encoded.ledger.report()
    assert (report["kept"], report["blocks"], report["trained"]) == (2, len(blocks) + 1, len(whole) - 1 + 3)
    assert report["tokens"] == len(whole) + 4
    assert encoded.ledger.lengths.tolist() == encoded.lengths.tolist()
    counted = make(tokenizer).encode(rows_of([TEXT, "abc"]), max_length=16, too_long="split", training=True, keep=False)
    assert counted.ledger.lengths.tolist() == encoded.lengths.tolist()


def test_loss_of_blocks_equals_the_sum_by_hand(tokenizer_of: Callable[[str], Any], tiny: Callable[..., Any]) -> None:
    tokenizer, model = tokenizer_of("tiny:llama"), tiny("tiny:llama").double().eval()
    task = make(tokenizer)
    examples = task.encode(rows_of([TEXT]), max_length=16, too_long="split", training=True).examples
    ids = torch.tensor([*tokenizer(TEXT)["input_ids"], tokenizer.eos_token_id])
    want = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 15):
            block = ids[start : start + 16]
            want += F.cross_entropy(model(block[None]).logits[0, :-1], block[1:], reduction="sum")
        ours = task.loss_sum(model, task.collate(examples, "cpu"))
    assert float(ours) == pytest.approx(float(want), rel=1e-9)


def test_a_lost_token_at_a_border_is_caught(
    tokenizer_of: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault: blocks without the overlap, whose first tokens nothing predicts."""
    monkeypatch.setattr(
        "peftlab.tasks.causal_lm.block_bounds", lambda length, size, overlap: block_bounds(length, size)
    )
    with pytest.raises(AssertionError):
        test_every_token_of_a_long_text_is_trained_once(tokenizer_of)


def test_conversations_are_not_split(tokenizer_of: Callable[[str], Any]) -> None:
    task = make(tokenizer_of("tiny:llama"), template={"prompt": "{text}", "completion": "{text}"})
    with pytest.raises(RecipeError, match="a prompt and an answer") as error:
        task.encode(rows_of([TEXT]), max_length=16, too_long="split", training=True)
    assert error.value.key == "data.too_long"


def test_places_of_blocks_differ(tokenizer_of: Callable[[str], Any]) -> None:
    """Stored targets and the report card find an example by its place."""
    task = make(tokenizer_of("tiny:llama"))
    examples = task.encode(rows_of([TEXT, TEXT]), max_length=16, too_long="split", training=True).examples
    assert len({e.key for e in examples}) == len(examples)
    assert np.unique([e.row for e in examples]).tolist() == [0, 1]
