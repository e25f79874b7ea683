"""Everything one decision reads of a policy, as one object that never changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.core.columns import N_CANDIDATE, N_CONTEXT, Col, Ctx, Kind, Need
from engine.core.policy import Policy
from engine.core.state import ClusterState
from engine.errors import SlalomError
from policies.guard.checks import widened
from policies.guard.config import GuardConfig
from policies.guard.worker import Worker
from policies.network import compiled

_NO_BOUNDS = np.zeros((0, 0))
#: A rehearsal may take this long, seconds: a Python policy may warm up.
_REHEARSAL_S = 5.0


def is_ours(policy: Policy) -> bool:
    """Whether a policy is compiled code of this package, which is bounded and cannot block."""
    function = getattr(policy.decide, "py_func", None)
    ours = function is not None and function.__module__.partition(".")[0] == "policies"
    return ours and not getattr(policy, "python", False)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """``memory`` is this snapshot's own and changes only by its policy's hand. ``worker`` is None for trusted code."""

    policy: Policy
    decide: Any
    params: np.ndarray
    memory: np.ndarray
    needs: int
    context_bounds: np.ndarray
    candidate_bounds: np.ndarray
    worker: Worker | None
    no_scores: np.ndarray
    score_cells: int

    @classmethod
    def of(cls, policy: Policy, config: GuardConfig) -> Snapshot:
        """``policy`` with fresh memory, as ``config`` wants it asked."""
        params, memory = policy.params.copy(), policy.memory.copy()
        isolated = config.isolate == "always" or not is_ours(policy)
        network = getattr(policy, "kind", "rule") == "network" and not isolated
        bounds = getattr(policy, "bounds", None)
        c, f = (_NO_BOUNDS, _NO_BOUNDS) if bounds is None else (widened(b, config.ood_margin) for b in bounds)
        return cls(
            policy=policy,
            decide=policy.decide,
            params=params,
            memory=memory,
            needs=int(policy.needs) | (0 if bounds is None else int(Need.PREDICT | Need.DIMENSIONLESS)),
            context_bounds=c,
            candidate_bounds=f,
            worker=Worker(policy.decide, params, memory) if isolated else None,
            no_scores=np.zeros(0),
            score_cells=compiled.score_cells(params) if network else 0,
        )

    @property
    def isolated(self) -> bool:
        """Whether it runs in a thread of its own."""
        return self.worker is not None

    def scores(self, rows: int) -> np.ndarray:
        """What the last decision gave each row, a view; empty for a policy that keeps no scores."""
        if not self.score_cells:
            return self.no_scores
        start = len(self.memory) - self.score_cells
        return self.memory[start : start + rows]

    def rehearse(self, state: ClusterState) -> None:
        """Ask for one placement of each kind with made-up numbers and memory that is thrown away.

        :raises SlalomError: it raised, was too slow or named a row that is not there
        """
        n = len(state.inst)
        memory = self.memory.copy()
        for kind in (Kind.PLACE_PREFILL, Kind.PLACE_DECODE):
            context, candidates = np.zeros(N_CONTEXT), np.zeros((n + 2, N_CANDIDATE))
            mask = np.array([1] * n + [0, 0], np.uint8)
            context[kind], context[Ctx.KIND], context[Ctx.N_INSTANCES] = 1.0, kind, n
            context[[Ctx.TTFT_SLO_S, Ctx.TPOT_SLO_S, Ctx.PROMPT]] = 1.0, 0.1, 64.0
            candidates[:n, Col.INSTANCE], candidates[:n, Col.IS_INSTANCE] = np.arange(n), 1.0
            candidates[:n, Col.ROLE] = state.inst["role"]
            candidates[:n, Col.TOTAL_BLOCKS] = candidates[:n, Col.FREE_BLOCKS] = 64.0
            candidates[n:, Col.INSTANCE] = -1.0
            try:
                if self.worker is not None:
                    answer = int(self.worker.ask(context, candidates, mask, _REHEARSAL_S))
                else:
                    answer = int(self.decide(context, candidates, mask, self.params, memory))
            except Exception as error:
                raise SlalomError(f"policy {self.policy.name}", repr(error), "it failed its rehearsal") from error
            if not 0 <= answer < len(mask) or not mask[answer]:
                fix = f"its rehearsal allowed rows 0 to {n - 1}"
                raise SlalomError(f"policy {self.policy.name}", answer, fix)

    def retire(self) -> None:
        """Nobody will ask any more."""
        if self.worker is not None:
            self.worker.stop()
