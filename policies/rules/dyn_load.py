"""DYN-LOAD: Dynamo's planner on queue length and KV use, the simpler opponent of DOPD.

    prefill: more when the queue per prefill worker > 5.0, fewer when < 0.2
    decode:  more when KV use > 0.9, fewer when < 0.5
    sampled every 10 s, one step at a time, a grace of three intervals after decode grew, and no prefill
    worker is added while the queue is falling fast enough to end below the threshold by itself

A fixed fleet is a budget that is always spent, so an instance moves when one side asks for more and the
other has one to spare, i.e. is below its lower threshold (inferred). The trend is the change over the
interval, carried on for ``trend`` intervals (inferred). Placement: conditional disaggregation with a FCFS
prefill queue.
"""

from __future__ import annotations

from engine.core.columns import Col, Ctx, Kind, Need
from engine.core.kinds import Role
from engine.core.policy import POLICY_SIGNATURE
from engine.jit.kernel import kernel
from policies.common import hold, kind_of
from policies.rule import Param, Rule
from policies.rules.parts.disaggregated import CONDITIONAL_PARAMS, answer_conditionally
from policies.rules.parts.layout import split_layout, split_params
from policies.rules.parts.planner import flip
from policies.rules.parts.pools import kv_use, waiting

_PREFILL, _DECODE = int(Role.PREFILL), int(Role.DECODE)
#: Memory: span, Σ queue, Σ KV use, samples, first queue of the interval, intervals of grace left.
_SPAN, _QUEUE, _KV, _N, _FIRST, _GRACE = range(6)


@kernel
def _sample(candidates):
    """(waiting prompts per prefill instance, mean KV use of decode instances) from rows of REALLOCATE."""
    queue, used, n_p, n_d = 0.0, 0.0, 0, 0
    for k in range(candidates.shape[0]):
        role, new = int(candidates[k, Col.ROLE]), int(candidates[k, Col.NEW_ROLE])
        if candidates[k, Col.INSTANCE] < 0.0:
            continue
        if role == _PREFILL and new == _DECODE:
            queue += waiting(candidates, k)
            n_p += 1
        elif role == _DECODE and new == _PREFILL:
            used += kv_use(candidates, k)
            n_d += 1
    return queue / max(n_p, 1), used / max(n_d, 1)


@kernel
def _wanted(memory, queue_now, params):
    """-1: more decode, 1: more prefill, 0: neither. ``params`` as in :func:`decide`."""
    queue, used = memory[_QUEUE] / memory[_N], memory[_KV] / memory[_N]
    trend = queue_now - memory[_FIRST]
    more_prefill = queue > params[1] and queue + params[5] * trend > params[1]
    more_decode = used > params[3]
    if more_prefill and not more_decode and memory[_GRACE] <= 0.0:
        return 1
    if more_decode and not more_prefill:
        return -1
    return 0


@kernel
def _reallocate(context, candidates, mask, params, memory):
    queue, used = _sample(candidates)
    if memory[_N] == 0.0:
        memory[_FIRST] = queue
    memory[_SPAN] += context[Ctx.WIN_SPAN_S]
    memory[_QUEUE] += queue
    memory[_KV] += used
    memory[_N] += 1.0
    if memory[_SPAN] < params[0] * (1.0 - 1e-6):
        return hold(candidates, mask)
    side = _wanted(memory, queue, params)
    idle_prefill = memory[_QUEUE] / memory[_N] < params[2]
    idle_decode = memory[_KV] / memory[_N] < params[4]
    for i in range(_GRACE):
        memory[i] = 0.0
    memory[_GRACE] = max(memory[_GRACE] - 1.0, 0.0)
    row = -1
    if side > 0 and idle_decode:
        row = flip(candidates, mask, _DECODE, _PREFILL)
    elif side < 0 and idle_prefill:
        row = flip(candidates, mask, _PREFILL, _DECODE)
        memory[_GRACE] = params[6] if row >= 0 else memory[_GRACE]
    return row if row >= 0 else hold(candidates, mask)


@kernel(POLICY_SIGNATURE)
def decide(context, candidates, mask, params, memory):
    """``params``: T, queue up, queue down, KV up, KV down, trend, grace, max_local, max_queue."""
    if kind_of(context) == Kind.REALLOCATE:
        return _reallocate(context, candidates, mask, params, memory)
    return answer_conditionally(context, candidates, mask, params[7], params[8])


RULE = Rule(
    name="dyn_load",
    doc="Dynamo's load planner: roles follow prefill queue length and decode KV use",
    source="NVIDIA Dynamo load planner, as opposed to DOPD in arXiv 2511.20982 (DYN-LOAD)",
    decide=decide,
    needs=Need.LOAD | Need.PREDICT,
    memory_size=_GRACE + 1,
    params=(
        Param("interval_s", 1.0, 180.0, 10.0, log=True, doc="time between two steps"),
        Param("queue_up", 0.5, 50.0, 5.0, log=True, doc="waiting prompts per prefill instance that ask for more"),
        Param("queue_down", 0.0, 5.0, 0.2, doc="... below which one can be spared"),
        Param("kv_up", 0.1, 1.0, 0.9, doc="KV use of decode instances that asks for more"),
        Param("kv_down", 0.0, 1.0, 0.5, doc="... below which one can be spared"),
        Param("trend", 0.0, 10.0, 3.0, doc="intervals that the queue's change is carried on for (inferred)"),
        Param("grace", 0, 10, 3, integer=True, doc="intervals without a step back after decode grew"),
        *CONDITIONAL_PARAMS,
        *split_params(prefill_tokens=None),
    ),
    arrange=split_layout("dyn_load"),
)
