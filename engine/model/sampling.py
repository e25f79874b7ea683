"""How the next token is chosen, for each row of a batch by its own rules and its own randomness."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.errors import SlalomError

__all__ = ["SamplingParams", "choose_tokens", "uniform"]

_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What a request asks of its continuation. Names and meanings are vLLM's where OpenAI has none.

    :param max_tokens: tokens to generate at most
    :param temperature: 0 is greedy
    :param top_p: sample from the fewest most likely tokens that hold this probability
    :param top_k: sample from this many most likely tokens; 0 for all
    :param seed: fixes the draws: the same seed draws the same numbers whatever else is in the batch
    :param stop: strings that end the output (not part of it)
    :param stop_token_ids: tokens that end the output (their text is not part of it)
    :param min_tokens: tokens before which nothing may end the output but ``max_tokens``
    :param ignore_eos: go on past the model's end tokens (for load tests of a given length)
    :raises SlalomError: a value out of range
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = field(default_factory=lambda: secrets.randbits(63))
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        rules = (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0.0 <= self.temperature <= 100.0, "from 0 (greedy) to 100"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0, at most 1"),
            ("top_k", self.top_k >= 0, "at least 1, or 0 for all tokens"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "from 0 to max_tokens"),
            ("stop", all(self.stop), "stop strings must not be empty"),
        )
        for name, holds, fix in rules:
            if not holds:
                raise SlalomError(name, getattr(self, name), fix)


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1) that depends on ``seed`` and ``step`` alone (SplitMix64, Steele et al. 2014)."""
    x = (seed + (step + 1) * 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((x ^ (x >> 31)) >> 11) * 2.0**-53


def choose_tokens(
    logits: Tensor, params: Sequence[SamplingParams], steps: Sequence[int], eos_ids: frozenset[int]
) -> Tensor:
    """One token for each row, int64 [R], on the device of ``logits`` [R, vocab].

    :param steps: tokens each request has generated so far; selects its random number
    :param eos_ids: the model's end tokens, barred while a request is below its ``min_tokens``
    """
    logits = _bar_ends(logits, params, steps, eos_ids)
    tokens = logits.argmax(-1)
    drawn = [row for row, p in enumerate(params) if p.temperature > 0.0]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        tokens[rows] = _draw(logits[rows].float(), [params[i] for i in drawn], [steps[i] for i in drawn])
    return tokens


def _bar_ends(
    logits: Tensor, params: Sequence[SamplingParams], steps: Sequence[int], eos_ids: frozenset[int]
) -> Tensor:
    early = [row for row, (p, step) in enumerate(zip(params, steps, strict=True)) if step < p.min_tokens]
    if not early:
        return logits
    logits = logits.clone()
    for row in early:
        barred = sorted(eos_ids.union(params[row].stop_token_ids))
        logits[row, barred] = float("-inf")
    return logits


def _draw(logits: Tensor, params: Sequence[SamplingParams], steps: Sequence[int]) -> Tensor:
    """Inverse transform sampling on the sorted distribution: temperature, then top-k, then top-p."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=logits.device).unsqueeze(1)

    scaled, order = (logits / column([p.temperature for p in params])).sort(
        stable=True, dim=-1, descending=True
    )
    vocab = scaled.shape[1]
    ranks = torch.arange(vocab, device=logits.device)
    kept_k = column([float(p.top_k or vocab) for p in params])
    probabilities = scaled.masked_fill(ranks >= kept_k, float("-inf")).softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    probabilities = probabilities.masked_fill(before >= column([p.top_p for p in params]), 0.0)
    reached = probabilities.cumsum(-1)
    draws = column([uniform(p.seed, step) for p, step in zip(params, steps, strict=True)])
    rank = (reached <= draws * reached[:, -1:]).sum(-1, keepdim=True)
    last = (probabilities > 0).sum(-1, keepdim=True) - 1  # rounding must not lead past the last kept token
    return order.gather(1, rank.minimum(last)).squeeze(1)
