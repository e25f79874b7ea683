"""The large parts of the simulator's loops, to be compiled side by side before the loops are."""

from __future__ import annotations

from typing import Any


def _types() -> tuple[Any, Any, Any]:
    """The types of the scheduling core's state, of the simulator's, and of every integer beside them."""
    import numba

    from engine.core.state import attach
    from engine.jit.rows import state_type
    from env.surrogate.clock import attach_sim

    return state_type(attach), state_type(attach_sim), numba.int64


def _made(part: Any, *types: Any) -> None:
    part.compile(types)


def planning() -> None:
    from engine.core.schedule.batching import plan_lane

    s, _, integer = _types()
    _made(plan_lane, s, integer, integer, integer)


def decisions() -> None:
    from env.surrogate.loop import answer, describe

    s, q, integer = _types()
    _made(describe, s, q, integer)
    _made(answer, s, q, integer)


def events() -> None:
    from env.surrogate.loop import _process

    s, q, integer = _types()
    _made(_process, s, q, integer)


#: In pieces of about a size.
PARTS = (planning, decisions, events)
