"""What lies between the matrix products of an update, forwards and backwards: one pass over memory each.

A chunk is decisions ``begin`` to ``end`` of a minibatch; the arrays of its layers begin with its first row or decision.
H is the hidden width. ``hidden`` (n, 2 H) holds, before the activation, what the head takes from the pool, then the
hidden layer of the value. The equations are those of :mod:`policies.network`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.core.jit import kernel

__all__ = ["Minibatch", "encode", "gather", "objective", "spread"]

_FAST = {"contract", "reassoc"}
_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


class Minibatch(NamedTuple):
    """n decisions and their R rows side by side, in the order in which :func:`gather` met them."""

    start: np.ndarray  # int64 (n + 1,)
    context: np.ndarray  # float32 (n, C)
    rows: np.ndarray  # flat, (R · width,): the features in use
    cost: np.ndarray  # (R,)
    advised: np.ndarray
    chosen: np.ndarray  # int64 (n,): row of the action
    log_probs: np.ndarray  # float32 (n,): when it was drawn
    advantages: np.ndarray
    returns: np.ndarray


@kernel
def gather(order, store, samples, columns, to):
    """Copy the decisions ``order`` (n,) of a rollout into ``to``, of their rows the ``columns`` only."""
    context, rows, first, n_rows = store.context, store.rows, store.first, store.n_rows
    cost, advised, which = store.cost, store.advised, store.which
    to_start, to_context, to_rows, to_cost, to_advised, chosen = (
        to.start, to.context, to.rows, to.cost, to.advised, to.chosen
    )  # fmt: skip
    at, width = 0, columns.shape[0]
    to_start[0] = 0
    for i in range(order.shape[0]):
        b = order[i]
        for j in range(context.shape[1]):
            to_context[i, j] = context[b, j]
        to.log_probs[i] = samples.log_probs[b]
        to.advantages[i] = samples.advantages[b]
        to.returns[i] = samples.returns[b]
        chosen[i] = at
        for r in range(first[b], first[b] + n_rows[b]):
            for j in range(width):
                to_rows[at * width + j] = rows[r, columns[j]]
            to_cost[at] = cost[r]
            to_advised[at] = advised[r]
            if which[r] == samples.actions[b]:
                chosen[i] = at
            at += 1
        to_start[i + 1] = at


@kernel(fastmath=_FAST)
def encode(start, begin, end, by_context, encoded, pooled):
    """In place e = relu(e + what comes from the context); mean and maximum over a decision's rows into ``pooled``."""
    width = by_context.shape[1]
    for b in range(end - begin):
        first, last = start[begin + b] - start[begin], start[begin + b + 1] - start[begin]
        for h in range(2 * width):
            pooled[b, h] = _ZERO
        for r in range(first, last):
            for h in range(width):
                e = encoded[r, h] + by_context[b, h]
                e = e if e > _ZERO else _ZERO
                encoded[r, h] = e
                pooled[b, h] += e
                most = pooled[b, width + h]
                pooled[b, width + h] = e if e > most else most
        share = _ONE / np.float32(max(last - first, 1))
        for h in range(width):
            pooled[b, h] *= share


@kernel(fastmath=_FAST)
def _residual(r, b, mixed, hidden, out):
    """Residual of row ``r``; ``mixed[r]`` becomes z = relu(mixed + what comes from the pool)."""
    total = _ZERO
    for h in range(mixed.shape[1]):
        z = mixed[r, h] + hidden[b, h]
        z = z if z > _ZERO else _ZERO
        mixed[r, h] = z
        total += z * out[h]
    return total


@kernel(fastmath=_FAST)
def _value(b, hidden, out, bias):
    total = _ZERO
    width = out.shape[0]
    for h in range(width):
        x = hidden[b, width + h]
        total += (x if x > _ZERO else _ZERO) * out[h]
    return total + bias


@kernel(fastmath=_FAST)
def _head_back(r, b, by_logit, mixed, out, d_out, hidden):
    """Of row ``r``: gradient of the output weights; ``mixed[r]`` becomes its own gradient, summed up in ``hidden``."""
    for h in range(mixed.shape[1]):
        z = mixed[r, h]
        d_out[h] += by_logit * z
        d = by_logit * out[h] if z > _ZERO else _ZERO
        mixed[r, h] = d
        hidden[b, h] += d


@kernel(fastmath=_FAST)
def _value_back(b, by_value, hidden, out, d_out):
    width = out.shape[0]
    for h in range(width):
        x = hidden[b, width + h]
        d_out[h] += by_value * x if x > _ZERO else _ZERO
        hidden[b, width + h] = by_value * out[h] if x > _ZERO else _ZERO


