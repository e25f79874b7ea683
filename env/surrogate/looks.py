"""Many simulated clusters advanced in one compiled call, each to the next look of a planner's network.

The rule ``planner`` answers every decision on the way; what a learner answers is by how much the composition that it
wants is shifted until the next look. Inputs and limits are those of ``policies.rules.planner`` itself.
"""

from __future__ import annotations

import numpy as np

from engine.core.columns import Kind
from engine.core.kinds import RequestState
from engine.core.state import attach
from engine.jit.kernel import kernel
from env.surrogate.batch import ENDED, LAST
from env.surrogate.clock import attach_sim
from env.surrogate.loop import advance, answer, describe
from policies.rules.parts.shift import N_INPUTS, SHIFTS
from policies.rules.planner import SHIFT, looks, shift_bounds, shift_inputs

_ASKED, _LAST, _ENDED = np.int64(0), np.int64(LAST), np.int64(ENDED)
_LIVE = int(RequestState.RUNNING)
_N = len(SHIFTS)


@kernel
def _too_late(s, q, factor):
    """Requests without a first token for more than ``factor`` times their TTFT target."""
    n = 0
    for r in range(s.cluster[0].n_requests):
        req = s.req[r]
        if req.arrival >= q.sim[0].now:
            break  # sorted by arrival; follow-up turns, which are not, come behind and are judged by their misses
        if req.first_token < 0 and req.state <= _LIVE and q.sim[0].now - req.arrival > factor * req.ttft_slo:
            n += 1
    return n


@kernel
def _to_look(s, q, needs, decide, params, memory, context, candidates, allowed):
    """Run one cluster to the network's next look; number of candidates, 0 where all has ended."""
    while True:
        kind = advance(s, q)
        if kind < 0:
            return 0
        k = describe(s, q, needs)
        if kind == Kind.REALLOCATE and looks(context, params, memory):
            return k
        answer(s, q, decide(context, candidates[:k], allowed[:k], params, memory))


@kernel
def advance_looks(
    state_words, sim_words, actions, chosen, kinds, context, candidates, allowed, decide, params, memory, needs,
    observation, mask, reward, elapsed_s, status, good, missed,
):  # fmt: skip
    """As :func:`env.surrogate.batch.advance_many`, an action being an index into ``shift.SHIFTS``.

    Observation: the network's inputs, then for each action the share of instances that would prefill only.

    :param kinds: not read
    """
    inputs = np.empty(N_INPUTS)
    for c in range(chosen.shape[0]):
        b = chosen[c]
        s, q = attach(state_words[b]), attach_sim(sim_words[b])
        asked_at = q.sim[0].asked_at
        if actions[b] >= 0:
            k = describe(s, q, needs)  # the buffers are everybody's
            memory[b, SHIFT] = SHIFTS[actions[b]] if mask[b, actions[b]] else 0.0
            answer(s, q, decide(context, candidates[:k], allowed[:k], params, memory[b]))
        k = _to_look(s, q, needs, decide, params, memory[b], context, candidates, allowed)
        late = _too_late(s, q, s.cluster[0].tail_factor)
        reward[b] = -q.sim[0].missed - late
        elapsed_s[b] = (q.sim[0].now - asked_at) * 1e-12
        q.sim[0].good = 0.0
        q.sim[0].missed = 0.0
        q.sim[0].asked_at = q.sim[0].now
        good[b], missed[b] = s.cluster[0].good_weight, s.cluster[0].miss_weight
        status[b] = _ENDED
        if k == 0:
            continue
        status[b] = _LAST if s.cluster[0].n_sent == s.cluster[0].n_requests else _ASKED
        shift_inputs(context, candidates[:k], params, memory[b], inputs)
        low, high = shift_bounds(context, candidates[:k], params, memory[b])
        for i in range(N_INPUTS):
            observation[b, i] = np.float32(inputs[i])
        for i in range(_N):
            observation[b, N_INPUTS + i] = np.float32((SHIFTS[i] - low) / (high - low))
            mask[b, i] = low <= SHIFTS[i] <= high
