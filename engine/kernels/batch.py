"""One forward pass, described flat: rows of tokens, which sequence each belongs to, where its KV goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Batch", "Span"]


class Span(NamedTuple):
    """The tokens of one sequence that take part in a forward pass.

    :param tokens: ids whose KV does not exist yet: one for a decode step, a chunk for a prefill
    :param start: tokens of the sequence whose KV already lies in ``blocks`` (earlier chunks, prefix hits)
    :param blocks: KV blocks of the sequence in order, covering at least ``start + len(tokens)`` tokens
    :param sample: whether logits of the last token are wanted (false for all but a prompt's last chunk)

    A named tuple because one is made for every sequence of every step.
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    sample: bool = True


@dataclass(frozen=True, slots=True)
class Batch:
    """Decodes, prefill chunks or both, in one launch. T rows (tokens), S sequences, R rows that sample.

    Everything on the device is a tensor, so a graph captured on one batch replays for another of the same
    shape; ``context_tokens`` and ``query_tokens`` are host copies for code that loops over sequences.
    A sequence of one row and context 0 is padding: its output is zero, and a slot below 0 writes no KV.
    """

    tokens: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    query_starts: Tensor  # int32 [S + 1]: first row of each sequence, then T
    context_lens: Tensor  # int32 [S]: tokens of each sequence with KV once this pass has run
    block_tables: Tensor  # int32 [S, max_blocks]; entries beyond a sequence's blocks are 0 and never read
    slots: Tensor  # int64 [T]: block * block_tokens + offset where the row's KV goes
    sample_rows: Tensor  # int64 [R]
    query_tokens: tuple[int, ...]  # rows of each sequence
    context_tokens: tuple[int, ...]
    max_query: int  # most rows of one sequence: 1 selects the decode kernel
    sm_count: int  # SMs of the lane that runs the batch (set by the lane): sizes split-KV; 1 on a CPU

    @property
    def n_rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def n_seqs(self) -> int:
        return len(self.query_tokens)

    @classmethod
    def build(
        cls,
        spans: Sequence[Span],
        *,
        block_tokens: int,
        device: torch.device | str = "cpu",
        sm_count: int = 1,
        pad_to: int = 0,
        table_width: int = 0,
    ) -> Batch:
        """Lay out ``spans`` in order. Every span needs a token and blocks for all its tokens (asserted).

        A captured graph needs fixed shapes: ``pad_to`` adds padding up to that many sequences (their rows
        "sample" too; drop the last logits), ``table_width`` widens the block tables to that many blocks.
        """
        padding = max(0, pad_to - len(spans))
        query = np.array([len(span.tokens) for span in spans] + [1] * padding, dtype=np.int32)
        start = np.array([span.start for span in spans] + [-1] * padding, dtype=np.int64)
        context = start + query
        assert len(spans) > 0, "an empty batch"
        assert query.min() > 0, "a span without tokens"
        starts = np.zeros(len(query) + 1, dtype=np.int32)
        np.cumsum(query, out=starts[1:])
        width = max(table_width, max(len(span.blocks) for span in spans))
        tables = np.zeros((len(query), width), dtype=np.int32)
        for row, span in enumerate(spans):
            assert len(span.blocks) * block_tokens >= context[row], "blocks do not cover the span"
            tables[row, : len(span.blocks)] = span.blocks
        owner = np.repeat(np.arange(len(query)), query)
        positions = np.arange(starts[-1], dtype=np.int64) - starts[owner] + start[owner]
        slots = tables[owner, positions // block_tokens].astype(np.int64) * block_tokens
        slots += positions % block_tokens
        slots[positions < 0] = -1
        wanted = np.array([span.sample for span in spans] + [True] * padding, dtype=bool)
        tokens = np.zeros(starts[-1], dtype=np.int64)
        tokens[: starts[len(spans)]] = np.concatenate([np.asarray(span.tokens) for span in spans])

        def put(array: np.ndarray) -> Tensor:
            tensor = torch.from_numpy(array)
            if torch.device(device).type == "cpu":
                return tensor
            return tensor.pin_memory().to(device, non_blocking=True)

        return cls(
            tokens=put(tokens),
            positions=put(np.maximum(positions, 0)),
            query_starts=put(starts),
            context_lens=put(context.astype(np.int32)),
            block_tables=put(tables),
            slots=put(slots),
            sample_rows=put((starts[1:][wanted] - 1).astype(np.int64)),
            query_tokens=tuple(query.tolist()),
            context_tokens=tuple(context.tolist()),
            max_query=int(query.max()),
            sm_count=sm_count,
        )

    def copy_(self, other: Batch) -> None:
        """Overwrite the tensors with those of ``other``, of equal shapes: the input of a captured graph.

        Block tables of ``other`` may have fewer columns; what is right of them keeps its old content, unread.
        The host's copies stay, so only kernels that never read them may run afterwards (Triton's).
        """
        for field in fields(self):
            mine = getattr(self, field.name)
            if isinstance(mine, Tensor):
                theirs = getattr(other, field.name)
                mine[..., : theirs.shape[-1]].copy_(theirs, non_blocking=True)
