"""Decisions of a rollout as the scoring network reads them: cut, normalised and scored by the base once, without gaps.

A rollout is read several times (once to act, once per epoch), and a good part of a flat observation may be padding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.jit.rows import addresses
from policies.network.features import N_CONTEXT_FEATURES, N_FEATURES
from policies.network.scoring import ScoringNetwork
from train.ppo.fast.pack import (
    CONTEXT_WIDTH,
    ROW_WIDTH,
    Constants,
    Observed,
    Scratch,
    Store,
    pack_many,
    put_changes,
    take_changes,
    varying,
)
from train.ppo.fast.products import ROWS

__all__ = ["Packed", "Parcel"]


class Changes(NamedTuple):
    """A matrix without the columns that hold one number everywhere, of the others only what changes.

    Rows are compared with those of the decision before, where most of an instance's features were the same.
    """

    values: NDArray[np.float32]
    flags: NDArray[np.uint16]  # (R, ·): a bit for each number that is in ``values``
    where: NDArray[np.int64]  # columns that vary
    first: NDArray[np.float32]  # (width,): first row
    back: int  # rows to the one before

    @classmethod
    def of(cls, x: NDArray[np.float32], n: int, back: int) -> Changes:
        """Of the first ``n`` rows."""
        varies = np.zeros(x.shape[1], np.bool_)
        varying(x, n, varies)
        where = np.flatnonzero(varies)
        flags = np.zeros((n, len(where) // 16 + 1), np.uint16)
        values = np.empty(n * len(where) + 1, np.float32)
        used = take_changes(x, n, where, back, flags, values)
        return cls(values[:used].copy(), flags, where, x[0].copy(), back)

    def put(self, out: NDArray[np.float32], at: int) -> None:
        """The matrix again, into ``out`` from row ``at`` on."""
        put_changes(self.flags, self.values, self.where, self.first, self.back, at, out)


class Parcel(NamedTuple):
    """Decisions on their way to another process: a fifth of the bytes of the observations they were made of."""

    context: Changes
    rows: Changes
    first: NDArray[np.int32]  # (frames,)
    n_rows: NDArray[np.int32]
    cost: NDArray[np.float32]  # (R,)
    advised: NDArray[np.float32]  # (R,), or none where all are 0
    which: NDArray[Any]
    greatest: NDArray[np.float32]


class Packed:
    """Up to ``capacity`` decisions of up to ``n_candidates`` candidates, with what is needed to add more.

    :param network: whose constants (normalisation, base, gates, bonus) apply
    """

    def __init__(self, network: ScoringNetwork, n_candidates: int, capacity: int) -> None:
        rows, f4, i8 = capacity * n_candidates, np.float32, np.int64
        self.capacity, self.n_candidates = capacity, n_candidates
        self.store = Store(
            context=np.zeros((capacity, N_CONTEXT_FEATURES), f4),
            first=np.zeros(capacity, i8),
            n_rows=np.zeros(capacity, i8),
            rows=np.zeros((rows + 1, N_FEATURES), f4),
            cost=np.zeros(rows, f4),
            advised=np.zeros(rows, f4),
            which=np.zeros(rows, i8),
            used=np.zeros(1, i8),
            greatest=np.zeros((1, ROW_WIDTH), f4),
            columns=np.zeros(N_FEATURES + ROWS, i8),
            n_columns=np.zeros(1, i8),
        )
        normal = network.normalisation
        self.constants = Constants(
            context_log=_padded(normal.context_log, CONTEXT_WIDTH),
            row_log=_padded(normal.candidate_log, ROW_WIDTH),
            context_factor=_padded(1.0 / network.context_scale.numpy(), CONTEXT_WIDTH),
            row_factor=_padded(1.0 / network.candidate_scale.numpy(), ROW_WIDTH),
            bound=np.array([normal.bound], f4),
            base=_padded(network.base.numpy(), ROW_WIDTH),
            gate=_padded(network.gate.numpy(), ROW_WIDTH),
            gated=np.zeros(1, np.bool_),
            bonus=network.bonus.numpy(),
        )
        self.scratch = Scratch(
            context=np.zeros((1, CONTEXT_WIDTH), f4),
            rows=np.zeros((n_candidates, ROW_WIDTH), f4),
            weights=np.zeros((1, ROW_WIDTH), f4),
        )
        self._network = network
        #: Address vectors as kernels take them.
        self.words = addresses(self.constants), addresses(self.store), addresses(self.scratch)
        self.clear()

    def clear(self) -> None:
        """Forget all decisions; memory is kept, and the network's base and gates are read anew."""
        self.complete = False
        self.store.used[0] = self.store.n_columns[0] = 0
        self.store.greatest[:] = 0.0
        constants, network = self.constants, self._network
        constants.base[:, :N_FEATURES] = network.base.numpy()
        constants.gate[:, :N_FEATURES] = network.gate.numpy().reshape(-1, N_FEATURES)
        constants.gated[0] = constants.gate.any()

    def parcel(self) -> Parcel:
        """A copy of what is held."""
        s, used, i4 = self.store, int(self.store.used[0]), np.int32
        advised, back = s.advised[:used], max(round(used / self.capacity), 1)
        return Parcel(
            Changes.of(s.context, self.capacity, 1), Changes.of(s.rows, used, back), s.first.astype(i4),
            s.n_rows.astype(i4), s.cost[:used].copy(), advised[: used if advised.any() else 0].copy(),
            s.which[:used].astype(np.uint8 if self.n_candidates <= 256 else np.int32), s.greatest.copy(),
        )  # fmt: skip

    def add(self, parcel: Parcel, steps: int, env: int) -> None:
        """Append the decisions of environments ``env`` and following, which decided ``steps`` times each.

        Decision t of environment b is number t · environments + b, there as here.
        """
        s, at, used = self.store, int(self.store.used[0]), len(parcel.cost)
        beside = slice(env, env + len(parcel.first) // steps)
        for name, shift in (("first", at), ("n_rows", 0)):
            getattr(s, name).reshape(steps, -1)[:, beside] = getattr(parcel, name).reshape(steps, -1) + shift
        context = np.empty((len(parcel.first), N_CONTEXT_FEATURES), np.float32)
        parcel.context.put(context, 0)
        shape = steps, -1, N_CONTEXT_FEATURES
        s.context.reshape(shape)[:, beside] = context.reshape(shape)
        parcel.rows.put(s.rows, at)
        s.cost[at : at + used], s.which[at : at + used] = parcel.cost, parcel.which
        s.advised[at : at + used] = parcel.advised if len(parcel.advised) else 0.0
        np.maximum(s.greatest, parcel.greatest, out=s.greatest)
        columns = np.flatnonzero(s.greatest[0, :N_FEATURES] > 0)
        s.used[0], s.n_columns[0], s.columns[: len(columns)] = at + used, len(columns), columns

    def fill(self, observations: NDArray[np.float32], masks: NDArray[np.bool_]) -> None:
        """Hold these decisions and no others.

        :param observations: float32 (B, C + K·F [+ K]) as the environment gives them, ``masks`` bool (B, K)
        """
        self.clear()
        observed = Observed.of(observations, masks)
        pack_many(addresses(observed), *self.words)
        self.complete = True


def _padded(rows: NDArray[Any], width: int) -> NDArray[np.float32]:
    """``rows`` (..., n) as float32 (R, ``width``), with zeros behind them."""
    flat = rows.reshape(-1, rows.shape[-1])
    return np.pad(flat.astype(np.float32), ((0, 0), (0, width - flat.shape[1])))
