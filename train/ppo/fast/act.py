"""Acting: the scoring network on one decision at a time, and whole rollouts of simulated clusters.

A cluster that plays its whole rollout before the next one begins stays in the cache; in lockstep with dozens of others
it is fetched from memory again for every decision.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.core.columns import CANDIDATE_DIMENSIONLESS, CONTEXT_DIMENSIONLESS
from engine.core.state import attach
from engine.jit.kernel import kernel
from engine.jit.rows import make_attach
from env.surrogate.batch import ASKED, advance_one
from env.surrogate.clock import attach_sim
from train.ppo.fast.layers import attach_weights, narrow, pool, repeat, score, take, value
from train.ppo.fast.pack import (
    attach_bounds,
    attach_constants,
    attach_observed,
    attach_scratch,
    attach_store,
    pack,
    widen_by,
)
from train.ppo.fast.products import add_product, add_row

__all__ = ["Layers", "Tape", "act_many", "play", "values_of"]

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_ASKED, _C, _WIDE = ASKED, CONTEXT_DIMENSIONLESS, CANDIDATE_DIMENSIONLESS


class Layers(NamedTuple):
    """Workspace of one decision, with room for three rows more."""

    base: np.ndarray  # float32 (1, W)
    encoded: np.ndarray  # (K, W)
    mixed: np.ndarray  # (K, W)
    pooled: np.ndarray  # (1, 2 W)
    hidden: np.ndarray  # (1, 2 W)
    logits: np.ndarray  # float64 (K,)
    chances: np.ndarray  # float64 (K,): of their softmax, not divided by the sum
    x: np.ndarray  # float32 (K, F): the features in use
    size: np.ndarray  # int64 (2,): W, and how many of these features ``Weights.live`` has; 0: none yet


class Tape(NamedTuple):
    """Columns of a rollout, (T, N), and where the environments are now, (N,)."""

    observations: np.ndarray  # (T · N, ·)
    action_masks: np.ndarray
    actions: np.ndarray
    log_probs: np.ndarray
    values: np.ndarray
    rewards: np.ndarray
    elapsed_s: np.ndarray
    clock_s: np.ndarray
    trace: np.ndarray
    episode_starts: np.ndarray
    now_s: np.ndarray  # float64: time since the episode began
    began: np.ndarray  # bool: whether the decision that waits is the first of its episode
    now_trace: np.ndarray  # int64


_F4, _F8, _I8 = np.float32, np.float64, np.int64
attach_layers = make_attach(
    "Layers",
    [
        *((name, _F4, 2) for name in ("base", "encoded", "mixed", "pooled", "hidden")),
        *(("logits", _F8, 1), ("chances", _F8, 1), ("x", _F4, 2), ("size", _I8, 1)),
    ],
)
attach_tape = make_attach(
    "Tape",
    [
        *(("observations", _F4, 2), ("action_masks", np.bool_, 2), ("actions", _I8, 2), ("log_probs", _F4, 2)),
        *(("values", _F4, 2), ("rewards", _F4, 2), ("elapsed_s", _F8, 2), ("clock_s", _F8, 2), ("trace", _I8, 2)),
        *(("episode_starts", _F4, 2), ("now_s", _F8, 1), ("began", np.bool_, 1), ("now_trace", _I8, 1)),
    ],
)


@kernel
def look(frame, weights, store, layers):
    """Forward pass of decision ``frame``: logits of its rows into ``layers.logits``; returns the value."""
    encoded, mixed, base, hidden, pooled = layers.encoded, layers.mixed, layers.base, layers.hidden, layers.pooled
    first, n, inputs, width, x = store.first[frame], store.n_rows[frame], store.n_columns[0], layers.size[0], layers.x
    if layers.size[1] != inputs:  # the weights have changed, or a feature was seen for the first time
        narrow(weights, store.columns, inputs, width)
        layers.size[1] = inputs
    repeat(weights.context_bias, 0, 1, width, base, 0)
    add_row(store.context, frame, _C, weights.context, width, base)
    take(store.rows, first, n, store.columns, inputs, x, 0)
    repeat(base, 0, n, width, encoded, 0)
    add_product(x, n, inputs, weights.live, width, encoded)
    pool(encoded, 0, n, width, pooled, 0)
    repeat(weights.first_bias, 0, 1, 2 * width, hidden, 0)
    add_row(pooled, 0, 2 * width, weights.first, 2 * width, hidden)
    repeat(hidden, 0, n, width, mixed, 0)
    add_product(encoded, n, width, weights.head, width, mixed)
    score(mixed, 0, n, width, weights.out, weights.scale[0], store.cost, store.advised, first, layers.logits)
    return value(hidden, 0, width, weights.value_out, weights.value_bias[0])


@kernel
def draw(n, uniform, logits, chances):
    """An index below ``n`` from the softmax of ``logits``, by one number in [0, 1), and its log-probability."""
    if n == 0:
        return 0, 0.0
    most = logits[0]
    for k in range(1, n):
        most = max(most, logits[k])
    total = 0.0
    for k in range(n):
        chances[k] = np.exp(logits[k] - most)
        total += chances[k]
    left = uniform * total
    for k in range(n):
        left -= chances[k]
        if left < 0.0:
            return k, logits[k] - most - np.log(total)
    k = n - 1
    while k > 0 and chances[k] == 0.0:  # rounding: the last one that has a probability
        k -= 1
    return k, logits[k] - most - np.log(total)


@kernel
def act_many(
    observed, frame, uniform, constants, store, scratch, weights, layers, shift, scale, actions, log_probs, values
):
    """Append decisions as numbers ``frame`` and following, and draw an action for each.

    :param observed: address vectors, this one and ``constants`` to ``layers``
    """
    o, c, s, w = attach_observed(observed), attach_constants(constants), attach_store(store), attach_scratch(scratch)
    weigh, work = attach_weights(weights), attach_layers(layers)
    for b in range(o.size[0]):
        pack(o, b, frame + b, c, s, w)
        values[b] = shift + scale * look(frame + b, weigh, s, work)
        n = s.n_rows[frame + b]
        k, log_probs[b] = draw(n, uniform[b], work.logits, work.chances)
        actions[b] = s.which[s.first[frame + b] + k] if n > 0 else 0


@kernel
def values_of(observed, constants, store, scratch, weights, layers, shift, scale, values):
    """Values of decisions; arguments as in :func:`act_many`, the store needs room for one."""
    o, c, s, w = attach_observed(observed), attach_constants(constants), attach_store(store), attach_scratch(scratch)
    weigh, work = attach_weights(weights), attach_layers(layers)
    for b in range(o.size[0]):
        s.used[0] = 0
        pack(o, b, 0, c, s, w)
        values[b] = shift + scale * look(0, weigh, s, work)


@kernel
def play(
    b, begin, end, uniform, clusters, kinds, decide, needs, observed, tape,
    constants, store, scratch, weights, layers, shift, scale, seen,
):  # fmt: skip
    """Let cluster ``b`` take decisions ``begin`` to ``end`` of a rollout, or fewer: up to where its episode ends.

    :param clusters: an ``env.surrogate.batch.Clusters``, with the ``kinds`` the learner answers, and the rule for
    others
    :param uniform: (T, N) numbers in [0, 1)
    :param observed: address vectors, this one of what ``clusters`` shows, and ``tape`` to ``layers``
    :param seen: address vector of bounds, widened by what is observed, see :func:`train.ppo.fast.pack.widen_by`
    :return: the first decision not taken
    """
    s, q = attach(clusters.state_words[b]), attach_sim(clusters.sim_words[b])
    mask, memory = clusters.mask[b], clusters.memory[b]
    context, candidates, allowed, params = clusters.context, clusters.candidates, clusters.allowed, clusters.params
    o, c, d, w = attach_observed(observed), attach_constants(constants), attach_store(store), attach_scratch(scratch)
    weigh, work, to, bounds = attach_weights(weights), attach_layers(layers), attach_tape(tape), attach_bounds(seen)
    row, returns, n_envs, k_max = clusters.observation[b], 0.0, uniform.shape[1], mask.shape[0]
    status, t = _ASKED, begin
    while t < end and status == _ASKED:
        frame = t * n_envs + b
        for j in range(row.shape[0]):
            to.observations[frame, j] = row[j]
        for k in range(k_max):
            to.action_masks[frame, k] = mask[k]
        to.episode_starts[t, b] = _ONE if to.began[b] else _ZERO
        to.clock_s[t, b] = to.now_s[b]
        to.trace[t, b] = to.now_trace[b]
        pack(o, b, frame, c, d, w)
        widen_by(o, b, _C, _WIDE, bounds)
        to.values[t, b] = shift + scale * look(frame, weigh, d, work)
        k, to.log_probs[t, b] = draw(d.n_rows[frame], uniform[t, b], work.logits, work.chances)
        action = d.which[d.first[frame] + k]
        to.actions[t, b] = action
        status, reward, elapsed_s = advance_one(
            s, q, action, kinds, context, candidates, allowed, decide, params, memory, needs, row, mask
        )
        to.rewards[t, b] = reward
        to.elapsed_s[t, b] = elapsed_s
        to.now_s[b] += elapsed_s
        to.began[b] = False
        returns += reward
        t += 1
    clusters.returns[b] += returns
    clusters.lengths[b] += t - begin
    clusters.status[b] = status
    if status != _ASKED:
        clusters.good[b] = s.cluster[0].good_weight
        clusters.missed[b] = s.cluster[0].miss_weight
    return t
