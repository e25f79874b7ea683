"""Who did what while the demand drifted: the roles of policies over a day, under what arrived."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from engine.core.kinds import Role
from env.measure.roles import RoleTimeline
from env.workload import Trace
from eval.report.plots_shadow import HATCH, ROLES

_BINS = 240
_PROMPTS, _ANSWERS = "#333333", "#D55E00"


def roles_under_demand(trace: Trace, lines: Mapping[str, RoleTimeline]) -> Figure:
    """Prompt and answer tokens that arrive per second, and below them the instances by role for each of ``lines``."""
    end = float(trace.arrival_s[trace.n_roots - 1])
    edges = np.linspace(0.0, end, _BINS + 1)
    figure = Figure(figsize=(9.0, 2.2 + 1.6 * len(lines)), layout="constrained")
    axes = figure.subplots(1 + len(lines), 1, sharex=True, squeeze=False)[:, 0]
    for tokens, name, colour in ((trace.prompt, "prompts", _PROMPTS), (trace.output, "answers", _ANSWERS)):
        found, _ = np.histogram(trace.arrival_s, edges, weights=tokens.astype(np.float64))
        axes[0].step(edges[:-1] / 3600.0, found / np.diff(edges) / 1e3, where="post", color=colour, label=name)
    axes[0].set(ylabel="demand\n[1000 tokens/s]", ylim=(0, None))
    axes[0].legend(fontsize=8, frameon=False, ncols=2, loc="upper right")
    for axis, (name, line) in zip(axes[1:], lines.items(), strict=True):
        inside = line.at_s <= end
        at, counts = np.append(line.at_s[inside], end), line.instances[inside]
        counts = np.vstack([counts, counts[-1:]])
        used = [role for role in Role if counts[:, role].any()]
        names = [role.name.lower() for role in used]
        stack = axis.stackplot(
            at / 3600.0, *counts[:, used].T, labels=names, step="post", colors=[ROLES[n] for n in names], alpha=0.9
        )
        for area, role in zip(stack, names, strict=True):
            area.set(hatch=HATCH[role], edgecolor="white", linewidth=0.0)
        axis.set(ylabel=f"{name}\n[instances]", ylim=(0, None))
        axis.legend(fontsize=8, frameon=True, ncols=len(names), loc="lower left")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set(xlabel="time of day [h]", xlim=(0, end / 3600.0))
    return figure
