"""How the next token is chosen, for each row of a batch by its own rules and its own randomness."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from engine.errors import SlalomError

_MASK = (1 << 64) - 1
_HEAD = 1024  # tokens looked at first: nearly always enough for top-k and top-p, and cheaper than all
_COLD = 1e-5  # below this temperature float32 cannot tell the logits' quotients apart: greedy (as vLLM)
_MOST_TOP_K = 2**31 - 1
_MOST_BIASES = 300
MOST_LOGPROBS = 20
_LEAST_LOGPROB = -9999.0  # minus infinity, which is no JSON, as OpenAI writes it
_MOST_STOPS, _MOST_STOP_TEXT, _MOST_STOP_IDS = 64, 4096, 256  # each is looked at for every token, in everybody's step


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What a request asks of its continuation. Names and meanings are vLLM's where OpenAI has none.

    :param max_tokens: tokens to generate at most
    :param temperature: 0 is greedy, and so is what lies below 1e-5
    :param top_p: sample from the fewest most likely tokens that hold this probability
    :param top_k: sample from this many most likely tokens; 0 for all
    :param min_p: sample only from tokens at least this many times as likely as the likeliest
    :param logit_bias: up to 300 (token, what is added to its logit: from -100 to 100)
    :param presence_penalty: taken from the logits of tokens that are in the answer already; from -2 to 2
    :param frequency_penalty: the same, for each time that they are in it; from -2 to 2
    :param counts: how often each token is in the answer, kept by whoever generates it
    :param allowed: bit k of it says whether token k may come next, kept by whoever generates it; None: all may
    :param logprobs: also say the log-probability of each token and of this many likeliest ones; None: do not
    :param prompt_logprobs: the same of the prompt's tokens, all but the first; its KV is computed, never found
    :param seed: fixes the draws: the same seed draws the same numbers whatever else is in the batch; 64 bits
    :param stop: up to 64 strings that end the output (not part of it), of 4096 characters together
    :param stop_token_ids: up to 256 tokens that end the output (their text is not part of it)
    :param min_tokens: tokens before which nothing may end the output but ``max_tokens``
    :param ignore_eos: go on past the model's end tokens (for load tests of a given length)
    :raises SlalomError: a value out of range
    """

    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    counts: dict[int, int] = field(default_factory=dict, compare=False)
    allowed: bytearray | None = field(default=None, compare=False)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
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
            ("top_k", 0 <= self.top_k <= _MOST_TOP_K, f"from 1 to {_MOST_TOP_K}, or 0 for all tokens"),
            ("min_p", 0.0 <= self.min_p <= 1.0, "from 0 to 1"),
            ("logit_bias", len(self.logit_bias) <= _MOST_BIASES, f"at most {_MOST_BIASES} tokens"),
            ("logit_bias", all(-100.0 <= bias <= 100.0 for _, bias in self.logit_bias), "from -100 to 100 each"),
            ("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "from -2 to 2"),
            ("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "from -2 to 2"),
            ("logprobs", 0 <= (self.logprobs or 0) <= MOST_LOGPROBS, f"from 0 to {MOST_LOGPROBS}"),
            ("prompt_logprobs", 0 <= (self.prompt_logprobs or 0) <= MOST_LOGPROBS, f"from 0 to {MOST_LOGPROBS}"),
            ("seed", -(2**63) <= self.seed < 2**64, "a number of at most 64 bits"),
            ("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "from 0 to max_tokens"),
            ("stop", all(self.stop), "stop strings must not be empty"),
            ("stop", len(self.stop) <= _MOST_STOPS, f"at most {_MOST_STOPS} strings"),
            ("stop", sum(map(len, self.stop)) <= _MOST_STOP_TEXT, f"at most {_MOST_STOP_TEXT} characters together"),
            ("stop_token_ids", len(self.stop_token_ids) <= _MOST_STOP_IDS, f"at most {_MOST_STOP_IDS} tokens"),
        )
        for name, holds, fix in rules:
            if not holds:
                raise SlalomError(name, getattr(self, name), fix)

    @property
    def penalises(self) -> bool:
        """Whether the tokens of its own answer matter to what comes next."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


class Logprobs(NamedTuple):
    """What the model thought of one token of an answer, before any bias, penalty or temperature.

    :param token: natural logarithm of its probability
    :param top: (token, the same) of the likeliest ones, best first; as many as were asked for
    """

    token: float
    top: tuple[tuple[int, float], ...]


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
    logits = _of_form(_bar_ends(_biased(logits, params), params, steps, eos_ids), params)
    tokens = logits.argmax(-1)
    drawn = [row for row, p in enumerate(params) if p.temperature >= _COLD]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        tokens[rows] = _draw(logits[rows].float(), [params[i] for i in drawn], [steps[i] for i in drawn])
    return tokens


def _biased(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Biases added and penalties taken off, as OpenAI defines them."""
    rows = [row for row, p in enumerate(params) if p.logit_bias or (p.counts and p.penalises)]
    if not rows:
        return logits
    logits = logits.clone()
    for row in rows:
        p = params[row]
        if p.logit_bias:
            tokens, biases = zip(*p.logit_bias, strict=True)
            logits[row, list(tokens)] += torch.tensor(biases, dtype=logits.dtype, device=logits.device)
        if p.counts and p.penalises:
            often = torch.tensor(list(p.counts.values()), dtype=logits.dtype, device=logits.device)
            logits[row, list(p.counts)] -= p.presence_penalty + p.frequency_penalty * often
    return logits


def _of_form(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Only tokens that the form of an answer allows."""
    allowed = [(row, p.allowed) for row, p in enumerate(params) if p.allowed is not None]
    if not allowed:
        return logits
    logits = logits.clone()
    for row, mask in allowed:
        bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")[: logits.shape[1]]
        logits[row, torch.from_numpy(bits == 0).to(logits.device)] = float("-inf")
    return logits


def logprobs_of(logits: Tensor, tokens: Tensor, tops: Sequence[int | None]) -> list[Logprobs | None]:
    """What the model thought of ``tokens`` [R], for the rows that ask; ``logits`` [R, vocab] as the model gave them.

    :param tops: how many of the likeliest tokens each row names; None: it does not ask
    """
    found: list[Logprobs | None] = [None] * len(tops)
    rows = [row for row, top in enumerate(tops) if top is not None]
    if not rows:
        return found
    at = torch.tensor(rows, device=logits.device)
    logs = logits[at].float().log_softmax(-1).clamp_min(_LEAST_LOGPROB)
    own = logs.gather(1, tokens[at].unsqueeze(1)).squeeze(1).tolist()
    best, order = logs.topk(min(max(tops[row] or 0 for row in rows), logs.shape[1]), sorted=True)
    for row, log, values, ids in zip(rows, own, best.tolist(), order.tolist(), strict=True):
        n = tops[row] or 0
        found[row] = Logprobs(log, tuple(zip(ids[:n], values[:n], strict=True)))
    return found


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
    """Inverse transform sampling. A row's answer depends on that row alone; rows may take different ways."""
    device = logits.device

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=device).unsqueeze(1)

    logits = logits / column([p.temperature for p in params])
    if any(p.min_p > 0.0 for p in params):
        least = logits.amax(-1, keepdim=True) + column([p.min_p for p in params]).log()
        logits = logits.masked_fill(logits < least, float("-inf"))
    draws = column([uniform(p.seed, step) for p, step in zip(params, steps, strict=True)])
    top_k = column([float(p.top_k or logits.shape[1]) for p in params])
    top_p = column([p.top_p for p in params])
    tokens = torch.empty(len(params), dtype=torch.int64, device=device)

    whole = torch.tensor([p.top_k == 0 and p.top_p == 1.0 for p in params], device=device)
    rows = whole.nonzero().squeeze(1)
    tokens[rows] = _invert(logits[rows].softmax(-1), draws[rows])
    rows = (~whole).nonzero().squeeze(1)
    for width in (min(_HEAD, logits.shape[1]), logits.shape[1]):
        if len(rows) == 0:
            break
        chosen, enough = _truncated(logits[rows], top_k[rows], top_p[rows], draws[rows], width)
        tokens[rows[enough]] = chosen[enough]
        rows = rows[~enough]
    return tokens


def _truncated(logits: Tensor, top_k: Tensor, top_p: Tensor, draws: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Draw after top-k, then top-p, from the ``width`` best; and whether those hold all that may be drawn."""
    best, order = logits.topk(width, sorted=True)
    best = best.masked_fill(torch.arange(width, device=logits.device) >= top_k, float("-inf"))
    inside = top_k <= width  # then probabilities are shares of the k kept, else of the whole vocabulary
    total = torch.where(inside, best.logsumexp(-1, keepdim=True), logits.logsumexp(-1, keepdim=True))
    probabilities = (best - total).exp()
    reached = probabilities.cumsum(-1)
    enough = inside | (reached[:, -1:] >= top_p) | (width == logits.shape[1])
    dropped = reached - probabilities >= top_p
    dropped[:, 0] = False  # the best one stays, also where float32 has no number for top_p
    kept = probabilities.masked_fill(dropped, 0.0)
    return order.gather(1, _invert(kept, draws).unsqueeze(1)).squeeze(1), enough.squeeze(1)


def _invert(weights: Tensor, draws: Tensor) -> Tensor:
    """Index at which the running sum of ``weights`` [R, n] passes ``draws`` [R, 1] of the whole sum, [R]."""
    reached = weights.cumsum(-1)
    index = torch.searchsorted(reached, draws * reached[:, -1:], right=True).squeeze(1)
    # rounding must not lead past the last weight that is not zero
    last = weights.shape[1] - 1 - (weights > 0).flip(-1).int().argmax(-1)
    return index.minimum(last)
