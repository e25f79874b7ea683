"""Published results as experiments on the surrogate: each returns the published figure beside ours.

Nothing is tuned towards a published figure. Where a setting of the original is not public or cannot be
expressed (pipeline parallelism, another model's profile), the claim's note says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from engine.latency import Profile
from env.measure.metrics import outcomes
from env.scenario import Scenario
from env.surrogate.simulate import RunResult, simulate
from eval.claims.claim import Claim, Curve, clustered, joint, ratio, ratio_interval, search, share_at
from eval.claims.muxwise import muxwise
from eval.claims.planners import planners
from eval.placement.disaggregation import algorithm_2

__all__ = ["CLAIMS", "S1_LENGTHS", "Claim", "distserve_search", "distserve_vs_vllm", "muxwise", "planners", "tropical"]

_Q = (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
#: Lengths of DistServe's ShareGPT sample (at least three turns, OPT tokens, below 2,048 in all): quantiles of the
#: 1,593 distinct requests in simdistserve/benchmarks/alignment/data-ground-truth/opt-13b-sharegpt-workload
#: (LLMServe/DistServe at commit 20a1633, Apache-2.0); means 761 in, 187 out.
S1_LENGTHS: dict[str, Any] = {
    "kind": "joint",
    "spearman": -0.125,
    "prompt": {
        "kind": "quantiles",
        "q": list(_Q),
        "v": [2, 25, 89, 244, 379, 518, 685, 858, 1044, 1277, 1546, 1723, 1922, 2031],
    },
    "output": {
        "kind": "quantiles",
        "q": list(_Q),
        "v": [1, 6, 9, 15, 22, 36, 78, 159, 258, 350, 512, 648, 969, 1809],
    },
}


# -- DistServe -------------------------------------------------------------------------------------------------


def distserve_search() -> Claim:
    """S1: the placement search of simdistserve's README (OPT-13B, ShareGPT, 4 A100, P90 of 200 ms and 100 ms)."""
    base = Scenario.load("distserve-13b-3xa100").with_overrides({"classes.0.ttft_s": 0.2})
    own = base.with_overrides({"workload.lengths": S1_LENGTHS})
    effort: dict[str, Any] = {"node_gpus": 4, "prefill_tokens": 16384}
    pooled, preset = (algorithm_2(x, 1.0, n_requests=300, seeds=range(10), **effort) for x in (own, base))
    long = algorithm_2(own, 1.0, n_requests=20_000, **effort)
    pair = clustered(
        own,
        {"count": 1, "role": "prefill", "profile": pooled.prefill, "prefill_tokens": 16384},
        {"count": 1, "role": "decode", "profile": pooled.decode, "max_batch": 1024},
        **{"links.bandwidth_gb_s": 300.0},
    )
    single = [_readme_search(pair, seed, 300) for seed in range(10)]
    sizes = (300, 1000, 3000, 20_000)
    by_size = [search(pair, _separate, _README_RULE, 0.9, n, range(6000 // n + 1)) / pair.n_gpus() for n in sizes[:-1]]
    by_size.append(long.per_gpu)
    chosen = [Profile.load(name).tp for name in (pooled.prefill, pooled.decode)]
    return Claim(
        name="S1",
        title=f"DistServe's placement search; ours chooses TP {chosen[0]} prefill, TP {chosen[1]} decode",
        source="DistServe, simdistserve/README.md",
        unit="req/s per GPU",
        published="1.56 with TP 2 prefill, TP 1 decode (a lower end: its search stops with 1.72 failed)",
        value=float(np.median(single)),
        band=(1.31, 1.81),
        interval=(min(single), max(single)),
        extra=chosen == [2, 1],
        note=(
            "Published is what a bisection of [0, 5] to 0.25 answers on one draw of 300 requests, so it can only say "
            f"1.56, 1.72, 1.88, ...; ours is the median of that same procedure over ten draws ({min(single):.2f} to "
            f"{max(single):.2f}). Ablation of the run length: {by_size[0]:.2f} with 300 requests, {by_size[1]:.2f}, "
            f"{by_size[2]:.2f} and {by_size[3]:.2f} with 1,000, 3,000 and 20,000, because a short run ends before its "
            f"longest queues form; {sum(x <= 1.81 for x in single)} of the ten draws lie in the band, and why the "
            "published draw is a low one is not known. Lengths are those of "
            "DistServe's own sample; the preset sharegpt has prompts less "
            "than a third as long."
        ),
        rows=(
            *((f"same bisection, draw {seed}", rate, "req/s per GPU") for seed, rate in enumerate(single)),
            ("exact search, ten draws of 300 requests pooled", pooled.per_gpu, "req/s per GPU"),
            *((f"exact search, {n} requests", rate, "req/s per GPU") for n, rate in zip(sizes, by_size, strict=True)),
            (f"preset sharegpt ({preset.prefill} + {preset.decode})", preset.per_gpu, "req/s per GPU"),
        ),
        curves=(
            Curve("simdistserve (README)", ("300",), (1.56,), published=True),
            Curve("ours, exact search", tuple(map(str, sizes)), tuple(by_size)),
            Curve("ours, the README's bisection", ("300",), (float(np.median(single)),)),
        ),
        axes=("requests of one run", "goodput [req/s per GPU]"),
    )


_README_RULE = "distserve:prefill_tokens=16384"


def _separate(run: RunResult) -> float:
    """The smaller of the shares within the TTFT and within the TPOT target, as DistServe's search tests them."""
    found = outcomes(run, warmup=0.0)
    return float(min(found.ttft_ok.mean(), found.tpot_ok.mean()))


def _readme_search(pair: Scenario, seed: int, n: int) -> float:
    """DistServe's own search on one draw: bisection of [0, 5] requests/s per GPU until 0.25 wide; the lower end."""
    low, high = 0.0, 5.0
    while high - low > 0.25:
        middle = 0.5 * (low + high)
        passed = share_at(pair, _separate, _README_RULE, middle * pair.n_gpus(), n, (seed,)) >= 0.9
        low, high = (middle, high) if passed else (low, middle)
    return low


def _vllm(scenario: Scenario, profile: str, **changes: Any) -> Scenario:
    """One instance; prompts first and whole, as the vLLM of late 2023, unless ``changes`` say otherwise."""
    group = {"count": 1, "role": "mixed", "profile": profile, "batching": "prefill_first", "max_batch": 1024}
    return clustered(scenario, group | {"prefill_tokens": 16384} | changes, profile=profile)


def distserve_vs_vllm() -> Claim:
    """S2: DistServe against vLLM at 90 % joint attainment, with the slower profile of vLLM and with one for both."""
    base = Scenario.load("distserve-13b-3xa100").with_overrides({"workload.lengths": S1_LENGTHS})
    large = base.with_overrides({"classes.0.ttft_s": 0.4})
    cases = (
        ("13B", base, "opt-13b-a100-tp2", "opt-13b-a100-tp1", "opt-13b-a100-tp1"),
        ("66B", large, "opt-66b-a100-tp4", "opt-66b-a100-tp4", "opt-66b-a100-tp4"),
    )
    rows: list[tuple[str, float, str]] = []
    ratios: dict[str, float] = {}
    one_profile: dict[str, tuple[Scenario, Scenario]] = {}
    for size, scenario, prefill, decode, one in cases:
        pair = clustered(
            scenario,
            {"count": 1, "role": "prefill", "profile": prefill},
            {"count": 1, "role": "decode", "profile": decode, "max_batch": 1024},
            profile=decode,
        )
        per_gpu = {"DistServe": search(pair, joint, "distserve", 0.9, 1500) / pair.n_gpus()}
        for label, alone in (
            ("vLLM, its own slower profile", _vllm(scenario, f"{one}-vllm")),
            ("vLLM, DistServe's profile", _vllm(scenario, one)),
            *(
                (f"chunked {c}, DistServe's profile", _vllm(scenario, one, batching="chunked", chunk_tokens=c))
                for c in (512, 1024, 2048)
            ),
        ):
            if label.startswith("vLLM, DistServe"):
                one_profile[size] = (pair, alone)
            per_gpu[label] = search(alone, joint, "least_tokens", 0.9, 1500) / alone.n_gpus()
        rows += [(f"{size} {label}", rate, "req/s per GPU") for label, rate in per_gpu.items()]
        ours = per_gpu["DistServe"]
        chunked = max(rate for label, rate in per_gpu.items() if label.startswith("chunked"))
        for label, rate in (
            ("two profiles", per_gpu["vLLM, its own slower profile"]),
            ("one profile", per_gpu["vLLM, DistServe's profile"]),
            ("best chunked", chunked),
        ):
            ratios[f"{size} {label}"] = ratio(ours, rate)
    rows += [(f"ratio, {label}", found, "x") for label, found in ratios.items()]
    for size, (pair, alone) in one_profile.items():
        low, high = ratio_interval((pair, "distserve"), (alone, "least_tokens"), joint, 0.9, 1500)
        scale = alone.n_gpus() / pair.n_gpus()
        rows += [(f"ratio, {size} one profile, least of 3 seeds", low * scale, "x")]
        rows += [(f"ratio, {size} one profile, most of 3 seeds", high * scale, "x")]
    slow = _vllm(base, "opt-13b-a100-tp1-vllm")
    unloaded = 100 * joint(simulate(slow, "least_tokens", rate=0.01, n_requests=2000))
    rows.append(("13B vLLM, its own slower profile, attainment without any queue", unloaded, "%"))
    return Claim(
        name="S2",
        title="DistServe against vLLM (OPT-13B; 66B below), ShareGPT, 90 % joint attainment",
        source="DistServe, section 6.2 and figure 8",
        unit="x requests per GPU",
        published="2.0 to 4.6 (against vLLM of late 2023, on a slower engine)",
        value=ratios["13B two profiles"],
        band=(2.0, 4.6),
        note=(
            f"The vLLM profile of DistServe's simulator is so slow that only {unloaded:.0f} % of requests meet 250 ms "
            "even alone, so no ratio exists (the paper measured the real engine); with one profile for both it is "
            f"{ratios['13B one profile']:.2f} and against the best chunked prefill {ratios['13B best chunked']:.2f}: "
            "at equal engine speed this placement serves fewer requests per GPU than one instance for both phases. "
            "66B decodes on TP 4 (published: TP 2, PP 2)."
        ),
        rows=tuple(rows),
        curves=(
            Curve("published, lowest", tuple(ratios), (2.0,) * len(ratios), published=True),
            Curve("published, highest", tuple(ratios), (4.6,) * len(ratios), published=True),
            Curve("ours (left out: unbounded)", *_finite(ratios)),
        ),
        axes=("", "DistServe ÷ the other [x]"),
    )


def _finite(ratios: dict[str, float]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    known = {label: found for label, found in ratios.items() if found != float("inf")}
    return tuple(known), tuple(known.values())


# -- Tropical --------------------------------------------------------------------------------------------------


def tropical() -> Claim:
    """S4: attainment over rate of Tropical, DistServe and vLLM on Mooncake lengths, targets 5x isolated and 100 ms."""
    base = Scenario.load("mooncake-pd-8xh100").with_overrides({
        "profile": "llama-8b-a100",
        "workload.arrival": {"kind": "poisson"},
        "classes": [{"name": "chat", "ttft_factor": 5.0, "ttft_s": 0.0, "tpot_s": 0.1}],
        "rates": {"low": 0.05, "high": 20.0},
        "reference_rate": 1.0,
    })  # fmt: skip
    split = ({"count": 2, "role": "prefill"}, {"count": 2, "role": "decode"})
    apart = clustered(base, *split, **{"decisions": {"hold": True}})
    first = {"count": 4, "role": "mixed", "batching": "prefill_first", "prefill_tokens": 16384}
    systems = {
        "Tropical": (apart, "tropical"),
        "Tropical, released code": (apart, "tropical_code"),
        "DistServe": (apart, "distserve"),
        "vLLM (whole prompts first)": (clustered(base, first), "least_tokens"),
        "vLLM chunked 512": (clustered(base, {"count": 4, "role": "mixed", "chunk_tokens": 512}), "least_tokens"),
        "vLLM chunked 2048": (clustered(base, {"count": 4, "role": "mixed", "chunk_tokens": 2048}), "least_tokens"),
    }
    rates = {label: search(scenario, joint, policy, 0.9, 1500) for label, (scenario, policy) in systems.items()}
    splits: dict[str, float] = {}
    for k in (1, 3):
        other = clustered(
            base, {"count": k, "role": "prefill"}, {"count": 4 - k, "role": "decode"}, decisions={"hold": True}
        )
        for label in ("Tropical", "DistServe"):
            splits[f"ablation, split {k}:{4 - k}: {label}"] = search(other, joint, systems[label][1], 0.9, 1500)
    widest = max(rate for label, rate in splits.items() if label.endswith("Tropical"))
    chunked = max(rates["vLLM chunked 512"], rates["vLLM chunked 2048"])
    ordered = rates["Tropical"] > rates["vLLM (whole prompts first)"] >= chunked > rates["DistServe"]
    rival_name = max(("DistServe", "vLLM (whole prompts first)"), key=lambda label: rates[label])
    rival = rates[rival_name]
    return Claim(
        name="S4",
        title="Tropical against DistServe and vLLM, Mooncake lengths, four instances",
        source="Tropical (DAC 2025), abstract and figures of its README",
        unit="x requests at 90 %",
        published="2.0 to 2.1 over both (crossings at 1.74, 0.82 and 0.86 req/s)",
        value=ratio(rates["Tropical"], rival),
        band=(1.8, 2.3),
        extra=ordered,
        note=(
            f"The published order (Tropical, vLLM, chunked, DistServe) {'comes' if ordered else 'does not come'} out; "
            f"over DistServe alone the ratio is {ratio(rates['Tropical'], rates['DistServe']):.2f}. Ablation of the "
            f"unpublished split: with 1:3 or 3:1 instead of 2:2 Tropical reaches {widest:.2f} req/s at best, "
            f"{ratio(widest, rival):.2f} over the stronger rival. A stand-in: "
            "InternLM-20B has no public profile, so Llama-3-8B on four A100 serves; the split of two and two and a "
            "TTFT target of five isolated prefills are inferred."
        ),
        interval=ratio_interval(systems["Tropical"], systems[rival_name], joint, 0.9, 1500),
        rows=tuple((label, rate, "req/s at 90 %") for label, rate in (rates | splits).items()),
        curves=_tropical_curves(systems, rates["DistServe"]),
        axes=("request rate ÷ DistServe's rate at 90 %", "attainment [%]"),
    )


#: Attainment in % read off the figures of Tropical's README (InternLM-20B, Mooncake) at these rates, req/s.
_FIGURE_RATES = (0.8, 1.0, 1.2, 1.4, 1.6, 1.8)
_FIGURE = {
    "Tropical": (99.5, 100, 98.5, 97.5, 96, 87),
    "vLLM (whole prompts first)": (90.5, 89, 84, 74, 70, 58),
    "vLLM chunked 512": (89, 85, 80, 68, 53, 32),
    "DistServe": (90, 84, 72, 63, 18, 7),
}


def _tropical_curves(systems: dict[str, tuple[Scenario, str]], unit: float) -> tuple[Curve, ...]:
    """Published and ours over the same load: rates as multiples of DistServe's at 90 % (published 0.82)."""
    load = tuple(rate / 0.82 for rate in _FIGURE_RATES)
    curves = [Curve(f"{label}, published", load, tuple(map(float, y)), published=True) for label, y in _FIGURE.items()]
    for label in _FIGURE:
        scenario, policy = systems[label]
        shares = [100.0 * share_at(scenario, joint, policy, x * unit, 1500, (0, 1)) for x in load]
        curves.append(Curve(f"{label}, ours", load, tuple(shares)))
    return tuple(curves)


#: name -> experiment, in the order in which they are worth reading
CLAIMS: dict[str, Callable[[], Claim]] = {
    "S1": distserve_search,
    "S2": distserve_vs_vllm,
    "S4": tropical,
    "S5": planners,
    "S6": muxwise,
}
