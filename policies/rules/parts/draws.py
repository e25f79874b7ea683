"""A policy's own random numbers, kept in its memory so that a reset repeats them."""

from __future__ import annotations

import numpy as np

from engine.jit.kernel import kernel

_MASK32 = 0xFFFFFFFF


@kernel
def uniform(memory, cell, seed):
    """Number in [0, 1) of a 32-bit xorshift (Marsaglia 2003); its state is ``memory[cell]``, 0: seed it.

    32 bits, because a float64 cell holds them exactly.
    """
    state = np.int64(memory[cell])
    if state == 0:
        state = np.int64(max((int(seed) * 2654435761 + 88675123) & _MASK32, 1))
    state ^= (state << 13) & _MASK32
    state ^= state >> 17
    state ^= (state << 5) & _MASK32
    memory[cell] = float(state)
    return state / 4294967296.0
