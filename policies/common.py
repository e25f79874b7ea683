"""Compiled helpers that rules share: allowed candidates, minima, and the answers nobody wants to repeat.

Ties always go to the lowest row, so equal inputs give equal answers on every machine. Candidates are told
apart by raw columns only (``INSTANCE`` is -1 for HOLD, SHED and KEEP), because for a rule that asks for ``LOAD``
alone the dimensionless block may hold anything.
"""

from __future__ import annotations

import numpy as np

from engine.core.columns import Col, Ctx, Kind
from engine.core.kinds import Role
from engine.jit.kernel import kernel


@kernel
def kind_of(context):
    """The :class:`Kind` of this decision as an integer."""
    return int(context[Ctx.KIND])


@kernel
def is_instance(candidates, mask, k):
    """Whether row ``k`` is allowed and names an instance."""
    return mask[k] != 0 and candidates[k, Col.INSTANCE] >= 0.0


@kernel
def least(candidates, mask, col):
    """Row of the allowed instance with the least ``candidates[:, col]``; -1 when no instance is allowed.

    A row holding NaN or infinity is chosen only where there is no other.
    """
    best, value = -1, np.inf
    for k in range(candidates.shape[0]):
        if is_instance(candidates, mask, k) and candidates[k, col] < value:
            best, value = k, candidates[k, col]
    return best if best >= 0 else _first_instance(candidates, mask)


@kernel
def only_decoders(candidates, mask):
    """Whether every allowed instance has role DECODE, so that one of them must prefill."""
    for k in range(candidates.shape[0]):
        if is_instance(candidates, mask, k) and int(candidates[k, Col.ROLE]) != Role.DECODE:
            return False
    return True


@kernel
def takes_prompts(candidates, mask, k, everyone):
    """Whether row ``k`` is an allowed instance that prefills by its role, or any when ``everyone``.

    PLACE_PREFILL lists DECODE instances too, because a policy may multiplex a prompt into them; simple rules
    do not. ``everyone`` is ``only_decoders(candidates, mask)``.
    """
    return is_instance(candidates, mask, k) and (everyone or int(candidates[k, Col.ROLE]) != Role.DECODE)


@kernel
def _first_instance(candidates, mask):
    for k in range(candidates.shape[0]):
        if is_instance(candidates, mask, k):
            return k
    return -1


@kernel
def hold(candidates, mask):
    """First allowed row that is no instance (HOLD before SHED; KEEP); else any allowed; else -1."""
    fallback = -1
    for k in range(candidates.shape[0]):
        if mask[k] != 0:
            if candidates[k, Col.INSTANCE] < 0.0:
                return k
            if fallback < 0:
                fallback = k
    return fallback


@kernel
def or_hold(choice, candidates, mask):
    """``choice`` unless it is -1: then HOLD (or KEEP)."""
    return choice if choice >= 0 else hold(candidates, mask)


@kernel
def stay_in_place(context, candidates, mask):
    """Row of the instance that prefilled the request, where it may decode too; else -1."""
    for k in range(candidates.shape[0]):
        if is_instance(candidates, mask, k) and candidates[k, Col.INSTANCE] == context[Ctx.SOURCE]:
            return k if int(candidates[k, Col.ROLE]) != Role.PREFILL else -1
    return -1


@kernel
def least_decode(candidates, mask):
    """Row of the instance whose decode step stays shortest with this request added (``STEP_WITH_S``).

    Ties, and rules that asked for no predictions, go by the fewest running and inbound tokens. -1: none.
    """
    best, best_step, best_tokens = -1, np.inf, np.inf
    for k in range(candidates.shape[0]):
        if not is_instance(candidates, mask, k):
            continue
        step = candidates[k, Col.STEP_WITH_S]
        tokens = candidates[k, Col.RUN_CTX] + candidates[k, Col.INBOUND_TOKENS]
        if step < best_step or (step == best_step and tokens < best_tokens):
            best, best_step, best_tokens = k, step, tokens
    return best if best >= 0 else _first_instance(candidates, mask)


@kernel
def default_answer(context, candidates, mask):
    """What a rule answers to kinds it does not care about.

    PLACE_DECODE: stay in place where that instance may decode, else the least loaded. PLACE_PREFILL: the
    fewest outstanding tokens among instances that prefill by their role. HOLD only when no instance is
    allowed. REALLOCATE and TUNE: KEEP.
    """
    kind = kind_of(context)
    if kind == Kind.PLACE_DECODE:
        stay = stay_in_place(context, candidates, mask)
        return or_hold(stay if stay >= 0 else least_decode(candidates, mask), candidates, mask)
    if kind == Kind.PLACE_PREFILL:
        everyone = only_decoders(candidates, mask)
        best, tokens = -1, np.inf
        for k in range(candidates.shape[0]):
            if takes_prompts(candidates, mask, k, everyone) and candidates[k, Col.OUTSTANDING] < tokens:
                best, tokens = k, candidates[k, Col.OUTSTANDING]
        return or_hold(best, candidates, mask)
    return hold(candidates, mask)
