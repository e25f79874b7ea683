"""The guard: stands between the scheduler and a policy, so that no policy can hurt the service.

Every decision runs down the same list; the first line that applies answers:

    frozen by an operator          → fallback rule; roles and splits stay as they are
    breaker open, or drift         → fallback rule; the policy is not asked
    a feature is NaN or infinite,
    or outside what was trained on → fallback rule; the policy is not asked
    late, raised, invalid answer,
    NaN among its scores           → fallback rule; counts against the breaker
    advisory mode                  → fallback rule; the policy's answer is logged
    otherwise                      → the policy

A decision reads one :class:`Snapshot` (function, constants, memory): a swap replaces it as a whole between two
decisions, so none can mix two policies. How far the deadline holds: code of this package is compiled, allocates
nothing and cannot block; it is asked in place and timed on the processor's clock, and a late answer is thrown away.
All other code runs in a thread that is left behind when its time is up, see ``policies.guard.worker``.
"""

from __future__ import annotations

import logging
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.core.columns import N_CANDIDATE, N_CONTEXT, Col, Kind, Need
from engine.core.decide.safe import safe_choice
from engine.core.policy import Policy
from engine.core.state import ClusterState
from engine.latency.evaluate import TICKS_PER_S
from engine.live.guard import DriftReport, GuardReport
from engine.live.observer import Observer
from policies.guard.breaker import Breaker, BreakerState
from policies.guard.checks import NOT_FINITE, fits, inspect
from policies.guard.config import GuardConfig
from policies.guard.log.log import DecisionLog
from policies.guard.log.ring import Meta
from policies.guard.log.writer import REASONS
from policies.guard.outcomes import Outcomes
from policies.guard.report import LATENCY_EDGES_S, Taken, plain
from policies.guard.roles import RoleGuard
from policies.guard.snapshot import Snapshot
from policies.guard.worker import Busy, Late

if TYPE_CHECKING:  # it knows torch, and nobody here needs that
    from engine.live.request import Ticket

_log = logging.getLogger("slalom.guard")

_EDGES_NS = [edge * 1e9 for edge in LATENCY_EDGES_S]
(_POLICY, _ADVISORY, _FROZEN, _RESTORE, _BREAKER, _OOD, _FEATURES, _DEADLINE, _BUSY, _ERROR, _INVALID, _SCORES,
 _DRIFT) = range(len(REASONS))  # fmt: skip
_PLACE_PREFILL, _PLACE_DECODE, _REALLOCATE, _TUNE = (int(k) for k in Kind)
_LOOK_AFTER = TICKS_PER_S  # between two looks at who writes the log
_INSTANCE, _NEW_ROLE = int(Col.INSTANCE), int(Col.NEW_ROLE)


