"""A weighted sum of dimensionless columns: the baseline that every learned policy has to beat.

    cost_k = Σ_f W[kind, f] · x_kf,        answer = argmin over allowed k

``W`` has one row per decision kind. The defaults amount to predicted TTFT ÷ target plus penalties for targets
that would be missed; HOLD and SHED are rows with a fixed cost of their own. An Optuna search over the weights
came within half a percentage point of PPO in our own measurements, for a fraction of the time.
"""

from __future__ import annotations

import numpy as np

from engine.core.columns import Col, Kind, Need
from engine.core.policy import POLICY_SIGNATURE, InstancePlan
from engine.jit.kernel import kernel
from policies.arrangement import all_mixed, prefill_decode_split
from policies.common import hold, kind_of
from policies.network.features import LATE, N_FEATURES, SLACK_MISS, STEP_MISS, feature
from policies.rule import Param, Rule, Setting, Values

#: Cost that no instance reaches; what a threshold at its upper bound means.
NEVER = 1e5
#: Advantage of KEEP: other rows of REALLOCATE and TUNE cost 0.
_KEEP = -5.0
_THRESHOLD = 20.0

#: name → (feature, low, high, default, doc)
_PREFILL: dict[str, tuple[int, float, float, float, str]] = {
    "p_ttft": (Col.TTFT, 0.0, 4.0, 1.0, "predicted TTFT ÷ target"),
    "p_late": (LATE, 0.0, 8.0, 1.0, "by how much the target would be missed"),
    "p_wait": (Col.WAIT, -2.0, 2.0, 0.0, "wait before the prefill starts"),
    "p_prefill": (Col.PREFILL, -2.0, 4.0, 0.0, "prefill time here"),
    "p_queue_work": (Col.QUEUE_WORK, -2.0, 4.0, 0.0, "prefill work queued here"),
    "p_queue": (Col.QUEUE, -1.0, 1.0, 0.0, "log1p of queued prompts"),
    "p_slack_after": (Col.SLACK_AFTER, -2.0, 1.0, -0.1, "TPOT slack left after the stall"),
    "p_slack_miss": (SLACK_MISS, 0.0, 8.0, 1.0, "TPOT slack that would be lacking"),
    "p_step_with": (Col.STEP_WITH, -1.0, 4.0, 0.0, "decode step with this request ÷ TPOT target"),
    "p_step_miss": (STEP_MISS, 0.0, 8.0, 0.5, "by how much that step would miss the target"),
    "p_kv": (Col.KV_WITH, -1.0, 4.0, 0.1, "KV use with this request"),
    "p_batch": (Col.BATCH, -1.0, 4.0, 0.1, "sequences ÷ batch limit"),
    "p_cached": (Col.CACHED, -4.0, 1.0, 0.0, "share of the prompt cached here"),
    "p_decode_role": (Col.ROLE_DECODE, -2.0, 4.0, 0.2, "a prefill on a decode instance"),
    "p_mixed_role": (Col.ROLE_MIXED, -2.0, 2.0, 0.0, "a prefill on a mixed instance"),
    "p_multiplexed_role": (Col.ROLE_MULTIPLEXED, -2.0, 2.0, 0.0, "a prefill on a multiplexed instance"),
}
_DECODE: dict[str, tuple[int, float, float, float, str]] = {
    "d_in_place": (Col.IN_PLACE, -20.0, 2.0, -20.0, "no transfer needed"),
    "d_step_with": (Col.STEP_WITH, 0.0, 4.0, 1.0, "decode step with this request ÷ TPOT target"),
    "d_step_miss": (STEP_MISS, 0.0, 8.0, 1.0, "by how much that step would miss the target"),
    "d_slack": (Col.SLACK, -2.0, 1.0, 0.0, "least TPOT slack of the running set"),
    "d_kv": (Col.KV_WITH, -1.0, 4.0, 0.2, "KV use with this request"),
    "d_batch": (Col.BATCH, -1.0, 4.0, 0.1, "sequences ÷ batch limit"),
    "d_inbound": (Col.INBOUND, 0.0, 4.0, 0.1, "transfers under way ÷ TPOT target"),
    "d_queue_work": (Col.QUEUE_WORK, -1.0, 4.0, 0.1, "prefill work queued here"),
}


