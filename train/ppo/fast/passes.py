"""PPO's objective over a minibatch and its gradient, in one compiled loop: no layer of it goes to memory.

The decisions of a chunk, some hundreds of rows, go through the whole network, forwards and backwards, before the next
ones are touched, so that everything but the rollout itself stays in the nearest caches. The equations are those of
:mod:`policies.network.scoring`; shapes as in :mod:`train.ppo.fast.layers`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.jit.kernel import kernel
from engine.jit.rows import make_attach
from policies.network.features import N_CONTEXT_FEATURES, N_FEATURES
from train.ppo.fast.layers import attach_weights, narrow, pool, repeat, score, value
from train.ppo.fast.pack import attach_store
from train.ppo.fast.products import ROWS, add_features, add_outer, add_outer_features, add_product
from train.ppo.fast.simd import LANES, equal, fetch, fma, load, most, over, plus, positive, save, splat, times

__all__ = ["CHUNK", "CHUNK_ROWS", "Chunk", "Goal", "Sums", "learn"]

#: A chunk is complete when it has as many decisions, or at least as many rows.
CHUNK, CHUNK_ROWS = 32, 256

_CHUNK, _CHUNK_ROWS, _C, _F, _SURPLUS = CHUNK, CHUNK_ROWS, N_CONTEXT_FEATURES, N_FEATURES, ROWS - 1
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


class Chunk(NamedTuple):
    """Workspace: D decisions and their R rows, with room for three more of each, and gradients (``by_``)."""

    start: np.ndarray  # int64 (D + 1,): first row
    frame: np.ndarray  # int64 (D,): number in the rollout
    chosen: np.ndarray  # int64 (D,): row of the action
    row: np.ndarray  # int64 (R,): place in the rollout
    context: np.ndarray  # float32 (D, C)
    cost: np.ndarray  # (R,)
    advised: np.ndarray
    base: np.ndarray  # (D, W): of the encoder, from the context; then its gradient
    encoded: np.ndarray  # (R, W)
    mixed: np.ndarray  # then their gradient
    by_encoded: np.ndarray
    pooled: np.ndarray  # (D, 2 W)
    by_pooled: np.ndarray
    hidden: np.ndarray  # then their gradient
    logits: np.ndarray  # float64 (K,)
    chances: np.ndarray


class Goal(NamedTuple):
    """``train.ppo.objective.Objective`` as kernels take it."""

    clip: float
    entropy_weight: float
    value_weight: float
    shift: float
    scale: float
    actor: bool


class Sums(NamedTuple):
    """Gradients of the weights of the same names, and what ``train.ppo.objective.Losses`` are the means of."""

    context: np.ndarray
    context_bias: np.ndarray
    row: np.ndarray  # (F, W): of the features in use
    head: np.ndarray
    first: np.ndarray
    first_bias: np.ndarray
    out: np.ndarray
    value_out: np.ndarray
    scalars: np.ndarray  # float64 (2,): of the logarithm of the scale, of the value's bias
    losses: np.ndarray  # float64 (5,): squared value error, policy loss, entropy, KL (k3), share clipped


_F4, _F8, _I8 = np.float32, np.float64, np.int64
attach_samples = make_attach(
    "Samples", [("actions", _I8, 1), ("log_probs", _F4, 1), ("advantages", _F4, 1), ("returns", _F4, 1)]
)
attach_chunk = make_attach(
    "Chunk",
    [
        *((name, _I8, 1) for name in ("start", "frame", "chosen", "row")),
        *(("context", _F4, 2), ("cost", _F4, 1), ("advised", _F4, 1)),
        *((name, _F4, 2) for name in ("base", "encoded", "mixed", "by_encoded", "pooled", "by_pooled", "hidden")),
        *(("logits", _F8, 1), ("chances", _F8, 1)),
    ],
)
attach_sums = make_attach(
    "Sums", [(name, _F8, 1) if name in ("scalars", "losses") else (name, _F4, 2) for name in Sums._fields]
)


@kernel
def _gather(order, begin, store, samples, c):
    """Fill the chunk with decisions ``order[begin:]`` until it is complete; returns their number."""
    start, frames, chosen, row, contexts, cost, advised = (
        c.start, c.frame, c.chosen, c.row, c.context, c.cost, c.advised
    )  # fmt: skip
    at, n = 0, 0
    start[0] = 0
    while n < _CHUNK and at < _CHUNK_ROWS and begin + n < order.shape[0]:
        b = order[begin + n]
        frames[n], chosen[n], action, first = b, at, samples.actions[b], store.first[b]
        for j in range(_C):
            contexts[n, j] = store.context[b, j]
        for r in range(first, first + store.n_rows[b]):
            row[at], cost[at], advised[at] = r, store.cost[r], store.advised[r]
            if store.which[r] == action:
                chosen[n] = at
            at += 1
        n += 1
        start[n] = at
    for k in range(at, at + _SURPLUS):
        row[k] = 0
    return n


@kernel
def _ask_for(order, place, store, samples):
    """Have decision ``order[place]`` brought near, for the next chunk: it lies anywhere in the memory of a rollout."""
    if place < order.shape[0]:
        b = order[place]
        first, n = store.first[b], store.n_rows[b]
        for r in range(first, first + n):
            for j in range(0, _F, LANES):
                fetch(store.rows, r, j)
        for r in range(first, first + n, LANES):
            fetch(store.cost, r, 0)
            fetch(store.advised, r, 0)
            fetch(store.which, r, 0)
        fetch(store.context, b, 0)
        fetch(store.context, b, _C - 1)
        fetch(samples.actions, b, 0)
        fetch(samples.log_probs, b, 0)
        fetch(samples.advantages, b, 0)
        fetch(samples.returns, b, 0)


@kernel
def _add_rows(x, n, width, sums):
    """``sums[0] += Σ x[k]`` over k < n."""
    for h in range(0, width, LANES):
        s = splat(_ZERO)
        for k in range(n):
            s = plus(s, load(x, k, h))
        save(sums, 0, h, plus(load(sums, 0, h), s))


@kernel
def _value_back(b, by_value, width, hidden, out, d_out):
    by = splat(by_value)
    for h in range(0, width, LANES):
        x = load(hidden, b, width + h)
        save(d_out, 0, h, plus(load(d_out, 0, h), positive(x, times(by, x))))
        save(hidden, b, width + h, positive(x, times(by, load(out, 0, h))))


@kernel
def _head_back(at, n, b, by_logits, width, mixed, hidden, out, d_out):
    """``mixed`` becomes its own gradient, whose sum over the decision's rows goes to ``hidden``."""
    for h in range(0, width, LANES):
        w, d, s = load(out, 0, h), load(d_out, 0, h), splat(_ZERO)
        for k in range(n):
            by, z = splat(np.float32(by_logits[k])), load(mixed, at + k, h)
            d = fma(by, z, d)
            y = positive(z, times(by, w))
            save(mixed, at + k, h, y)
            s = plus(s, y)
        save(d_out, 0, h, d)
        save(hidden, b, h, s)


