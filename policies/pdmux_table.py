"""SGLang's PD multiplexing as merged: the SM split comes from a table on the decode batch size, no predictor.

    row(bs) = the last table row whose threshold ≤ bs;  decode gets that row's SMs, prefill the rest

``default`` is the built-in list, whose middle index is clamp(bs · (G − 2) // 36, 1, G − 2) with G = 8 groups;
``general`` and ``loogle`` are the tables published for H200. All are written for 132 SMs and scaled to the
device (inferred), then rounded up to a share that its profile has.

An approximation: SGLang looks the table up whenever a prefill starts or ends; here the split moves by TUNE
decisions, one share per control interval and instance, so it trails the batch size by some intervals. The
scenario must therefore allow tune. Layers per launch are the core's (enough to last one decode step), not
65,536 ÷ prompt tokens. The dispatch over instances is inferred.
"""

from __future__ import annotations

import numpy as np

from engine.core.columns import Col, Kind, Need
from engine.core.jit import kernel
from engine.core.policy import POLICY_SIGNATURE, InstancePlan
from engine.core.state import Batching, Role
from engine.errors import SlalomError
from policies.common import default_answer, hold, kind_of
from policies.muxwise import ROUTER, require_shares, route
from policies.rule import Param, Rule, Values
from policies.setting import Setting

__all__ = ["RULE", "TABLES", "decide", "share_rows"]

_SMS = 132
#: (decode SMs of 132, least decode batch size), ascending
TABLES: dict[str, tuple[tuple[int, int], ...]] = {
    "default": ((20, 1), (28, 12), (36, 18), (44, 24), (52, 30), (60, 36)),
    "general": ((20, 1), (28, 5), (36, 10), (52, 15), (68, 20), (76, 25)),
    "loogle": ((52, 1), (68, 5), (76, 10)),
}
#: params: router, table rows n, n thresholds, then n share rows per profile
_ROUTER, _N, _TABLE = 0, 1, 2


def share_rows(setting: Setting, table: str, profile: int) -> list[int]:
    """Share row of ``profile`` for each row of ``table``: the smallest with the scaled SMs, never the whole
    device."""
    n, total = int(setting.profile["n_shares"][profile]), int(setting.profile["total_sms"][profile])
    sms = setting.share["sms"][profile, :n]
    wanted = [decode * total / _SMS for decode, _ in TABLES[table]]
    return [min(int(np.searchsorted(sms, want)), n - 2) for want in wanted]


def _prepare(values: Values, setting: Setting) -> np.ndarray:
    table = str(values["table"])
    rows = [share_rows(setting, table, p) for p in range(len(setting.profile))]
    thresholds = [bs for _, bs in TABLES[table]]
    router = ROUTER.number(values["router"])
    return np.array([router, len(thresholds), *thresholds, *np.ravel(rows)], np.float64)


@kernel
def _wanted_row(candidates, k, params):
    """Share row that the table gives the decode batch of candidate ``k``'s instance."""
    n = int(params[_N])
    at = 0
    for j in range(n):
        if params[_TABLE + j] <= candidates[k, Col.RUN_N]:
            at = j
    return params[_TABLE + n * (1 + int(candidates[k, Col.PROFILE])) + at]


@kernel
def _tune(candidates, mask, params):
    for k in range(candidates.shape[0]):
        delta = candidates[k, Col.SPLIT_DELTA]
        if mask[k] != 0 and delta != 0.0:
            if (_wanted_row(candidates, k, params) - candidates[k, Col.SPLIT]) * delta > 0.0:
                return k
    return hold(candidates, mask)


@kernel(POLICY_SIGNATURE)
def decide(context, candidates, mask, params, memory):
    """``params``: router, table (see ``_prepare``)."""
    kind = kind_of(context)
    if kind == Kind.TUNE:
        return _tune(candidates, mask, params)
    if kind != Kind.PLACE_PREFILL:
        return default_answer(context, candidates, mask)
    return route(context, candidates, mask, params[_ROUTER])


def _arrange(values: Values, setting: Setting) -> list[InstancePlan]:
    require_shares(setting, "pdmux_table")
    if Kind.TUNE not in setting.kinds:
        raise SlalomError("pdmux_table: decisions.tune", False, "its table moves the SM split: set tune: true")
    budget = int(values["prefill_tokens"])
    return [
        InstancePlan(
            role=Role.MULTIPLEXED,
            batching=Batching.LAYERED,
            split=share_rows(setting, str(values["table"]), profile)[0],
            prefill_tokens=budget,
            order=0,
        )
        for profile in setting.profile_of
    ]


RULE = Rule(
    name="pdmux_table",
    doc="all instances multiplexed, SM split by a table on the decode batch size (moved at control intervals)",
    source="SGLang --enable-pdmux (pull requests 10692, 11592, 12275): multiplex/pdmux_context.py and its docs",
    decide=decide,
    needs=Need.LOAD | Need.PREDICT,
    params=(
        ROUTER,
        Param("table", default="default", choices=tuple(TABLES), doc="rows of decode SMs and batch thresholds"),
        Param("prefill_tokens", 256, 65536, 16384, log=True, integer=True, doc="tokens of one prefill batch"),
    ),
    prepare=_prepare,
    arrange=_arrange,
)
