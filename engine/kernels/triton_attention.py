"""Paged attention in Triton: one kernel for decode, prefill chunks and mixed batches, and the split-KV merge.

A program owns a block of query rows of one KV head, a row being one (token, query head of the group) pair,
and one contiguous share of the context ("split"). It keeps a running softmax in base 2 (Milakov & Gimelshein
2018). With one split it writes the result; with more, partial results and their log-sum-exp, merged by a
second kernel as in Flash-Decoding. The grid depends on tensor shapes only, lengths are read on the device,
so that a launch can be captured in a graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.kernels.batch import Batch

__all__ = ["AttentionPlan", "attention_kernel", "merge_kernel", "paged_attention", "plan_attention"]

_LOG2_E = 1.4426950408889634
_MAX_SPLITS = 32
_PROGRAMS_PER_SM = 2  # one decode program alone cannot keep an SM's share of the memory bandwidth busy
_SPLIT_TILES = 4  # a split shorter than this many key tiles costs more to merge than it saves


@triton.jit
def _owner(starts, program, n_seqs, BLOCK_TOKENS: tl.constexpr):
    """Sequence of query block ``program``: the first of sequence s is starts[s] // BLOCK_TOKENS + s."""
    low = 0
    high = n_seqs
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(starts + middle) // BLOCK_TOKENS + middle <= program:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _tile(
    acc, top, total, query, positions, key_base, value_base, table, tile, end, scale,
    slot_stride, block_stride,
    PAGE: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Fold one tile of BLOCK_N keys into the running softmax (acc, top, total)."""
    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    width = tl.arange(0, D_PAD)
    if MASKED:
        page = tl.load(table + keys // PAGE, mask=keys < end, other=0).to(tl.int64)
    else:
        page = tl.load(table + keys // PAGE).to(tl.int64)
    offsets = page * block_stride + (keys % PAGE) * slot_stride
    where = offsets[:, None] + width[None, :]
    if MASKED:
        inside = (keys < end)[:, None] & (width < D)[None, :]
        key = tl.load(key_base + where, mask=inside, other=0.0)
        value = tl.load(value_base + where, mask=inside, other=0.0)
    elif D == D_PAD:
        key = tl.load(key_base + where)
        value = tl.load(value_base + where)
    else:
        key = tl.load(key_base + where, mask=(width < D)[None, :], other=0.0)
        value = tl.load(value_base + where, mask=(width < D)[None, :], other=0.0)
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
    if MASKED:
        scores = tl.where(keys[None, :] <= positions[:, None], scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    # a row that has seen no key yet has top = -inf, and -inf - -inf is not a number
    anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - anchor[:, None])
    shrink = tl.exp2(top - anchor)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    acc += tl.dot(weights.to(value.dtype), value, input_precision="ieee")
    return acc, new_top, total


@triton.jit
def attention_kernel(
    query_ptr, key_ptr, value_ptr, table_ptr, starts_ptr, context_ptr, out_ptr, lse_ptr,
    n_seqs, scale, query_token_stride, query_head_stride,
    block_stride, slot_stride, head_stride, table_stride, n_heads,
    GROUP: tl.constexpr, PAGE: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DECODE: tl.constexpr, SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: (query blocks, KV heads, splits). ``out`` is [T, H, D], or fp32 [T, H, splits, D] when SPLIT."""
    program = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    n_splits = tl.num_programs(2)
    BLOCK_TOKENS: tl.constexpr = BLOCK_M // GROUP

    if DECODE:
        seq = program
        start = tl.load(starts_ptr + seq)
        first = 0
    else:
        seq = _owner(starts_ptr, program, n_seqs, BLOCK_TOKENS)
        start = tl.load(starts_ptr + seq)
        first = (program - (start // BLOCK_TOKENS + seq)) * BLOCK_TOKENS
    n_query = tl.load(starts_ptr + seq + 1) - start
    if first >= n_query:
        return
    context = tl.load(context_ptr + seq)

    rows = tl.arange(0, BLOCK_M)
    width = tl.arange(0, D_PAD)
    token = first + rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    live = (rows < BLOCK_TOKENS * GROUP) & (token < n_query)
    inside = live[:, None] & (width < D)[None, :]
    positions = context - n_query + token
    row_offset = (start + token).to(tl.int64) * query_token_stride + head * query_head_stride
    query = tl.load(query_ptr + row_offset[:, None] + width[None, :], mask=inside, other=0.0)

    end = context - n_query + tl.minimum(first + BLOCK_TOKENS, n_query)  # keys the last row sees
    tiles = (end + BLOCK_N - 1) // BLOCK_N
    share = (tiles + n_splits - 1) // n_splits
    low = split * share
    high = tl.minimum(low + share, tiles)
    # up to here all rows see all keys; a padding sequence (context 0) has none
    clear = tl.minimum(high, tl.maximum(context - n_query + first + 1, 0) // BLOCK_N)

    acc = tl.zeros([BLOCK_M, D_PAD], dtype=tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    table = table_ptr + seq.to(tl.int64) * table_stride
    key_base = key_ptr + kv_head * head_stride
    value_base = value_ptr + kv_head * head_stride
    for tile in tl.range(low, clear, num_stages=STAGES):
        acc, top, total = _tile(
            acc, top, total, query, positions, key_base, value_base, table, tile, end, scale,
            slot_stride, block_stride, PAGE, BLOCK_N, D, D_PAD, False,
        )  # fmt: skip
    for tile in tl.range(tl.maximum(low, clear), high, num_stages=1):
        acc, top, total = _tile(
            acc, top, total, query, positions, key_base, value_base, table, tile, end, scale,
            slot_stride, block_stride, PAGE, BLOCK_N, D, D_PAD, True,
        )  # fmt: skip

    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_row = (start + token).to(tl.int64) * n_heads + head
    if SPLIT:
        out_row = out_row * n_splits + split
        lse = tl.where(total == 0.0, float("-inf"), top + tl.log2(tl.where(total == 0.0, 1.0, total)))
        tl.store(lse_ptr + out_row, lse, mask=live)
    tl.store(out_ptr + out_row[:, None] * D + width[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def merge_kernel(
    partial_ptr, lse_ptr, out_ptr, n_splits,
    SPLITS_PAD: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr,
):  # fmt: skip
    """Grid: (T * H,). Weighs the splits of one row by their log-sum-exp."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS_PAD)
    width = tl.arange(0, D_PAD)
    lse = tl.load(lse_ptr + row * n_splits + split, mask=split < n_splits, other=float("-inf"))
    top = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weight, 0)
    weight = weight / tl.where(total == 0.0, 1.0, total)
    inside = (split < n_splits)[:, None] & (width < D)[None, :]
    where = (row * n_splits + split)[:, None] * D + width[None, :]
    partial = tl.load(partial_ptr + where, mask=inside, other=0.0)
    out = tl.sum(partial * weight[:, None], 0)
    tl.store(out_ptr + row * D + width, out.to(out_ptr.dtype.element_ty), mask=width < D)


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Launch shape of one attention call: a function of shapes only, so every replay of a graph keeps it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    query_blocks: int
    splits: int


def plan_attention(
    *,
    n_rows: int,
    n_seqs: int,
    max_query: int,
    max_context: int,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    element_bytes: int,
    sm_count: int,
) -> AttentionPlan:
    """Tile sizes and the number of splits.

    Splits fill the lane: they are added while ``query blocks * KV heads`` programs are fewer than what its
    ``sm_count`` SMs hold at once. Programs against SMs decide, not context length alone: a batch that fills
    the lane gains nothing from splitting, however long its contexts are.
    """
    group = n_heads // n_kv_heads
    block_m = max(16, triton.next_power_of_2(min(group * max_query, 128)), triton.next_power_of_2(group))
    wide = element_bytes == 4 or head_dim > 128
    if wide:
        block_m = max(min(block_m, 32), triton.next_power_of_2(group))
    block_n = 32 if wide else 64
    query_blocks = n_seqs if max_query == 1 else n_rows // (block_m // group) + n_seqs
    programs = query_blocks * n_kv_heads
    useful = max(1, max_context // (block_n * _SPLIT_TILES))
    splits = max(1, min(_PROGRAMS_PER_SM * sm_count // programs, useful, _MAX_SPLITS))
    return AttentionPlan(
        block_m=block_m,
        block_n=block_n,
        num_warps=8 if block_m == 128 else 4,
        num_stages=2 if block_m == 128 else 3,
        query_blocks=query_blocks,
        splits=splits,
    )


def paged_attention(query: Tensor, cache: Tensor, batch: Batch, scale: float) -> Tensor:
    """:meth:`Kernels.attend`; the block table's width (a graph's bucket) stands for the longest context."""
    n_rows, n_heads, head_dim = query.shape
    _, _, page, n_kv_heads, _ = cache.shape
    plan = plan_attention(
        n_rows=n_rows,
        n_seqs=batch.n_seqs,
        max_query=batch.max_query,
        max_context=batch.block_tables.shape[1] * page,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        element_bytes=query.element_size(),
        sm_count=batch.sm_count,
    )
    out = torch.empty((n_rows, n_heads, head_dim), dtype=query.dtype, device=query.device)
    target, lse = out, out  # lse is not touched without splits
    if plan.splits > 1:
        shape = (n_rows, n_heads, plan.splits)
        target = torch.empty((*shape, head_dim), dtype=torch.float32, device=query.device)
        lse = torch.empty(shape, dtype=torch.float32, device=query.device)
    d_pad = max(16, triton.next_power_of_2(head_dim))
    attention_kernel[(plan.query_blocks, n_kv_heads, plan.splits)](
        query, cache[0], cache[1], batch.block_tables, batch.query_starts, batch.context_lens, target, lse,
        batch.n_seqs, scale * _LOG2_E, query.stride(0), query.stride(1),
        cache.stride(1), cache.stride(2), cache.stride(3), batch.block_tables.stride(0), n_heads,
        GROUP=n_heads // n_kv_heads, PAGE=page, D=head_dim, D_PAD=d_pad,
        BLOCK_M=plan.block_m, BLOCK_N=plan.block_n, DECODE=batch.max_query == 1, SPLIT=plan.splits > 1,
        STAGES=plan.num_stages, num_warps=plan.num_warps,
    )  # fmt: skip
    if plan.splits > 1:
        merge_kernel[(n_rows * n_heads,)](
            target, lse, out, plan.splits,
            SPLITS_PAD=triton.next_power_of_2(plan.splits), D=head_dim, D_PAD=d_pad, num_warps=2,
        )  # fmt: skip
    return out
