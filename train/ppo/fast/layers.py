"""Layers of the scoring network for one decision among several, as :mod:`policies.network.scoring` has them.

W is the hidden width, a multiple of ``products.WIDTH``. A decision owns rows ``at`` to ``at + n`` of arrays (R, W), and
row ``b`` of ``pooled`` and ``hidden`` (B, 2 W). ``hidden`` holds, before the activation, what the head takes from the
pool, then the hidden layer of the value.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from engine.jit.kernel import kernel
from engine.jit.rows import make_attach
from train.ppo.fast.products import WIDTH
from train.ppo.fast.simd import LANES, fma, load, most, plus, relu, save, splat, times, total

__all__ = ["Weights", "attach_weights", "narrow", "pool", "repeat", "score", "take", "value"]

_ZERO, _ONE = np.float32(0.0), np.float32(1.0)


class Weights(NamedTuple):
    """The network's weights, float32; matrices are (inputs, outputs), surplus columns and rows are zeros."""

    context: np.ndarray  # (C, W)
    context_bias: np.ndarray  # (1, W)
    row: np.ndarray  # (F, W)
    live: np.ndarray  # (F, W): the rows of ``row`` that belong to features in use, side by side
    head: np.ndarray  # (W, W)
    first: np.ndarray  # (2 W, 2 W): from the pool to the head, then to the value
    first_bias: np.ndarray  # (1, 2 W)
    out: np.ndarray  # (1, W)
    value_out: np.ndarray  # (1, W)
    value_bias: np.ndarray  # (1,)
    scale: np.ndarray  # (1,): between the base's cost and a logit
    head_back: np.ndarray  # (W, W): ``head`` transposed
    first_back: np.ndarray  # (2 W, 2 W): ``first`` transposed


#: The weights behind an address vector, for use inside kernels.
attach_weights = make_attach(
    "Weights", [(name, np.float32, 1 if name in ("value_bias", "scale") else 2) for name in Weights._fields]
)


@kernel
def narrow(weights, columns, n, width):
    """Put the rows of ``weights.row`` that belong to the features ``columns`` side by side."""
    for i in range(n):
        for h in range(0, width, LANES):
            save(weights.live, i, h, load(weights.row, columns[i], h))


@kernel
def take(rows, first, n, columns, width, x, at):
    """``x[at + k, :width]`` = the features ``columns`` of row ``first + k``, for k < n."""
    for k in range(n):
        for i in range(width):
            x[at + k, i] = rows[first + k, columns[i]]


@kernel
def repeat(row, b, n, width, out, at):
    """``out[at + k]`` = the first ``width`` columns of ``row[b]``, for k < n."""
    for h in range(0, width, LANES):
        x = load(row, b, h)
        for k in range(at, at + n):
            save(out, k, h, x)


@kernel
def pool(encoded, at, n, width, pooled, b):
    """relu in place; mean and maximum over the decision's rows."""
    share = splat(_ONE / np.float32(max(n, 1)))
    for h in range(0, width, LANES):
        mean = greatest = splat(_ZERO)
        for k in range(at, at + n):
            e = relu(load(encoded, k, h))
            save(encoded, k, h, e)
            mean, greatest = plus(mean, e), most(e, greatest)
        save(pooled, b, h, times(mean, share))
        save(pooled, b, width + h, greatest)


@kernel
def score(mixed, at, n, width, out, scale, cost, advised, first, logits):
    """Logits of the rows; ``mixed`` becomes z = relu(mixed).

    :param cost: (·,) of the base, ``advised`` (·,): of the decision from ``first`` on
    """
    for k in range(n):
        x = y = splat(_ZERO)
        for h in range(0, width, WIDTH):
            g = h + LANES
            z, w = relu(load(mixed, at + k, h)), relu(load(mixed, at + k, g))
            save(mixed, at + k, h, z), save(mixed, at + k, g, w)
            x, y = fma(z, load(out, 0, h), x), fma(w, load(out, 0, g), y)
        logits[k] = np.float64(total(plus(x, y)) - scale * cost[first + k] + advised[first + k])


@kernel
def value(hidden, b, width, out, bias):
    """Output of the value's head."""
    x = splat(_ZERO)
    for h in range(0, width, LANES):
        x = fma(relu(load(hidden, b, width + h)), load(out, 0, h), x)
    return total(x) + bias
