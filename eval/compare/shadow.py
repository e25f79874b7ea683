"""One run watched closely: who plays which role when, and where a policy decides otherwise than a rival.

The subject answers every decision of a run; the rival is asked too, on the same columns, but not obeyed. The rival
also serves the same arrivals by itself, so the requests that the two sent different ways have an outcome under both.
Those outcomes are of whole runs: a request is also better or worse off for what was decided about others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.core.columns import Col, Ctx, Kind
from engine.core.kinds import Role
from engine.jit.rows import addresses
from engine.latency.evaluate import TICKS_PER_S
from env.measure.contender import Contender, PointSettings
from env.measure.evaluator import bound
from env.measure.metrics import outcomes
from env.scenario import Scenario
from env.surrogate.arena import arena_of, build_trace, horizon_s
from env.surrogate.clock import new_sim
from env.surrogate.compiled import FirstClass
from env.surrogate.simulate import ready

SAMPLES = 240  # of the timeline
_BINS = 60  # of attainment over time


def shadow(
    scenario: Scenario, subject: Contender, rival: Contender, rate: float, seed: int, settings: PointSettings
) -> dict[str, Any]:
    """Run ``subject`` with ``rival`` looking over its shoulder, then ``rival`` alone on the same arrivals.

    :return: JSON-ready: ``timeline`` (seconds, instances per role, SM share of decode, attainment of both runs),
        ``kinds`` (decisions and differing ones of each kind), ``differing`` (what became of the requests placed
        differently, and in which way they were)
    """
    ours = _Watched(scenario, subject, rate, seed, settings, rival)
    theirs = _Watched(scenario, rival, rate, seed, settings)
    ours_good, theirs_good = ours.good(), theirs.good()
    timeline = ours.timeline() | {
        "attained_at_s": ours.binned(ours_good)[0],
        "subject": ours.binned(ours_good)[1],
        "rival": theirs.binned(theirs_good)[1],
        "arrivals_per_s": ours.arrivals(),
    }
    return {
        "subject": subject.name,
        "rival": rival.name,
        "rate": rate,
        "seed": seed,
        "timeline": timeline,
        "kinds": {Kind(kind).name: counts for kind, counts in sorted(ours.kinds.items())},
        "differing": _differing(ours, ours_good, theirs_good),
    }


class _Watched:
    """A run, decision by decision."""

    def __init__(
        self,
        scenario: Scenario,
        contender: Contender,
        rate: float,
        seed: int,
        settings: PointSettings,
        other: Contender | None = None,
    ) -> None:
        arena = arena_of(scenario)
        policy = bound(scenario, contender)
        trace = build_trace(scenario, rate, settings.n_requests, seed, settings.split)
        self.state = arena.cluster(policy.arrangement, trace, horizon_s(trace))
        self.kinds: dict[int, dict[str, int]] = {}
        self.placed: dict[int, tuple[bool, str]] = {}  # request -> did they differ, and how
        self._settings, self._times, self._roles, self._shares = settings, [], [], []  # type: ignore[var-annotated]
        self._sim = sim = new_sim(self.state, n_roots=trace.n_roots)
        step = ready()
        asked = bound(scenario, other) if other is not None else None
        needs = int(policy.needs) | (int(asked.needs) if asked is not None else 0)
        words = addresses(self.state), addresses(sim), sim.context, sim.candidates, sim.mask
        decide, memory = FirstClass(policy.decide), policy.memory.copy()
        theirs = asked.memory.copy() if asked is not None else None
        every = max(self._duration_s(trace) / SAMPLES, 1e-9)
        while True:
            before = memory.copy() if asked is not None else memory
            if step(*words, decide, policy.params, memory, needs, 1) == 0:
                break
            self._sample(every)
            if asked is not None:
                k = int(sim.sim[0]["candidates"])
                decision = sim.context, sim.candidates[:k], sim.mask[:k]
                self._compare(
                    decision,
                    int(policy.decide(*decision, policy.params, before)),
                    int(asked.decide(*decision, asked.params, theirs)),
                )

    @staticmethod
    def _duration_s(trace: Any) -> float:
        return float(trace.arrival_s[-1]) if trace.n else 0.0

    def _sample(self, every: float) -> None:
        """Roles and SM shares, at most once every ``every`` seconds."""
        now = float(self._sim.sim[0]["now"]) / TICKS_PER_S
        if self._times and now < self._times[-1] + every:
            return
        inst, lane = self.state.inst, self.state.lane
        self._times.append(now)
        self._roles.append(np.bincount(inst["role"], minlength=len(Role)).tolist())
        split = inst["role"] == Role.MULTIPLEXED
        if split.any():
            total = self.state.profile[inst["profile"][split]]["total_sms"]
            row = lane["share"][split, -1]
            self._shares.append(float(np.mean(self.state.share[inst["profile"][split], row]["sms"] / total)))

    def _compare(self, decision: tuple[NDArray[Any], ...], ours: int, theirs: int) -> None:
        context, candidates, _ = decision
        kind = int(context[Ctx.KIND])
        counts = self.kinds.setdefault(kind, {"decisions": 0, "differing": 0})
        counts["decisions"] += 1
        counts["differing"] += int(ours != theirs)
        if kind == Kind.PLACE_PREFILL:
            request = int(context[Ctx.REQUEST])
            before = self.placed.get(request, (False, ""))
            if ours != theirs:
                self.placed[request] = True, _way(candidates, ours, theirs)
            elif not before[0]:
                self.placed[request] = before

    # -- afterwards

    def good(self) -> NDArray[np.bool_]:
        """Whether each request met both targets, (R,); in the order of ``req``."""
        found = outcomes(_Run(self.state.req), warmup=0.0)
        good = np.zeros(len(self.state.req), np.bool_)
        good[found.rows] = found.good
        return good

    def _edges(self) -> NDArray[np.float64]:
        return np.linspace(0.0, float(self.state.req["arrival"].max()) / TICKS_PER_S + 1e-9, _BINS + 1)

    def binned(self, good: NDArray[np.bool_]) -> tuple[list[float], list[float | None]]:
        """Attainment by time of arrival: middles of the bins and shares (None: nobody arrived)."""
        edges = self._edges()
        place = np.digitize(self.state.req["arrival"] / TICKS_PER_S, edges) - 1
        sent = np.bincount(place, minlength=_BINS)[:_BINS]
        met = np.bincount(place, good, minlength=_BINS)[:_BINS]
        shares = [float(m / n) if n else None for m, n in zip(met, sent, strict=True)]
        return ((edges[1:] + edges[:-1]) / 2).tolist(), shares

    def arrivals(self) -> list[float]:
        """Requests per second in each bin."""
        edges = self._edges()
        counts, _ = np.histogram(self.state.req["arrival"] / TICKS_PER_S, edges)
        return (counts / (edges[1] - edges[0])).tolist()

    def timeline(self) -> dict[str, Any]:
        roles = np.array(self._roles, np.int64).reshape(-1, len(Role))  # no row where nothing was decided
        shown = {role.name.lower(): roles[:, role].tolist() for role in Role if roles[:, role].any()}
        return {"at_s": self._times, "roles": shown, "decode_sm_share": self._shares}


class _Run:
    """As much of a ``RunResult`` as ``env.measure.metrics.outcomes`` reads."""

    def __init__(self, req: NDArray[Any]) -> None:
        self.req = req


def _way(candidates: NDArray[np.float64], ours: int, theirs: int) -> str:
    """In words: what the subject did where the rival would have done something else."""
    a, b = _answer(candidates, ours), _answer(candidates, theirs)
    return f"another {a.removeprefix('a ')}" if a == b else f"{a} instead of {b}"


def _answer(candidates: NDArray[np.float64], row: int) -> str:
    if row < 0 or candidates[row, Col.INSTANCE] < 0:
        held = row < 0 or candidates[row, Col.IS_HOLD] > 0 or candidates[row, Col.IS_SHED] == 0
        return "hold" if held else "shed"
    return f"a {Role(int(candidates[row, Col.ROLE])).name.lower()} instance"


def _differing(watched: _Watched, ours: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> dict[str, Any]:
    """Requests by whether the two policies placed them alike, and what became of them under each."""
    table: dict[str, Any] = {}
    different = {request: way for request, (differs, way) in watched.placed.items() if differs}
    alike = [request for request, (differs, _) in watched.placed.items() if not differs]
    for name, group in (("placed differently", list(different)), ("placed alike", alike)):
        rows = np.array(group, np.int64)
        table[name] = _outcome(rows, ours, theirs)
    ways: dict[str, list[int]] = {}
    for request, way in different.items():
        ways.setdefault(way, []).append(request)
    ordered = sorted(ways.items(), key=lambda entry: -len(entry[1]))
    return {"groups": table, "ways": {way: _outcome(np.array(rows), ours, theirs) for way, rows in ordered[:8]}}


def _outcome(rows: NDArray[np.int64], ours: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> dict[str, int]:
    a, b = ours[rows], theirs[rows]
    return {
        "requests": len(rows),
        "good": int(a.sum()),
        "good_under_rival": int(b.sum()),
        "gained": int((a & ~b).sum()),
        "lost": int((~a & b).sum()),
    }