class Guard:
    """Satisfies :class:`engine.live.guard.Guard`. Everything but :meth:`prepare` belongs to the loop's thread.

    :param fallback: a compiled rule of this package, bound to the same setting
    :param log: where decisions and outcomes go, None for nowhere
    :param classes: names of the SLO classes, for the log
    :raises SlalomError: see :class:`RoleGuard` and :meth:`prepare`
    """

    def __init__(
        self,
        state: ClusterState,
        policy: Policy,
        fallback: Policy,
        config: GuardConfig | None = None,
        log: DecisionLog | None = None,
        classes: Sequence[str] = (),
    ) -> None:
        self.config = config or GuardConfig()
        self.state, self.log = state, log
        self.fallback = fallback
        self._fallback_memory = fallback.memory.copy()
        self.breaker = Breaker(self.config.breaker)
        self.roles = RoleGuard(self.config.roles, state)
        self.outcomes = Outcomes(len(state.req), self.config.drift, log, classes)
        self._start = (state.inst["role"].copy(), state.inst["split"].copy(), state.inst["chunk_tokens"].copy())
        self.frozen = self.restoring = False
        self.advisory = self.config.advisory
        self.fallbacks: Counter[str] = Counter()
        self.reasons = [0] * len(REASONS)
        self.latency = [0] * (len(LATENCY_EDGES_S) + 1)
        self.latency_sum_ns = 0
        self.advised = self.agreed = 0
        self.swaps, self._trips = -1, 0
        self._recent: deque[Taken] = deque(maxlen=64)
        self._deadline_ns = self.config.deadline_us * 1e3
        self._meta = np.zeros(len(Meta), np.int64)
        self._seq = 0
        self._requests: Sequence[Ticket | None] = ()  # by slot, where a request has a number
        self._now = self._looked_at = 0
        self._snapshot: Snapshot
        self.adopt(self.prepare(policy))
        self._compile()

    def _compile(self) -> None:
        """Compile what a decision calls now rather than during the first one."""
        context, candidates, mask = np.zeros(N_CONTEXT), np.zeros((1, N_CANDIDATE)), np.zeros(1, np.uint8)
        inspect(context, candidates, mask, self._snapshot.context_bounds, self._snapshot.candidate_bounds)
        fits(0, mask, self._snapshot.no_scores)

    # -- which policy ----------------------------------------------------------------------------------------

    @property
    def policy(self) -> Policy:
        return self._snapshot.policy

    @property
    def needs(self) -> int:
        return self._needs

    def prepare(self, policy: Policy, *, rehearse: bool = False) -> Snapshot:
        """``policy`` ready to be adopted; any thread, and what takes long (compiling) happens here.

        :param rehearse: ask it once for each kind of placement first, and refuse one that fails
        :raises SlalomError: the rehearsal failed
        """
        snapshot = Snapshot.of(policy, self.config)
        if rehearse:
            snapshot.rehearse(self.state)
        return snapshot

    def adopt(self, ready: Any) -> None:
        """Let a policy, or what :meth:`prepare` made of it, answer from the next decision on, with fresh memory."""
        snapshot = ready if isinstance(ready, Snapshot) else self.prepare(ready)
        if self.swaps >= 0:
            self._snapshot.retire()
            self._trips += self.breaker.trips
        self._snapshot = snapshot
        self.swaps += 1
        self.breaker = Breaker(self.config.breaker)
        self._said: set[int] = set()
        predict = int(Need.PREDICT) if self.config.predict else 0
        self._needs = int(Need.LOAD) | predict | snapshot.needs | int(self.fallback.needs)
        what = {"name": snapshot.policy.name, **snapshot.policy.describe()}
        self.note("policy", generation=self.swaps, isolated=snapshot.isolated, policy=what)

    def attach(self, requests: Sequence[Ticket | None], observers: list[Observer]) -> None:
        """Learn how the ``requests`` of slots are called outside, and subscribe to their ends."""
        self._requests = requests
        observers.append(self.outcomes)

    # -- what an operator may say ------------------------------------------------------------------------------

    def freeze(self, *, restore: bool = False) -> None:
        """At once: the fallback places, nothing is reallocated or tuned.

        :param restore: also bring chunk budgets and splits back to those of the start, and the roles one by one
            (as far as the scheduler asks for reallocation)
        """
        self.frozen, self.restoring = True, restore
        if restore:
            self.state.inst["split"], self.state.inst["chunk_tokens"] = self._start[1], self._start[2]
        self.note("mode", mode=self.mode)

    def thaw(self, *, advisory: bool | None = None) -> None:
        """Let the policy decide again (or only advise), and role changes go on after a failed one."""
        self.frozen = self.restoring = False
        if advisory is not None:
            self.advisory = advisory
        self.roles.resume()
        self.note("mode", mode=self.mode)

    @property
    def mode(self) -> str:
        """``active``, ``advisory`` or ``frozen``."""
        return "frozen" if self.frozen else "advisory" if self.advisory else "active"

    # -- a decision --------------------------------------------------------------------------------------------

    def choose(
        self, kind: int, subject: int, now: int, context: np.ndarray, candidates: np.ndarray, mask: np.ndarray
    ) -> int:
        began = time.perf_counter_ns()
        snapshot, now_s = self._snapshot, now * 1e-12
        self._now = now
        if kind == _REALLOCATE:
            self._watch_roles(now_s, mask)
        advised, scores = -1, snapshot.no_scores
        reason = self._closed(now_s)
        if reason == _POLICY:
            fault = inspect(context, candidates, mask, snapshot.context_bounds, snapshot.candidate_bounds)
            if fault:
                reason = _FEATURES if fault == NOT_FINITE else _OOD
            else:
                reason, advised = self._ask(snapshot, context, candidates, mask)
                scores = snapshot.scores(len(mask))
                if not reason and not fits(advised, mask, scores):
                    reason = _SCORES if 0 <= advised < len(mask) and mask[advised] else _INVALID
                self._judge(reason, advised, now_s)
        if reason == _POLICY and self.advisory:
            reason = _ADVISORY
        action = advised if reason == _POLICY else self._instead(reason, kind, context, candidates, mask)
        if reason == _ADVISORY:
            self.advised += 1
            self.agreed += action == advised
        if kind <= _PLACE_DECODE:
            self.outcomes.predict(kind, subject, candidates, action)
        elif kind == _REALLOCATE and action > 0:
            self.roles.begins(int(candidates[action, _INSTANCE]), int(candidates[action, _NEW_ROLE]), now_s)
        took = time.perf_counter_ns() - began
        self._book(kind, subject, now, action, advised, reason, took, context, candidates, mask, scores)
        return action

    def _closed(self, now_s: float) -> int:
        """Why the policy is not asked at all; _POLICY when it is."""
        if self.frozen:
            return _FROZEN
        breaker = self.breaker
        if breaker.state == BreakerState.OPEN:
            if not breaker.lets(now_s):
                return _BREAKER
            self._said_breaker()
        if self.config.drift.demote and self.outcomes.alarm:
            return _DRIFT
        return _POLICY

    def _ask(
        self, snapshot: Snapshot, context: np.ndarray, candidates: np.ndarray, mask: np.ndarray
    ) -> tuple[int, int]:
        """(_POLICY, answer), or (what went wrong, -1)."""
        try:
            if snapshot.worker is not None:
                return _POLICY, int(snapshot.worker.ask(context, candidates, mask, self._deadline_ns * 1e-9))
            began = time.thread_time_ns()
            answer = int(snapshot.decide(context, candidates, mask, snapshot.params, snapshot.memory))
            late = time.thread_time_ns() - began > self._deadline_ns
            return (_DEADLINE, -1) if late else (_POLICY, answer)
        except Late:
            return _DEADLINE, -1
        except Busy:
            return _BUSY, -1
        except (TypeError, ValueError, OverflowError) as error:
            return self._say(_ERROR if snapshot.worker is None else _INVALID, f"gave no row: {error!r}"), -1
        except Exception as error:  # a policy is somebody else's code
            return self._say(_ERROR, f"raised {error!r}"), -1

    def _judge(self, reason: int, advised: int, now_s: float) -> None:
        """Tell the breaker how the policy did."""
        before = self.breaker.state
        if reason == _BUSY and before == BreakerState.CLOSED:
            return  # the late answer was counted, and not waiting for its thread costs nothing
        if reason == _POLICY:
            if before != BreakerState.CLOSED:
                self.breaker.succeeded()
        else:
            self._say(reason, f"answered {advised}" if advised >= 0 else "gave no usable answer")
            self.breaker.failed(now_s)
        if self.breaker.state != before:
            self._said_breaker()

    def _instead(self, reason: int, kind: int, context: np.ndarray, candidates: np.ndarray, mask: np.ndarray) -> int:
        """The fallback's answer, which is allowed whatever happens."""
        if reason != _ADVISORY:
            self.fallbacks[REASONS[reason]] += 1
        if reason == _FROZEN and kind >= _REALLOCATE:
            return self._restored(candidates, mask) if kind == _REALLOCATE and self.restoring else 0
        fallback = self.fallback
        try:
            action = int(fallback.decide(context, candidates, mask, fallback.params, self._fallback_memory))
        except Exception as error:
            self._say(_ERROR, f"and its fallback {fallback.name} raised {error!r}")
            return safe_choice(kind, candidates, mask)
        if 0 <= action < len(mask) and mask[action]:
            return action
        return safe_choice(kind, candidates, mask)

    def _restored(self, candidates: np.ndarray, mask: np.ndarray) -> int:
        """A role change that leads back to the arrangement of the start; KEEP when there is none."""
        for k in np.flatnonzero(mask).tolist():
            i = int(candidates[k, _INSTANCE])
            if i >= 0 and self.state.inst[i]["role"] != self._start[0][i] == int(candidates[k, _NEW_ROLE]):
                return int(k)
        return 0

    def _watch_roles(self, now_s: float, mask: np.ndarray) -> None:
        ended = self.roles.check(now_s)
        if ended is not None:
            self.note("role", **ended.plain())
        if not self.roles.allows(now_s):
            self.roles.close(mask)

    # -- books -------------------------------------------------------------------------------------------------

    def _book(
        self, kind: int, subject: int, now: int, action: int, advised: int, reason: int, took: int,
        context: np.ndarray, candidates: np.ndarray, mask: np.ndarray, scores: np.ndarray,
    ) -> None:  # fmt: skip
        self._seq += 1
        self.reasons[reason] += 1
        self.latency[bisect_left(_EDGES_NS, took)] += 1
        self.latency_sum_ns += took
        request = -1
        if kind <= _PLACE_DECODE:
            called = self._requests[subject] if self._requests else None
            request = subject if called is None else called.number
        instance = candidates.item(action, _INSTANCE)
        self._recent.append((self._seq, now, kind, request, action, instance, advised, reason, took, self.swaps))
        if self.log is None:
            return
        if now - self._looked_at >= _LOOK_AFTER:
            self._looked_at = now
            self.log.look_after()
        meta = self._meta
        meta[0], meta[1], meta[2], meta[3], meta[4] = self._seq, time.time_ns(), now // 1000, kind, request
        meta[5], meta[6], meta[7], meta[8], meta[9] = len(mask), action, advised, reason, took
        meta[10], meta[11], meta[12] = self.swaps, len(scores), subject
        self.log.decision(meta, context, candidates, mask, scores)

    def note(self, kind: str, **content: Any) -> None:
        """A line of the log about the guard itself."""
        if self.log is not None:
            self.log.note(kind, now_s=self._now * 1e-12, **content)

    def _say(self, reason: int, what: str) -> int:
        if reason not in self._said:
            self._said.add(reason)
            _log.warning(
                "policy %s %s (%s); %s answers (said once)",
                self.policy.name, what, REASONS[reason], self.fallback.name,
            )  # fmt: skip
        return reason

    def _said_breaker(self) -> None:
        state = self.breaker.state.name.lower()
        _log.warning("circuit breaker of policy %s: %s", self.policy.name, state)
        self.note("breaker", state=state, trips=self.breaker.trips)

    def report(self, recent: int = 0) -> GuardReport:
        """How things stand. Any thread may ask: each number is right by itself.

        :param recent: decisions to include, newest first
        """
        snapshot, log, roles = self._snapshot, self.log, self.roles
        drifts = (self.outcomes.ttft, self.outcomes.tpot)
        return GuardReport(
            policy={"name": snapshot.policy.name, **snapshot.policy.describe()},
            generation=self.swaps,
            mode=self.mode,
            isolated=snapshot.isolated,
            fallback=self.fallback.name,
            deadline_us=self.config.deadline_us,
            breaker=self.breaker.state.name.lower(),
            breaker_code=int(self.breaker.state),
            breaker_trips=self._trips + self.breaker.trips,
            reasons=dict(zip(REASONS, self.reasons, strict=True)),
            latency_edges_s=LATENCY_EDGES_S,
            latency_counts=tuple(self.latency),
            latency_sum_s=self.latency_sum_ns * 1e-9,
            drift=tuple(DriftReport(d.metric, d.ratio, d.alarm, d.n) for d in drifts),
            advised=self.advised,
            agreed=self.agreed,
            role_results=dict(roles.results),
            role_drain_s=roles.drain_s,
            role_changes_halted=roles.halted,
            records_written=log.written if log else None,
            records_dropped=log.dropped if log else None,
            log_writing=bool(log and log.writing),
            recent=plain(list(self._recent)[: -recent - 1 : -1]),
        )

    def close(self) -> None:
        """Write the rest of the log and let the policy's thread go."""
        self._snapshot.retire()
        if self.log is not None:
            self.log.close()
