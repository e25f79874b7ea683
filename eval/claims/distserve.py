"""S1 and S2: DistServe's placement search, and DistServe against vLLM.

Nothing is tuned towards a published figure. Where a setting of the original is not public or cannot be
expressed (pipeline parallelism, another model's profile), the claim's note says so.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.latency import Profile
from env.measure.metrics import outcomes
from env.scenario import Scenario
from env.surrogate.simulate import RunResult, simulate
from eval.claims.claim import (
    ORIGINAL,
    STEADY,
    SUSTAINED,
    Claim,
    Curve,
    Lasting,
    Reading,
    changed_profile,
    joint,
    lasting,
    ratio,
    ratio_interval,
    ratios,
    search,
    share_at,
    slower,
    sustained,
)
from eval.placement.disaggregation import algorithm_2

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
    pair = own.fixed_on(
        {"count": 1, "role": "prefill", "profile": pooled.prefill, "prefill_tokens": 16384},
        {"count": 1, "role": "decode", "profile": pooled.decode, "max_batch": 1024},
        **{"links.bandwidth_gb_s": 300.0},
    )
    gpus = pair.n_gpus()
    single = [_readme_search(pair, seed, 300) for seed in range(10)]
    sizes = (300, 1000, 3000)
    by_size = [search(pair, _all_separate, _README_RULE, 0.9, n, range(6000 // n + 1)) / gpus for n in sizes]
    by_size.append(search(pair, _separate, _README_RULE, 0.9, None) / gpus)
    shown = (*map(str, sizes), STEADY)
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
        length="300 requests (published)",
        lasting=(
            Reading(STEADY, by_size[-1], chosen == [2, 1]),
            Reading(SUSTAINED, sustained(pair, _README_RULE) / gpus, chosen == [2, 1]),
        ),
        note=(
            "Published is what a bisection of [0, 5] to 0.25 answers on one draw of 300 requests, so it can only say "
            f"1.56, 1.72, 1.88, ...; ours is the median of that same procedure over ten draws ({min(single):.2f} to "
            f"{max(single):.2f}). Ablation of the run length: {by_size[0]:.2f} with 300 requests, {by_size[1]:.2f}, "
            f"{by_size[2]:.2f} and {by_size[3]:.2f} with 1,000, 3,000 and at steady state, because a short run ends "
            f"before its longest queues form; {sum(x <= 1.81 for x in single)} of the ten draws lie in the band, and "
            "why the published draw is a low one is not known. Lengths are those of DistServe's own sample; the preset "
            "sharegpt has prompts less than a third as long."
        ),
        rows=(
            *((f"same bisection, draw {seed}", rate, "req/s per GPU") for seed, rate in enumerate(single)),
            ("exact search, ten draws of 300 requests pooled", pooled.per_gpu, "req/s per GPU"),
            *((f"exact search, requests: {n}", rate, "req/s per GPU") for n, rate in zip(shown, by_size, strict=True)),
            (f"preset sharegpt ({preset.prefill} + {preset.decode})", preset.per_gpu, "req/s per GPU"),
        ),
        curves=(
            Curve("simdistserve (README)", ("300",), (1.56,), published=True),
            Curve("ours, exact search", shown, tuple(by_size)),
            Curve("ours, the README's bisection", ("300",), (float(np.median(single)),)),
        ),
        axes=("requests of one run", "goodput [req/s per GPU]"),
    )


_README_RULE = "distserve:prefill_tokens=16384"


def _separate(run: RunResult, warmup: float) -> float:
    """The smaller of the shares within the TTFT and within the TPOT target, as DistServe's search tests them."""
    found = outcomes(run, warmup=warmup)
    return float(min(found.ttft_ok.mean(), found.tpot_ok.mean()))


def _all_separate(run: RunResult, warmup: float) -> float:
    """The same over every request of a run: that search leaves none out."""
    return _separate(run, 0.0)


