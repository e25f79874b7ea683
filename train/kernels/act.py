"""Acting: the scoring network on one decision at a time, and whole rollouts of simulated clusters.

A cluster that plays its whole rollout before the next one begins stays in the cache; in lockstep with dozens of others
it is fetched from memory again for every decision.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.core.columns import CANDIDATE_DIMENSIONLESS, CONTEXT_DIMENSIONLESS
from engine.core.jit import kernel
from engine.core.state import attach
from env.batch import ASKED, advance_one
from env.clock import attach_sim
from train.kernels.pack import pack, widen_by

__all__ = ["Layers", "Tape", "Weights", "act_many", "play", "values_of"]

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)
_ASKED, _C, _WIDE = ASKED, CONTEXT_DIMENSIONLESS, CANDIDATE_DIMENSIONLESS
_FAST = {"contract", "reassoc"}


class Weights(NamedTuple):
    """The network's weights, float32; matrices are (inputs, outputs)."""

    context: np.ndarray  # (C, H)
    context_bias: np.ndarray  # (H,)
    row: np.ndarray  # (F, H)
    head: np.ndarray  # (H, H)
    first: np.ndarray  # (2 H, 2 H): from the pool to the head, then to the value
    first_bias: np.ndarray  # (2 H,)
    out: np.ndarray  # (H,)
    value_out: np.ndarray  # (H,)
    value_bias: np.ndarray  # (1,)
    scale: np.ndarray  # (1,): between the base's cost and a logit


class Layers(NamedTuple):
    """Workspace of one decision."""

    base: np.ndarray  # float32 (1, H)
    encoded: np.ndarray  # (K, H)
    mixed: np.ndarray  # (K, H)
    pooled: np.ndarray  # (1, 2 H)
    hidden: np.ndarray  # (1, 2 H)
    logits: np.ndarray  # float64 (K,)
    chances: np.ndarray  # float64 (K,): of their softmax, not divided by the sum
    live: np.ndarray  # float32 (F,)
    columns: np.ndarray  # int64 (F,): features in use, of which ``narrow`` (1,) hold
    narrow: np.ndarray
    x: np.ndarray  # float32 (K, F): these features
    weights: np.ndarray  # (F, H): their weights


class Tape(NamedTuple):
    """Columns of a rollout, (T, N) or (T, N, width), and where the environments are now, (N,)."""

    observations: np.ndarray
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


@kernel(fastmath=_FAST)
def _add_product(x, first, n, width, weights, out):
    """``out[k] += x[first + k, :width] @ weights`` for k < n.

    Two rows and four inputs at a time; the inner loop is contiguous and without a reduction, so it becomes SIMD.
    """
    whole = width - width % 4
    for k in range(0, n - 1, 2):
        r = first + k
        for i in range(0, whole, 4):
            a, b, c, d = x[r, i], x[r, i + 1], x[r, i + 2], x[r, i + 3]
            e, f, g, j = x[r + 1, i], x[r + 1, i + 1], x[r + 1, i + 2], x[r + 1, i + 3]
            for h in range(weights.shape[1]):
                p, q, v, w = weights[i, h], weights[i + 1, h], weights[i + 2, h], weights[i + 3, h]
                out[k, h] += a * p + b * q + c * v + d * w
                out[k + 1, h] += e * p + f * q + g * v + j * w
        for i in range(whole, width):
            a, b = x[r, i], x[r + 1, i]
            for h in range(weights.shape[1]):
                out[k, h] += a * weights[i, h]
                out[k + 1, h] += b * weights[i, h]
    if n % 2 == 1:
        k = n - 1
        r = first + k
        for i in range(0, whole, 4):
            a, b, c, d = x[r, i], x[r, i + 1], x[r, i + 2], x[r, i + 3]
            for h in range(weights.shape[1]):
                out[k, h] += a * weights[i, h] + b * weights[i + 1, h] + c * weights[i + 2, h] + d * weights[i + 3, h]
        for i in range(whole, width):
            a = x[r, i]
            for h in range(weights.shape[1]):
                out[k, h] += a * weights[i, h]


@kernel
def _narrow(first, n, rows, weights, live, columns, held, x, out):
    """Copy the features that are not zero in all rows, and their weights, side by side; returns how many those are.

    About half are zero: other roles, other kinds of decisions.

    :param columns: features that ``out`` holds the weights of, ``held`` (1,) many
    """
    size = live.shape[0]
    for f in range(size):
        live[f] = _ZERO
    for r in range(first, first + n):
        for f in range(size):
            y = abs(rows[r, f])
            live[f] = y if y > live[f] else live[f]
    width, same = 0, True
    for f in range(size):
        if live[f] > _ZERO:
            same = same and columns[width] == f
            columns[width] = f
            width += 1
    if not same or held[0] != width:
        held[0] = width
        for i in range(width):
            for h in range(weights.shape[1]):
                out[i, h] = weights[columns[i], h]
    for k in range(n):
        for i in range(width):
            x[k, i] = rows[first + k, columns[i]]
    return width


@kernel(fastmath=_FAST)
def _pool(n, width, encoded, pooled):
    """relu in place; mean and maximum over the rows."""
    for h in range(2 * width):
        pooled[0, h] = _ZERO
    for k in range(n):
        for h in range(width):
            e = encoded[k, h]
            e = e if e > _ZERO else _ZERO
            encoded[k, h] = e
            pooled[0, h] += e
            most = pooled[0, width + h]
            pooled[0, width + h] = e if e > most else most
    share = _ONE / np.float32(max(n, 1))
    for h in range(width):
        pooled[0, h] *= share


