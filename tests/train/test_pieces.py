"""Objects cut into pieces for Ray's messages come back as they were, and never as a flood of large pieces."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.collect.pieces import _MOST, _PIECE, cut, join, pieces_for

DTYPES = (np.float32, np.float64, np.int64, np.uint8, np.bool_)


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 70_000)), max_size=6), st.integers(2, 40))
def test_what_was_cut_comes_back(columns: list[tuple[Any, int]], pieces: int) -> None:
    value = {"columns": [np.arange(n).astype(dtype) for dtype, n in columns], "state": b"x" * 10}
    for parts in (cut(value), cut(value, pieces)):
        again = join(parts)
        assert again["state"] == value["state"]
        for a, b in zip(value["columns"], again["columns"], strict=True):
            assert a.dtype == b.dtype
            assert b.flags.aligned
            np.testing.assert_array_equal(a, b)
    assert len(cut(value, pieces)) == pieces


@pytest.mark.parametrize("size", [0, 1, _PIECE, _PIECE + 1, _PIECE * _MOST])
def test_as_many_pieces_as_asked_for_hold_what_was_expected(size: int) -> None:
    parts = cut(np.zeros(size, np.uint8), pieces_for(size))
    assert all(len(part) <= _PIECE for part in parts)
    assert sum(map(len, parts)) < 100 * 102_400  # what Ray sends in one message


@pytest.mark.parametrize("pieces", [2, 5])
def test_more_than_expected_goes_through_the_object_store_in_one_piece(pieces: int) -> None:
    parts = cut(np.arange(_PIECE * pieces, dtype=np.uint8), pieces)
    assert [len(part) > _PIECE for part in parts] == [False, True] + [False] * (pieces - 2)
    assert pieces_for(_PIECE * _MOST + 1) == 2
