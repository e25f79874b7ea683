"""Online TTFT prediction with argmax, in the manner of Lodestar (arXiv 2606.00946): no plan, no long horizon.

    reward(request, instance) = −TTFT,  predicted by a model that learns from the requests already routed
    choice = argmax over instances of the predicted reward; with probability ε any instance (exploration)

Published: the supervised reward predictor fitted online, the argmax, TTFT as reward, and that it learns within
minutes on clusters of unlike devices. Inferred here: the model and what it reads. It is a linear regression, one for
each kind of device, fitted by recursive least squares with forgetting (Haykin, Adaptive Filter Theory, ch. 9):

    K = P x ÷ (λ + xᵀ P x),   w ← w + K (TTFT − wᵀ x),   P ← (P − K xᵀ P) ÷ λ

The rule sees no latency profile. It takes a routed prompt to be answered at the first decision at which its instance
has worked off the prompt tokens routed there up to it, as a router that polls queue lengths does. Before ``warm_up``
answers the fewest outstanding tokens win.
"""

from __future__ import annotations

import numpy as np

from engine.core.columns import Col, Ctx, Kind, Need
from engine.core.policy import POLICY_SIGNATURE
from engine.jit.kernel import kernel
from policies.common import default_answer, kind_of, or_hold
from policies.rule import Param, Rule, Setting, Values
from policies.rules.parts.draws import uniform
from policies.rules.parts.layout import ROUTER_PARAMS, router_layout
from policies.rules.parts.pools import in_prefill_pool, least_prefill

_D = 8  # features
_RING = 96  # prompts of one instance whose answer is awaited; the oldest give way
_ENTRY = 2 + _D  # place in the instance's work, when it was routed, features
_MODEL = 1 + _D + _D * _D  # answers, w, P
_MODELS, _INSTANCES = 4, 5  # params: epsilon, forgetting, ridge, warm_up, then these
_PLACED, _HEAD, _TAIL = 0, 1, 2  # of an instance: tokens routed to it so far, ring positions
_INSTANCE = 3 + _RING * _ENTRY


def _cells(setting: Setting) -> int:
    return 1 + (max(setting.profile_of) + 1) * _MODEL + setting.n_instances * _INSTANCE


def _prepare(values: Values, setting: Setting) -> np.ndarray:
    names = ("epsilon", "forgetting", "ridge", "warm_up")
    numbers = [float(values[name]) for name in names]
    return np.array([*numbers, float(max(setting.profile_of) + 1), float(setting.n_instances)])


@kernel
def _size(x, unit):
    """``x`` in ``unit``, cut to what a regression survives; NaN counts as nothing."""
    return min(x / unit, 1e3) if x > 0.0 else 0.0


@kernel
def _features(context, candidates, k, x):
    """What a router knows about prompt and instance: work ahead and its own, and what shares the device with it."""
    own = _size(context[Ctx.PROMPT] - candidates[k, Col.CACHED_TOKENS], 1000.0)
    ahead = _size(candidates[k, Col.QUEUE_TOKENS], 1000.0)
    running = _size(candidates[k, Col.RUN_N] + candidates[k, Col.INBOUND_N], 64.0)
    x[0] = 1.0
    x[1] = own
    x[2] = ahead
    x[3] = _size(candidates[k, Col.QUEUE_N], 8.0)
    x[4] = running
    x[5] = _size(candidates[k, Col.RUN_CTX], 50_000.0)
    x[6] = (own + ahead) * running
    x[7] = own * own * 0.1


@kernel
def _model(candidates, k, params):
    """First cell of the model for the device of row ``k``."""
    group = int(candidates[k, Col.PROFILE])
    return 1 + min(max(group, 0), int(params[_MODELS]) - 1) * _MODEL


@kernel
def _predict(memory, model, x):
    total = 0.0
    for i in range(_D):
        total += memory[model + 1 + i] * x[i]
    return total


@kernel
def _learn(memory, model, x, target, forgetting, ridge):
    """One step of recursive least squares."""
    w, p = model + 1, model + 1 + _D
    if memory[model] == 0.0:
        for i in range(_D):
            memory[p + i * _D + i] = 1.0 / ridge
    gain = np.empty(_D)
    spread = forgetting
    for i in range(_D):
        gain[i] = 0.0
        for j in range(_D):
            gain[i] += memory[p + i * _D + j] * x[j]
        spread += x[i] * gain[i]
    error = target - _predict(memory, model, x)
    trace = 0.0
    for i in range(_D):
        memory[w + i] += gain[i] / spread * error
        for j in range(_D):
            memory[p + i * _D + j] = (memory[p + i * _D + j] - gain[i] * gain[j] / spread) / forgetting
        trace += memory[p + i * _D + i]
    if not trace < 1e6:  # nothing new in some direction for long: forgetting must not blow P up
        for i in range(_D):
            for j in range(_D):
                memory[p + i * _D + j] = 1.0 / ridge if i == j else 0.0
    memory[model] += 1.0