@kernel(fastmath=_FAST)
def _dot_relu(x, j, first, out):
    total = _ZERO
    for h in range(out.shape[0]):
        y = x[j, first + h]
        total += (y if y > _ZERO else _ZERO) * out[h]
    return total


@kernel
def _repeat(row, n, width, out):
    for k in range(n):
        for h in range(width):
            out[k, h] = row[0, h]


@kernel
def look(frame, weights, store, layers):
    """Forward pass of decision ``frame``: logits of its rows into ``layers.logits``; returns the value."""
    encoded, mixed, base, hidden = layers.encoded, layers.mixed, layers.base, layers.hidden
    pooled, logits, x, narrow = layers.pooled, layers.logits, layers.x, layers.weights
    context_bias, first_bias, out, scale = weights.context_bias, weights.first_bias, weights.out, weights.scale[0]
    context, cost, advised = store.context, store.cost, store.advised
    width = out.shape[0]
    first, n = store.first[frame], store.n_rows[frame]
    for h in range(width):
        base[0, h] = context_bias[h]
    for h in range(2 * width):
        hidden[0, h] = first_bias[h]
    _add_product(context, frame, 1, context.shape[1], weights.context, base)
    _repeat(base, n, width, encoded)
    live = _narrow(first, n, store.rows, weights.row, layers.live, layers.columns, layers.narrow, x, narrow)
    _add_product(x, 0, n, live, narrow, encoded)
    _pool(n, width, encoded, pooled)
    _add_product(pooled, 0, 1, 2 * width, weights.first, hidden)
    _repeat(hidden, n, width, mixed)
    _add_product(encoded, 0, n, width, weights.head, mixed)
    for k in range(n):
        residual = _dot_relu(mixed, k, 0, out)
        logits[k] = np.float64(residual - scale * cost[first + k] + advised[first + k])
    return _dot_relu(hidden, 0, width, weights.value_out) + weights.value_bias[0]


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
    observations, masks, frame, uniform, constants, store, scratch, weights, layers, shift, scale,
    actions, log_probs, values,
):  # fmt: skip
    """Append decisions as numbers ``frame`` and following, and draw an action for each."""
    for b in range(observations.shape[0]):
        pack(observations, masks, b, frame + b, constants, store, scratch)
        values[b] = shift + scale * look(frame + b, weights, store, layers)
        n = store.n_rows[frame + b]
        k, log_probs[b] = draw(n, uniform[b], layers.logits, layers.chances)
        actions[b] = store.which[store.first[frame + b] + k] if n > 0 else 0


@kernel
def values_of(observations, masks, constants, store, scratch, weights, layers, shift, scale, values):
    """Values of decisions; ``store`` needs room for one."""
    for b in range(observations.shape[0]):
        store.used[0] = 0
        pack(observations, masks, b, 0, constants, store, scratch)
        values[b] = shift + scale * look(0, weights, store, layers)


@kernel
def play(
    b, begin, end, uniform, clusters, kinds, decide, needs, tape,
    constants, store, scratch, weights, layers, shift, scale, seen,
):  # fmt: skip
    """Let cluster ``b`` take decisions ``begin`` to ``end`` of a rollout, or fewer: up to where its episode ends.

    :param clusters: an ``env.batch.Clusters``, with the ``kinds`` the learner answers, and the rule for others
    :param uniform: (T, N) numbers in [0, 1)
    :param seen: widened by what is observed, see :func:`train.kernels.pack.widen`
    :return: the first decision not taken
    """
    s, q = attach(clusters.state_words[b]), attach_sim(clusters.sim_words[b])
    observation, waiting = clusters.observation, clusters.mask
    row, mask, memory = observation[b], waiting[b], clusters.memory[b]
    context, candidates, allowed, params = clusters.context, clusters.candidates, clusters.allowed, clusters.params
    observations, action_masks, first, n_rows = tape.observations, tape.action_masks, store.first, store.n_rows
    logits, chances = layers.logits, layers.chances
    n_envs = tape.actions.shape[1]
    for t in range(begin, end):
        for j in range(row.shape[0]):
            observations[t, b, j] = row[j]
        for k in range(mask.shape[0]):
            action_masks[t, b, k] = mask[k]
        tape.episode_starts[t, b] = _ONE if tape.began[b] else _ZERO
        tape.clock_s[t, b] = tape.now_s[b]
        tape.trace[t, b] = tape.now_trace[b]
        frame = t * n_envs + b
        pack(observation, waiting, b, frame, constants, store, scratch)
        widen_by(observation, b, _C, _WIDE, mask.shape[0], seen)
        tape.values[t, b] = shift + scale * look(frame, weights, store, layers)
        k, tape.log_probs[t, b] = draw(n_rows[frame], uniform[t, b], logits, chances)
        action = store.which[first[frame] + k]
        tape.actions[t, b] = action
        status, reward, elapsed_s = advance_one(
            s, q, action, kinds, context, candidates, allowed, decide, params, memory, needs, row, mask
        )
        tape.rewards[t, b] = reward
        tape.elapsed_s[t, b] = elapsed_s
        tape.now_s[b] += elapsed_s
        tape.began[b] = False
        clusters.returns[b] += reward
        clusters.lengths[b] += 1
        if status != _ASKED:
            clusters.status[b] = status
            clusters.good[b] = s.cluster[0].good_weight
            clusters.missed[b] = s.cluster[0].miss_weight
            return t + 1
    clusters.status[b] = _ASKED
    return end
