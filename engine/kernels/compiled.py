"""The operations a CPU decodes with, compiled by Numba: no gathering of blocks, no intermediate tensors.

A decode step of a small model on one core is many tiny operations: in torch, handing them out costs as much as
doing them, and attention must first copy a sequence's blocks together. Here each is one call that walks the blocks
where they lie. Chunks of a prompt, and types other than float32, go the way of :class:`TorchKernels`.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from engine.jit.kernel import kernel
from engine.kernels.batch import Batch
from engine.kernels.reference import TorchKernels


class CompiledKernels(TorchKernels):
    """Kernels of a CPU in float32. A sequence's result does not depend on what else is in the batch."""

    name: ClassVar[str] = "compiled"

    def attend(self, query: Tensor, cache: Tensor, batch: Batch, scale: float) -> Tensor:
        if query.dtype != torch.float32 or 1 not in batch.query_tokens:
            return super().attend(query, cache, batch, scale)
        out = torch.empty(query.shape)
        _decode(
            query.numpy(),
            cache.numpy(),
            batch.block_tables.numpy(),
            batch.query_starts.numpy(),
            batch.context_lens.numpy(),
            np.float32(scale),
            out.numpy(),
        )
        if batch.max_query > 1:
            self.attend_chunks(query, cache, batch, scale, out, at_least=2)
        return out

    def rope_write(
        self, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, slots: Tensor
    ) -> None:
        if query.dtype != torch.float32:
            super().rope_write(query, key, value, cos, sin, cache, slots)
            return
        _rotate(query.numpy(), key.numpy(), cos.numpy(), sin.numpy())
        _write(key.numpy(), value.numpy(), cache.numpy(), slots.numpy())

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if x.dtype != torch.float32 or x.dim() != 2 or not x.is_contiguous():
            return super().rms_norm(x, weight, eps, residual)
        out, total = torch.empty(x.shape), x
        if residual is None:
            _norm(x.numpy(), weight.numpy(), np.float32(eps), out.numpy())
        else:
            total = torch.empty(x.shape)
            _add_norm(x.numpy(), residual.numpy(), weight.numpy(), np.float32(eps), total.numpy(), out.numpy())
        return out, total


@kernel(fastmath=True)
def _softmax(scores, bits):
    """Replace ``scores`` by their softmax; ``bits`` is scratch, int32, of the same length.

    2^x = 2^n 2^f with f within a half: a Taylor polynomial (error 5e-9) and the exponent's bits. Unlike a call of
    the C library it runs in all lanes of a vector, and exponentials are half the work of a decode's attention.
    """
    n = scores.shape[0]
    top = np.float32(-np.inf)
    for k in range(n):
        top = max(top, scores[k])
    for k in range(n):
        x = max((scores[k] - top) * np.float32(1.4426950408889634), np.float32(-126.0))
        whole = np.floor(x + np.float32(0.5))
        f = x - whole
        bits[k] = (np.int32(whole) + np.int32(127)) << np.int32(23)
        y = np.float32(1.5252733e-05) * f + np.float32(1.5403530e-04)
        y = y * f + np.float32(1.3333558e-03)
        y = y * f + np.float32(9.6181291e-03)
        y = y * f + np.float32(5.5504109e-02)
        y = y * f + np.float32(2.4022651e-01)
        y = y * f + np.float32(6.9314718e-01)
        scores[k] = y * f + np.float32(1.0)
    powers = bits.view(np.float32)
    total = np.float32(0.0)
    for k in range(n):
        scores[k] *= powers[k]
        total += scores[k]
    inverse = np.float32(1.0) / total
    for k in range(n):
        scores[k] *= inverse


@kernel(fastmath=True)
def _decode(query, cache, tables, starts, contexts, scale, out):
    """Attention of every sequence that has one row; shapes as in :class:`Kernels`. Two passes over its keys."""
    page, n_kv, width = cache.shape[2], cache.shape[3], cache.shape[4]
    group = query.shape[1] // n_kv
    longest = 0
    for seq in range(contexts.shape[0]):
        longest = max(longest, contexts[seq])
    weights = np.empty((group, longest), np.float32)
    bits = np.empty(longest, np.int32)
    rows = np.empty((group, width), np.float32)
    for seq in range(contexts.shape[0]):
        row, context = starts[seq], contexts[seq]
        if starts[seq + 1] - row != 1:
            continue
        for kv in range(n_kv):
            for h in range(group):
                for d in range(width):
                    rows[h, d] = query[row, kv * group + h, d] * scale
            for first in range(0, context, page):
                block = tables[seq, first // page]
                for token in range(first, min(first + page, context)):
                    key = cache[0, block, token - first, kv]
                    for h in range(group):
                        score = np.float32(0.0)
                        for d in range(width):
                            score += rows[h, d] * key[d]
                        weights[h, token] = score
            if context > 0:
                for h in range(group):
                    _softmax(weights[h, :context], bits[:context])
            rows[:] = np.float32(0.0)
            for first in range(0, context, page):
                block = tables[seq, first // page]
                for h in range(group):
                    for token in range(first, min(first + page, context)):
                        value = cache[1, block, token - first, kv]
                        weight = weights[h, token]
                        for d in range(width):
                            rows[h, d] += weight * value[d]
            for h in range(group):
                for d in range(width):
                    out[row, kv * group + h, d] = rows[h, d]


@kernel
def _write(key, value, cache, slots):
    page = cache.shape[2]
    for row in range(slots.shape[0]):
        slot = slots[row]
        if slot < 0:
            continue
        block, offset = slot // page, slot % page
        for kv in range(cache.shape[3]):
            for d in range(cache.shape[4]):
                cache[0, block, offset, kv, d] = key[row, kv, d]
                cache[1, block, offset, kv, d] = value[row, kv, d]


@kernel(fastmath=True)
def _norm(x, weight, eps, out):
    width = x.shape[1]
    for row in range(x.shape[0]):
        squares = np.float32(0.0)
        for d in range(width):
            squares += x[row, d] * x[row, d]
        shrink = np.float32(1.0) / np.sqrt(squares / np.float32(width) + eps)
        for d in range(width):
            out[row, d] = x[row, d] * shrink * weight[d]


@kernel(fastmath=True)
def _add_norm(x, residual, weight, eps, total, out):
    width = x.shape[1]
    for row in range(x.shape[0]):
        squares = np.float32(0.0)
        for d in range(width):
            added = x[row, d] + residual[row, d]
            total[row, d] = added
            squares += added * added
        shrink = np.float32(1.0) / np.sqrt(squares / np.float32(width) + eps)
        for d in range(width):
            out[row, d] = total[row, d] * shrink * weight[d]


@kernel
def _rotate(query, key, cos, sin):
    half = cos.shape[1]
    for row in range(query.shape[0]):
        for heads in (query, key):
            for head in range(heads.shape[1]):
                for d in range(half):
                    first, second = heads[row, head, d], heads[row, head, d + half]
                    heads[row, head, d] = first * cos[row, d] - second * sin[row, d]
                    heads[row, head, d + half] = second * cos[row, d] + first * sin[row, d]
