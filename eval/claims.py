"""Published results as experiments on the surrogate: each returns the published figure beside ours.

Nothing is tuned towards a published figure. Where a setting of the original is not public or cannot be
expressed (pipeline parallelism, another model's profile), the claim's note says so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engine.core.slo import itl_edges_s
from engine.core.state import RequestState
from engine.latency import Profile
from env.scenario import Scenario
from env.simulate import RunResult, simulate
from eval.disaggregation import LEAST_LOAD, algorithm_2
from eval.goodput import find_goodput
from eval.metrics import histogram_stats, outcomes

__all__ = ["CLAIMS", "S1_LENGTHS", "Claim", "distserve_search", "distserve_vs_vllm", "muxwise", "tropical"]

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


@dataclass(frozen=True)
class Claim:
    """One published result and ours.

    :param name: S1, S2, ...
    :param unit: of ``value`` and ``band``
    :param published: the figure as published
    :param value: ours
    :param band: pass band of ``value``
    :param extra: whether what the band does not cover (a choice, an order) came out too
    :param note: one honest sentence
    :param rows: what was measured on the way: (label, figure, unit)
    """

    name: str
    title: str
    source: str
    unit: str
    published: str
    value: float
    band: tuple[float, float]
    note: str
    extra: bool = True
    rows: tuple[tuple[str, float, str], ...] = field(default=())

    @property
    def holds(self) -> bool:
        """Whether ours lies in the band, and the rest came out."""
        return self.extra and self.band[0] <= self.value <= self.band[1]


# -- measuring -------------------------------------------------------------------------------------------------


def _search(
    scenario: Scenario, passes: Callable[[RunResult], float], policy: str, goal: float, n: int, **values: Any
) -> float:
    """Largest rate at which ``passes`` (a share, mean of two seeds) reaches ``goal``."""

    def share(rate: float) -> float:
        if rate < LEAST_LOAD * scenario.reference_rate:
            return 0.0
        runs = (simulate(scenario, policy, rate=rate, n_requests=n, seed=seed) for seed in (0, 1))
        return float(np.mean([passes(run) for run in runs]))

    return find_goodput(share, scenario.reference_rate, targets=(goal,), tolerance=0.01).at(goal).rate


def _ratio(ours: float, theirs: float) -> float:
    """Infinite where theirs reaches the goal at no rate."""
    return ours / theirs if theirs > 0.0 else math.inf


def _joint(run: RunResult) -> float:
    return float(outcomes(run).good.mean())


def _cluster(scenario: Scenario, *groups: Mapping[str, Any], **overrides: Any) -> Scenario:
    fixed = {"cluster": [dict(g) for g in groups], "decisions": {}, "min_prefill": 1, "min_decode": 1}
    return scenario.with_overrides(fixed | overrides)


# -- DistServe -------------------------------------------------------------------------------------------------


def distserve_search() -> Claim:
    """S1: the placement search of simdistserve's README (OPT-13B, ShareGPT, 4 A100, P90 of 200 ms and 100 ms)."""
    base = Scenario.load("distserve-13b-3xa100").with_overrides({"classes.0.ttft_s": 0.2})
    own = base.with_overrides({"workload.lengths": S1_LENGTHS})
    effort: dict[str, Any] = {"node_gpus": 4, "prefill_tokens": 16384}
    pooled, preset = (algorithm_2(x, 1.0, n_requests=300, seeds=range(10), **effort) for x in (own, base))
    long = algorithm_2(own, 1.0, n_requests=20_000, **effort)
    single = [algorithm_2(own, 1.0, n_requests=300, seeds=(seed,), **effort).per_gpu for seed in range(10)]
    chosen = [Profile.load(name).tp for name in (pooled.prefill, pooled.decode)]
    return Claim(
        name="S1",
        title=f"DistServe's placement search; ours chooses TP {chosen[0]} prefill, TP {chosen[1]} decode",
        source="DistServe, simdistserve/README.md",
        unit="req/s per GPU",
        published="1.56 with TP 2 prefill, TP 1 decode (a lower end: its search stops with 1.72 failed)",
        value=pooled.per_gpu,
        band=(1.31, 1.81),
        extra=chosen == [2, 1],
        note=(
            f"Published is one draw of 300 requests, and single draws of ours reach from {min(single):.2f} to "
            f"{max(single):.2f} (ten together: {pooled.per_gpu:.2f}); 20,000 requests give {long.per_gpu:.2f}: "
            "short runs presumably end before the longest queues form. Lengths are those of DistServe's own sample; "
            "the preset sharegpt has prompts less than a third as long."
        ),
        rows=(
            ("ten draws of 300 requests, pooled", pooled.per_gpu, "req/s per GPU"),
            ("least of ten single draws", min(single), "req/s per GPU"),
            ("median of ten single draws", float(np.median(single)), "req/s per GPU"),
            ("most of ten single draws", max(single), "req/s per GPU"),
            (f"20,000 requests ({long.prefill} + {long.decode})", long.per_gpu, "req/s per GPU"),
            (f"preset sharegpt ({preset.prefill} + {preset.decode})", preset.per_gpu, "req/s per GPU"),
        ),
    )


