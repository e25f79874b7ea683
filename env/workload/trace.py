"""``Trace``: a workload as columns, the one thing every reader and generator returns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from engine.errors import SlalomError
from env.workload.hashing import refine, salt

#: What there is of each request, and as which type.
COLUMNS: dict[str, type] = {
    "arrival_s": np.float64,
    "prompt": np.int32,
    "output": np.int32,
    "cls": np.int16,
    "ttft_s": np.float64,
    "tpot_s": np.float64,
    "next_turn": np.int32,
    "think_s": np.float64,
    "hash_start": np.int64,
    "hash_n": np.int32,
}


@dataclass(frozen=True, eq=False)
class Trace:
    """Requests as columns of length ``n``; checked on construction (``SlalomError`` on bad data).

    The first ``n_roots`` rows are open-loop and sorted by arrival. The rest are follow-up turns: their
    ``arrival_s`` is ``inf``, and each is named by ``next_turn`` of exactly one earlier row, whose end
    plus ``think_s`` is when it is sent.

    ``hashes[hash_start[i] : hash_start[i] + hash_n[i]]`` are *chained* prefix hashes: entry ``j`` stands
    for tokens ``0 .. (j + 1) * hash_tokens``. Rows may share a stretch of ``hashes``; a row may hash less
    than its prompt (the rest is never reused) or more (its answer, which a follow-up turn will find).

    :param arrival_s: f8, seconds from the start of the trace; ``inf`` for follow-up turns
    :param prompt: i4, prompt tokens, >= 1
    :param output: i4, output tokens, >= 1
    :param cls: i2, index of the SLO class
    :param ttft_s: f8, this request's own TTFT target, ``nan`` = that of its class
    :param tpot_s: f8, likewise for TPOT
    :param next_turn: i4, row of the next turn, -1 = none
    :param think_s: f8, seconds between the end of this row and its next turn
    :param hash_start: i8, first entry in ``hashes``
    :param hash_n: i4, entries of this row
    :param hashes: u8 (total,)
    :param hash_tokens: tokens per entry, a multiple of 16; 0 = no prefix data
    :param n_roots: number of open-loop rows
    :param bound: the source says which class a request belongs to; else classes may be drawn by their shares
    :param meta: where it came from and what was done to it
    :param name: for reports
    """

    arrival_s: np.ndarray
    prompt: np.ndarray
    output: np.ndarray
    cls: np.ndarray
    ttft_s: np.ndarray
    tpot_s: np.ndarray
    next_turn: np.ndarray
    think_s: np.ndarray
    hash_start: np.ndarray
    hash_n: np.ndarray
    hashes: np.ndarray
    hash_tokens: int
    n_roots: int
    meta: dict[str, Any] = field(default_factory=dict)
    name: str = "trace"
    bound: bool = False

    def __post_init__(self) -> None:
        for column, dtype in COLUMNS.items():
            object.__setattr__(self, column, self._cast(column, dtype))
        object.__setattr__(self, "hashes", np.ascontiguousarray(self.hashes, np.uint64))
        self._check_rows()
        self._check_turns()
        self._check_hashes()

    @staticmethod
    def make(
        arrival_s: np.ndarray,
        prompt: np.ndarray,
        output: np.ndarray,
        *,
        name: str = "trace",
        hash_tokens: int = 0,
        n_roots: int | None = None,
        meta: dict[str, Any] | None = None,
        bound: bool = False,
        **columns: np.ndarray,
    ) -> Trace:
        """Build a trace, filling the columns not given with their "nothing special" value."""
        n = len(arrival_s)
        defaults: dict[str, np.ndarray] = {
            "cls": np.zeros(n, np.int16),
            "ttft_s": np.full(n, np.nan),
            "tpot_s": np.full(n, np.nan),
            "next_turn": np.full(n, -1, np.int32),
            "think_s": np.zeros(n),
            "hash_start": np.zeros(n, np.int64),
            "hash_n": np.zeros(n, np.int32),
            "hashes": np.empty(0, np.uint64),
        }
        return Trace(
            arrival_s=arrival_s,
            prompt=prompt,
            output=output,
            hash_tokens=hash_tokens,
            n_roots=n if n_roots is None else n_roots,
            meta=meta or {},
            name=name,
            bound=bound,
            **(defaults | columns),
        )

    @property
    def n(self) -> int:
        """Number of requests, follow-up turns included."""
        return len(self.arrival_s)

    @property
    def duration_s(self) -> float:
        """Arrival of the last open-loop request."""
        return float(self.arrival_s[self.n_roots - 1]) if self.n_roots else 0.0

    def _cast(self, column: str, dtype: type) -> np.ndarray:
        raw = np.asarray(getattr(self, column))
        if raw.ndim != 1 or len(raw) != len(self.arrival_s):
            raise SlalomError(f"trace.{column}", raw.shape, f"give one value per request ({len(self.arrival_s)})")
        if np.issubdtype(dtype, np.integer) and not np.issubdtype(raw.dtype, np.integer):
            raise SlalomError(f"trace.{column}", str(raw.dtype), "give whole numbers")
        if raw.dtype != dtype and np.issubdtype(dtype, np.integer) and len(raw):
            limits = np.iinfo(dtype)
            if raw.min() < limits.min or raw.max() > limits.max:
                raise SlalomError(f"trace.{column}", int(np.abs(raw).max()), f"stay within {limits.max}")
        return np.ascontiguousarray(raw, dtype)

    def _check_rows(self) -> None:
        if not 0 <= self.n_roots <= self.n:
            raise SlalomError("trace.n_roots", self.n_roots, f"give 0 to {self.n}")
        if self.n and not self.n_roots:
            raise SlalomError("trace.n_roots", 0, "a trace needs at least one open-loop request")
        roots = self.arrival_s[: self.n_roots]
        _reject("trace.arrival_s", roots, ~(np.isfinite(roots) & (roots >= 0)), "give finite times >= 0")
        later = self.arrival_s[self.n_roots :]
        _reject("trace.arrival_s", later, ~np.isposinf(later), "follow-up turns have arrival inf", self.n_roots)
        _reject("trace.arrival_s", roots[1:], roots[1:] < roots[:-1], "sort the requests by arrival", 1)
        for column in ("prompt", "output"):
            values = getattr(self, column)
            _reject(f"trace.{column}", values, values < 1, "drop requests without tokens")
            _reject(f"trace.{column}", values, values >= 2**30, "no request has 2^30 tokens or more")
        _reject("trace.cls", self.cls, self.cls < 0, "class indices start at 0")
        for column in ("ttft_s", "tpot_s"):
            values = getattr(self, column)
            bad = ~(np.isnan(values) | (values > 0))
            _reject(f"trace.{column}", values, bad, "give a time > 0, or nan for the target of the class")
        bad = ~(np.isfinite(self.think_s) & (self.think_s >= 0))
        _reject("trace.think_s", self.think_s, bad, "give finite times >= 0")

    def _check_turns(self) -> None:
        parents = np.flatnonzero(self.next_turn != -1)
        if not len(parents) and self.n_roots == self.n:
            return
        turns = self.next_turn[parents]
        bad = (turns < self.n_roots) | (turns >= self.n) | (turns <= parents)
        _reject("trace.next_turn", turns, bad, "name a later row among the follow-up turns")
        follow_ups = np.bincount(turns - self.n_roots, minlength=self.n - self.n_roots)
        _reject(
            "trace.next_turn",
            follow_ups,
            follow_ups != 1,
            "name every follow-up turn exactly once",
            self.n_roots,
        )

    def _check_hashes(self) -> None:
        if self.hash_tokens < 0 or self.hash_tokens % 16:
            raise SlalomError("trace.hash_tokens", self.hash_tokens, "give a multiple of 16, or 0 for no hashes")
        end = self.hash_start + self.hash_n
        bad = (self.hash_start < 0) | (self.hash_n < 0) | (end > len(self.hashes))
        _reject("trace.hash_start", self.hash_start, bad, f"stay within the {len(self.hashes)} entries of hashes")
        if not self.hash_tokens:
            _reject("trace.hash_n", self.hash_n, self.hash_n > 0, "set hash_tokens, or leave the hashes out")

    def owner(self) -> np.ndarray:
        """Row of the open-loop request each request descends from, i8 (n,)."""
        owner = np.arange(self.n)
        for parents, turns in self.generations():
            owner[turns] = owner[parents]
        return owner

    def generations(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pairs (rows, their next turns), i8, first all second turns, then all third ones, and so on."""
        parents = np.flatnonzero(self.next_turn[: self.n_roots] >= 0)
        while len(parents):
            turns = self.next_turn[parents]
            yield parents, turns
            parents = turns[self.next_turn[turns] >= 0]

    def rows(self, keep: np.ndarray) -> Trace:
        """The rows where ``keep`` (bool, (n,)) holds; a chain of turns ends at its first dropped row."""
        keep = keep.copy()
        for parents, turns in self.generations():
            keep[turns] &= keep[parents]
        kept = np.flatnonzero(keep)
        place = np.full(self.n + 1, -1, np.int32)
        place[kept] = np.arange(len(kept), dtype=np.int32)
        columns = {column: getattr(self, column)[kept] for column in COLUMNS}
        columns["next_turn"] = place[columns["next_turn"]]
        return replace(self, n_roots=int(keep[: self.n_roots].sum()), **columns)

    def slice_time(self, t0: float, t1: float) -> Trace:
        """Open-loop requests arriving in ``[t0, t1)`` seconds, with their turns, moved to start at 0."""
        arrival = self.arrival_s[: self.n_roots]
        first, last = np.searchsorted(arrival, [t0, t1])
        cut = self._roots(int(first), int(last))
        shifted = np.where(np.isfinite(cut.arrival_s), cut.arrival_s - t0, np.inf)
        return replace(cut, arrival_s=shifted, meta=self.meta | {"slice_s": [float(t0), float(t1)]})

    def take(self, n: int, start: int = 0) -> Trace:
        """``n`` requests from open-loop request ``start`` on, turns counted; the last chain may be cut.

        :raises SlalomError: fewer than ``n`` requests are there
        """
        if self.n_roots == self.n:
            cut = self._roots(start, start + n)
        else:
            sizes = np.bincount(self.owner(), minlength=self.n_roots)[start : self.n_roots].cumsum()
            cut = self._roots(start, start + int(np.searchsorted(sizes, n)) + 1)
        if cut.n < n:
            raise SlalomError(
                f"trace {self.name}",
                n,
                f"ask for at most {cut.n} requests from row {start}, or give a longer trace",
            )
        return cut if cut.n == n else cut.rows(_first_rows(cut, n))

    def compact(self) -> Trace:
        """Without the entries of ``hashes`` before the first and after the last one its rows use."""
        used = self.hash_n > 0
        if not used.any():
            return replace(self, hashes=self.hashes[:0], hash_start=np.zeros(self.n, np.int64))
        low, high = self.hash_start[used].min(), (self.hash_start + self.hash_n)[used].max()
        start = np.where(used, self.hash_start - low, 0)
        return replace(self, hashes=self.hashes[low:high], hash_start=start)

    def _roots(self, first: int, last: int) -> Trace:
        last = min(last, self.n_roots)
        if self.n_roots == self.n:
            columns = {column: getattr(self, column)[first:last] for column in COLUMNS}
            return replace(self, n_roots=max(last - first, 0), **columns)
        owner = self.owner()
        return self.rows((owner >= first) & (owner < last))


