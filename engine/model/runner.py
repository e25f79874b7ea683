"""A model with its KV pool: batches in, tokens out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from engine.kernels import Batch, Scored, Span, Spans
from engine.model.kv import KVPool
from engine.model.llama import Carry, Llama
from engine.model.sampling import Logprobs, SamplingParams, choose_tokens, logprobs_of

_SCORED_AT_ONCE = 128  # rows of logits that are in memory together


class ModelRunner:
    """Runs what somebody else has scheduled. Runners of one device share ``model``; each has its own pool.

    It holds no state of a request, so two lanes may call it at once for different sequences.

    :param model: the weights (:func:`engine.model.weights.load_model`)
    :param pool: KV of this runner's sequences
    :param eos_ids: the model's end tokens, for ``min_tokens``
    """

    def __init__(self, model: Llama, pool: KVPool, *, eos_ids: frozenset[int] = frozenset()) -> None:
        assert pool.layers[0].dtype == model.embed.weight.dtype, "weights and KV differ in type"
        self.model, self.pool, self.eos_ids = model, pool, eos_ids
        self.device = model.embed.weight.device
        self.n_layers = model.config.n_layers

    def batch(self, spans: Spans | Sequence[Span], *, sm_count: int = 1) -> Batch:
        """Lay out ``spans`` for this pool and device; ``sm_count`` is the lane's."""
        tokens = self.pool.block_tokens
        return Batch.build(spans, block_tokens=tokens, device=self.device, sm_count=sm_count)

    def run_layers(self, batch: Batch, layers: tuple[int, int], carry: Carry | None = None) -> Carry:
        """Run layers ``[from, to)``; the result goes to the next slice or, at the end, to :meth:`logits`."""
        return self.model(batch, self.pool, layers, carry)

    @torch.inference_mode()
    def logits(self, batch: Batch, carry: Carry) -> Tensor:
        """Logits [R, vocab] of the sampling rows."""
        return self.model.logits(carry, batch)

    @torch.inference_mode()
    def logprobs(self, batch: Batch, carry: Carry, wanted: Scored) -> list[Logprobs]:
        """What the model thought of tokens of a prompt, see :class:`Scored`; ``carry`` is that of the last layer."""
        found: list[Logprobs] = []
        begin = sum(batch.query_tokens[: wanted.span])
        for k in range(0, len(wanted.tokens), _SCORED_AT_ONCE):
            tokens = torch.tensor(wanted.tokens[k : k + _SCORED_AT_ONCE], device=self.device)
            rows = torch.arange(begin + k, begin + k + len(tokens), device=self.device)
            logits = self.model.logits(carry, replace(batch, sample_rows=rows))
            found += [one for one in logprobs_of(logits, tokens, [wanted.top] * len(tokens)) if one is not None]
        return found

    @torch.inference_mode()
    def choose(self, logits: Tensor, params: Sequence[SamplingParams], steps: Sequence[int]) -> Tensor:
        """The next token of each sampling row, int64 [R], still on the device.

        :param logits: [R, vocab], of :meth:`logits` or of a graph
        :param params: one for each sampling row, in order
        :param steps: tokens each of them has generated so far
        """
        assert len(params) == len(steps) == logits.shape[0]
        return choose_tokens(logits, params, steps, self.eos_ids)

    @torch.inference_mode()
    def warm(self, sm_count: int) -> None:
        """Meet every variant of the kernels once, so that none is compiled while requests wait. No KV is written.

        One layer stands for all. Their shapes follow from the most rows of a sequence; only long contexts are merged.

        :param sm_count: of the whole device
        """
        blocks = [0] * (4096 // self.pool.block_tokens)
        for rows in self.model.kernels.warm_rows:
            start = len(blocks) * self.pool.block_tokens - rows
            batch = self.batch([Span([0] * rows, start, blocks)], sm_count=sm_count)
            batch.slots.fill_(-1)
            hidden = self.run_layers(batch, (0, 1)).hidden
            self.model.logits(Carry(hidden, hidden, self.n_layers), batch)

    def run(self, batch: Batch, params: Sequence[SamplingParams], steps: Sequence[int]) -> list[int]:
        """A whole forward pass and its tokens on the host, one for each sampling row."""
        carry = self.model(batch, self.pool)
        return self.choose(self.logits(batch, carry), params, steps).tolist() if params else []
