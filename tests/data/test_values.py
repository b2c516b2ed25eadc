"""Values of columns: what counts as nothing."""

from __future__ import annotations

import math

import numpy as np

from peftlab.data.values import is_empty


def test_is_empty_is_no_content() -> None:
    assert [is_empty(v) for v in (None, math.nan, "", " \n\t", [], np.array([]))] == [True] * 6
    assert [is_empty(v) for v in (0, False, "x", 0.0, [0], np.array([0]), np.int64(0))] == [False] * 7