def _first_rows(trace: Trace, n: int) -> np.ndarray:
    """Mask of ``n`` rows: all chains but the last whole, the last one cut short."""
    owner = trace.owner()
    order = np.argsort(owner, kind="stable")  # turns of one chain stay in order, as parents precede children
    keep = np.zeros(trace.n, bool)
    keep[order[:n]] = True
    return keep


def _reject(name: str, values: np.ndarray, bad: np.ndarray, fix: str, offset: int = 0) -> None:
    if bad.any():
        row = int(np.argmax(bad))
        raise SlalomError(f"{name}[{row + offset}]", values[row].item(), fix)


def scale_rate(trace: Trace, rate: float) -> Trace:
    """Stretch time so the open-loop requests arrive at ``rate`` per second on average.

    Order, CV and relative shape stay; bursts get shorter or longer by the factor, which is written to
    ``meta["time_factor"]`` (keep it within about 0.2 to 5: think times and SLOs do not stretch along).

    :raises SlalomError: rate <= 0, or fewer than two distinct arrivals
    """
    if not (math.isfinite(rate) and rate > 0):
        raise SlalomError("rate", rate, "give requests per second > 0")
    roots = trace.arrival_s[: trace.n_roots]
    span = float(roots[-1] - roots[0]) if len(roots) else 0.0
    if span <= 0:
        raise SlalomError(f"trace {trace.name}", span, "give a trace with at least two distinct arrival times")
    factor = (len(roots) - 1) / (rate * span)
    done = trace.meta.get("time_factor", 1.0)
    return replace(trace, arrival_s=trace.arrival_s * factor, meta=trace.meta | {"time_factor": done * factor})


