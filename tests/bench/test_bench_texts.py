"""The tokens and labels that cells of a benchmark run on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np

from peftlab.bench.cells import text_examples, write_texts
from peftlab.data import Rows
from peftlab.tasks import Example


def test_token_classes_keep_the_class_of_each_scored_token(tmp_path: Path) -> None:
    rows = Rows.from_dicts([{"text": "a"}, {"text": "b"}], name="a")
    trained = np.array([False, True, True, False])
    example = Example(np.arange(4, dtype=np.int32), 0, 2.0, trained=trained, label=np.array([3, 1]))
    assembly = SimpleNamespace(
        data=SimpleNamespace(train=rows), encode=lambda some, training: SimpleNamespace(examples=[example] * len(some))
    )
    write_texts(tmp_path / "texts.npz", assembly, num_tokens=8)  # type: ignore[arg-type]
    (made,) = text_examples(tmp_path / "texts.npz", rows=1, length=6, predicts="token classes")
    assert made.ids.tolist() == [0, 1, 2, 3, 0, 1] and made.num_scored == 6
    assert made.label.tolist() == [0, 3, 1, 0, 0, 3]
