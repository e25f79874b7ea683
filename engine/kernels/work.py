"""What attention has to do in one pass, cut on the host into items of about equal size.

A program of the kernel takes one item: a block of query tokens of one sequence, and the tiles of keys from ``low`` to
``high``. Items are cut by the lengths of the sequences that are really there, so one long context beside many short
ones is spread over the lane (the idea of FlashInfer's planner, Ye et al. 2025, section 3.3). Where several items share
a query block, their partial results are merged afterwards (Flash-Decoding).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

#: Columns of an item: first entry of its block table, first row, rows (query tokens), position of the first row, first
#: tile, tile after the last, partial result (-1: the only item of its block, writes the output itself), unused.
ITEM = 8
#: Columns of a merge: first row, rows, first partial result, how many.
MERGE = 4
_MOST_PARTS = 32  # what the merge kernel holds at once
_LEAST_TILES = 4  # an item of fewer tiles costs more to merge than it saves


class Tiling(NamedTuple):
    """How a pass is cut: the same for all passes of one shape on one lane.

    :param tokens: query tokens of a block
    :param keys: keys of a tile
    :param fill: items that fill the lane, for each KV head
    """

    tokens: int
    keys: int
    fill: int

    def items(self, rows: int, sequences: int) -> int:
        """Most items of a pass with so many rows and sequences."""
        return rows // self.tokens + sequences + self.fill

    @property
    def merges(self) -> int:
        """Most merges of a pass: each has an item more than its block, and no more than ``fill`` are added."""
        return self.fill

    @property
    def partials(self) -> int:
        """Most partial results of a pass."""
        return 2 * self.fill


class WorkList(NamedTuple):
    """:func:`work_list`: ``items`` int32 (I, ITEM), ``merges`` int32 (M, MERGE)."""

    items: np.ndarray
    merges: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """A :class:`WorkList` on the device, as long as it is or, for a captured graph, as long as it may get.

    Items with no rows, and merges of nothing, are skipped. ``partials``: partial results to make room for.
    """

    items: Tensor
    merges: Tensor
    partials: int


def work_list(counts: np.ndarray, contexts: np.ndarray, width: int, tiling: Tiling) -> WorkList:
    """Cut a pass.

    :param counts: rows of each sequence, int (S,), and ``contexts`` its tokens once the pass has run (0: padding)
    :param width: columns of the block tables
    :return: items of every sequence, also of padding (no tiles: its output is zero)
    """
    tokens, keys, fill = tiling
    blocks = -(-counts // tokens)
    owner = np.arange(len(counts)).repeat(blocks)
    first = (np.arange(len(owner)) - (np.cumsum(blocks) - blocks)[owner]) * tokens
    rows = np.minimum(counts[owner] - first, tokens)
    position = (contexts - counts)[owner] + first
    tiles = -(-(position + rows) // keys)
    most = max(_LEAST_TILES, -(-int(tiles.sum()) // fill), -(-int(tiles.max()) // _MOST_PARTS))
    parts = np.maximum(-(-tiles // most), 1)
    row = (np.cumsum(counts) - counts)[owner] + first

    block = np.arange(len(owner)).repeat(parts)
    begins = np.cumsum(parts) - parts
    part = np.arange(len(block)) - begins[block]
    each = -(-tiles // parts)
    split = parts > 1
    partial = np.cumsum(parts * split) - parts * split
    items = np.zeros((len(block), ITEM), np.int32)
    items[:, 0] = owner[block] * width
    items[:, 1], items[:, 2], items[:, 3] = row[block], rows[block], position[block]
    items[:, 4] = np.minimum(part * each[block], tiles[block])
    items[:, 5] = np.minimum((part + 1) * each[block], tiles[block])
    items[:, 6] = np.where(split[block], partial[block] + part, -1)
    merges = np.stack((row, rows, partial, parts), axis=1)[split].astype(np.int32)
    return WorkList(items, merges)
