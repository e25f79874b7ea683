"""Products of tall matrices and small ones, in tiles of four rows and 32 columns that stay in registers.

Widths are multiples of :data:`WIDTH`. Rows come in fours: arrays have room for the number of rows rounded up to a
multiple of four, and what the surplus rows hold is nobody's.
"""

from __future__ import annotations

import numpy as np

from engine.jit.kernel import kernel
from train.ppo.fast.simd import LANES, fma, load, plus, save, splat

__all__ = ["ROWS", "WIDTH", "add_features", "add_outer", "add_outer_features", "add_product", "add_row"]

WIDTH = 2 * LANES
ROWS = 4
_ZERO = np.float32(0.0)


@kernel
def add_product(x, n, inputs, weights, width, out):
    """``out[k, :width] += x[k, :inputs] @ weights`` for k < n."""
    for h in range(0, width, WIDTH):
        g = h + LANES
        for k in range(0, n, 4):
            a, b, c, d = load(out, k, h), load(out, k + 1, h), load(out, k + 2, h), load(out, k + 3, h)
            e, f, p, q = load(out, k, g), load(out, k + 1, g), load(out, k + 2, g), load(out, k + 3, g)
            for i in range(inputs):
                v, w = load(weights, i, h), load(weights, i, g)
                r, s, t, u = splat(x[k, i]), splat(x[k + 1, i]), splat(x[k + 2, i]), splat(x[k + 3, i])
                a, b, c, d = fma(r, v, a), fma(s, v, b), fma(t, v, c), fma(u, v, d)
                e, f, p, q = fma(r, w, e), fma(s, w, f), fma(t, w, p), fma(u, w, q)
            save(out, k, h, a), save(out, k + 1, h, b), save(out, k + 2, h, c), save(out, k + 3, h, d)
            save(out, k, g, e), save(out, k + 1, g, f), save(out, k + 2, g, p), save(out, k + 3, g, q)


@kernel
def add_features(rows, at, n, columns, inputs, weights, width, out):
    """``out[k, :width] += rows[at[k], columns[:inputs]] @ weights``: a product of rows left where they are."""
    for h in range(0, width, WIDTH):
        g = h + LANES
        for k in range(0, n, 4):
            a, b, c, d = load(out, k, h), load(out, k + 1, h), load(out, k + 2, h), load(out, k + 3, h)
            e, f, p, q = load(out, k, g), load(out, k + 1, g), load(out, k + 2, g), load(out, k + 3, g)
            k0, k1, k2, k3 = at[k], at[k + 1], at[k + 2], at[k + 3]
            for i in range(inputs):
                v, w, j = load(weights, i, h), load(weights, i, g), columns[i]
                r, s, t, u = splat(rows[k0, j]), splat(rows[k1, j]), splat(rows[k2, j]), splat(rows[k3, j])
                a, b, c, d = fma(r, v, a), fma(s, v, b), fma(t, v, c), fma(u, v, d)
                e, f, p, q = fma(r, w, e), fma(s, w, f), fma(t, w, p), fma(u, w, q)
            save(out, k, h, a), save(out, k + 1, h, b), save(out, k + 2, h, c), save(out, k + 3, h, d)
            save(out, k, g, e), save(out, k + 1, g, f), save(out, k + 2, g, p), save(out, k + 3, g, q)


@kernel
def add_row(x, row, inputs, weights, width, out):
    """``out[0, :width] += x[row, :inputs] @ weights``: four sums at once, so that none waits for the last."""
    whole = inputs - inputs % 4
    for h in range(0, width, WIDTH):
        g = h + LANES
        a, e = load(out, 0, h), load(out, 0, g)
        b = c = d = f = p = q = splat(_ZERO)
        for i in range(0, whole, 4):
            r, s, t, u = splat(x[row, i]), splat(x[row, i + 1]), splat(x[row, i + 2]), splat(x[row, i + 3])
            a, e = fma(r, load(weights, i, h), a), fma(r, load(weights, i, g), e)
            b, f = fma(s, load(weights, i + 1, h), b), fma(s, load(weights, i + 1, g), f)
            c, p = fma(t, load(weights, i + 2, h), c), fma(t, load(weights, i + 2, g), p)
            d, q = fma(u, load(weights, i + 3, h), d), fma(u, load(weights, i + 3, g), q)
        for i in range(whole, inputs):
            r = splat(x[row, i])
            a, e = fma(r, load(weights, i, h), a), fma(r, load(weights, i, g), e)
        save(out, 0, h, plus(plus(a, b), plus(c, d)))
        save(out, 0, g, plus(plus(e, f), plus(p, q)))


@kernel
def _add_to(sums, i, h, v, w):
    """``sums[i, h : h + WIDTH] += (v, w)``."""
    save(sums, i, h, plus(load(sums, i, h), v)), save(sums, i, h + LANES, plus(load(sums, i, h + LANES), w))


@kernel
def add_outer(x, y, n, inputs, width, sums):
    """``sums[i, :width] += Σ x[k, i] · y[k]`` over k < n, for i < inputs; room for a multiple of four of these.

    The n terms are summed up before they are added, so that rounding does not grow with the length of a minibatch.
    """
    for h in range(0, width, WIDTH):
        g = h + LANES
        for i in range(0, inputs, 4):
            a = b = c = d = e = f = p = q = splat(_ZERO)
            for k in range(n):
                v, w = load(y, k, h), load(y, k, g)
                r, s, t, u = splat(x[k, i]), splat(x[k, i + 1]), splat(x[k, i + 2]), splat(x[k, i + 3])
                a, b, c, d = fma(r, v, a), fma(s, v, b), fma(t, v, c), fma(u, v, d)
                e, f, p, q = fma(r, w, e), fma(s, w, f), fma(t, w, p), fma(u, w, q)
            _add_to(sums, i, h, a, e), _add_to(sums, i + 1, h, b, f)
            _add_to(sums, i + 2, h, c, p), _add_to(sums, i + 3, h, d, q)


@kernel
def add_outer_features(rows, at, columns, y, n, inputs, width, sums):
    """``sums[i, :width] += Σ rows[at[k], columns[i]] · y[k]``: :func:`add_outer` of rows left where they are."""
    for h in range(0, width, WIDTH):
        g = h + LANES
        for i in range(0, inputs, 4):
            i0, i1, i2, i3 = columns[i], columns[i + 1], columns[i + 2], columns[i + 3]
            a = b = c = d = e = f = p = q = splat(_ZERO)
            for k in range(n):
                v, w, j = load(y, k, h), load(y, k, g), at[k]
                r, s, t, u = splat(rows[j, i0]), splat(rows[j, i1]), splat(rows[j, i2]), splat(rows[j, i3])
                a, b, c, d = fma(r, v, a), fma(s, v, b), fma(t, v, c), fma(u, v, d)
                e, f, p, q = fma(r, w, e), fma(s, w, f), fma(t, w, p), fma(u, w, q)
            _add_to(sums, i, h, a, e), _add_to(sums, i + 1, h, b, f)
            _add_to(sums, i + 2, h, c, p), _add_to(sums, i + 3, h, d, q)
