"""Pictures of one run watched closely (``eval.compare.shadow``): the timeline, and where two policies part ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

ROLES = {"prefill": "#56B4E9", "decode": "#E69F00", "mixed": "#999999", "multiplexed": "#CC79A7"}
HATCH = {"prefill": "", "decode": "//", "mixed": "..", "multiplexed": "xx"}
_SUBJECT, _RIVAL = "#0072B2", "#D55E00"


def timeline(watched: Mapping[str, Any]) -> Figure:
    """Attainment of both, request rate, roles and SM share of decode, over the simulated time of one run."""
    t = watched["timeline"]
    roles, shares = t["roles"], t["decode_sm_share"]
    panels = ["attainment", "rate"] + ["roles"] * (len(roles) > 0) + ["sms"] * (len(shares) > 0)
    figure = Figure(figsize=(9.0, 1.3 + 1.75 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis in axes:
        axis.grid(True, alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    by_name = dict(zip(panels, axes, strict=True))
    at = t["attained_at_s"]
    styles = (("subject", _SUBJECT, "-", "o"), ("rival", _RIVAL, "--", "s"))
    for who, colour, line, marker in styles:
        shown = [(x, 100 * y) for x, y in zip(at, t[who], strict=True) if y is not None]
        xs, ys = [x for x, _ in shown], [y for _, y in shown]
        by_name["attainment"].plot(xs, ys, line, color=colour, marker=marker, markersize=3, label=watched[who])
    by_name["attainment"].set(ylabel="attainment\n[% of arrivals]", ylim=(-2, 103))
    by_name["attainment"].legend(fontsize=8, frameon=False, ncols=2, loc="lower left")
    by_name["rate"].step(at, t["arrivals_per_s"], where="mid", color="#333333")
    by_name["rate"].set(ylabel="arrivals [1/s]", ylim=(0, None))
    if roles:
        names = list(roles)
        stack = by_name["roles"].stackplot(
            t["at_s"], *roles.values(), labels=names, step="post", colors=[ROLES[n] for n in names], alpha=0.9
        )
        for area, name in zip(stack, names, strict=True):
            area.set(hatch=HATCH[name], edgecolor="white", linewidth=0.0)
        by_name["roles"].set(ylabel="instances", ylim=(0, None))
        by_name["roles"].legend(fontsize=8, frameon=True, ncols=len(names), loc="lower left")
    if shares:
        by_name["sms"].step(t["at_s"], [100 * share for share in shares], where="post", color=ROLES["multiplexed"])
        by_name["sms"].set(ylabel="SMs of decode\n[%]", ylim=(0, 103))
    axes[-1].set(xlabel="simulated time [s]", xlim=(0, 2 * at[-1] - at[-2] if len(at) > 1 else None))
    return figure


def decisions(watched: Mapping[str, Any]) -> Figure:
    """Requests placed differently, by how: gained to the right, lost to the left."""
    ways = watched["differing"]["ways"]
    names = list(ways)[::-1]
    figure = Figure(figsize=(9.0, 1.3 + 0.5 * len(names)), layout="constrained")
    axis = figure.add_subplot()
    axis.grid(True, axis="x", alpha=0.3)
    axis.spines[["top", "right", "left"]].set_visible(False)
    gained, lost = [ways[n]["gained"] for n in names], [ways[n]["lost"] for n in names]
    axis.barh(range(len(names)), gained, color="#009E73", edgecolor="white", label="gained: good here, missed there")
    axis.barh(
        range(len(names)), [-n for n in lost], color="#D55E00", hatch="//", edgecolor="white",
        label="lost: missed here, good there",
    )  # fmt: skip
    for place, (up, down) in enumerate(zip(gained, lost, strict=True)):
        axis.annotate(f"+{up}", (up, place), (4, 0), textcoords="offset points", va="center", fontsize=9)
        axis.annotate(
            f"−{down}", (-down, place), (-4, 0), textcoords="offset points", va="center", ha="right", fontsize=9
        )
    axis.axvline(0, color="#333333", linewidth=1)
    axis.margins(x=0.15)
    most = max([1, *gained, *lost])
    axis.set_xlim(-1.2 * most if any(lost) else -0.2 * most, 1.2 * most)
    axis.set_yticks(range(len(names)), [f"{n}\n({ways[n]['requests']} requests)" for n in names], fontsize=9)
    axis.set_xlabel("requests")
    figure.legend(loc="outside upper right", fontsize=8, frameon=False, ncols=2)
    return figure