def merge(traces: Sequence[Trace], name: str = "mix") -> Trace:
    """All traces at once, on one clock; hashes of different traces never match.

    Traces with different ``hash_tokens`` are refined to their greatest common divisor.
    """
    if not traces:
        raise SlalomError("traces", [], "give at least one trace")
    names = list(dict.fromkeys(name for t in traces for name in t.meta.get("classes", ())))
    traces = [classes_by_name(t, names) for t in traces]  # the same name, the same class
    unit = math.gcd(*(t.hash_tokens for t in traces))
    parts = [_with_unit(t, unit, key) for key, t in enumerate(traces)]
    joined = {c: np.concatenate([getattr(t, c) for t in parts]) for c in COLUMNS}
    offsets = np.cumsum([0, *(t.n for t in parts)])
    joined["next_turn"] = np.concatenate(
        [np.where(t.next_turn >= 0, t.next_turn + off, -1) for t, off in zip(parts, offsets, strict=False)]
    ).astype(np.int32)
    entries = np.cumsum([0, *(len(t.hashes) for t in parts)])
    joined["hash_start"] = np.concatenate([t.hash_start + off for t, off in zip(parts, entries, strict=False)])
    order = np.argsort(joined["arrival_s"], kind="stable")  # inf last, so turns keep following their parents
    place = np.full(len(order) + 1, -1, np.int32)
    place[order] = np.arange(len(order), dtype=np.int32)
    columns = {c: values[order] for c, values in joined.items()}
    columns["next_turn"] = place[columns["next_turn"]]
    return Trace(
        **columns,
        hashes=np.concatenate([t.hashes for t in parts]),
        hash_tokens=unit,
        n_roots=sum(t.n_roots for t in parts),
        meta={"parts": [{"name": t.name, "n": t.n} | t.meta for t in traces]} | ({"classes": names} if names else {}),
        name=name,
        bound=any(t.bound for t in traces),
    )