def _vllm(scenario: Scenario, profile: str, **changes: Any) -> Scenario:
    """One instance; prompts first and whole, as the vLLM of late 2023, unless ``changes`` say otherwise."""
    group = {"count": 1, "role": "mixed", "profile": profile, "batching": "prefill_first", "max_batch": 1024}
    return _cluster(scenario, group | {"prefill_tokens": 16384} | changes, profile=profile)


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
    for size, scenario, prefill, decode, one in cases:
        pair = _cluster(
            scenario,
            {"count": 1, "role": "prefill", "profile": prefill},
            {"count": 1, "role": "decode", "profile": decode, "max_batch": 1024},
            profile=decode,
        )
        per_gpu = {"DistServe": _search(pair, _joint, "distserve", 0.9, 1500) / pair.n_gpus()}
        for label, alone in (
            ("vLLM, its own slower profile", _vllm(scenario, f"{one}-vllm")),
            ("vLLM, DistServe's profile", _vllm(scenario, one)),
            *(
                (f"chunked {c}, DistServe's profile", _vllm(scenario, one, batching="chunked", chunk_tokens=c))
                for c in (512, 1024, 2048)
            ),
        ):
            per_gpu[label] = _search(alone, _joint, "least_tokens", 0.9, 1500) / alone.n_gpus()
        rows += [(f"{size} {label}", rate, "req/s per GPU") for label, rate in per_gpu.items()]
        ours = per_gpu["DistServe"]
        chunked = max(rate for label, rate in per_gpu.items() if label.startswith("chunked"))
        for label, rate in (
            ("two profiles", per_gpu["vLLM, its own slower profile"]),
            ("one profile", per_gpu["vLLM, DistServe's profile"]),
            ("best chunked", chunked),
        ):
            ratios[f"{size} {label}"] = _ratio(ours, rate)
    rows += [(f"ratio, {label}", ratio, "x") for label, ratio in ratios.items()]
    slow = _vllm(base, "opt-13b-a100-tp1-vllm")
    unloaded = 100 * _joint(simulate(slow, "least_tokens", rate=0.01, n_requests=2000))
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
    )


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
    apart = _cluster(base, *split, **{"decisions": {"hold": True}})
    first = {"count": 4, "role": "mixed", "batching": "prefill_first", "prefill_tokens": 16384}
    systems = {
        "Tropical": (apart, "tropical"),
        "Tropical, released code": (apart, "tropical_code"),
        "DistServe": (apart, "distserve"),
        "vLLM (whole prompts first)": (_cluster(base, first), "least_tokens"),
        "vLLM chunked 512": (_cluster(base, {"count": 4, "role": "mixed", "chunk_tokens": 512}), "least_tokens"),
        "vLLM chunked 2048": (_cluster(base, {"count": 4, "role": "mixed", "chunk_tokens": 2048}), "least_tokens"),
    }
    rates = {label: _search(scenario, _joint, policy, 0.9, 1500) for label, (scenario, policy) in systems.items()}
    chunked = max(rates["vLLM chunked 512"], rates["vLLM chunked 2048"])
    ordered = rates["Tropical"] > rates["vLLM (whole prompts first)"] >= chunked > rates["DistServe"]
    rival = max(rates["DistServe"], rates["vLLM (whole prompts first)"])
    return Claim(
        name="S4",
        title="Tropical against DistServe and vLLM, Mooncake lengths, four instances",
        source="Tropical (DAC 2025), abstract and figures of its README",
        unit="x requests at 90 %",
        published="2.0 to 2.1 over both (crossings at 1.74, 0.82 and 0.86 req/s)",
        value=_ratio(rates["Tropical"], rival),
        band=(1.8, 2.3),
        extra=ordered,
        note=(
            f"The published order (Tropical, vLLM, chunked, DistServe) {'comes' if ordered else 'does not come'} out; "
            f"over DistServe alone the ratio is {_ratio(rates['Tropical'], rates['DistServe']):.2f}. A stand-in: "
            "InternLM-20B has no public profile, so Llama-3-8B on four A100 serves; the split of two and two and a "
            "TTFT target of five isolated prefills are inferred."
        ),
        rows=tuple((label, rate, "req/s at 90 %") for label, rate in rates.items()),
    )


# -- MuxWise ---------------------------------------------------------------------------------------------------


