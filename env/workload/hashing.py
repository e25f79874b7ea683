"""Chained prefix hashes as whole-array arithmetic: equal leading ids give equal leading entries."""

from __future__ import annotations

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ID_FACTOR = np.uint64(0xD6E8FEB86659FD93)


def mix64(x: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser (Steele, Lea and Flood, OOPSLA 2014): a bijection of uint64, any shape."""
    z = np.asarray(x).astype(np.uint64, copy=True)
    z += GOLDEN
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def flat_index(start: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Expand rows (start, count) into ``(row, index)`` of every entry, both i8 (sum of count,)."""
    row = np.repeat(np.arange(len(count)), count)
    first = np.cumsum(count) - count
    return row, np.arange(len(row)) - np.repeat(first, count) + np.repeat(start, count)


def chain(ids: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Prefix hashes of rows of block ids laid end to end.

    A running sum of position-dependent mixes, mixed once more: entry ``j`` depends on ids ``0..j`` in
    order, like a chained hash, but needs no sequential loop. Ids are data, not adversaries.

    :param ids: u8 or i8 (sum of count,)
    :param count: (rows,) ids per row
    :return: u8 (sum of count,)
    """
    row, position = flat_index(np.zeros(len(count), np.int64), count)
    # The factor keeps ids and positions apart: with a plain sum, id 1 in place 0 equals id 0 in place 1.
    terms = mix64(mix64(ids) * _ID_FACTOR + mix64(position))
    total = np.cumsum(terms, dtype=np.uint64)
    before = np.concatenate([np.zeros(1, np.uint64), total])[np.cumsum(count) - count]
    return mix64(total - before[row])


def salt(hashes: np.ndarray, key: int) -> np.ndarray:
    """The same structure of reuse under ids that match no other ``key``."""
    return mix64(hashes ^ mix64(np.array([key + 1], np.uint64)))


def refine(
    start: np.ndarray, count: np.ndarray, hashes: np.ndarray, pieces: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split every entry into ``pieces`` finer ones; blocks that were not shared stay unshared.

    :return: start, count and hashes at the finer grain
    """
    if pieces == 1:
        return start, count, hashes
    fine = mix64(hashes[:, None] ^ mix64(np.arange(pieces, dtype=np.uint64)))
    fine[:, -1] = hashes
    return start * pieces, (count * pieces).astype(np.int32), fine.ravel()