@kernel
def _no_head(b, width, hidden):
    for h in range(0, width, LANES):
        save(hidden, b, h, splat(_ZERO))


@kernel
def _objective(c, n, width, order, ahead, store, samples, weights, goal, share, sums):
    """The objective on a chunk of ``n`` decisions and its gradient in front of the heads, in place of ``mixed`` and
    ``hidden``.

    :param ahead: where in ``order`` the next chunk begins
    :param goal: a Goal
    :param share: 1 ÷ size of the minibatch
    """
    mixed, hidden, logits, chances, cost, scalars, losses = (
        c.mixed, c.hidden, c.logits, c.chances, c.cost, sums.scalars, sums.losses
    )  # fmt: skip
    out, value_out, d_out, d_value_out = weights.out, weights.value_out, sums.out, sums.value_out
    scale, bias, entropy_weight, clip = weights.scale[0], weights.value_bias[0], goal.entropy_weight, goal.clip
    for b in range(n):
        _ask_for(order, ahead + b, store, samples)
        frame, at, rows = c.frame[b], c.start[b], c.start[b + 1] - c.start[b]
        error = np.float64(value(hidden, b, width, value_out, bias))
        error -= (np.float64(samples.returns[frame]) - goal.shift) / goal.scale
        losses[0] += error * error
        by_value = 2.0 * goal.value_weight * share * error
        scalars[1] += by_value
        _value_back(b, np.float32(by_value), width, hidden, value_out, d_value_out)
        if not goal.actor or rows == 0:
            _no_head(b, width, hidden)
            continue
        score(mixed, at, rows, width, out, scale, cost, c.advised, at, logits)
        chosen = c.chosen[b] - at
        largest = -np.inf
        for k in range(rows):
            largest = max(largest, logits[k])
        total = 0.0
        for k in range(rows):
            logits[k] -= largest
            chances[k] = np.exp(logits[k])
            total += chances[k]
        norm, entropy = np.log(total), 0.0
        for k in range(rows):
            logits[k] -= norm
            chances[k] /= total
            entropy -= chances[k] * logits[k]
        advantage = np.float64(samples.advantages[frame])
        log_ratio = logits[chosen] - np.float64(samples.log_probs[frame])
        ratio = np.exp(log_ratio)
        gain = min(advantage * ratio, advantage * min(max(ratio, 1.0 - clip), 1.0 + clip))
        losses[1] -= gain
        losses[2] += entropy
        losses[3] += ratio - 1.0 - log_ratio
        losses[4] += 1.0 if abs(ratio - 1.0) > clip else 0.0
        by_log_prob = -advantage * ratio * share if advantage * ratio <= gain else 0.0
        for k in range(rows):
            p = chances[k]
            by_logit = entropy_weight * share * p * (logits[k] + entropy) - by_log_prob * p
            if k == chosen:
                by_logit += by_log_prob
            scalars[0] -= by_logit * scale * cost[at + k]
            chances[k] = by_logit
        _head_back(at, rows, b, chances, width, mixed, hidden, out, d_out)


