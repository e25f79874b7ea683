"""Bounds on role changes, and the proof that each one really happened.

A switch that did nothing also returns quickly and serves correctly afterwards, so neither time nor output proves it:
the instance's own role and the engine's count of switches are compared before and after.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from dataclasses import dataclass

import numpy as np

from engine.core.kinds import Role
from engine.core.state import ClusterState
from engine.errors import SlalomError
from policies.guard.config import RoleConfig

_log = logging.getLogger("slalom.guard")


@dataclass(frozen=True)
class Change:
    """A role change on its way, or its end."""

    instance: int
    old: Role
    new: Role
    since_s: float
    switches: int
    result: str = ""
    took_s: float = 0.0

    def plain(self) -> dict[str, object]:
        """As a line of the decision log."""
        names = {"from": self.old.name.lower(), "to": self.new.name.lower()}
        return {"instance": self.instance, **names, "result": self.result, "took_s": self.took_s}


class RoleGuard:
    """:raises SlalomError: the cluster starts with fewer instances than the bounds demand"""

    def __init__(self, config: RoleConfig, state: ClusterState) -> None:
        self.config, self._state = config, state
        roles = state.inst["role"]
        for name, unable in (("min_prefill", Role.DECODE), ("min_decode", Role.PREFILL)):
            least, able = getattr(config, name), int((roles != unable).sum())
            if able < least:
                raise SlalomError(f"guard: roles.{name}", least, f"the cluster starts with {able} such instances")
            # The core masks what would go below; the scenario's own bound stays where it is stricter.
            state.cluster[0][name] = max(int(state.cluster[0][name]), least)
        self.results: Counter[tuple[str, str, str]] = Counter()  # from, to, result
        self.drain_s = 0.0
        self.halted = False
        self.pending: list[Change] = []
        self._begun: deque[float] = deque(maxlen=max(config.max_per_hour, 1))

    def allows(self, now_s: float) -> bool:
        """Whether a change may begin now: as many at once as the core allows, ``cooldown_s`` after the one before."""
        if len(self.pending) >= int(self._state.cluster[0]["at_once"]) or self.halted or self.config.max_per_hour == 0:
            return False
        if self._begun and now_s - self._begun[-1] < self.config.cooldown_s:
            return False
        full = len(self._begun) == self.config.max_per_hour
        return not (full and now_s - self._begun[0] < 3600.0)

    def begins(self, instance: int, new: int, now_s: float) -> None:
        """The guard let a change through."""
        old = Role(int(self._state.inst[instance]["role"]))
        switches = int(self._state.cluster[0]["n_switches"])
        self.pending.append(Change(instance, old, Role(new), now_s, switches))
        self._begun.append(now_s)

    def check(self, now_s: float) -> Change | None:
        """A change that has ended since the last call, well or not; None while there is none.

        A change not seen done in time halts all further ones until :meth:`resume`.
        """
        for change in self.pending:
            result = self._result(change, now_s)
            if result:
                self.pending.remove(change)
                return self._ended(change, result, now_s - change.since_s)
        return None

    def _result(self, change: Change, now_s: float) -> str:
        """How the change ended; empty while it goes on."""
        row = self._state.inst[change.instance]
        if row["target_role"] >= 0 or row["switching"]:
            return "" if now_s - change.since_s < self.config.verify_s else "timeout"
        counted = int(self._state.cluster[0]["n_switches"]) > change.switches
        return "done" if counted and row["role"] == change.new else "unverified"

    def _ended(self, change: Change, result: str, took: float) -> Change:
        self.results[change.old.name.lower(), change.new.name.lower(), result] += 1
        if result == "done":
            self.drain_s += took
        else:
            self.halted = True
            row = self._state.inst[change.instance]
            _log.error(
                "instance %d should be %s and is %s after %.1f s (%s): no further role changes",
                change.instance, change.new.name.lower(), Role(int(row["role"])).name.lower(), took, result,
            )  # fmt: skip
        return Change(change.instance, change.old, change.new, change.since_s, change.switches, result, took)

    def resume(self) -> None:
        """Somebody looked at a failed change: go on."""
        self.halted = False

    @staticmethod
    def close(mask: np.ndarray) -> None:
        """Leave a REALLOCATE decision only KEEP."""
        mask[1:] = 0