def _keeps_up(run: RunResult) -> bool:
    """Stable: of all that was sent, at most a tenth is still open when the last request arrives."""
    last = run.req["arrival"].max()
    return bool(np.mean((run.req["finished"] < 0) | (run.req["finished"] > last)) <= 0.1)


def _tbt(run: RunResult) -> float:
    """1 where the 99th percentile of token gaps is within 100 ms and the system is stable, else 0."""
    p99 = histogram_stats(run.itl, itl_edges_s())["p99_itl_ms"]
    done = (run.req["state"] == RequestState.FINISHED).all()
    return float(p99 is not None and p99 <= 100.0 and bool(done) and _keeps_up(run))


def _tool_agent() -> dict[str, Any]:
    """Tool&Agent as the preset has it, with its shared prefixes as prefixes: 37 % share 6,144 tokens, 14 % 2,560."""
    parts = []
    lengths = (
        (0.37, (6200, 8000), (3, 50), 6144),
        (0.14, (2900, 3300), (16, 24), 2560),
        (0.49, None, None, 0),
    )
    for weight, prompt, output, shared in lengths:
        spec: dict[str, Any] = {"kind": "preset", "name": "mooncake-conversation"}
        if prompt is not None and output is not None:
            low_high = [dict(zip(("low", "high"), pair, strict=True)) for pair in (prompt, output)]
            spec = {"kind": "joint", **dict(zip(("prompt", "output"), low_high, strict=True))}
            spec = {k: {"kind": "uniform", **v} if isinstance(v, dict) else v for k, v in spec.items()}
        work: dict[str, Any] = {"kind": "synthetic", "lengths": spec, "max_context": 131072}
        if shared:
            work["prefix"] = {"kind": "system", "prompts": 1, "tokens": shared}
        parts.append({"weight": weight, "workload": work})
    return {"kind": "mix", "parts": parts}


def muxwise() -> Claim:
    """S6: MuxWise against chunked prefill and disaggregation, Llama-70B TP 8, Tool&Agent, P99 TBT of 100 ms."""
    base = Scenario.load("muxwise-70b-2x8xa100").with_overrides({"workload": _tool_agent()})
    mixed = {"count": 1, "role": "mixed"}
    systems = {
        "MuxWise": (_cluster(base, {"count": 1, "role": "multiplexed"}), "muxwise"),
        "pdmux table": (_cluster(base, {"count": 1, "role": "multiplexed"}, decisions={"tune": True}), "pdmux_table"),
        "disaggregated": (_cluster(base, {"count": 1, "role": "prefill"}, {"count": 1, "role": "decode"}), "distserve"),
    } | {f"chunked {c}": (_cluster(base, {**mixed, "chunk_tokens": c}), "least_tokens") for c in (128, 256, 512, 1024)}
    per_gpu = {
        label: _search(scenario, _tbt, policy, 1.0, 800) / scenario.n_gpus()
        for label, (scenario, policy) in systems.items()
    }
    chunked = max(rate for label, rate in per_gpu.items() if label.startswith("chunked"))
    apart = per_gpu["disaggregated"]
    over = _ratio(per_gpu["MuxWise"], apart)
    profile = Profile.load("llama-70b-a100-tp8")
    chunk_ms, step_ms = 1e3 * profile.prefill_s(256, 4000), 1e3 * profile.decode_s(8 * 8000, 8)
    return Claim(
        name="S6",
        title="MuxWise against the best chunked prefill, Llama-70B TP 8, Tool&Agent, P99 TBT 100 ms, stable",
        source="MuxWise (ASPLOS 2026), goodput of Tool&Agent, 70B",
        unit="x requests",
        published="3.06 over chunked prefill, 1.62 over disaggregation (TP 4 + TP 4)",
        value=_ratio(per_gpu["MuxWise"], chunked),
        band=(2.3, 3.8),
        extra=1.2 <= over <= 2.1,
        note=(
            f"MuxWise itself serves {8 * per_gpu['MuxWise']:.2f} req/s (published 7,430 tokens/s, about 0.85 req/s); "
            f"over disaggregation ours is {over:.2f}, two TP 8 instances counted per GPU (there is no TP 4 table). "
            "Chunked prefill collapses because the authors' table starts at 512 tokens: a chunk of 256 costs "
            f"{chunk_ms:.0f} ms, beside a decode step of {step_ms:.0f} ms close to 100 ms already, so that ratio means "
            "nothing. The trace is a surrogate that shares 2.6k prompt tokens on average, not 4.9k."
        ),
        rows=tuple((label, rate * 8, "req/s per 8 GPUs") for label, rate in per_gpu.items()),
    )


#: name -> experiment, in the order in which they are worth reading
CLAIMS: dict[str, Callable[[], Claim]] = {
    "S1": distserve_search,
    "S2": distserve_vs_vllm,
    "S6": muxwise,
    "S4": tropical,
}