def weights(values: Values) -> np.ndarray:
    """The matrix W, float64 (4 kinds, N_FEATURES), of checked parameter values."""
    table = np.zeros((len(Kind), N_FEATURES))
    for kind, columns in ((Kind.PLACE_PREFILL, _PREFILL), (Kind.PLACE_DECODE, _DECODE)):
        for name, entry in columns.items():
            table[kind, entry[0]] = float(values[name])
        table[kind, Col.IS_HOLD] = table[kind, Col.IS_SHED] = NEVER
    for name, column in (("hold", Col.IS_HOLD), ("shed", Col.IS_SHED)):
        if float(values[name]) < _THRESHOLD:
            table[Kind.PLACE_PREFILL, column] = float(values[name])
    table[Kind.PLACE_DECODE, Col.ROLE_PREFILL] = 100.0  # cannot decode: only when nothing else is left
    table[Kind.REALLOCATE, Col.IS_KEEP] = table[Kind.TUNE, Col.IS_KEEP] = _KEEP
    return table


def _arrange(values: Values, setting: Setting) -> list[InstancePlan] | None:
    layout, tokens = values["layout"], int(values["chunk_tokens"])
    if layout == "mixed":
        return all_mixed(setting, tokens)
    if layout == "split":
        return prefill_decode_split(setting, float(values["prefill_fraction"]), tokens, "linear_score")
    return None


@kernel
def cost_of(candidates, k, params, row):
    """Cost of candidate ``k``, its weights being ``params[row : row + N_FEATURES]``."""
    cost = 0.0
    for f in range(N_FEATURES):
        weight = params[row + f]
        if weight != 0.0:
            cost += weight * feature(candidates, k, f)
    return cost


@kernel
def cheapest(candidates, mask, params, row, column, more):
    """The allowed candidate of least :func:`cost_of` plus ``more`` times the feature ``column``; ties to the lowest."""
    best, least = -1, np.inf
    for k in range(candidates.shape[0]):
        if mask[k] == 0:
            continue
        cost = cost_of(candidates, k, params, row)
        if more != 0.0:
            cost += more * feature(candidates, k, column)
        if cost < least:
            best, least = k, cost
    return best if best >= 0 else hold(candidates, mask)


@kernel(POLICY_SIGNATURE)
def decide(context, candidates, mask, params, memory):
    """``params``: W, row-major. Ties to the lowest row."""
    return cheapest(candidates, mask, params, kind_of(context) * N_FEATURES, 0, 0.0)


RULE = Rule(
    name="linear_score",
    doc="weighted sum of dimensionless columns, weights found by search",
    source="this project; the same form as parametric dispatch scores in queueing control",
    decide=decide,
    needs=Need.LOAD | Need.PREDICT | Need.DIMENSIONLESS,
    params=(
        *(Param(n, lo, hi, d, doc=doc) for n, (_, lo, hi, d, doc) in (_PREFILL | _DECODE).items()),
        Param("hold", 0.0, _THRESHOLD, _THRESHOLD, doc="hold back when every instance costs more; top = never"),
        Param("shed", 0.0, _THRESHOLD, _THRESHOLD, doc="refuse when every instance costs more; top = never"),
        Param("layout", default="scenario", choices=("scenario", "mixed", "split"), doc="static arrangement"),
        Param("prefill_fraction", 0.0, 1.0, 0.5, doc="of instances, for layout=split"),
        Param("chunk_tokens", 64, 8192, 2048, log=True, integer=True, doc="step budget, for mixed and split"),
    ),
    prepare=lambda values, setting: weights(values).ravel(),
    arrange=_arrange,
)
