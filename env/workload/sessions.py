"""``kind: sessions``: closed-loop conversations. A turn is sent ``think`` seconds after the one before ends,
so later arrivals depend on the policy under test."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator
from scipy.special import ndtri

from engine.errors import SlalomError
from env.workload.arrivals import ArrivalSpec, PoissonArrivals
from env.workload.base import Model, Split, WorkloadBase, check_request, stream
from env.workload.lengths import Marginal, draw_marginal
from env.workload.prefix import layered, zipf
from env.workload.trace import Trace


class ThinkTime(Model):
    """Lognormal seconds by median and p90, cut at ``cap_s``."""

    median_s: float = Field(gt=0)
    p90_s: float = Field(gt=0)
    cap_s: float = Field(default=600.0, gt=0)

    def draw(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Seconds, f8 (n,)."""
        sigma = np.log(self.p90_s / self.median_s) / ndtri(0.9)
        return np.minimum(self.median_s * np.exp(sigma * rng.standard_normal(n)), self.cap_s)


def _lognormal(median: float, p90: float, high: int) -> dict[str, Any]:
    return {"kind": "lognormal", "median": median, "p90": p90, "high": high}


_PRESETS: dict[str, dict[str, Any]] = {
    # callanjfox/kv-cache-tester (Apache-2.0), 352 Claude Code sessions: medians and p90 of each quantity
    "agents": {
        "turns": _lognormal(33, 138, 400),
        "first": _lognormal(64_159, 261_896, 800_000),
        "growth": _lognormal(391, 3_320, 50_000),
        "output": _lognormal(246, 861, 16_000),
        "think": {"median_s": 12.0, "p90_s": 191.0},
        "shared": 14_400,
        "max_context": 200_000,  # longer sessions of the recording compacted their context; ours end there
        "prompts": 1,
    },
    # Turns and user messages of ShareGPT-like chat; think time is reading plus typing (assumed)
    "chat": {
        "turns": _lognormal(3, 8, 40),
        "first": _lognormal(60, 500, 8_000),
        "growth": _lognormal(40, 300, 8_000),
        "output": _lognormal(220, 510, 4_000),
        "think": {"median_s": 20.0, "p90_s": 90.0},
        "shared": 0,
        "prompts": 1,
    },
}


class SessionsSpec(WorkloadBase):
    """Sessions start by ``arrival`` at the asked rate; each turn's prompt is all that was said before.

    :param preset: ``agents`` or ``chat``; other fields override it, without it all must be given
    :param turns: calls per session
    :param first: prompt tokens of the first call, shared ones included
    :param growth: new prompt tokens of each later call (user message, tool result)
    :param output: answer tokens
    :param think: seconds between an answer and the next call
    :param shared: leading tokens (tools, system prompt) that sessions have in common
    :param prompts: how many different such beginnings there are, with equal popularity
    :param max_context: a session ends before its first call above this; sessions whose first call is above
        are drawn again and counted in ``meta``
    """

    kind: Literal["sessions"]
    preset: Literal["agents", "chat"] | None = None
    turns: Marginal
    first: Marginal
    growth: Marginal
    output: Marginal
    think: ThinkTime
    shared: Annotated[int, Field(ge=0, le=2**24)] = 0
    prompts: Annotated[int, Field(ge=1, le=10**6)] = 1
    arrival: ArrivalSpec = PoissonArrivals(kind="poisson")
    hash_tokens: int = Field(default=64, ge=16, le=2**20, multiple_of=16)
    max_context: int | None = Field(default=None, ge=2)

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("preset") in _PRESETS:
            return _PRESETS[given["preset"]] | given
        return given

    def build(self, rate: float, n: int, seed: int, split: Split, classes: Sequence[str] = ()) -> Trace:
        check_request(rate, n)
        rng = stream(seed, split)
        session, prompt, output, skipped = self._turns(n, rng)
        n_roots = int(session[-1]) + 1
        is_root = np.diff(session, prepend=-1) > 0
        order = np.concatenate([np.flatnonzero(is_root), np.flatnonzero(~is_root)])
        place = np.empty(n + 1, np.int64)
        place[order] = np.arange(n)
        place[n] = -1
        follows = np.append(~is_root[1:], False)  # row i + 1 is the next turn of row i
        next_turn = np.where(follows, place[np.arange(n) + 1], -1)
        think_s = np.where(follows, self.think.draw(n, rng), 0.0)
        start, count, hashes = self._hashes(session, prompt, output, is_root, rng)
        arrival_s = np.full(n, np.inf)
        arrival_s[:n_roots] = self.arrival.times(rate, n_roots, rng, split)
        return Trace.make(
            arrival_s,
            prompt[order],
            output[order],
            n_roots=n_roots,
            next_turn=next_turn[order],
            think_s=think_s[order],
            hash_start=start[order],
            hash_n=count[order],
            hashes=hashes,
            hash_tokens=self.hash_tokens,
            name="sessions",
            meta={"source": "sessions", "seed": seed, "split": split, "sessions_over_context": skipped},
        )

    def _turns(self, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """``n`` calls, session after session: session number, prompt, output; the last session may be cut."""
        columns: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        have = sessions = skipped = 0
        for _ in range(1000):
            session, prompt, output, lost = self._batch(max(8, (n - have) // 16), rng)
            columns.append((session + sessions, prompt, output))
            have += len(session)
            sessions += int(session[-1]) + 1 if len(session) else 0
            skipped += lost
            if have >= n:
                session, prompt, output = (np.concatenate(parts)[:n] for parts in zip(*columns, strict=True))
                return session, prompt, output, skipped
        raise SlalomError("workload.max_context", self.max_context, "allow longer requests or shorten `first`")

    def _batch(self, sessions: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        turns = draw_marginal(self.turns, rng.random(sessions))
        total = int(turns.sum())
        output = draw_marginal(self.output, rng.random(total)).astype(np.int64)
        added = draw_marginal(self.growth, rng.random(total)).astype(np.int64)
        starts = np.cumsum(turns) - turns
        added[starts] = draw_marginal(self.first, rng.random(sessions))
        added[1:] += np.where(np.isin(np.arange(1, total), starts), 0, output[:-1])
        session = np.repeat(np.arange(sessions), turns)
        running = added.cumsum()
        prompt = running - (running[starts] - added[starts])[session]
        limit = self.max_context or np.iinfo(np.int32).max
        over = (prompt + output > limit).cumsum()
        before = np.where(starts > 0, over[starts - 1], 0)
        keep = over == before[session]
        kept, numbers = np.unique(session[keep], return_inverse=True)
        return numbers, prompt[keep], output[keep], sessions - len(kept)

    def _hashes(
        self,
        session: np.ndarray,
        prompt: np.ndarray,
        output: np.ndarray,
        is_root: np.ndarray,
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One chain per session, stored once; every turn sees as much of it as it will have written."""
        count = (prompt + output) // self.hash_tokens
        last = np.append(is_root[1:], True)
        total = np.maximum.reduceat(count, np.flatnonzero(is_root)) if len(count) else count[last]
        which = zipf(self.prompts, 0.0, len(total), rng)
        secrets = rng.integers(0, 2**63, 1 + len(total)).astype(np.uint64)
        keys = np.column_stack([which.astype(np.uint64) ^ secrets[0], secrets[1:]])
        shared = np.minimum(self.shared, prompt[is_root] - 1) // self.hash_tokens
        hashes = layered(keys, np.column_stack([np.minimum(shared, total), total]))
        return (np.cumsum(total) - total)[session], count, hashes