@kernel
def objective(
    batch, begin, end, mixed, hidden, out, scale, value_out, value_bias,
    shift, value_scale, clip, entropy_weight, value_weight, actor, share,
    logits, chances, d_out, d_value_out, d_scalars, sums,
):  # fmt: skip
    """PPO's objective on a chunk and its gradient with respect to everything in front of the heads.

    ``mixed`` and ``hidden`` become their gradients; those of the output weights are added to ``d_out`` (H,) and
    ``d_value_out`` (H,), of the logarithm of ``scale`` and of the value's bias to ``d_scalars`` (2,). ``sums`` (5,)
    gathers squared value error, policy loss, entropy, KL divergence (k3) and ratios outside the clip range.

    :param share: 1 ÷ size of the minibatch
    :param actor: whether the policy learns, or the value only (``mixed`` is left alone then)
    """
    start, cost, advised = batch.start, batch.cost, batch.advised
    width = out.shape[0]
    origin = start[begin]
    for b in range(end - begin):
        frame = begin + b
        at, n = start[frame], start[frame + 1] - start[frame]
        first, chosen = at - origin, batch.chosen[frame] - at
        value = np.float64(_value(b, hidden, value_out, value_bias))
        error = value - (np.float64(batch.returns[frame]) - shift) / value_scale
        sums[0] += error * error
        by_value = 2.0 * value_weight * share * error
        d_scalars[1] += by_value
        _value_back(b, np.float32(by_value), hidden, value_out, d_value_out)
        if not actor or n == 0:
            for h in range(width):
                hidden[b, h] = _ZERO
            continue
        most = -np.inf
        for k in range(n):
            residual = _residual(first + k, b, mixed, hidden, out)
            logits[k] = np.float64(residual - scale * cost[at + k] + advised[at + k])
            most = max(most, logits[k])
        for h in range(width):
            hidden[b, h] = _ZERO
        total = 0.0
        for k in range(n):
            chances[k] = np.exp(logits[k] - most)
            total += chances[k]
        norm = most + np.log(total)
        entropy = 0.0
        for k in range(n):
            logits[k] -= norm
            chances[k] /= total
            entropy -= chances[k] * logits[k]
        advantage = np.float64(batch.advantages[frame])
        log_ratio = logits[chosen] - np.float64(batch.log_probs[frame])
        ratio = np.exp(log_ratio)
        gain = min(advantage * ratio, advantage * min(max(ratio, 1.0 - clip), 1.0 + clip))
        sums[1] -= gain
        sums[2] += entropy
        sums[3] += ratio - 1.0 - log_ratio
        sums[4] += 1.0 if abs(ratio - 1.0) > clip else 0.0
        by_log_prob = -advantage * ratio * share if advantage * ratio <= gain else 0.0
        for k in range(n):
            p = chances[k]
            by_logit = entropy_weight * share * p * (logits[k] + entropy) - by_log_prob * p
            if k == chosen:
                by_logit += by_log_prob
            d_scalars[0] -= by_logit * scale * cost[at + k]
            _head_back(first + k, b, np.float32(by_logit), mixed, out, d_out, hidden)


@kernel(fastmath=_FAST)
def spread(start, begin, end, encoded, pooled, by_pooled, by_encoded, by_context, ties):
    """Gradients before the encoder's activation, in place of ``by_encoded``, and their sums per decision.

    A maximum that several rows share passes its gradient on in equal parts, as in torch.

    :param by_pooled: (n, 2 H) gradient of the pool; ``by_encoded`` (R, H): of ``encoded`` by its other way
    """
    width = by_context.shape[1]
    for b in range(end - begin):
        first, last = start[begin + b] - start[begin], start[begin + b + 1] - start[begin]
        share = _ONE / np.float32(max(last - first, 1))
        for h in range(width):
            ties[h] = _ZERO
            by_context[b, h] = _ZERO
            by_pooled[b, h] *= share
        for r in range(first, last):
            for h in range(width):
                ties[h] += _ONE if encoded[r, h] == pooled[b, width + h] else _ZERO
        for h in range(width):
            by_pooled[b, width + h] /= ties[h] if ties[h] > _ONE else _ONE
        for r in range(first, last):
            for h in range(width):
                e = encoded[r, h]
                d = by_encoded[r, h] + by_pooled[b, h]
                d += by_pooled[b, width + h] if e == pooled[b, width + h] else _ZERO
                d = d if e > _ZERO else _ZERO
                by_encoded[r, h] = d
                by_context[b, h] += d