@kernel
def _mean_back(at, n, b, width, by_pooled, by_encoded):
    """The rows' parts of the gradient of their mean."""
    share = splat(_ONE / np.float32(max(n, 1)))
    for h in range(0, width, LANES):
        x = times(load(by_pooled, b, h), share)
        for k in range(at, at + n):
            save(by_encoded, k, h, x)


@kernel
def _spread(at, n, b, width, encoded, pooled, by_pooled, by_encoded, base):
    """Gradients before the encoder's activation, in place of ``by_encoded``, and their sum in place of ``base``.

    A maximum that several rows share passes its gradient on in equal parts, as in torch.
    """
    one = splat(_ONE)
    for h in range(0, width, LANES):
        greatest, ties, s = load(pooled, b, width + h), splat(_ZERO), splat(_ZERO)
        for k in range(at, at + n):
            ties = plus(ties, equal(load(encoded, k, h), greatest, one))
        top = over(load(by_pooled, b, width + h), most(ties, one))
        for k in range(at, at + n):
            e = load(encoded, k, h)
            d = plus(load(by_encoded, k, h), equal(e, greatest, top))
            d = positive(e, d)
            save(by_encoded, k, h, d)
            s = plus(s, d)
        save(base, b, h, s)


@kernel
def _forwards(c, n, store, width, weights):
    """The chunk's layers up to ``mixed`` and ``hidden``."""
    start, encoded = c.start, c.encoded
    rows = start[n]
    repeat(weights.context_bias, 0, n, width, c.base, 0)
    add_product(c.context, n, _C, weights.context, width, c.base)
    for b in range(n):
        repeat(c.base, b, start[b + 1] - start[b], width, encoded, start[b])
    add_features(store.rows, c.row, rows, store.columns, store.n_columns[0], weights.live, width, encoded)
    for b in range(n):
        pool(encoded, start[b], start[b + 1] - start[b], width, c.pooled, b)
    repeat(weights.first_bias, 0, n, 2 * width, c.hidden, 0)
    add_product(c.pooled, n, 2 * width, weights.first, 2 * width, c.hidden)
    for b in range(n):
        repeat(c.hidden, b, start[b + 1] - start[b], width, c.mixed, start[b])
    add_product(encoded, rows, width, weights.head, width, c.mixed)


@kernel
def _backwards(c, n, store, width, weights, sums, actor):
    """From the gradients of ``mixed`` and ``hidden`` to those of all weights before them."""
    start, encoded = c.start, c.encoded
    rows = start[n]
    add_outer(c.pooled, c.hidden, n, 2 * width, 2 * width, sums.first)
    _add_rows(c.hidden, n, 2 * width, sums.first_bias)
    for b in range(n):
        for h in range(0, 2 * width, LANES):
            save(c.by_pooled, b, h, splat(_ZERO))
    add_product(c.hidden, n, 2 * width, weights.first_back, 2 * width, c.by_pooled)
    for b in range(n):
        _mean_back(start[b], start[b + 1] - start[b], b, width, c.by_pooled, c.by_encoded)
    if actor:
        add_outer(encoded, c.mixed, rows, width, width, sums.head)
        add_product(c.mixed, rows, width, weights.head_back, width, c.by_encoded)
    for b in range(n):
        _spread(start[b], start[b + 1] - start[b], b, width, encoded, c.pooled, c.by_pooled, c.by_encoded, c.base)
    add_outer_features(store.rows, c.row, store.columns, c.by_encoded, rows, store.n_columns[0], width, sums.row)
    add_outer(c.context, c.base, n, _C, width, sums.context)
    _add_rows(c.base, n, width, sums.context_bias)


@kernel
def learn(order, width, store, samples, weights, goal, chunk, sums):
    """Add the gradient of ``goal`` over the minibatch ``order`` (decisions of the store), and its losses, to the sums.

    :param width: W
    :param store: addresses of a Store; of a ``train.ppo.batch.Samples``, of Weights, of a Chunk and of Sums
    :param goal: a Goal
    """
    s, samples, weights, c, sums = (
        attach_store(store), attach_samples(samples), attach_weights(weights), attach_chunk(chunk), attach_sums(sums)
    )  # fmt: skip
    begin, share = 0, 1.0 / order.shape[0]
    narrow(weights, s.columns, s.n_columns[0], width)
    while begin < order.shape[0]:
        n = _gather(order, begin, s, samples, c)
        _forwards(c, n, s, width, weights)
        _objective(c, n, width, order, begin + n, s, samples, weights, goal, share, sums)
        _backwards(c, n, s, width, weights, sums, goal.actor)
        begin += n
