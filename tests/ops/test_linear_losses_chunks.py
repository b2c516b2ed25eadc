"""How many tokens a chunk of the linear losses has, given the memory of the device."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peftlab_kernels import heads
from peftlab_kernels.heads import Head
from peftlab_kernels.lora_linear import DenseWeight


def test_num_tokens_per_chunk_is_no_larger_where_nothing_is_spared() -> None:
    """float16 sums in float32 for any chunks. An operator that is not told to defer defers nothing."""
    head = Head(DenseWeight(torch.empty(128256, 4096, dtype=torch.float16, device="meta")))
    wanted, cpu = heads.NeedsGrad(weight=True), torch.device("cpu")
    half = torch.empty(1, 4096, dtype=torch.float16, device="meta")
    assert heads.rows_of(head, half, wanted).spared_bytes == 0
    assert heads.rows_of(head, half.bfloat16(), wanted).spared_bytes == 0, "products in another type"
    assert _trained(torch.bfloat16).spared_bytes > 0
    head = Head(DenseWeight(torch.empty(4096, 64, dtype=torch.bfloat16)))
    hidden = torch.empty(128, 64, dtype=torch.bfloat16)
    assert heads.walk_of(head, hidden, wanted, None) == (128, True)
    rows = heads.rows_of(head, hidden, wanted, deferred=False)
    assert rows.spared_bytes == 0
    assert heads.size_where_nothing_is_deferred(head, hidden, wanted) == heads.num_tokens_per_chunk(128, rows, cpu)


def _card(
    monkeypatch: pytest.MonkeyPatch, total_gib: float, free_gib: float, *, share: float = 1.0, unused_gib: float = 0.0
) -> list[str]:
    """A fake GPU. The returned list gets a word for each call to the driver."""
    calls: list[str] = []
    total, free, unused = (int(gib * 2**30) for gib in (total_gib, free_gib, unused_gib))
    for name, value in {
        "get_device_properties": SimpleNamespace(total_memory=total),
        "memory_reserved": unused,
        "memory_allocated": 0,
        "get_per_process_memory_fraction": share,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (calls.append("mem_get_info"), (free, total))[1])
    return calls


@pytest.mark.parametrize(
    ("total_gib", "free_gib", "rows", "expected"),
    [
        (80, 70, heads.Rows(2 * 128256), 4096),
        (80, 70, heads.Rows(2 * 128256, sides=2), 2048),
        (24, 20, heads.Rows(2 * 128256), 1024),
        (24, 20, heads.Rows(2 * 128256, sides=2), 512),
        (24, 0.05, heads.Rows(4 * 128256), 32),
        (8, 7, heads.Rows(2 * 256000), 256),
    ],
)
def test_num_tokens_per_chunk_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, total_gib: float, free_gib: float, rows: Any, expected: int
) -> None:
    card = torch.device("cuda")
    _card(monkeypatch, total_gib, free_gib)
    assert heads.num_tokens_per_chunk(100_000, rows, card) == expected
    # A process that may use a quarter of a larger card gets the chunks of a card of that size.
    _card(monkeypatch, 4 * total_gib, free_gib, share=0.25)
    assert heads.num_tokens_per_chunk(100_000, rows, card) == expected


def test_num_tokens_per_chunk_asks_the_driver_only_before_memory_is_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, card = heads.Rows(2 * 128256), torch.device("cuda")
    calls = _card(monkeypatch, 80, 60)
    assert heads.num_tokens_per_chunk(100_000, rows, card) == 4096 and calls == ["mem_get_info"]
    calls = _card(monkeypatch, 80, 60, unused_gib=3)
    assert heads.num_tokens_per_chunk(100_000, rows, card) == 4096 and calls == []


def _trained(dtype: torch.dtype, hidden_dtype: torch.dtype = torch.bfloat16) -> Any:
    """Rows of a trained head of a Llama-3-8B."""
    head = Head(DenseWeight(torch.empty(128256, 4096, dtype=dtype, device="meta")))
    return heads.rows_of(head, torch.empty(1, 4096, dtype=hidden_dtype, device="meta"), heads.NeedsGrad(weight=True))


def test_num_tokens_per_chunk_takes_one_chunk_where_that_needs_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum over chunks takes 4 bytes per weight besides the gradient in 16 bits. One chunk takes none."""
    sixteen, wide, card = _trained(torch.bfloat16), _trained(torch.float32), torch.device("cuda")
    assert sixteen.sum_bytes == wide.sum_bytes == sixteen.spared_bytes == 4 * 128256 * 4096 and wide.spared_bytes == 0
    _card(monkeypatch, 24, 10)
    assert heads.num_tokens_per_chunk(8192, sixteen, card) == 8192, "as much as the sum: 2.1 GB"
    assert heads.num_tokens_per_chunk(8193, sixteen, card) == 2048, (
        "a quarter of the sum's bytes, not a share of the card"
    )
    assert heads.num_tokens_per_chunk(8192, wide, card) == 2048
    _card(monkeypatch, 24, 3)
    assert heads.num_tokens_per_chunk(8192, sixteen, card) == 4096, "half of what is free"
    cpu = torch.device("cpu")
    assert heads.num_tokens_per_chunk(8192, sixteen, cpu) == 8192
    assert heads.num_tokens_per_chunk(10_000, _trained(torch.float32, torch.float32), cpu) == 1024


def test_num_tokens_per_chunk_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert heads.num_tokens_per_chunk(10_000, heads.Rows(4 * 49152), cpu) == 341
    assert heads.num_tokens_per_chunk(10_000, heads.Rows(4 * 49152, sides=2), cpu) == 170
    assert heads.num_tokens_per_chunk(7, heads.Rows(4 * 49152), cpu) == 7
    assert heads.num_tokens_per_chunk(0, heads.Rows(4 * 49152), cpu) == 1