def _readme_search(pair: Scenario, seed: int, n: int) -> float:
    """DistServe's own search on one draw: bisection of [0, 5] requests/s per GPU until 0.25 wide; the lower end."""
    low, high = 0.0, 5.0
    while high - low > 0.25:
        middle = 0.5 * (low + high)
        passed = share_at(pair, _all_separate, _README_RULE, middle * pair.n_gpus(), n, (seed,)) >= 0.9
        low, high = (middle, high) if passed else (low, middle)
    return low


def _vllm(scenario: Scenario, profile: str, **changes: Any) -> Scenario:
    """One instance; prompts first and whole, as the vLLM of late 2023, unless ``changes`` say otherwise."""
    group = {"count": 1, "role": "mixed", "profile": profile, "batching": "prefill_first", "max_batch": 1024}
    return scenario.fixed_on(group | {"prefill_tokens": 16384} | changes, profile=profile)


_DRAWS = range(10)  # of runs as short as the original's
_FACTORS = (1.1, 1.15, 1.2, 1.25)


class _Size(NamedTuple):
    """One of the paper's two models: DistServe's placement, vLLM's, and requests a GPU of a run of its scripts."""

    name: str
    pair: Scenario
    alone: Scenario  # what vLLM serves, without its instances
    profile: str  # of vLLM's instance, as fast as DistServe's engine
    per_gpu: int

    def rate(self, scenario: Scenario, policy: str) -> float:
        """Requests per second and GPU at 90 % joint attainment, in runs as long as the original's."""
        gpus = scenario.n_gpus()
        return search(scenario, joint, policy, 0.9, self.per_gpu * gpus, _DRAWS) / gpus


def _sizes() -> tuple[_Size, ...]:
    base = Scenario.load("distserve-13b-3xa100").with_overrides({"workload.lengths": S1_LENGTHS})
    large = base.with_overrides({"classes.0.ttft_s": 0.4})
    found = []
    for name, scenario, prefill, decode, one, per_gpu in (
        ("13B", base, "opt-13b-a100-tp2", "opt-13b-a100-tp1", "opt-13b-a100-tp1", 100),
        ("66B", large, "opt-66b-a100-tp4", "opt-66b-a100-tp4", "opt-66b-a100-tp4", 25),
    ):
        pair = scenario.fixed_on(
            {"count": 1, "role": "prefill", "profile": prefill},
            {"count": 1, "role": "decode", "profile": decode, "max_batch": 1024},
            profile=decode,
        )
        found.append(_Size(name, pair, scenario, one, per_gpu))
    return tuple(found)


