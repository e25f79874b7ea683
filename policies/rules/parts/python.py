"""The plain-Python way in: a class with ``name`` and ``decide(self, context, candidates, mask) -> int``.

    class FewestRunning:
        name = "fewest_running"

        def decide(self, context, candidates, mask):
            load = candidates[:, Col.RUN_N] + 1e9 * (mask == 0)
            return int(load.argmin())

Its compiled ``decide`` goes back into the interpreter, which takes the GIL and costs some microseconds and
whatever the class does: fine for trying an idea and for rules at control intervals, too slow for large
searches. Optional attributes: ``needs`` (bit mask of :class:`engine.core.columns.Need`, default all), ``params``
(a tuple of :class:`policies.rule.Param`; the class is then made with their values as keyword arguments, and a
search may tune them) and ``reset(self)``, called at the first decision after a reset. One object serves one bound
policy; the arrays it receives are views that are valid during the call. What it raises comes out of the driver.

Another package adds its class under the entry-point group of ``policies.registry``; then every command knows it:

    [project.entry-points."slalom.policies"]
    fewest_running = "my_package:FewestRunning"
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, objmode

from engine.core.columns import Need
from engine.core.policy import POLICY_SIGNATURE
from engine.errors import SlalomError
from policies.rule import Rule, Setting, Values

_ALL = int(Need.LOAD | Need.PREDICT | Need.DIMENSIONLESS | Need.QUEUE)
#: Compiled code knows a Python object by the number in ``params[0]``.
_objects: dict[int, Any] = {}
_numbers = itertools.count(1)
#: What an object has raised in a loop of :func:`watched` that still runs; None: nothing.
_caught: dict[int, BaseException | None] = {}


def watched(policy: Any, loop: Callable[[], int]) -> Callable[[], int]:
    """``loop``, which asks ``policy``; what a plain class raises in it comes out when it returns.

    The compiled loop calls a policy by its address, and numba drops what is raised there.
    """
    if policy.decide is not decide:
        return loop
    number = int(policy.params[0])

    def step() -> int:
        _caught[number] = None
        try:
            done = loop()
        finally:
            error = _caught.pop(number, None)
        if error is None:
            return done
        if isinstance(error, SlalomError) or not isinstance(error, Exception):
            raise error
        at = traceback.extract_tb(error.__traceback__)[-1]
        fix = f"its decide raises this ({at.filename}, line {at.lineno}): mend it"
        raise SlalomError(f"policy {policy.name}", f"{type(error).__name__}: {error}", fix) from error

    return step


def _call(number: int, context: np.ndarray, candidates: np.ndarray, mask: np.ndarray, fresh: bool) -> int:
    if number not in _caught:
        return _answer(number, context, candidates, mask, fresh)
    if _caught[number] is None:
        try:
            return _answer(number, context, candidates, mask, fresh)
        except BaseException as error:
            _caught[number] = error
    return int(mask.argmax())  # whatever is allowed: the run does not count


def _answer(number: int, context: np.ndarray, candidates: np.ndarray, mask: np.ndarray, fresh: bool) -> int:
    policy = _objects[number]
    if fresh and hasattr(policy, "reset"):
        policy.reset()
    answer = policy.decide(context, candidates, mask)
    try:
        row = int(answer)
    except (TypeError, ValueError):
        row = -1
    if not 0 <= row < len(mask) or not mask[row]:
        allowed = np.flatnonzero(mask).tolist()
        raise SlalomError(f"{policy.name}.decide", answer, f"return the row of an allowed candidate: {allowed}")
    return row


# Not cached on disk: the machine code refers to objects of this process. The other kernels release the GIL;
# this one needs it.
@njit(POLICY_SIGNATURE)
def decide(context, candidates, mask, params, memory):
    """``params``: the object's number; ``memory[0]`` is 0 before the first decision."""
    number, fresh = int(params[0]), memory[0] == 0.0
    memory[0] = 1.0
    with objmode(row="int64"):
        row = _call(number, context, candidates, mask, fresh)
    return row  # noqa: RET504 (no return out of objmode)


def python_rule(cls: Any, name: str) -> Rule:
    """A :class:`Rule` around a plain class; each ``bind`` makes a new object of it.

    :raises SlalomError: no class, or without ``name`` and ``decide``
    """
    if not isinstance(cls, type) or not callable(getattr(cls, "decide", None)) or not hasattr(cls, "name"):
        raise SlalomError(
            f"policy {name}",
            cls,
            "give a Rule, or a class with `name` and `decide(self, context, candidates, mask)`",
        )

    def prepare(values: Values, setting: Setting) -> np.ndarray:
        number = next(_numbers)
        _objects[number] = cls(**values)
        return np.array([float(number)])

    return Rule(
        name=str(cls.name),
        doc=(cls.__doc__ or "plain Python policy").strip().splitlines()[0],
        source=f"{cls.__module__}.{cls.__qualname__}",
        decide=decide,
        params=tuple(getattr(cls, "params", ())),
        needs=int(getattr(cls, "needs", _ALL)),
        prepare=prepare,
        python=True,
    )