@kernel
def _harvest(context, candidates, k, params, memory):
    """Learn from the prompts that row ``k`` has worked off since the last look."""
    ring = _ring(candidates, k, params)
    if ring < 0:
        return
    queue = candidates[k, Col.QUEUE_TOKENS]
    done = memory[ring + _PLACED] - (queue if queue > 0.0 else 0.0)
    model = _model(candidates, k, params)
    while memory[ring + _TAIL] < memory[ring + _HEAD]:
        entry = ring + 3 + int(memory[ring + _TAIL]) % _RING * _ENTRY
        if memory[entry] > done + 0.5:
            break
        ttft = context[Ctx.NOW_S] - memory[entry + 1]
        if 0.0 <= ttft < 1e4:
            _learn(memory, model, memory[entry + 2 : entry + _ENTRY], ttft, params[1], params[2])
        memory[ring + _TAIL] += 1.0


@kernel
def _ring(candidates, k, params):
    """First cell of the memory of the instance at row ``k``; -1 for one that it was not bound for."""
    instance = int(candidates[k, Col.INSTANCE])
    if instance < 0 or instance >= int(params[_INSTANCES]):
        return -1
    return 1 + int(params[_MODELS]) * _MODEL + instance * _INSTANCE


@kernel
def _note(context, candidates, k, params, memory):
    """Remember a prompt that goes to row ``k``, to learn from its answer."""
    ring = _ring(candidates, k, params)
    if ring < 0:
        return
    own = context[Ctx.PROMPT] - candidates[k, Col.CACHED_TOKENS]
    memory[ring + _PLACED] += own if own > 0.0 else 0.0
    if memory[ring + _HEAD] - memory[ring + _TAIL] >= _RING:
        memory[ring + _TAIL] += 1.0
    entry = ring + 3 + int(memory[ring + _HEAD]) % _RING * _ENTRY
    memory[entry], memory[entry + 1] = memory[ring + _PLACED], context[Ctx.NOW_S]
    _features(context, candidates, k, memory[entry + 2 : entry + _ENTRY])
    memory[ring + _HEAD] += 1.0


@kernel
def _choose(context, candidates, mask, params, memory):
    """Row of the prefill pool with the greatest predicted reward, or any; -1 while a model is still too young."""
    explore = uniform(memory, 0, 0) < params[0]
    draw = uniform(memory, 0, 0)
    n = 0
    for k in range(candidates.shape[0]):
        n += 1 if in_prefill_pool(candidates, mask, k) else 0
    x = np.empty(_D)
    best, reward, place = -1, -np.inf, 0
    for k in range(candidates.shape[0]):
        if not in_prefill_pool(candidates, mask, k):
            continue
        if explore:
            if place == int(draw * n):
                return k
            place += 1
            continue
        model = _model(candidates, k, params)
        if memory[model] < params[3]:
            return -1
        _features(context, candidates, k, x)
        here = -_predict(memory, model, x)
        if here > reward:
            best, reward = k, here
    return best


@kernel(POLICY_SIGNATURE)
def decide(context, candidates, mask, params, memory):
    """``params``: epsilon, forgetting, ridge, warm_up, number of models, number of instances."""
    if kind_of(context) != Kind.PLACE_PREFILL:
        return default_answer(context, candidates, mask)
    for k in range(candidates.shape[0]):
        _harvest(context, candidates, k, params, memory)
    best = _choose(context, candidates, mask, params, memory)
    if best < 0:
        best = least_prefill(candidates, mask, Col.OUTSTANDING, Col.QUEUE_N)
    if best >= 0:
        _note(context, candidates, best, params, memory)
    return or_hold(best, candidates, mask)


RULE = Rule(
    name="lodestar",
    doc="TTFT predicted by a model learned online from the requests already routed; the least wins",
    source="Lodestar, arXiv 2606.00946 (abstract and excerpts)",
    decide=decide,
    needs=int(Need.LOAD),
    params=(
        Param("epsilon", 0.0, 0.2, 0.01, off=0.005, doc="share of prompts routed at random, to keep learning"),
        Param("forgetting", 0.98, 1.0, 0.999, doc="λ: weight of an answer after the next one came in"),
        Param("ridge", 1e-3, 10.0, 0.1, log=True, doc="pull of the first weights towards zero"),
        Param("warm_up", 8, 512, 32, log=True, integer=True, doc="answers before predictions are trusted"),
        *ROUTER_PARAMS,
    ),
    prepare=_prepare,
    arrange=router_layout("lodestar"),
    memory_size=_cells,
)
