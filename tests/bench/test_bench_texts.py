"""The tokens that cells of a benchmark run on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from peftlab.bench.cells import text_examples, write_texts
from peftlab.data import Rows
from peftlab.tasks import Example


def test_rows_of_one_length_repeat_the_tokens_of_the_data(tmp_path: Path) -> None:
    rows = Rows.from_dicts([{"text": "a"}, {"text": "b"}], name="a")
    example = Example(np.arange(4, dtype=np.int32), 0, 1.0)
    assembly: Any = SimpleNamespace(
        data=SimpleNamespace(train=rows), encode=lambda some, training: SimpleNamespace(examples=[example] * len(some))
    )
    task: Any = SimpleNamespace(
        spec=SimpleNamespace(predicts="classes"), probe=lambda ids: Example(ids, 0, 1.0, label=0)
    )
    write_texts(tmp_path / "texts.npz", assembly, num_tokens=8)
    made = text_examples(tmp_path / "texts.npz", rows=2, length=6, task=task)
    assert [e.ids.tolist() for e in made] == [[0, 1, 2, 3, 0, 1], [2, 3, 0, 1, 2, 3]] and [e.row for e in made] == [
        0,
        1,
    ]


def test_texts_of_a_row_share_its_length(tmp_path: Path) -> None:
    np.savez(tmp_path / "texts.npz", ids=np.arange(8, dtype=np.int32))
    task: Any = SimpleNamespace(
        spec=SimpleNamespace(predicts="vectors"),
        probe=lambda ids: Example(np.tile(ids, 2), 0, 1.0, sizes=(len(ids),) * 2),
    )
    (made,) = text_examples(tmp_path / "texts.npz", rows=1, length=6, task=task)
    assert made.ids.tolist() == [0, 1, 2, 0, 1, 2] and made.sizes == (3, 3)
