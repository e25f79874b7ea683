"""The input of a captured graph: a batch whose tensors never move, filled anew before each replay."""

from __future__ import annotations

import numpy as np
import torch

from engine.kernels.batch import Batch, Span, Spans
from engine.kernels.packing import offsets, view
from engine.kernels.work import ITEM, MERGE, Tiling, Work, work_list

#: In the buffer's order. The tables come last: only their used part is copied.
_COLUMNS = ("tokens", "positions", "slots", "sample_rows", "query_starts", "context_lens", "items", "merges", "tables")


class StaticBatch:
    """Room for a pass of at most so many rows and sequences, in one buffer that one copy fills.

    :param decodes: rows are sequences with a token each, and what is missing are padding sequences whose output is
        zero; else the rows behind the last sequence belong to none, and what comes of them means nothing
    :param width: KV blocks of the longest sequence
    :param tiling: how the kernels cut attention; None where they keep no work list
    :ivar batch: as it was filled last; at first a decode of padding only, or rows of nobody
    """

    def __init__(
        self,
        *,
        rows: int,
        sequences: int,
        decodes: bool,
        width: int,
        block_tokens: int,
        tiling: Tiling | None,
        sm_count: int,
        device: torch.device | str,
    ) -> None:
        assert sequences == rows or not decodes
        self.rows, self.sequences, self.width = rows, sequences, width
        self._decodes, self._size, self._tiling, self._sm_count = decodes, block_tokens, tiling, sm_count
        n_items, n_merges = (tiling.items(rows, sequences), tiling.merges) if tiling is not None else (0, 0)
        shapes: dict[str, np.ndarray] = {
            "tokens": np.empty(rows, np.int64),
            "positions": np.empty(rows, np.int64),
            "slots": np.empty(rows, np.int64),
            "sample_rows": np.empty(sequences, np.int64),
            "query_starts": np.empty(sequences + 1, np.int32),
            "context_lens": np.empty(sequences, np.int32),
            "items": np.empty((n_items, ITEM), np.int32),
            "merges": np.empty((n_merges, MERGE), np.int32),
            "tables": np.empty(sequences * width, np.int32),
        }
        at = dict(zip(_COLUMNS, offsets([shapes[name].nbytes for name in _COLUMNS]), strict=False))
        total = offsets([shapes[name].nbytes for name in _COLUMNS])[-1]
        self._tables_at = at["tables"]
        self._host = torch.zeros(total, dtype=torch.uint8, pin_memory=torch.device(device).type == "cuda")
        self._device = torch.zeros(total, dtype=torch.uint8, device=device)
        self._columns = {name: view(self._host, at[name], shapes[name]).numpy() for name in _COLUMNS}
        self._there = {name: view(self._device, at[name], shapes[name]) for name in _COLUMNS}
        self.fill([Span([0], 0, [0])])
        if decodes:  # all padding: nothing is written, nothing is read
            self._columns["slots"][:] = -1
            self._columns["items"][:, 3:6] = (-1, 0, 0)
        else:
            self._columns["slots"][:] = -1
            self._columns["items"][:] = 0
        self._device.copy_(self._host)

    def fill(self, spans: Spans | list[Span]) -> Batch:
        """Lay out ``spans``, which must fit, by one copy that the host does not wait for.

        What is replayed next reads it; the pass before must have ended, since its input is overwritten.
        """
        spans = Spans.of(spans)
        built = Batch.build(spans, block_tokens=self._size, pad_to=self.rows if self._decodes else 0)
        columns, n, width = self._columns, built.n_seqs, spans.width
        for name, empty in (("tokens", 0), ("positions", 0), ("slots", -1), ("sample_rows", 0), ("context_lens", 0)):
            found = getattr(built, name).numpy()
            columns[name][: len(found)] = found
            columns[name][len(found) :] = empty
        columns["query_starts"][: n + 1] = built.query_starts.numpy()
        columns["query_starts"][n + 1 :] = built.n_rows
        columns["tables"][: n * width].reshape(n, width)[...] = built.block_tables.numpy()
        works = {}
        if self._tiling is not None:
            lists = work_list(np.array(built.query_tokens), np.array(built.context_tokens), width, self._tiling)
            for name, rows in zip(("items", "merges"), lists, strict=True):
                columns[name][: len(rows)] = rows
                columns[name][len(rows) :] = 0  # no rows: skipped
            works[self._tiling] = Work(self._there["items"], self._there["merges"], self._tiling.partials)
        used = self._tables_at + 4 * n * width
        self._device[:used].copy_(self._host[:used], non_blocking=True)
        there = self._there
        self.batch = Batch(
            tokens=there["tokens"],
            positions=there["positions"],
            query_starts=there["query_starts"][: n + 1],
            context_lens=there["context_lens"][:n],
            block_tables=there["tables"][: n * width].view(n, width),
            slots=there["slots"],
            sample_rows=there["sample_rows"][: len(built.sample_rows)],
            query_tokens=built.query_tokens,
            context_tokens=built.context_tokens,
            max_query=1 if self._decodes else self.rows,  # what chooses the kernel's shape must not change
            sm_count=self._sm_count,
            works=works,
        )
        return self.batch
