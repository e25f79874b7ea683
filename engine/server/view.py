"""What the cluster looks like now, as plain data: for the dashboard and for metrics. Reads, never writes.

The records are read while the engine runs: each number is right by itself.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from engine.core.kinds import Role
from engine.core.lists import HANDOVER, HELD, PLACING, inbound_of, queue_of, ready_of
from engine.core.state import ClusterState
from engine.live.fate import Fate
from engine.live.scheduler import Scheduler

STATES = ("serving", "draining", "switching", "lost")
_ROLES = [r.name.lower() for r in Role]


class Attainment:
    """Of the requests sent: how many met their targets, per class. See :mod:`engine.live.fate` for what counts.

    :param classes: their names
    :param recent: requests in the sliding window
    """

    METRICS = ("both", "ttft", "tpot")

    def __init__(self, classes: Sequence[str], recent: int = 200) -> None:
        n = len(classes)
        self.classes = tuple(classes)
        self.ended, self.refused = [0] * n, [0] * n
        self._met = [[0, 0, 0] for _ in range(n)]
        self._recent: list[deque[tuple[bool, bool, bool]]] = [deque(maxlen=recent) for _ in range(n)]

    def observe_refused(self, c: int, fate: Fate) -> None:
        """A request of class ``c`` was not taken in."""
        self.refused[c] += 1
        self.observe(c, fate)

    def observe(self, c: int, fate: Fate) -> None:
        """A request of class ``c`` ended."""
        if fate.good is None:
            return
        met = (fate.good, fate.ttft, fate.tpot)
        self.ended[c] += 1
        self._recent[c].append(met)
        for k in range(3):
            self._met[c][k] += met[k]

    def total(self, c: int) -> dict[str, float]:
        """Shares since the start, in each metric of all that count; empty while none does."""
        n = self.ended[c]
        return {m: self._met[c][k] / n for k, m in enumerate(self.METRICS)} if n else {}

    def recent(self, c: int) -> dict[str, float | None]:
        """The same over the last requests; None while there are none."""
        window = list(self._recent[c])
        return {m: sum(w[k] for w in window) / len(window) if window else None for k, m in enumerate(self.METRICS)}


def state_of(state: ClusterState, i: int) -> str:
    """``lost``, ``switching`` (its role), ``draining`` (before that) or ``serving``: one of :data:`STATES`."""
    row = state.inst[i]
    if row["lost"]:
        return "lost"
    if row["switching"]:
        return "switching"
    return "serving" if row["target_role"] < 0 else "draining"


def sm_shares(state: ClusterState, i: int) -> tuple[float, float]:
    """(prefill, decode) share of instance ``i``'s SMs while both lanes run; an undivided one has it all for each."""
    row = state.inst[i]
    profile = state.profile[row["profile"]]
    last = int(profile["n_shares"]) - 1
    if row["role"] != Role.MULTIPLEXED or last < 1:
        return 1.0, 1.0
    split = int(row["split"]) if row["split"] >= 0 else last // 2
    decode = float(state.share[row["profile"], split]["sms"]) / float(profile["total_sms"])
    return 1.0 - decode, decode


def view(engine: Scheduler, met: Attainment, recent: int = 40) -> dict[str, Any]:
    """Everything the dashboard shows."""
    state, runtime = engine.state, engine.runtime
    cluster = state.cluster[0]
    guard = runtime.guard
    report = asdict(guard.report(recent)) if guard is not None else None
    if report is not None:
        report["role_results"] = [[*key, n] for key, n in report["role_results"].items()]
    return {
        "now_s": engine.clock.uptime_s(),
        "accepting": engine.accepting,
        "open": engine.n_open,
        "policy": runtime.policy.name,
        "sent": int(cluster["n_sent"]),
        "finished": int(cluster["n_finished"]),
        "shed": int(cluster["n_shed"]),
        "failed": int(cluster["n_failed"]),
        "tokens_out": int(cluster["tokens_out"]),
        "switches": int(cluster["n_switches"]),
        "ttft_ok": float(cluster["ema_ttft_ok"]),
        "tpot_ok": float(cluster["ema_tpot_ok"]),
        "undecided": {
            "placing": int(state.lists[PLACING, 2]),
            "handover": int(state.lists[HANDOVER, 2]),
            "held": int(state.lists[HELD, 2]),
        },
        "decisions": dict(runtime.decisions),
        "classes": [
            {
                "class": met.classes[i],
                "ttft_s": float(c["ttft_s"]),
                "tpot_s": float(c["tpot_s"]),
                "sent": int(c["sent"]),
                "ended": met.ended[i],
                "refused": met.refused[i],
                **met.recent(i),
            }
            for i, c in enumerate(state.cls)
        ],
        "instances": [_instance(state, i) for i in range(len(state.inst))],
        "guard": report,
    }


def _instance(state: ClusterState, i: int) -> dict[str, Any]:
    row = state.inst[i]
    pool = state.pool[row["pool"]]
    prefill, decode = sm_shares(state, i)
    return {
        "instance": i,
        "state": state_of(state, i),
        "gpu": int(row["gpu"]),
        "role": _ROLES[row["role"]],
        "target_role": None if row["target_role"] < 0 else _ROLES[row["target_role"]],
        "prefill_share": prefill,
        "decode_share": decode,
        "running": int(row["run_n"]),
        "max_batch": int(row["max_batch"]),
        "ready": int(state.lists[ready_of(i), 2]),
        "queued": int(state.lists[queue_of(i), 2]),
        "queued_tokens": int(row["queue_tokens"]),
        "inbound": int(state.lists[inbound_of(i), 2]) + int(row["moving_n"]),
        "kv_use": 1.0 - float(pool["free"]) / float(pool["n_blocks"]),
        "steps": int(row["steps"]),
    }
