"""Prefix structure of independent requests: which of them begin alike, as chained hashes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from env.workload.base import Model
from env.workload.hashing import GOLDEN, mix64
from env.workload.lengths import Marginal, draw_marginal
from env.workload.trace import Trace


def zipf(n: int, exponent: float, size: int | tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Ranks 0..n-1 with probability proportional to (rank + 1) ** -exponent."""
    weights = np.arange(1, n + 1, dtype=float) ** -exponent
    return np.minimum(np.searchsorted(weights.cumsum() / weights.sum(), rng.random(size), side="right"), n - 1)


def layered(keys: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Hashes of rows built of layers: rows share an entry where they share the key of its layer.

    :param keys: u8 (n, m), each standing for its layer *and* all layers before it
    :param ends: i8 (n, m), rising, entry at which each layer ends; the last is the row's total
    :return: u8 (sum of totals,), rows end to end
    """
    lengths = np.diff(ends, axis=1, prepend=0)
    total = ends[:, -1]
    position = np.arange(int(total.sum())) - np.repeat(np.cumsum(total) - total, total)
    streams = np.repeat(keys.ravel(), lengths.ravel())
    return mix64(streams + position.astype(np.uint64) * GOLDEN)  # splitmix64 of each key, read at `position`


class _Prefix(Model, ABC):
    """:param private: hash the rest of each request too; it is never found again, but it competes for
    cache space with what is, as in a real engine"""

    hash_tokens: int = Field(default=256, ge=16, le=2**20, multiple_of=16)
    private: bool = True

    @abstractmethod
    def apply(self, trace: Trace, rng: np.random.Generator, max_context: int | None = None) -> Trace:
        """The trace with prefix hashes; rows that outgrow ``max_context`` are dropped and counted."""

    def _hashed(
        self, trace: Trace, prompt: np.ndarray, keys: np.ndarray, ends: np.ndarray, max_context: int | None
    ) -> Trace:
        """Close the shared layers with the private one and put the hashes into the trace."""
        own = mix64(keys[:, -1] ^ mix64(np.arange(trace.n) ^ 0x5EED))
        total = (prompt.astype(np.int64) + trace.output) // self.hash_tokens if self.private else ends[:, -1]
        ends = np.minimum(np.column_stack([ends, total]), total[:, None])
        start = np.cumsum(total) - total
        hashed = replace(
            trace,
            prompt=prompt,
            hash_start=start,
            hash_n=total,
            hashes=layered(np.column_stack([keys, own]), ends),
            hash_tokens=self.hash_tokens,
        )
        if max_context is None:
            return hashed
        fits = prompt.astype(np.int64) + trace.output <= max_context
        meta = hashed.meta | {"dropped": {"over max_context": int((~fits).sum())}}
        return replace(hashed.rows(fits), meta=meta)


class SystemPrefix(_Prefix):
    """Shared system prompts with Zipf popularity.

    :param prompts: how many there are
    :param tokens: length of each
    :param zipf: exponent of their popularity
    :param share: share of requests that have one
    :param included: whether the lengths model already counts them (else they are added)
    """

    kind: Literal["system"]
    prompts: int = Field(default=8, ge=1, le=10**6)
    tokens: Marginal = 1024
    zipf: float = Field(default=1.0, ge=0, le=20)
    share: float = Field(default=1.0, ge=0, le=1)
    included: bool = True

    def apply(self, trace: Trace, rng: np.random.Generator, max_context: int | None = None) -> Trace:
        which = zipf(self.prompts, self.zipf, trace.n, rng)
        tokens = draw_marginal(self.tokens, rng.random(self.prompts))[which]
        tokens = np.where(rng.random(trace.n) < self.share, tokens, 0)
        secret = rng.integers(0, 2**63)
        if self.included:
            prompt = trace.prompt
            tokens = np.minimum(tokens, prompt - 1)
        else:
            prompt = trace.prompt + tokens
        keys = mix64(which ^ secret)[:, None]
        return self._hashed(trace, prompt, keys, (tokens // self.hash_tokens)[:, None], max_context)


class DocumentsPrefix(_Prefix):
    """Long documents, each asked about several times (LooGLE): the lengths model gives the documents.

    :param questions: mean requests per document
    :param active: documents asked about at the same time, in random turns
    :param question_tokens: tokens of the question behind the document
    """

    kind: Literal["documents"]
    questions: float = Field(default=11.0, ge=1, le=10**6)
    active: int = Field(default=8, ge=1, le=10**6)
    question_tokens: Marginal = 30

    def apply(self, trace: Trace, rng: np.random.Generator, max_context: int | None = None) -> Trace:
        batch = max(round(self.questions * self.active), 1)
        document = np.arange(trace.n) // batch * self.active + rng.integers(self.active, size=trace.n)
        _, first, inverse = np.unique(document, return_index=True, return_inverse=True)
        tokens = trace.prompt[first][inverse]
        prompt = tokens + draw_marginal(self.question_tokens, rng.random(trace.n))
        keys = mix64(document ^ rng.integers(0, 2**63))[:, None]
        return self._hashed(trace, prompt, keys, (tokens // self.hash_tokens)[:, None].astype(np.int64), max_context)


class RagPrefix(_Prefix):
    """Retrieved passages behind one system prompt; the lengths model gives the question.

    Passages come in order of relevance, so two requests share a passage's KV only if all before it agree.

    :param documents: passages in the store, with Zipf popularity ``zipf``
    :param per_request: passages per request
    :param chunk_tokens: length of a passage
    :param system_tokens: length of the system prompt
    """

    kind: Literal["rag"]
    documents: int = Field(default=1000, ge=1, le=10**6)
    per_request: int = Field(default=5, ge=1, le=64)
    chunk_tokens: int = Field(default=512, ge=16, le=2**24)
    system_tokens: int = Field(default=1024, ge=0, le=2**24)
    zipf: float = Field(default=1.0, ge=0, le=20)

    def apply(self, trace: Trace, rng: np.random.Generator, max_context: int | None = None) -> Trace:
        passages = zipf(self.documents, self.zipf, (trace.n, self.per_request), rng)
        keys = np.empty((trace.n, self.per_request + 1), np.uint64)
        keys[:, 0] = mix64(np.array([rng.integers(0, 2**63)]))
        for place in range(self.per_request):
            keys[:, place + 1] = mix64(keys[:, place] ^ mix64(passages[:, place]))
        tokens = self.system_tokens + self.chunk_tokens * np.arange(self.per_request + 1)
        ends = np.broadcast_to(tokens // self.hash_tokens, keys.shape)
        return self._hashed(trace, trace.prompt + np.int32(tokens[-1]), keys, ends, max_context)


PrefixSpec = Annotated[SystemPrefix | DocumentsPrefix | RagPrefix, Field(discriminator="kind")]
