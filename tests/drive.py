"""Drive a cluster with a policy that answers at random, under a watchdog: a livelock fails instead of hanging."""

from __future__ import annotations

import os
import threading
from typing import Any

import numba
import numpy as np
from strategies import Case

from engine.core.columns import Col
from engine.core.policy import POLICY_SIGNATURE
from engine.core.state import ClusterState
from engine.jit.kernel import kernel
from engine.jit.rows import addresses
from env.surrogate.clock import Sim
from env.surrogate.compiled import POLICY_ARGS, WORDS, FirstClass, compiled
from env.surrogate.loop import run

#: Wall-clock seconds that one call may take; a normal one takes milliseconds.
PATIENCE_S = float(os.environ.get("SLALOM_PATIENCE", "30"))

_INSTANCE, _IS_HOLD, _IS_SHED = int(Col.INSTANCE), int(Col.IS_HOLD), int(Col.IS_SHED)


@kernel
def _uniform(memory):
    """Next number of a 32-bit xorshift generator kept in ``memory[0]``, in [0, 1)."""
    x = np.int64(memory[0])
    x ^= (x << 13) & 0xFFFFFFFF
    x ^= x >> 17
    x ^= (x << 5) & 0xFFFFFFFF
    memory[0] = float(x)
    return x / 4294967296.0


@kernel(POLICY_SIGNATURE)
def random_answer(context, candidates, mask, params, memory):
    """Any allowed candidate. ``params``: seed, chance of HOLD, of SHED, of KEEP (where there is another answer)."""
    if memory[0] == 0.0:
        memory[0] = params[0]
    k_max = mask.shape[0]
    chance = _uniform(memory)
    others = 0
    for k in range(k_max):
        if mask[k] != 0 and candidates[k, _INSTANCE] >= 0.0:
            others += 1
    for k in range(k_max):
        if mask[k] != 0 and candidates[k, _INSTANCE] < 0.0:
            if candidates[k, _IS_HOLD] == 1.0:
                wanted = params[1]
            elif candidates[k, _IS_SHED] == 1.0:
                wanted = params[2]
            else:
                wanted = params[3]
            if chance < wanted:
                return k
            chance = (chance - wanted) / (1.0 - wanted)
    pick = int(_uniform(memory) * others)
    last = -1
    for k in range(k_max):
        if mask[k] != 0:
            if candidates[k, _INSTANCE] >= 0.0:
                if pick == 0:
                    return k
                pick -= 1
            elif last < 0:
                last = k
    return last


class Driver:
    """One run of a built case; ``step`` goes on by some decisions, ``finish`` to the end."""

    def __init__(self, case: Case, state: ClusterState, sim: Sim, decide: Any = random_answer, needs: int = 7) -> None:
        self.case, self.state, self.sim, self.needs = case, state, sim, needs
        self._run = compiled(run, WORDS, WORDS, *POLICY_ARGS, numba.float64[::1], numba.int64, numba.int64)
        self._decide = FirstClass(decide)
        self.params = np.array([case.seed, case.hold, case.shed, case.keep], np.float64)
        self.memory = np.zeros(8)
        self._words = addresses(state), addresses(sim)

    def step(self, limit: int) -> int:
        """Take up to ``limit`` decisions (0: all); returns how many were taken."""
        taken: list[int] = []
        raised: list[Exception] = []

        def work() -> None:
            try:
                taken.append(
                    self._run(
                        *self._words, self.sim.context, self.sim.candidates, self.sim.mask,
                        self._decide, self.params, self.memory, self.needs, limit,
                    )
                )  # fmt: skip
            except IndexError as error:  # SLALOM_BOUNDS=1
                raised.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(PATIENCE_S)
        assert not thread.is_alive(), f"the event loop does not come to an end at {self.sim.sim[0]['now']} ticks"
        if raised:
            raise raised[0]
        return taken[0]

    def finish(self) -> None:
        self.step(0)


def played(case: Case, *, fast_forward: bool = True, **options: Any) -> tuple[ClusterState, Sim]:
    """``case`` run to its end."""
    state, sim = case.build(fast_forward=fast_forward, **options)
    Driver(case, state, sim).finish()
    return state, sim
