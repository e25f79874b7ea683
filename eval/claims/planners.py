"""S5: DOPD's planner of the prefill:decode ratio against Dynamo's two, under load that moves."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from engine.latency import Profile
from env.scenario import Scenario
from eval.claims.claim import Claim, Curve, joint, search, share_at

__all__ = ["planners"]

_REQUESTS = 10_000
_POLICIES = {"DOPD": "dopd", "DYN-SLA": "dyn_sla", "DYN-LOAD": "dyn_load", "DOPD, released code": "dopd_code"}
#: Attainment of the dynamic BurstGPT run, budget 8 GPUs.
_PUBLISHED = {"DOPD": 99.4, "DYN-SLA": 87.3, "DYN-LOAD": 80.8}
_START_S = 30.0  # an instance takes this long to start serving in its new role


def _scenario(profile: str) -> Scenario:
    """Eight instances, half of them prefilling at the start; the rate and the mix move by phases of minutes."""
    return Scenario.load("shift-pd-8xa100").with_overrides({
        "profile": profile,
        "workload": {
            "kind": "shift",
            "lengths": [{"kind": "preset", "name": name} for name in ("azure-conv", "azure-code", "creation")],
            "random": {"phases": [4, 8], "rate": [0.5, 2.0], "ramp_share": 0.5, "sharpness": 0.5},
        },
        "classes": [{"name": "all", "ttft_s": 1.5, "tpot_s": 0.05}],
    })  # fmt: skip


def _at_published(scenario: Scenario, seeds: tuple[int, ...]) -> tuple[float, dict[str, float]]:
    """The rate at which DYN-SLA meets what it met in the paper, and everyone's attainment there, in %."""
    rate = search(scenario, joint, "dyn_sla", 0.01 * _PUBLISHED["DYN-SLA"], _REQUESTS, seeds)
    shares = {
        label: 100.0 * share_at(scenario, joint, rule, rate, _REQUESTS, seeds) for label, rule in _POLICIES.items()
    }
    return rate, shares


def planners() -> Claim:
    """S5: attainment of three planners at the load where the middle one meets what it did in the paper."""
    with tempfile.TemporaryDirectory() as folder:
        slow = Profile.load("llama-8b-h100").model_copy(update={"switch_s": _START_S, "name": "slow-start"})
        path = Path(folder) / "slow-start.json"
        path.write_text(slow.model_dump_json())
        scenario = _scenario(str(path))
        rate, shares = _at_published(scenario, (0, 1, 2))
        single = [_at_published(scenario, (seed,))[1]["DOPD"] for seed in range(3)]
        quick_rate, quick = _at_published(_scenario("llama-8b-h100"), (0, 1, 2))
        loads = tuple(rate * factor for factor in (0.6, 0.8, 1.0, 1.2, 1.4))
        curves: list[Curve] = [Curve(f"{k}, published", (rate,), (v,), published=True) for k, v in _PUBLISHED.items()]
        for label, rule in _POLICIES.items():
            found = [100.0 * share_at(scenario, joint, rule, x, _REQUESTS, (0,)) for x in loads]
            curves.append(Curve(f"{label}, ours", loads, tuple(found)))
    ordered = shares["DOPD"] > shares["DYN-SLA"] > shares["DYN-LOAD"]
    rows: list[tuple[str, float, str]] = [(label, share, "% of sent") for label, share in shares.items()]
    rows += [(f"{label}, role change in 50 ms", share, "% of sent") for label, share in quick.items()]
    rows += [("rate", rate, "req/s"), ("rate, role change in 50 ms", quick_rate, "req/s")]
    return Claim(
        name="S5",
        title="DOPD (repaired) against DYN-SLA and DYN-LOAD, moving load, eight instances",
        source="DOPD (arXiv 2511.20982), dynamic BurstGPT run, as reported second hand",
        unit="% attainment of DOPD",
        published="99.4 against 87.3 (DYN-SLA) and 80.8 (DYN-LOAD)",
        value=shares["DOPD"],
        band=(95.0, 100.0),
        interval=(min(single), max(single)),
        extra=ordered,
        note=_note(shares, quick, ordered, (min(single), max(single))),
        rows=tuple(rows),
        curves=tuple(curves),
        axes=("request rate [1/s]", "attainment [%]"),
    )


def _note(shares: dict[str, Any], quick: dict[str, Any], ordered: bool, single: tuple[float, float]) -> str:
    return (
        "Read at the rate where DYN-SLA meets 87.3 % as published. The published order "
        f"{'comes' if ordered else 'does not come'} out (DOPD {shares['DOPD']:.1f}, DYN-SLA {shares['DYN-SLA']:.1f}, "
        f"DYN-LOAD {shares['DYN-LOAD']:.1f}; released DOPD code {shares['DOPD, released code']:.1f}). A stand-in: "
        "neither BurstGPT nor a 70B-FP8 profile is at hand, so Llama-3-8B on eight H100 serves phases of chat, code "
        "and writing. The fleet is fixed: an instance that changes its role serves nobody for 30 s, where the paper "
        f"starts another beside those that serve. DOPD over single seeds reaches from {single[0]:.0f} to "
        f"{single[1]:.0f}: three draws of the phases do not tell these planners apart, so neither the published order "
        f"nor its opposite is shown. Ablation: with role changes in 50 ms, "
        f"at DYN-SLA's rate for 87.3 %, DOPD meets {quick['DOPD']:.1f}, DYN-SLA {quick['DYN-SLA']:.1f}, "
        f"DYN-LOAD {quick['DYN-LOAD']:.1f} and the released DOPD code {quick['DOPD, released code']:.1f}."
    )
