"""A small network that shifts what a planner of roles wants: by how many instances more or fewer prefill only.

    h1 = tanh(W1 x + b1),  h2 = tanh(W2 h1 + b2),  logits = W3 h2 + b3 + KEEP · [no shift]

The largest logit names the shift, ties go to none. So with W3 = 0 and b3 = 0 the planner decides alone. The weights
ride behind the rule's own parameters as one block: seconds between two looks, width (0: no network), W1, b1, W2, b2,
W3, b3, matrices as rows of outputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from engine.errors import SlalomError
from engine.jit.kernel import kernel

#: Instances more that prefill only, by action; the first is none.
SHIFTS = (0, -1, 1, -2, 2)
N_INPUTS = 20
#: Logits by which keeping to the planner is ahead before anything is learned.
KEEP = 3.5
WIDEST = 64
#: Memory that a look takes: inputs and two layers.
CELLS = N_INPUTS + 2 * WIDEST
_EVERY_S = 10.0
_N = len(SHIFTS)


def shapes(hidden: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every float32 array of a network of this width, in the order of the block."""
    return {
        "first.weight": (hidden, N_INPUTS), "first.bias": (hidden,), "second.weight": (hidden, hidden),
        "second.bias": (hidden,), "out.weight": (_N, hidden), "out.bias": (_N,),
    }  # fmt: skip


def pack(arrays: Mapping[str, np.ndarray], every_s: float = _EVERY_S) -> np.ndarray:
    """The block of a network, float64.

    :param arrays: weights by name, see :func:`shapes`
    :param every_s: seconds between two looks
    :raises SlalomError: missing or unknown arrays, wrong shapes, values that are not finite, or more than 64 wide
    """
    hidden = len(arrays.get("first.bias", ()))
    if not 1 <= hidden <= WIDEST:
        raise SlalomError("shift network: width", hidden, f"give 1 to {WIDEST} units a layer")
    found = {name: np.shape(array) for name, array in arrays.items()}
    if found != shapes(hidden):
        raise SlalomError("shift network: arrays", found, f"expected {shapes(hidden)}")
    block = np.concatenate([[every_s, hidden], *(np.ravel(arrays[name]) for name in shapes(hidden))])
    if not np.isfinite(block).all():
        raise SlalomError("shift network", "NaN or infinity", "the training diverged; use an earlier one")
    return block.astype(np.float64)


#: The block of a rule without one.
NO_NETWORK = np.array([_EVERY_S, 0.0])


@kernel
def _layer(params, at, x, x_at, n_in, out_at, n_out, squash):
    """x[out_at:] = (tanh of) W x[x_at:] + b; returns where the next layer's weights start."""
    for j in range(n_out):
        total = params[at + n_out * n_in + j]
        for i in range(n_in):
            total += params[at + j * n_in + i] * x[x_at + i]
        x[out_at + j] = np.tanh(total) if squash else total
    return at + n_out * (n_in + 1)


@kernel
def logit_shift(params, at, scratch, low, high):
    """The shift with the largest logit among those from ``low`` to ``high``, for the inputs in ``scratch``.

    :param at: where the block stands in ``params``
    :param scratch: float64 (CELLS,), inputs first
    """
    hidden = int(params[at + 1])
    first, second = N_INPUTS, N_INPUTS + WIDEST
    at = _layer(params, at + 2, scratch, 0, N_INPUTS, first, hidden, True)
    at = _layer(params, at, scratch, first, hidden, second, hidden, True)
    _layer(params, at, scratch, second, hidden, first, _N, False)
    best, most = 0.0, -np.inf
    for k in range(_N):
        shift = float(SHIFTS[k])
        logit = scratch[first + k] + (KEEP if k == 0 else 0.0)
        if low <= shift <= high and logit > most:
            best, most = shift, logit
    return best