def distserve_vs_vllm() -> Claim:
    """S2: DistServe against vLLM at 90 % joint attainment, with the slower profile of vLLM and with one for both."""
    sizes = _sizes()
    rows: list[tuple[str, float, str]] = []
    found: dict[str, float] = {}
    for size in sizes:
        ours = size.rate(size.pair, "distserve")
        rates = {label: size.rate(alone, "least_tokens") for label, alone in _opponents(size).items()}
        rows += [(f"{size.name} {label}", x, "req/s per GPU") for label, x in {"DistServe": ours, **rates}.items()]
        chunked = max(rate for label, rate in rates.items() if label.startswith("chunked"))
        found[f"{size.name} two profiles"] = ratio(ours, rates[_OWN])
        found[f"{size.name} one profile"] = ratio(ours, rates[_SAME])
        found[f"{size.name} best chunked"] = ratio(ours, chunked)
    rows += [(f"ratio, {label}", figure, "x") for label, figure in found.items()]
    small = sizes[0]
    slow = _vllm(small.alone, f"{small.profile}-vllm")
    unloaded = 100 * joint(simulate(slow, "least_tokens", rate=0.01, n_requests=2000), 0.05)
    rows.append(("13B vLLM, its own slower profile, attainment without any queue", unloaded, "%"))
    whole = lasting(small.pair, "distserve") / small.pair.n_gpus()
    same = lasting(_vllm(small.alone, small.profile), "least_tokens")
    rows += [("13B DistServe, steady state", whole.steady, "req/s per GPU")]
    rows += [("13B DistServe, sustained", whole.sustained, "req/s per GPU")]
    scale = slow.n_gpus() / small.pair.n_gpus()
    low, high = ratio_interval(
        (small.pair, "distserve"), (slow, "least_tokens"), joint, 0.9, (3 * small.per_gpu, small.per_gpu)
    )
    return Claim(
        name="S2",
        title="DistServe against vLLM (OPT-13B; 66B below), ShareGPT, 90 % joint attainment",
        source="DistServe, section 6.2 and figure 8",
        unit="x requests per GPU",
        published="2.0 to 4.6 (against vLLM of late 2023, on a slower engine)",
        value=found["13B two profiles"],
        band=(2.0, 4.6),
        length="100 requests a GPU (13B) and 25 (66B), as its evaluation scripts send; ten draws",
        interval=(low * scale, high * scale),
        lasting=ratios(whole, lasting(slow, "least_tokens")),
        causes=(
            Reading(f"engine speed: vLLM as fast as DistServe, {ORIGINAL}", found["13B one profile"]),
            *(Reading(f"engine speed: vLLM as fast as DistServe, {r.label}", r.value) for r in ratios(whole, same)),
            Reading(f"and chunked prefill for vLLM, best of three budgets, {ORIGINAL}", found["13B best chunked"]),
            *_slower_engines(small, whole),
        ),
        note=(
            "The vLLM profile of DistServe's simulator is so slow that only "
            f"{unloaded:.0f} % of requests meet 250 ms even alone, so in long runs no rate reaches 90 % (the paper "
            "measured the real engine), and in short ones the ratio is whatever the draws leave of a flat curve. With "
            f"one profile for both it is {found['13B one profile']:.2f}, against the best chunked prefill "
            f"{found['13B best chunked']:.2f}: at equal engine speed this placement gains little or nothing "
            "per GPU, while an engine that is slower by a sixth or a fifth yields any ratio that was published. 66B "
            "decodes on TP 4 (published: TP 2, PP 2)."
        ),
        rows=tuple(rows),
        curves=(
            Curve("published, lowest", tuple(found), (2.0,) * len(found), published=True),
            Curve("published, highest", tuple(found), (4.6,) * len(found), published=True),
            Curve("ours (left out: unbounded)", *_finite(found)),
        ),
        axes=("", "DistServe ÷ the other [x]"),
    )


_OWN, _SAME = "vLLM, its own slower profile", "vLLM, DistServe's profile"


def _opponents(size: _Size) -> dict[str, Scenario]:
    chunks = {
        f"chunked {c}, DistServe's profile": _vllm(size.alone, size.profile, batching="chunked", chunk_tokens=c)
        for c in (512, 1024, 2048)
    }
    own, same = (_vllm(size.alone, profile) for profile in (f"{size.profile}-vllm", size.profile))
    return {_OWN: own, _SAME: same, **chunks}


def _slower_engines(size: _Size, whole: Lasting) -> list[Reading]:
    """The ratio when every step of vLLM takes so many times as long as one of DistServe's engine."""
    found = []
    ours = size.rate(size.pair, "distserve")
    with tempfile.TemporaryDirectory() as folder:
        for factor in _FACTORS:
            shares = partial(slower, factor=factor)
            profile = changed_profile(Profile.load(size.profile), Path(folder), f"slower-{factor}", share=shares)
            alone = _vllm(size.alone, profile)
            about = f"engine speed: vLLM's steps {factor:g} times as long as DistServe's (its profile: 1.33)"
            found.append(Reading(f"{about}, {ORIGINAL}", ratio(ours, size.rate(alone, "least_tokens"))))
            held = lasting(alone, "least_tokens")
            found += [Reading(f"{about}, {r.label}", r.value) for r in ratios(whole, held)]
    return found


def _finite(ratios: dict[str, float]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    known = {label: found for label, found in ratios.items() if found != float("inf")}
    return tuple(known), tuple(known.values())
