"""One forward pass, described flat: rows of tokens, which sequence each belongs to, where its KV goes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.kernels.packing import upload
from engine.kernels.work import Tiling, Work, work_list

_COLUMNS = ("tokens", "positions", "query_starts", "context_lens", "block_tables", "slots", "sample_rows")


class Span(NamedTuple):
    """The tokens of one sequence that take part in a forward pass.

    :param tokens: ids whose KV does not exist yet: one for a decode step, a chunk for a prefill
    :param start: tokens of the sequence whose KV already lies in ``blocks`` (earlier chunks, prefix hits)
    :param blocks: KV blocks of the sequence in order, covering at least ``start + len(tokens)`` tokens
    :param sample: whether logits of the last token are wanted (false for all but a prompt's last chunk)
    """

    tokens: Sequence[int]
    start: int
    blocks: Sequence[int]
    sample: bool = True


class Scored(NamedTuple):
    """Tokens of a prompt whose log-probabilities somebody wants.

    :param span: which sequence of the pass
    :param top: how many of the likeliest tokens to name beside each
    :param tokens: those that follow the first rows of the span, one for each row
    """

    span: int
    top: int
    tokens: Sequence[int]


@dataclass(slots=True, eq=False)
class Spans:
    """Several :class:`Span` as columns: S sequences in order, T tokens. What the scheduler writes and a lane reads.

    The columns may be views of somebody's buffers, and ``blocks`` may be wider than any sequence needs; entries
    beyond a sequence's blocks mean nothing. Nobody changes one; it is not frozen since that takes three times as long
    to make, and there is one for every step.
    """

    tokens: np.ndarray  # int64 (T,), those of the first sequence first
    counts: np.ndarray  # int64 (S,): tokens of each sequence
    starts: np.ndarray  # int64 (S,)
    sample: np.ndarray  # bool (S,)
    n_blocks: np.ndarray  # int32 (S,)
    blocks: np.ndarray  # int32 (S, W)
    prompts: int = 0  # the first so many sequences compute a part of their prompt, be it of one token
    scored: Sequence[Scored] = ()

    def __len__(self) -> int:
        return len(self.counts)

    @classmethod
    def of(cls, spans: Spans | Iterable[Span]) -> Spans:
        """``spans`` as columns: for callers to whom a list is handier."""
        if isinstance(spans, Spans):
            return spans
        rows = list(spans)
        assert rows, "an empty batch"
        n_blocks = np.array([len(span.blocks) for span in rows], np.int32)
        blocks = np.zeros((len(rows), int(n_blocks.max())), np.int32)
        for row, span in zip(blocks, rows, strict=True):
            row[: len(span.blocks)] = span.blocks
        return cls(
            tokens=np.concatenate([np.asarray(span.tokens, np.int64) for span in rows]),
            counts=np.array([len(span.tokens) for span in rows], np.int64),
            starts=np.array([span.start for span in rows], np.int64),
            sample=np.array([span.sample for span in rows], bool),
            n_blocks=n_blocks,
            blocks=blocks,
        )

    @property
    def decodes(self) -> bool:
        """Whether this is a decode step: every sequence takes part with its newest token, and samples.

        A prompt's last chunk of one token looks the same but is none: it runs beside the decodes of the other lane.
        """
        return self.prompts == 0 and len(self.tokens) == len(self.counts) and bool(self.sample.all())

    def alone(self, k: int) -> Spans:
        """Sequence ``k`` by itself."""
        begin, one = int(self.counts[:k].sum()), slice(k, k + 1)
        tokens = self.tokens[begin : begin + int(self.counts[k])]
        counts, starts, sample = self.counts[one], self.starts[one], self.sample[one]
        scored = [wanted._replace(span=0) for wanted in self.scored if wanted.span == k]
        return Spans(
            tokens, counts, starts, sample, self.n_blocks[one], self.blocks[one], int(k < self.prompts), scored
        )

    @property
    def width(self) -> int:
        """KV blocks of the longest sequence."""
        return int(self.n_blocks.max())


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
    block_tables: Tensor  # int32 [S, max_blocks]; entries beyond a sequence's blocks are never read
    slots: Tensor  # int64 [T]: block * block_tokens + offset where the row's KV goes
    sample_rows: Tensor  # int64 [R]
    query_tokens: tuple[int, ...]  # rows of each sequence
    context_tokens: tuple[int, ...]
    max_query: int  # most rows of one sequence: 1 selects the decode kernel
    sm_count: int  # SMs of the lane that runs the batch (set by the lane): sizes split-KV; 1 on a CPU
    works: dict[Tiling, Work] = field(default_factory=dict)  # see :meth:`work`

    @property
    def n_rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def n_seqs(self) -> int:
        return len(self.query_tokens)

    @classmethod
    def build(
        cls,
        spans: Spans | Sequence[Span],
        *,
        block_tokens: int,
        device: torch.device | str = "cpu",
        sm_count: int = 1,
        pad_to: int = 0,
    ) -> Batch:
        """Lay out ``spans`` in order. Every span needs a token and blocks for all its tokens (asserted).

        A captured graph needs fixed shapes: ``pad_to`` adds padding up to that many sequences (their rows
        "sample" too; drop the last logits).
        Nothing of ``spans`` is shared with the batch, so its columns may be overwritten afterwards.
        """
        spans = Spans.of(spans)
        n = len(spans)
        total = max(n, pad_to)
        query = np.ones(total, np.int32)
        query[:n] = spans.counts
        context = np.zeros(total, np.int64)  # padding: its only row has position -1
        np.add(spans.starts, spans.counts, out=context[:n])
        assert n > 0, "an empty batch"
        assert query.min() > 0, "a span without tokens"
        assert (spans.n_blocks * block_tokens >= context[:n]).all(), "blocks do not cover the span"
        starts = np.zeros(total + 1, np.int32)
        np.cumsum(query, out=starts[1:])
        width = spans.width
        tables = np.zeros((total, width), np.int32)
        tables[:n, :width] = spans.blocks[:, :width]
        owner = np.arange(total).repeat(query)
        positions = np.arange(len(owner)) + (context - starts[1:])[owner]
        page, offset = np.divmod(positions, block_tokens)
        slots = tables[owner, page].astype(np.int64) * block_tokens + offset
        tokens = np.zeros(len(owner), np.int64)
        tokens[: len(spans.tokens)] = spans.tokens
        sample_rows = starts[1:].astype(np.int64) - 1
        if total > n:
            slots[positions < 0] = -1
            np.maximum(positions, 0, out=positions)
        if not spans.sample.all():
            sample_rows = np.concatenate((sample_rows[:n][spans.sample], sample_rows[n:]))
        columns = (tokens, positions, starts, context.astype(np.int32), tables, slots, sample_rows)
        there = dict(zip(_COLUMNS, upload(columns, device), strict=True))
        return cls(
            tokens=there["tokens"],
            positions=there["positions"],
            query_starts=there["query_starts"],
            context_lens=there["context_lens"],
            block_tables=there["block_tables"],
            slots=there["slots"],
            sample_rows=there["sample_rows"],
            query_tokens=tuple(query.tolist()),
            context_tokens=tuple(context.tolist()),
            max_query=int(query.max()),
            sm_count=sm_count,
        )

    def work(self, tiling: Tiling) -> Work:
        """The attention of this pass cut by ``tiling``: made when the first layer asks, the same for all layers."""
        if tiling not in self.works:
            counts, contexts = np.array(self.query_tokens), np.array(self.context_tokens)
            items, merges = work_list(counts, contexts, self.block_tables.shape[1], tiling)
            partials = int(merges[:, 3].sum())
            on_device = upload((items, merges), self.tokens.device)
            self.works[tiling] = Work(on_device[0], on_device[1], partials)
        return self.works[tiling]
