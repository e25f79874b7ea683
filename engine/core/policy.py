"""What the engine receives from a policy: one compiled function and the arrays it works on.

The engine knows nobody above it, so the contract lives here and the rules live in ``policies``. A decision
is ``decide(context, candidates, mask, params, memory) -> index``:

* ``context``: float64 (N_CONTEXT,), columns of :class:`engine.core.columns.Ctx`
* ``candidates``: float64 (K, N_CANDIDATE), columns of :class:`engine.core.columns.Col`
* ``mask``: uint8 (K,), 1 where the candidate may be chosen
* ``params``: float64, constants of the policy; never written
* ``memory``: float64, the policy's own scratch and history; all zeros means "just reset"

The answer is the row of an allowed candidate; -1 when nothing is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numba import types

from engine.core.kinds import Order

POLICY_SIGNATURE = types.int64(
    types.float64[::1], types.float64[:, ::1], types.uint8[::1], types.float64[::1], types.float64[::1]
)
#: The type of a ``decide`` argument of a compiled driver: any policy fits without recompiling the driver.
POLICY_TYPE = types.FunctionType(POLICY_SIGNATURE)


@dataclass(frozen=True)
class InstancePlan:
    """How one instance starts. ``None`` leaves what the scenario says.

    :param role: a :class:`engine.core.kinds.Role`
    :param chunk_tokens: token budget of a fused step or a prefill chunk
    :param batching: a :class:`engine.core.kinds.Batching`
    :param split: share row for decode while both lanes run, or a :class:`engine.core.kinds.Split`
    :param table: for ``Split.TABLE``: (least decode batch size, share row), ascending
    :param layer_tokens: a layered prefill launches max(1, layer_tokens // prompt tokens) layers at a time;
        0: as many as last one decode step
    :param stand_aside: between its layers, a layered prefill batch stands aside for a short prompt that would be late
    :param headroom: the predictor rule aims at ``headroom`` × TPOT target
    :param prefill_tokens: token budget of a whole-prompt prefill batch
    :param order: a :class:`engine.core.kinds.Order`
    """

    role: int | None = None
    chunk_tokens: int | None = None
    batching: int | None = None
    split: int | None = None
    headroom: float | None = None
    prefill_tokens: int | None = None
    order: int | None = None
    table: tuple[tuple[int, int], ...] | None = None
    layer_tokens: int | None = None
    stand_aside: bool | None = None


def from_outside(plan: InstancePlan) -> InstancePlan:
    """What a router arranges of ``plan`` where the instances are engines of others: what each is used for, and the
    order of the prompts that it has not handed on yet; those that it has are not taken back for shorter ones."""
    order = Order.SHORTEST if plan.order == Order.SHORTEST_PREEMPTIVE else plan.order
    return InstancePlan(role=plan.role, order=order)


@runtime_checkable
class Policy(Protocol):
    """A policy bound to one scenario, ready to decide.

    ``decide`` is a compiled function of ``POLICY_SIGNATURE``; ``needs`` a bit mask of
    :class:`engine.core.columns.Need`; ``memory`` the array in its reset state (zeros), to be copied once per
    cluster; ``arrangement`` one plan per instance, or None for the scenario's own.
    """

    @property
    def name(self) -> str: ...

    @property
    def decide(self) -> Any: ...

    @property
    def needs(self) -> int: ...

    @property
    def params(self) -> np.ndarray: ...

    @property
    def memory(self) -> np.ndarray: ...

    @property
    def arrangement(self) -> Sequence[InstancePlan] | None: ...

    def describe(self) -> dict[str, Any]:
        """Plain data (JSON) that says which policy this is and with which values."""
        ...
