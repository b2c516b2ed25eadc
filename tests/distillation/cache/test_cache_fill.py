"""Settings of a cache: refused values, equal settings, size per position, reproducible targets."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peftlab.distillation.cache import Fill
from peftlab.distillation.targets import SparseTarget
from peftlab.errors import RecipeError


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        ({"kind": "dense"}, "kind", "one of topk, sampled, mixed, hidden, found 'dense'"),
        ({"kind": "topk"}, "k", "to keep 1 to 100 classes per token, found None"),
        ({"kind": "topk", "k": 101}, "k", "to keep 1 to 100 classes per token, found 101"),
        ({"kind": "topk", "k": 0}, "k", "found 0"),
        ({"kind": "topk", "k": 5, "draws": 3}, "draws", "draws belongs to sampled, mixed and has no effect on topk"),
        ({"kind": "topk", "k": 5, "temperature": 0.0}, "temperature", "a temperature above 0, found 0.0"),
        ({"kind": "topk", "k": 5, "values": "int8"}, "values", "float16 or float32, found 'int8'"),
        ({"kind": "sampled"}, "draws", "1 to 255 draws, found None"),
        ({"kind": "sampled", "draws": 256}, "draws", "1 to 255 draws, found 256"),
        ({"kind": "sampled", "draws": 50, "k": 3}, "k", "k belongs to topk, mixed and has no effect on sampled"),
        ({"kind": "mixed", "draws": 5, "k": 100}, "k", "1 to 99 classes per token and to draw from the others"),
        ({"kind": "hidden", "hidden": "int4"}, "hidden", "bfloat16 or int8 or float32, found 'int4'"),
    ],
)
def test_fill_refuses_wrong_settings(settings: dict[str, Any], key: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        Fill(**{"num_classes": 100, "hidden_size": 8} | settings)
    assert error.value.key == f"distill.targets.{key}"


def test_fill_settings_hold_only_what_the_bytes_depend_on() -> None:
    assert Fill("topk", k=5, num_classes=9, seed=1).settings() == Fill("topk", k=5, num_classes=9, seed=2).settings()
    assert (
        Fill("sampled", draws=5, num_classes=9, seed=1).settings()
        != Fill("sampled", draws=5, num_classes=9, seed=2).settings()
    )
    hidden = Fill("hidden", hidden="int8", hidden_size=9, temperature=2.0)
    assert hidden.settings() == {"kind": "hidden", "hidden": "int8", "hidden_size": 9}
    assert Fill(**hidden.settings()).settings() == hidden.settings()


@pytest.mark.parametrize(
    ("fill", "expected"),
    [
        # Each of 50 classes has 16 or 17 bits of id and 16 of value. The rest has 16 bits.
        (Fill("topk", k=50, num_classes=49_152), 50 * (16 + 16) / 8 + 2),
        (Fill("topk", k=50, num_classes=128_256), 50 * (17 + 16) / 8 + 2),
        (Fill("topk", k=50, num_classes=49_152, values="float32"), 50 * (16 + 32) / 8),
        (Fill("topk", k=8, num_classes=8), 8 * (3 + 16) / 8),
        (Fill("sampled", draws=50, num_classes=49_152), (6 + 50 * (16 + 6)) / 8),
        (Fill("sampled", draws=50, num_classes=4), (6 + 4 * (2 + 6)) / 8),
        (Fill("mixed", k=16, draws=16, num_classes=49_152), (16 * 32 + 16 + 5 + 16 * 20) / 8),
        (Fill("hidden", hidden_size=4096), 8192),
        (Fill("hidden", hidden_size=4096, hidden="int8"), 4352),
        (Fill("hidden", hidden_size=100, hidden="int8"), 108),
        (Fill("hidden", hidden_size=100, hidden="float32"), 400),
    ],
)
def test_fill_bytes_per_position_by_hand(fill: Fill, expected: float) -> None:
    assert fill.bytes_per_position() == expected


def test_fill_target_depends_on_seed_and_example() -> None:
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    fill = Fill("sampled", draws=6, num_classes=50)

    def ids(seed: int, example: int) -> list[list[int]]:
        target = Fill("sampled", draws=6, num_classes=50, seed=seed).target(logits, example)
        assert isinstance(target, SparseTarget)
        return target.ids.tolist()

    torch.manual_seed(7)
    first = ids(0, 3)
    assert first == ids(0, 3)
    assert first != ids(0, 4)
    assert first != ids(1, 3)
    with pytest.raises(ValueError, match=r"expected values \[P, 50\] of the teacher, found \[20, 49\]"):
        fill.target(logits[:, 1:], 0)


def test_fill_target_has_no_graph() -> None:
    weight = torch.randn(3, 8, requires_grad=True)
    target = Fill("hidden", hidden_size=8).target(weight * 2, 0)
    assert isinstance(target, torch.Tensor) and not target.requires_grad
