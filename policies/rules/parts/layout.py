"""Where the instances of a published system come from: the scenario's roles, or a split of one's own."""

from __future__ import annotations

from collections.abc import Callable

from engine.core.kinds import Order, Role
from engine.core.policy import InstancePlan
from policies.arrangement import all_mixed, prefill_decode_split
from policies.rule import Param, Value, Values
from policies.setting import Setting

Arrange = Callable[[Values, Setting], list[InstancePlan] | None]


#: Shortest-remaining-first chunked preemption on prefill instances, as an option of :func:`split_layout`.
PREEMPTION_PARAMS = (
    Param(
        "preemption",
        default="off",
        choices=("off", "chunked"),
        doc="prefill instances: whole prompts, or chunks with the shortest remaining prefill first at each",
    ),
    Param("chunk_tokens", 128, 16384, 2048, log=True, integer=True, doc="chunk of preemption=chunked (inferred)"),
)


def split_params(prefill_tokens: int | None = 2048) -> tuple[Param, ...]:
    """Parameters of :func:`split_layout`.

    :param prefill_tokens: default of the token budget of a prefill batch; None: the system batches one by one
    """
    params = (
        Param(
            "layout",
            default="scenario",
            choices=("scenario", "split"),
            doc="roles as the scenario starts them where all are prefill or decode; else prefill_fraction",
        ),
        Param("prefill_fraction", 0.0, 1.0, 0.5, doc="share of instances that prefill (each side at least 1)"),
    )
    if prefill_tokens is None:
        return params
    doc = "L_m: tokens of one prefill batch; a longer prompt runs alone"
    return (*params, Param("prefill_tokens", 256, 16384, prefill_tokens, log=True, integer=True, doc=doc))


def split_layout(rule: str, order: int = 0) -> Arrange:
    """Prefill and decode instances; the scenario's own split where it has one.

    :param order: of the prefill queue, see :class:`engine.core.policy.InstancePlan`

    A rule without a value ``prefill_tokens`` prefills one prompt at a time. With a value ``preemption=chunked`` the
    queue is preemptive and prefill goes in chunks of ``chunk_tokens``.
    """

    def arrange(values: Values, setting: Setting) -> list[InstancePlan]:
        budget = int(values.get("prefill_tokens", 1))
        split = prefill_decode_split(setting, float(values["prefill_fraction"]), budget, rule)
        roles = [plan.role for plan in split]
        if values["layout"] == "scenario" and set(setting.roles) == {Role.PREFILL, Role.DECODE}:
            roles = list(setting.roles)
        if values.get("preemption") == "chunked":
            chunk, kept = int(values["chunk_tokens"]), Order.SHORTEST_PREEMPTIVE
            return [InstancePlan(role=role, prefill_tokens=budget, chunk_tokens=chunk, order=kept) for role in roles]
        return [InstancePlan(role=role, prefill_tokens=budget, order=order) for role in roles]

    return arrange


_LAYOUTS: tuple[Value, ...] = ("scenario", "mixed", "split")
ROUTER_PARAMS = (
    Param("layout", default="scenario", choices=_LAYOUTS, doc="instances behind the router"),
    Param("prefill_fraction", 0.0, 1.0, 0.5, doc="share that prefills, for layout=split"),
    Param("chunk_tokens", 64, 8192, 512, log=True, integer=True, doc="step budget, for mixed and split"),
)


def router_layout(rule: str) -> Arrange:
    """What a router finds behind it: the scenario as it is, every instance mixed, or a split."""

    def arrange(values: Values, setting: Setting) -> list[InstancePlan] | None:
        if values["layout"] == "mixed":
            return all_mixed(setting, int(values["chunk_tokens"]))
        if values["layout"] == "split":
            fraction, budget = float(values["prefill_fraction"]), int(values["chunk_tokens"])
            return prefill_decode_split(setting, fraction, budget, rule)
        return None

    return arrange
