"""SGLang's PD multiplexing as merged: the SM split comes from a table on the decode batch size, no predictor.

    row(bs) = the last table row whose threshold ≤ bs;  decode gets that row's SMs, prefill the rest
    layers per launch = max(1, 65536 // new tokens of the prefill batch)

The core looks the table up whenever a prefill batch starts (``Split.TABLE``), which is when SGLang regroups its
streams; the last row of ``default`` (all SMs to decode) and its first (all to prefill) are what the core
does anyway when one of the two has nothing to do. ``default`` is the built-in list, whose middle index is
clamp(bs · (G − 2) // 36, 1, G − 2) with G = 8 groups; ``general`` and ``loogle`` are the tables published for
H200. All are written for 132 SMs and scaled to the device (inferred), then rounded up to a share that its
profile has. The dispatch over instances is inferred.
"""

from __future__ import annotations

import numpy as np

from engine.core.columns import Need
from engine.core.kinds import Batching, Order, Role, Split
from engine.core.policy import InstancePlan
from policies.rule import Param, Rule, Values
from policies.rules.muxwise import ROUTER, decide, require_shares
from policies.setting import Setting

_SMS = 132
#: (decode SMs of 132, least decode batch size), ascending
TABLES: dict[str, tuple[tuple[int, int], ...]] = {
    "default": ((20, 1), (28, 12), (36, 18), (44, 24), (52, 30), (60, 36)),
    "general": ((20, 1), (28, 5), (36, 10), (52, 15), (68, 20), (76, 25)),
    "loogle": ((52, 1), (68, 5), (76, 10)),
}


def share_rows(setting: Setting, table: str, profile: int) -> list[int]:
    """Share row of ``profile`` for each row of ``table``: the smallest with the scaled SMs, never the whole
    device."""
    n, total = int(setting.profile["n_shares"][profile]), int(setting.profile["total_sms"][profile])
    sms = setting.share["sms"][profile, :n]
    wanted = [decode * total / _SMS for decode, _ in TABLES[table]]
    return [min(int(np.searchsorted(sms, want)), n - 2) for want in wanted]


def _arrange(values: Values, setting: Setting) -> list[InstancePlan]:
    require_shares(setting, "pdmux_table")
    name = str(values["table"])
    least = [bs for _, bs in TABLES[name]]
    return [
        InstancePlan(
            role=Role.MULTIPLEXED,
            batching=Batching.LAYERED,
            split=Split.TABLE,
            table=tuple(zip(least, share_rows(setting, name, profile), strict=True)),
            layer_tokens=int(values["layer_tokens"]),
            prefill_tokens=int(values["prefill_tokens"]),
            order=Order.FCFS,
        )
        for profile in setting.profile_of
    ]


RULE = Rule(
    name="pdmux_table",
    doc="all instances multiplexed, SM split by a table on the decode batch size, looked up at every prefill",
    source="SGLang --enable-pdmux (pull requests 10692, 11592, 12275): multiplex/pdmux_context.py and its docs",
    decide=decide,
    needs=Need.LOAD | Need.PREDICT,
    params=(
        ROUTER,
        Param("table", default="default", choices=tuple(TABLES), doc="rows of decode SMs and batch thresholds"),
        Param("prefill_tokens", 256, 65536, 16384, log=True, integer=True, doc="tokens of one prefill batch"),
        Param("layer_tokens", 1024, 1 << 20, 65536, log=True, integer=True, doc="tokens × layers of one launch"),
    ),
    arrange=_arrange,
)