def concat(traces: Sequence[Trace], gap_s: float = 0.0) -> Trace:
    """The traces one after the other; each starts ``gap_s`` after the last arrival of the one before."""
    moved, start = [], 0.0
    for trace in traces:
        moved.append(replace(trace, arrival_s=trace.arrival_s + start))
        start += trace.duration_s + gap_s
    return merge(moved, "concat")


def _with_unit(trace: Trace, unit: int, key: int) -> Trace:
    if not trace.hash_tokens:
        return trace
    start, count, hashes = refine(trace.hash_start, trace.hash_n, trace.hashes, trace.hash_tokens // unit)
    return replace(trace, hash_start=start, hash_n=count, hashes=salt(hashes, key), hash_tokens=unit)


def classes_by_name(trace: Trace, names: Sequence[str]) -> Trace:
    """The trace with its class names (``meta["classes"]``, numbered as they appeared) looked up among ``names``.

    :raises SlalomError: one of them is not there
    """
    own = trace.meta.get("classes")
    if own is None or not names:
        return trace
    place = {"": 0} | {name: k for k, name in enumerate(names)}  # who names none is of the first class
    unknown = next((name for name in own if name not in place), None)
    if unknown is not None:
        raise SlalomError(f"trace {trace.name}: class", unknown, f"the scenario has {', '.join(names)}")
    number = np.array([place[name] for name in own], np.int16)
    return replace(trace, cls=number[trace.cls], meta=trace.meta | {"classes": list(names)})


def assign_classes(trace: Trace, shares: Sequence[float], seed: int) -> Trace:
    """Draw an SLO class per open-loop request with these shares; follow-up turns inherit it.

    :raises SlalomError: shares empty, negative or all zero
    """
    weights = np.asarray(shares, float)
    if not len(weights) or not np.isfinite(weights).all() or weights.min() < 0 or weights.sum() <= 0:
        raise SlalomError("shares", list(shares), "give shares >= 0 with a sum > 0")
    draw = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0xC1A55,))).random(trace.n_roots)
    edges = weights.cumsum() / weights.sum()
    drawn = np.minimum(np.searchsorted(edges, draw, side="right"), len(weights) - 1).astype(np.int16)
    return replace(trace, cls=drawn[trace.owner()])
