"""Many simulated clusters advanced in one compiled call, each to its next decision that a learner answers.

Decisions of other kinds are answered on the way by a rule, inside the kernel. The learner sees dimensionless
columns only, as one flat float32 row per cluster: context, then K candidates.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.core.columns import CANDIDATE_DIMENSIONLESS, CONTEXT_DIMENSIONLESS, N_CANDIDATE, N_CONTEXT, Need
from engine.core.kinds import RequestState
from engine.core.kv import release
from engine.core.state import attach
from engine.jit.kernel import kernel
from env.surrogate.clock import attach_sim
from env.surrogate.loop import advance, answer, describe
from env.surrogate.seen import open_book

#: What ``advance_many`` reports per cluster: a decision waits; one waits and every request has been sent; all ended.
ASKED, LAST, ENDED = 0, 1, 2

_ASKED, _LAST, _ENDED = np.int64(ASKED), np.int64(LAST), np.int64(ENDED)
_DIMENSIONLESS = int(Need.DIMENSIONLESS)
_WIDE, _NARROW = CANDIDATE_DIMENSIONLESS, CONTEXT_DIMENSIONLESS
_FIRST_LIVE, _LAST_LIVE = int(RequestState.PLACING), int(RequestState.RUNNING)


class Buffers(NamedTuple):
    """Arrays that ``advance_many`` reads and fills, for B clusters and K candidates."""

    observation: np.ndarray  # float32 (B, C + K · F), with advice K columns more
    mask: np.ndarray  # bool (B, K)
    reward: np.ndarray  # float64 (B,)
    elapsed_s: np.ndarray  # float64 (B,): from the last decision to this one
    status: np.ndarray  # int64 (B,): ASKED, LAST or ENDED
    good: np.ndarray  # float64 (B,): requests sealed as good, by weight, since the episode began
    missed: np.ndarray  # float64 (B,)
    context: np.ndarray  # float64 (N_CONTEXT,), scratch of one decision
    candidates: np.ndarray  # float64 (K max, N_CANDIDATE)
    allowed: np.ndarray  # uint8 (K max,)


def new_buffers(n: int, k: int, k_max: int, advise: bool = False) -> Buffers:
    """Buffers for ``n`` clusters; ``k`` candidates in observations, ``k_max`` in any decision.

    :param advise: with room for the rule's answer behind the candidates
    """
    return Buffers(
        observation=np.zeros((n, _NARROW + k * (_WIDE + advise)), np.float32),
        mask=np.zeros((n, k), np.bool_),
        reward=np.zeros(n),
        elapsed_s=np.zeros(n),
        status=np.zeros(n, np.int64),
        good=np.zeros(n),
        missed=np.zeros(n),
        context=np.zeros(N_CONTEXT),
        candidates=np.zeros((k_max, N_CANDIDATE)),
        allowed=np.zeros(k_max, np.uint8),
    )


@kernel
def _observe(q, k, row, mask, advice):
    """Copy the dimensionless columns of the decision at hand, and a 1 at ``advice``, into an observation row."""
    for j in range(_NARROW):
        row[j] = np.float32(q.context[j])
    at = _NARROW
    for c in range(mask.shape[0]):
        if c < k:
            for j in range(_WIDE):
                row[at + j] = np.float32(q.candidates[c, j])
            mask[c] = q.mask[c] == 1
        else:
            for j in range(_WIDE):
                row[at + j] = np.float32(0.0)
            mask[c] = False
        at += _WIDE
    for c in range(row.shape[0] - at):
        row[at + c] = np.float32(1.0 if c == advice else 0.0)


@kernel
def _to_next(s, q, kinds, advise, needs, decide, params, memory, context, candidates, allowed):
    """Run one cluster to the next decision of a kind in ``kinds``: its number of candidates, 0 at the end, and what
    the rule would answer (-1 where ``advise`` is off)."""
    while True:
        kind = advance(s, q)
        if kind < 0:
            return 0, -1
        if (kinds >> kind) & 1 == 1:
            if not advise:
                return describe(s, q, _DIMENSIONLESS), -1
            k = describe(s, q, needs | _DIMENSIONLESS)
            if q.sim[0].routers > 1:
                open_book(q, memory)
            return k, decide(context, candidates[:k], allowed[:k], params, memory)
        k = describe(s, q, needs)
        if q.sim[0].routers > 1:
            open_book(q, memory)
        answer(s, q, decide(context, candidates[:k], allowed[:k], params, memory))


@kernel
def _advance_one(s, q, action, kinds, context, candidates, allowed, decide, params, memory, needs, row, mask):
    """Answer the pending decision with ``action`` (-1: none is pending yet) and run to the next one.

    :param kinds: bit mask of the kinds the learner answers
    :param decide: rule for the other kinds, and for advice where ``row`` has room for it, with its ``params``,
        ``memory`` and ``needs``
    :param row: the next decision as the learner sees it, with its ``mask``; both are left alone where all has ended
    :return: status, reward, and simulated seconds from the decision answered to the next one
    """
    advise = row.shape[0] > _NARROW + mask.shape[0] * _WIDE
    asked_at = q.sim[0].asked_at
    if action >= 0:
        answer(s, q, action)
    k, advice = _to_next(s, q, kinds, advise, needs, decide, params, memory, context, candidates, allowed)
    reward = -q.sim[0].missed
    elapsed_s = (q.sim[0].now - asked_at) * 1e-12
    q.sim[0].good = 0.0
    q.sim[0].missed = 0.0
    q.sim[0].asked_at = q.sim[0].now
    if k == 0:
        return _ENDED, reward, elapsed_s
    _observe(q, k, row, mask, advice)
    everyone = s.cluster[0].n_sent == s.cluster[0].n_requests
    return _LAST if everyone else _ASKED, reward, elapsed_s


@kernel
def advance_many(
    state_words, sim_words, actions, chosen, kinds, context, candidates, allowed, decide, params, memory, needs,
    observation, mask, reward, elapsed_s, status, good, missed,
):  # fmt: skip
    """Answer and go on in each cluster of ``chosen``; a masked action is replaced by the first allowed one.

    :param state_words: int64 (B, ·) address vectors of the clusters, ``sim_words`` of their clocks
    :param actions: int64 (B,); -1 starts an episode (nothing is pending yet)
    :param chosen: int64, indices of the clusters to advance
    :param kinds: bit mask of the kinds the learner answers
    :param decide: rule for the other kinds, and for advice where ``observation`` has room for it, with its
        ``params``, ``memory`` (B, M) and ``needs``
    """
    for c in range(chosen.shape[0]):
        b = chosen[c]
        s, q = attach(state_words[b]), attach_sim(sim_words[b])
        action = actions[b]
        if action >= 0 and (action >= mask.shape[1] or not mask[b, action]):
            action = 0
            while not mask[b, action]:
                action += 1
        status[b], reward[b], elapsed_s[b] = _advance_one(
            s, q, action, kinds, context, candidates, allowed, decide, params, memory[b], needs, observation[b], mask[b]
        )
        good[b] = s.cluster[0].good_weight
        missed[b] = s.cluster[0].miss_weight


@kernel
def release_all(state_words):
    """Give back the blocks of every request still alive, so that the pools can serve the next episode."""
    s = attach(state_words)
    for r in range(s.cluster[0].n_requests):
        state = s.req[r].state
        if state < _FIRST_LIVE or state > _LAST_LIVE:
            continue
        if s.req[r].blocks > 0:
            release(s, r)
        if s.req[r].dst_blocks > 0:
            source_tail, n, inst = s.req[r].dst_tail, s.req[r].dst_blocks, s.req[r].dest
            s.req[r].tail, s.req[r].blocks, s.req[r].inst = source_tail, n, inst
            release(s, r)
            s.req[r].dst_blocks = 0
