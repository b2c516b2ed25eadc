"""Bit packing, compared with Python's integers."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftlab.distillation.cache.bits import pack, packed_bytes, unpack, width_for


def as_integer(values: list[int], width: int) -> bytes:
    """The same bits as one long integer, lowest value first."""
    whole = sum(value << (i * width) for i, value in enumerate(values))
    return whole.to_bytes((len(values) * width + 7) // 8, "little")


@settings(max_examples=200, deadline=None)
@given(data=st.data(), width=st.integers(0, 32))
def test_pack_and_unpack_return_any_values_of_any_width(data: st.DataObject, width: int) -> None:
    values = data.draw(st.lists(st.integers(0, 2**width - 1), max_size=40))
    packed = pack(np.array(values, dtype=np.int64), width)
    assert packed == as_integer(values, width)
    assert len(packed) == packed_bytes(len(values), width)
    assert unpack(packed, len(values), width).tolist() == values


@pytest.mark.parametrize(("dtype", "width"), [("<u1", 8), ("<u2", 16), ("<u4", 32)])
def test_pack_of_whole_bytes_gives_plain_integers(dtype: str, width: int) -> None:
    values = np.random.default_rng(0).integers(0, 2**width, 101)
    assert pack(values, width) == values.astype(dtype).tobytes()


def test_width_for_vocabulary_sizes() -> None:
    sizes = {1: 0, 2: 1, 3: 2, 30_522: 15, 49_152: 16, 65_536: 16, 65_537: 17, 128_256: 17, 151_936: 18, 262_144: 18}
    assert {size: width_for(size - 1) for size in sizes} == sizes


def test_pack_refuses_values_that_do_not_fit() -> None:
    for wrong in ([8], [-1]):
        with pytest.raises(ValueError, match="expected values of 3 bits"):
            pack(np.array(wrong), 3)
    with pytest.raises(ValueError, match="expected 3 bytes of 8 values, found 2"):
        unpack(b"ab", 8, 3)
    with pytest.raises(ValueError, match="expected values from 0"):
        width_for(2**32)


def test_pack_and_unpack_take_under_a_second_for_two_million_values() -> None:
    values = np.random.default_rng(0).integers(0, 151_936, 2_000_000)
    began = time.perf_counter()
    packed = pack(values, 18)
    back = unpack(packed, len(values), 18)
    # An idle core packs or unpacks 30 million per second. A loop over ids needs 2 s.
    assert time.perf_counter() - began < 1.0
    assert np.array_equal(back, values)
