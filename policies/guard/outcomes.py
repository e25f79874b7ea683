"""What became of the requests, beside what was predicted when they were placed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.core.columns import Col, Kind
from engine.core.kinds import RequestState
from engine.latency.evaluate import TICKS_PER_S
from engine.live.door import TurnedAway
from engine.live.fate import Fate
from engine.live.observer import Observer
from policies.guard.config import DriftConfig
from policies.guard.drift import Drift
from policies.guard.log.log import DecisionLog

if TYPE_CHECKING:  # it knows torch, and nobody here needs that
    from engine.live.request import Ticket

_log = logging.getLogger("slalom.guard")
_PLACE_PREFILL = int(Kind.PLACE_PREFILL)
_INSTANCE, _TTFT_S, _STEP_WITH_S = int(Col.INSTANCE), int(Col.TTFT_S), int(Col.STEP_WITH_S)


class Outcomes(Observer):
    """:param slots: request slots of the cluster
    :param classes: names of its SLO classes
    """

    def __init__(self, slots: int, config: DriftConfig, log: DecisionLog | None, classes: Sequence[str] = ()) -> None:
        self._log, self._classes = log, classes
        self._ttft_s, self._tpot_s = [0.0] * slots, [0.0] * slots
        self.ttft, self.tpot = Drift("ttft", config), Drift("tpot", config)

    @property
    def alarm(self) -> bool:
        """Whether either metric has drifted."""
        return self.ttft.alarm or self.tpot.alarm

    def predict(self, kind: int, slot: int, candidates: np.ndarray, action: int) -> None:
        """Keep what was predicted for the candidate that was chosen."""
        if candidates.item(action, _INSTANCE) < 0.0:
            return
        if kind == _PLACE_PREFILL:
            self._ttft_s[slot] = candidates.item(action, _TTFT_S)
        self._tpot_s[slot] = candidates.item(action, _STEP_WITH_S)

    def request_ended(self, request: Ticket, record: np.void, finish: str, fate: Fate) -> None:
        """See :class:`engine.live.observer.Observer`."""
        slot = request.slot
        predicted_ttft, predicted_tpot = self._ttft_s[slot], self._tpot_s[slot]
        self._ttft_s[slot] = self._tpot_s[slot] = 0.0
        ttft = tpot = None
        finished = record["state"] == RequestState.FINISHED and not finish
        first, gaps = int(record["first_token"]), int(record["generated"]) - 1
        if first >= 0:
            ttft = (first - int(record["arrival"])) / TICKS_PER_S
        if ttft is not None and finished:
            self._drifts(self.ttft, ttft, predicted_ttft)
            if gaps > 0:
                tpot = (int(record["last_token"]) - first) / TICKS_PER_S / gaps
                self._drifts(self.tpot, tpot, predicted_tpot)
        if self._log is not None:
            self._log.note(
                "outcome",
                request=request.number,
                **self._fate(int(record["cls"]), finish or "done", fate),
                instance=int(record["first_inst"]),
                ttft_s=ttft,
                predicted_ttft_s=predicted_ttft or None,
                tpot_s=tpot,
                predicted_tpot_s=predicted_tpot or None,
            )

    def request_refused(self, away: TurnedAway, fate: Fate) -> None:
        """See :class:`engine.live.observer.Observer`."""
        if self._log is not None:
            unknown = dict.fromkeys(("instance", "ttft_s", "predicted_ttft_s", "tpot_s", "predicted_tpot_s"))
            said = self._fate(away.cls, away.reason, fate)
            self._log.note("outcome", request=away.number, **said, **unknown)

    def _fate(self, cls: int, finish: str, fate: Fate) -> dict[str, Any]:
        name = self._classes[cls] if cls < len(self._classes) else str(cls)
        return {"class": name, "finish": finish, "ttft_ok": fate.ttft, "tpot_ok": fate.tpot, "good": fate.good}

    def _drifts(self, drift: Drift, actual_s: float, predicted_s: float) -> None:
        if not drift.observe(actual_s, predicted_s):
            return
        state = "on" if drift.alarm else "off"
        _log.warning("drift alarm %s: actual %s is %.2f times what was predicted", state, drift.metric, drift.ratio)
        if self._log is not None:
            self._log.note("drift", metric=drift.metric, alarm=drift.alarm, ratio=drift.ratio, requests=drift.n)
