"""S5: DOPD's planner of the prefill:decode ratio against Dynamo's two, under load that moves."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from engine.latency import Profile
from env.scenario import Scenario
from eval.claims.claim import (
    ORIGINAL,
    STEADY,
    Claim,
    Curve,
    Reading,
    changed_profile,
    joint,
    lone,
    search,
    share_at,
)

_REQUESTS = 10_000
_RELEASED = "DOPD, released code"
_POLICIES = {"DOPD": "dopd", "DYN-SLA": "dyn_sla", "DYN-LOAD": "dyn_load", _RELEASED: "dopd_code"}
#: Attainment of the dynamic BurstGPT run, budget 8 GPUs.
_PUBLISHED = {"DOPD": 99.4, "DYN-SLA": 87.3, "DYN-LOAD": 80.8}
_FAST = "llama-8b-h100"
_EPISODE_S = 1800.0  # at steady state: phases of four to seven minutes
_START_S = 30.0  # an instance takes this long to start serving in its new role


def _scenario(profile: str, **changes: Any) -> Scenario:
    """Eight instances, half of them prefilling at the start; the rate and the mix move by four to eight phases a run.

    :param changes: overrides, such as the length of an episode (``workload.duration_s``), else the whole run
    """
    return Scenario.load("shift-pd-8xa100").with_overrides({
        "profile": profile,
        "workload": {
            "kind": "shift",
            "lengths": [{"kind": "preset", "name": name} for name in ("azure-conv", "azure-code", "creation")],
            "random": {"phases": [4, 8], "rate": [0.5, 2.0], "ramp_share": 0.5, "sharpness": 0.5},
        },
        "classes": [{"name": "all", "ttft_s": 1.5, "tpot_s": 0.05}],
    }).with_overrides(changes)  # fmt: skip


class _At(NamedTuple):
    """The rate [requests/s] at which DYN-SLA meets what it met in the paper, and everyone's attainment there, in %."""

    rate: float
    shares: dict[str, float]

    def ordered(self, planner: str = "DOPD") -> bool:
        """Whether ``planner`` and the two others stand in the published order."""
        return self.shares[planner] > self.shares["DYN-SLA"] > self.shares["DYN-LOAD"]

    def reading(self, label: str, planner: str = "DOPD") -> Reading:
        return Reading(label, self.shares[planner], self.ordered(planner))

    def __str__(self) -> str:
        return ", ".join(f"{label} {share:.1f}" for label, share in self.shares.items())


def _at_published(scenario: Scenario, seeds: Sequence[int], n: int | None = _REQUESTS) -> _At:
    """Read everyone where DYN-SLA meets 87.3 %.

    :param n: requests of a run; None: runs as long as sustained goodput asks, in whole episodes
    """
    rate = search(scenario, joint, "dyn_sla", 0.01 * _PUBLISHED["DYN-SLA"], n, seeds)
    lone_s = lone(scenario, "dyn_sla")

    def share(rule: str) -> float:
        return share_at(scenario, joint, rule, rate, n, seeds, lone_s)

    return _At(rate, {label: 100.0 * share(rule) for label, rule in _POLICIES.items()})


_SEEDS = (0, 1, 2)
#: Assumptions of the original that are changed alone, at steady state, over two draws.
_CHANGES: dict[str, dict[str, Any]] = {
    "workload: the rate alone moves, as BurstGPT's does": {
        "workload.lengths": [{"kind": "preset", "name": "azure-conv"}]
    },
    "workload: milder phases (rates of 0.6 to 1.6, three to six)": {
        "workload.random": {"phases": [3, 6], "rate": [0.6, 1.6], "ramp_share": 0.5, "sharpness": 0.3}
    },
    "targets: TTFT of 3 s": {"classes.0.ttft_s": 3.0},
}


def planners() -> Claim:
    """S5: attainment of three planners at the load where the middle one meets what it did in the paper."""
    long = {"workload.duration_s": _EPISODE_S}
    with tempfile.TemporaryDirectory() as folder:
        slow = changed_profile(Profile.load(_FAST), Path(folder), "slow-start", switch_s=_START_S)
        scenario = _scenario(slow)
        ours = _at_published(scenario, _SEEDS)
        single = [_at_published(scenario, (seed,)).shares["DOPD"] for seed in _SEEDS]
        quick = _at_published(_scenario(_FAST), _SEEDS)
        steady = _at_published(_scenario(slow, **long), _SEEDS, None)
        changed = {"fleet: a role changes in 50 ms": _at_published(_scenario(_FAST, **long), _SEEDS[:2], None)}
        changed |= {k: _at_published(_scenario(slow, **long, **v), _SEEDS[:2], None) for k, v in _CHANGES.items()}
        loads = tuple(ours.rate * factor for factor in (0.6, 0.8, 1.0, 1.2, 1.4))
        curves = [Curve(f"{k}, published", (ours.rate,), (v,), published=True) for k, v in _PUBLISHED.items()]
        for label, rule in _POLICIES.items():
            found = [100.0 * share_at(scenario, joint, rule, x, _REQUESTS, (0,)) for x in loads]
            curves.append(Curve(f"{label}, ours", loads, tuple(found)))
    read = {"": ours, ", role change in 50 ms": quick, f", {STEADY}": steady}
    read |= {f", {label}, {STEADY}": at for label, at in changed.items()}
    rows = [(f"{name}{label}", share, "% of sent") for label, at in read.items() for name, share in at.shares.items()]
    rows += [(f"rate{label}", at.rate, "req/s") for label, at in read.items()]
    return Claim(
        name="S5",
        title="DOPD (repaired) against DYN-SLA and DYN-LOAD, moving load, eight instances",
        source="DOPD (arXiv 2511.20982), dynamic BurstGPT run, as reported second hand",
        unit="% attainment of DOPD",
        published="99.4 against 87.3 (DYN-SLA) and 80.8 (DYN-LOAD)",
        value=ours.shares["DOPD"],
        band=(95.0, 100.0),
        interval=(min(single), max(single)),
        length="not published; 10,000 requests in four to eight phases, three draws",
        extra=ours.ordered(),
        lasting=(steady.reading(STEADY),),
        causes=(
            *(at.reading(f"{label}, {STEADY}") for label, at in changed.items()),
            *(at.reading(f"planner: as released, {k}", _RELEASED) for k, at in ((ORIGINAL, ours), (STEADY, steady))),
        ),
        note=_note(ours, quick, steady, (min(single), max(single))),
        rows=tuple(rows),
        curves=tuple(curves),
        axes=("request rate [1/s]", "attainment [%]"),
    )


def _note(ours: _At, quick: _At, steady: _At, single: tuple[float, float]) -> str:
    comes, lasts = ("comes" if at.ordered() else "does not come" for at in (ours, steady))
    return (
        f"Read at the rate where DYN-SLA meets 87.3 % as published. The published order {comes} out ({ours}); at "
        f"steady state, with phases of minutes, it {lasts} out ({steady}). A stand-in: neither BurstGPT nor a 70B-FP8 "
        "profile is at hand, so Llama-3-8B on eight H100 serves phases of chat, code and writing. The fleet is fixed: "
        "an instance that changes its role serves nobody for 30 s, where the paper starts another beside those that "
        f"serve. DOPD over single seeds reaches from {single[0]:.0f} to {single[1]:.0f}: three draws of the phases do "
        "not tell these planners apart in short runs. Ablation: with role changes in 50 ms, at DYN-SLA's rate for "
        f"87.3 %: {quick}. Attainment at a rate is compared, not goodput: there is no sustained figure."
    )
