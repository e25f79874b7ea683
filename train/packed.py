"""Decisions of a rollout as the scoring network reads them: cut, normalised and scored by the base once, without gaps.

A rollout is read several times (once to act, once per epoch), and a good part of a flat observation may be padding.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from policies.features import N_CONTEXT_FEATURES, N_FEATURES
from policies.network import ScoringNetwork
from train.kernels.pack import Constants, Scratch, Store, pack_many

__all__ = ["Packed"]


class Packed:
    """Up to ``capacity`` decisions of up to ``n_candidates`` candidates, with what is needed to add more.

    :param network: whose constants (normalisation, base, gates, bonus) apply, read in place
    """

    def __init__(self, network: ScoringNetwork, n_candidates: int, capacity: int) -> None:
        rows, f4, i8 = capacity * n_candidates, np.float32, np.int64
        self.capacity = capacity
        self.store = Store(
            context=np.zeros((capacity, N_CONTEXT_FEATURES), f4),
            first=np.zeros(capacity, i8),
            n_rows=np.zeros(capacity, i8),
            rows=np.zeros((rows, N_FEATURES), f4),
            cost=np.zeros(rows, f4),
            advised=np.zeros(rows, f4),
            which=np.zeros(rows, i8),
            used=np.zeros(1, i8),
            greatest=np.zeros(N_FEATURES, f4),
        )
        normal = network.normalisation
        self.constants = Constants(
            log_context=np.flatnonzero(normal.context_log).astype(i8),
            log_row=np.flatnonzero(normal.candidate_log).astype(i8),
            context_factor=1.0 / network.context_scale.numpy(),
            row_factor=1.0 / network.candidate_scale.numpy(),
            bound=np.array([normal.bound], f4),
            base=network.base.numpy(),
            gate=network.gate.numpy(),
            gated=np.zeros(1, np.bool_),
            bonus=network.bonus.numpy(),
        )
        width = N_CONTEXT_FEATURES + n_candidates * N_FEATURES
        x, mantissa = np.ones(width, f4), np.ones(width, f4)
        self.scratch = Scratch(
            x=x, x_bits=x.view(np.int32), mantissa=mantissa, mantissa_bits=mantissa.view(np.int32),
            exponent=np.zeros(width, f4), logs=np.zeros(width, f4), weights=np.zeros(N_FEATURES, f4),
        )  # fmt: skip
        self.clear()

    def clear(self) -> None:
        """Forget all decisions; memory is kept, and the network's gates are looked at anew."""
        self.complete = False
        self.store.used[0] = 0
        self.store.greatest[:] = 0.0
        self.constants.gated[0] = self.constants.gate.any()

    def fill(self, observations: NDArray[np.float32], masks: NDArray[np.bool_]) -> None:
        """Hold these decisions and no others.

        :param observations: float32 (B, C + K·F [+ K]) as the environment gives them, ``masks`` bool (B, K)
        """
        self.clear()
        pack_many(observations, masks, 0, self.constants, self.store, self.scratch)
        self.complete = True
