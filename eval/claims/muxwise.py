"""S6: MuxWise (one GPU shared by SMs between prefill and decode) against chunked prefill and disaggregation."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from engine.core.kinds import RequestState
from engine.core.slo import itl_edges_s
from engine.latency import Profile
from env.measure.metrics import histogram_stats
from env.scenario import Scenario
from env.surrogate.simulate import RunResult
from eval.claims.claim import Claim, Curve, Passes, clustered, ratio, ratio_interval, search

__all__ = ["muxwise"]


def _keeps_up(run: RunResult) -> bool:
    """Stable: of all that was sent, at most a tenth is still open when the last request arrives."""
    last = run.req["arrival"].max()
    return bool(np.mean((run.req["finished"] < 0) | (run.req["finished"] > last)) <= 0.1)


def _tbt(target_ms: float) -> Passes:
    """1 where the 99th percentile of token gaps is within the target and the system is stable, else 0."""

    def passes(run: RunResult) -> float:
        p99 = histogram_stats(run.itl, itl_edges_s())["p99_itl_ms"]
        done = (run.req["state"] == RequestState.FINISHED).all()
        return float(p99 is not None and p99 <= target_ms and bool(done) and _keeps_up(run))

    return passes


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


_CHUNKS = (128, 256, 512, 1024)


def _chunked(base: Scenario, profile: str) -> dict[str, tuple[Scenario, str]]:
    group = {"count": 1, "role": "mixed", "profile": profile}
    return {
        f"chunked {c}": (clustered(base, {**group, "chunk_tokens": c}, profile=profile), "least_tokens")
        for c in _CHUNKS
    }


def _best(base: Scenario, profile: str, target_ms: float) -> tuple[str, float]:
    """The chunk budget that holds the highest rate (requests/s of the instance), and that rate."""
    found = {
        label: search(scenario, _tbt(target_ms), policy, 1.0, 800)
        for label, (scenario, policy) in _chunked(base, profile).items()
    }
    label = max(found, key=lambda key: found[key])
    return label, found[label]


def _without_floor(profile: Profile, folder: Path) -> str:
    """Ablation: the same line below 512 tokens as above, and a fused step that pays its constant once."""
    shares = []
    for share in profile.shares:
        constant = min(share.prefill_s[3], share.decode_small_s[2])
        shares.append(share.model_copy(update={"fused_shared_s": constant}))
    changed = profile.model_copy(update={"prefill_min_tokens": 1, "shares": tuple(shares), "name": "no-floor"})
    path = folder / "no-floor.json"
    path.write_text(changed.model_dump_json())
    return str(path)


def _half(profile: Profile, folder: Path) -> str:
    """A stand-in for TP 4: every second doubled (no gain from fewer devices to synchronise), KV of half the memory."""
    shares = [
        share.model_copy(
            update={
                "prefill_s": tuple(2.0 * x for x in share.prefill_s),
                "decode_small_s": tuple(2.0 * x for x in share.decode_small_s),
            }
        )
        for share in profile.shares
    ]
    weights = profile.roofline.weight_bytes if profile.roofline else 0.0
    kv = 0.5 * (profile.kv_tokens * profile.kv_bytes_per_token + weights) - weights
    update = {"shares": tuple(shares), "tp": 4, "kv_tokens": int(kv / profile.kv_bytes_per_token), "name": "tp4"}
    path = folder / "tp4.json"
    path.write_text(profile.model_copy(update=update).model_dump_json())
    return str(path)


def _small() -> tuple[float, float, str]:
    """Llama-8B on one A100, ShareGPT, 50 ms: (MuxWise, best chunked prefill, which), requests/s."""
    base = Scenario.load("muxwise-70b-2x8xa100").with_overrides({
        "profile": "llama-8b-a100",
        "cluster": [{"count": 1, "role": "multiplexed"}],
        "workload": {"kind": "synthetic", "lengths": {"kind": "preset", "name": "sharegpt"}, "max_context": 2048},
        "classes": [{"name": "chat", "ttft_s": 10.0, "tpot_s": 0.05}],
        "rates": {"low": 0.5, "high": 100.0},
        "reference_rate": 8.0,
    })  # fmt: skip
    ours = search(clustered(base, {"count": 1, "role": "multiplexed"}), _tbt(50.0), "muxwise", 1.0, 2000)
    found = {
        c: search(
            clustered(base, {"count": 1, "role": "mixed", "chunk_tokens": c}), _tbt(50.0), "least_tokens", 1.0, 2000
        )
        for c in (256, 512, 1024, 2048)
    }
    best = max(found, key=lambda c: found[c])
    return ours, found[best], f"chunked {best}"


def muxwise() -> Claim:
    """S6: MuxWise against chunked prefill and disaggregation, Llama-70B TP 8, Tool&Agent, P99 TBT of 100 ms."""
    base = Scenario.load("muxwise-70b-2x8xa100").with_overrides({"workload": _tool_agent()})
    profile = Profile.load("llama-70b-a100-tp8")
    both = clustered(base, {"count": 1, "role": "prefill"}, {"count": 1, "role": "decode"})
    systems = {
        "MuxWise": (clustered(base, {"count": 1, "role": "multiplexed"}), "muxwise"),
        "pdmux table": (clustered(base, {"count": 1, "role": "multiplexed"}, decisions={"tune": True}), "pdmux_table"),
        "disaggregated": (both, "distserve"),
    } | _chunked(base, profile.name)
    rates = {
        label: 8 * search(scenario, _tbt(100.0), policy, 1.0, 800) / scenario.n_gpus()
        for label, (scenario, policy) in systems.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        half = _half(profile, Path(folder))
        groups = ({"count": 1, "role": r, "profile": half} for r in ("prefill", "decode"))
        apart = search(clustered(base, *groups, profile=half), _tbt(100.0), "distserve", 1.0, 800)
        no_floor = _best(base, _without_floor(profile, Path(folder)), 100.0)
    chunked = max((label for label in rates if label.startswith("chunked")), key=lambda label: rates[label])
    small, small_chunked, which = _small()
    ours, over = rates["MuxWise"], ratio(rates["MuxWise"], apart)
    chunk_ms, step_ms = 1e3 * profile.prefill_s(256, 4000), 1e3 * profile.decode_s(8 * 8000, 8)
    interval = ratio_interval(systems["MuxWise"], systems[chunked], _tbt(100.0), 1.0, 800)
    tokens = 8596 + 182
    return Claim(
        name="S6",
        title="MuxWise against the best chunked prefill, Llama-70B TP 8, Tool&Agent, P99 TBT 100 ms, stable",
        source="MuxWise (ASPLOS 2026), goodput of Tool&Agent, 70B",
        unit="x requests",
        published="3.06 over chunked prefill, 1.62 over disaggregation (TP 4 + TP 4); 8B ShareGPT on one A100 1.2",
        value=ratio(ours, rates[chunked]),
        band=(2.3, 3.8),
        interval=interval,
        extra=1.2 <= over <= 2.1,
        note=(
            f"MuxWise itself serves {ours:.2f} req/s (published 7,430 tokens/s, about 0.85 req/s). Chunked prefill "
            f"collapses in the authors' table, which starts at 512 tokens: a chunk of 256 (the paper's budget) costs "
            f"{chunk_ms:.0f} ms, beside a decode step of {step_ms:.0f} ms close to 100 ms already. Ablation: with the "
            f"line continued below 512 tokens and the constant of a fused step paid once, {no_floor[0]} holds "
            f"{no_floor[1]:.2f} req/s, so the ratio is {ratio(ours, no_floor[1]):.2f}. Over disaggregation ours is "
            f"{over:.2f} on two TP 4 halves (a stand-in, the TP 8 table with every second doubled) and "
            f"{ratio(ours, rates['disaggregated']):.2f} against two TP 8 instances per GPU. 8B ShareGPT "
            f"against the best of four budgets ({which}): {ratio(small, small_chunked):.2f}. The trace "
            "is a surrogate that shares 2.6k prompt tokens, not 4.9k."
        ),
        rows=(
            *((label, rate, "req/s per 8 GPUs") for label, rate in rates.items()),
            ("disaggregated, TP 4 + TP 4 (stand-in)", apart, "req/s per 8 GPUs"),
            (f"ablation without the 512-token floor: {no_floor[0]}", no_floor[1], "req/s per 8 GPUs"),
            ("8B ShareGPT, one A100: MuxWise", small, "req/s"),
            (f"8B ShareGPT, one A100: {which}", small_chunked, "req/s"),
            ("ratio over chunked without the floor", ratio(ours, no_floor[1]), "x"),
            ("ratio over disaggregated TP 4 + TP 4", over, "x"),
            ("ratio 8B ShareGPT", ratio(small, small_chunked), "x"),
        ),
        curves=(
            Curve(
                "published (tokens/s ÷ mean tokens)",
                ("chunked", "disaggregated", "MuxWise"),
                (2269 / tokens, 4538 / tokens, 7430 / tokens),
                published=True,
            ),
            Curve("ours", ("chunked", "disaggregated", "MuxWise"), (rates[chunked], apart, ours)),
            Curve("ours, no 512-token floor", ("chunked",), (no_floor[1],)),
        ),
        axes=("", "goodput on eight GPUs [req/s]"),
    )
