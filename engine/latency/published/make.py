"""Profiles made from published numbers; ``python -m engine.latency.published.make`` writes the shipped files.

The numbers are in :mod:`engine.latency.published.tables`. What no source gives is inferred here, in one
place, and every profile's notes say so:

* KV capacity (OPT's is published): 90 % of 80 GiB per device, less weights and 2 GiB of activations;
* ``fused_shared_s``: the time to read the weights once at 80 % of the bandwidth;
* co-run slow-downs: half of the published worst case (MuxWise: 1.2 on A100, 1.3 on H100), the guard;
* ``switch_s``: 50 ms, an in-process change of role without a reload of weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.latency.fit import PrefillSamples, fit_prefill
from engine.latency.profile import FitError, Profile, Provenance, Roofline, Share, profiles_dir
from engine.latency.published import tables

GIB = 2**30
BANDWIDTH_REACHED = 0.8  # AISimulate's own correction for these devices
SWITCH_S = 0.05
#: Best part of the peak that prefill reaches on few SMs: 80 to 83 % on 8 to 32 SMs in the 70B table (A100).
COMPUTE_REACHED = 0.82
INFERRED = "Inferred: fused_shared_s, co-run factors, switch_s, migrate_latency_s"
KV_INFERRED = "kv_tokens (90 % of 80 GiB per device, less weights and 2 GiB)"


@dataclass(frozen=True)
class Device:
    name: str
    sms: int
    peak_flops: float
    memory_bytes_per_s: float
    guard: float


@dataclass(frozen=True)
class Model:
    """``params`` meet every prompt token; a decode step reads ``weight_bytes`` (16-bit, head included)."""

    name: str
    n_layers: int
    params: float
    weight_bytes: float
    resident_bytes: float
    kv_bytes_per_token: float
    max_prompt_tokens: int


A100 = Device("NVIDIA A100-SXM4-80GB", 108, 312e12, 2.039e12, guard=1.2)
H100 = Device("NVIDIA H100-SXM5-80GB", 132, 989e12, 3.35e12, guard=1.3)


def _opt(name: str, layers: int, width: int) -> Model:
    """OPT: multi-head attention, tied embeddings, 2,048 positions."""
    params, head = 12.0 * layers * width**2, 50272.0 * width
    read = 2.0 * (params + head)
    return Model(name, layers, params, read, read, 4.0 * layers * width, 2048)


def _llama(name: str, layers: int, width: int, inner: int, vocab: int, longest: int) -> Model:
    """Llama: eight KV heads of 128, gated MLP, separate output head."""
    params = layers * (2.0 * width**2 + 2.0 * width * 1024 + 3.0 * width * inner)
    head = float(vocab * width)
    read = 2.0 * (params + head)
    return Model(name, layers, params, read, read + 2.0 * head, 4.0 * layers * 1024, longest)


MODELS = {
    "opt-13b": _opt("OPT-13B", 40, 5120),
    "opt-66b": _opt("OPT-66B", 64, 9216),
    "llama-8b": _llama("Llama-3-8B", 32, 4096, 14336, 128256, 131072),
    "llama-70b": _llama("Llama-3-70B", 80, 8192, 28672, 128256, 131072),
    "llama2-70b": _llama("Llama-2-70B", 80, 8192, 28672, 32000, 32768),
}


def published() -> dict[str, Profile]:
    """All shipped profiles by name."""
    made = [
        *(_distserve(model, tp, "") for model, tp in tables.DISTSERVE),
        *(_distserve(model, tp, "vllm") for model, tp in tables.DISTSERVE_VLLM),
        _muxwise_70b(),
        _muxwise_8b(),
        _operators("llama-8b-a100", A100, _a100_scaling()),
        _operators("llama-8b-h100", H100, _h100_scaling()),
        _splitwise("llama2-70b-a100-tp8", A100),
        _splitwise("llama2-70b-h100-tp8", H100),
    ]
    return {profile.name: profile for profile in made}


def write(folder: Path) -> list[Path]:
    """Write every published profile into ``folder``."""
    return [profile.save(folder / f"{name}.json") for name, profile in published().items()]


def _profile(
    name: str, model: Model, device: Device, tp: int, rows: Mapping[int, Mapping[str, Any]], **facts: Any
) -> Profile:
    """A profile with the inferred fields filled in; ``rows`` holds the coefficients by SM count."""
    roofline = Roofline(
        peak_flops=device.peak_flops,
        memory_bytes_per_s=device.memory_bytes_per_s,
        params=model.params,
        weight_bytes=model.weight_bytes,
    )
    corun = 1.0 + (device.guard - 1.0) / 2
    common: dict[str, Any] = {
        "fused_shared_s": _weights_s(model, device, tp),
        "corun_prefill": corun,
        "corun_decode": corun,
        "guard": device.guard,
    }
    room = tp * (0.9 * 80 * GIB - 2 * GIB) - model.resident_bytes
    fields: dict[str, Any] = {
        "kv_tokens": int(room / model.kv_bytes_per_token) // 16 * 16,
        "switch_s": SWITCH_S,
        "max_prompt_tokens": model.max_prompt_tokens,
    }
    return Profile(
        name=name,
        model=model.name,
        device=device.name,
        tp=tp,
        n_layers=model.n_layers,
        total_sms=device.sms,
        kv_bytes_per_token=model.kv_bytes_per_token,
        shares=tuple(Share(sms=sms, **common, **row) for sms, row in sorted(rows.items())),
        roofline=roofline,
        **(fields | facts),
    )


def _weights_s(model: Model, device: Device, tp: int) -> float:
    return model.weight_bytes / (BANDWIDTH_REACHED * device.memory_bytes_per_s * tp)


def _distserve(model: str, tp: int, variant: str) -> Profile:
    """OPT on A100 from DistServe's simulator; its prefill adds 1 ms per pipeline stage (one here)."""
    table = tables.DISTSERVE_VLLM if variant else tables.DISTSERVE
    (p0, p1, p2), small, large = table[model, tp]
    row = {
        "prefill_s": (p2 * 1e-3, p2 * 2e-3, p1 * 1e-3, (p0 + 1.0) * 1e-3),
        "decode_small_s": _context_batch_fixed(small),
        "decode_large_s": _context_batch_fixed(large),
    }
    notes = (
        "Coefficients as published. Prefill holds the simulator's +1 ms (one pipeline stage). Its "
        "extra of 2 ms + 1e-4 ms per token, added to every prefill and decode step on the first stage "
        "(Ray), is in step_overhead_s and ctx_overhead_s; the 0.1 % it adds per prompt token is left "
        "out. kv_tokens as published (max_num_tokens.csv). OPT has 2,048 positions: nothing beyond "
        f"was measured. Cached-prefix coefficient b = 2a by operation count. {INFERRED}."
    )
    if variant:
        notes = "The simulator's separate, slower fit of the vLLM of late 2023. " + notes
    return _profile(
        "-".join(filter(None, (model, "a100", f"tp{tp}", variant))),
        MODELS[model],
        A100,
        tp,
        {A100.sms: row if p2 >= 0 else row | {"prefill_s": (p2 * 1e-3, 0.0, p1 * 1e-3, (p0 + 1.0) * 1e-3)}},
        engine="vLLM (2023), as in simdistserve" if variant else "DistServe",
        provenance=Provenance(
            source="DistServe (OSDI 2024), simdistserve/estimators/profile_data",
            url="https://github.com/LLMServe/DistServe",
            commit="82831f1604cc6b10bebd360f6c437a07790dde9f",
            licence="Apache-2.0",
            notes=notes,
        ),
        kv_tokens=tables.OPT_KV_TOKENS[model, tp],
        regime_bs=95,
        step_overhead_s=2e-3,
        ctx_overhead_s=1e-7,
    )


def _context_batch_fixed(x: tuple[float, float, float]) -> tuple[float, float, float]:
    """DistServe writes (fixed, per context token, per sequence) in milliseconds."""
    return x[1] * 1e-3, x[2] * 1e-3, x[0] * 1e-3


def _per_1024(prefill: tuple[float, ...], decode: tuple[float, ...]) -> dict[str, Any]:
    """Milliseconds and units of 1024 tokens to seconds and tokens."""
    a, b, c, d = prefill
    return {
        "prefill_s": (a * 1e-3 / 1024**2, b * 1e-3 / 1024**2, c * 1e-3 / 1024, d * 1e-3),
        "decode_small_s": (decode[0] * 1e-3 / 1024, decode[1] * 1e-3, decode[2] * 1e-3),
    }


def _muxwise_source(notes: str) -> Provenance:
    return Provenance(
        source="MuxWise (ASPLOS 2026) authors' branch of SGLang, python/sglang/srt/multiplex/predictor.py",
        url="https://github.com/sgl-project/sglang",
        commit="56f74d2489540c89bba016991e45160b930f03d6",
        licence="Apache-2.0",
        notes=notes + f" {INFERRED}, {KV_INFERRED}. guard: the paper's worst case on A100.",
    )


def _muxwise_70b() -> Profile:
    rows = {
        sms: _per_1024(tables.A100_70B_PREFILL[sms], tables.A100_70B_DECODE[sms]) for sms in tables.A100_70B_PREFILL
    }
    notes = (
        "Prefill: the fit for more than 8K tokens; decode: the fit up to 128K context tokens; n "
        "floored at 512. The file does not name the tensor parallelism: 8 is the only one of 1, 2, 4, "
        "8 that no coefficient contradicts (at 4, prefill and the KV term would beat the roofline)."
    )
    return _profile(
        "llama-70b-a100-tp8", MODELS["llama-70b"], A100, 8, rows,
        engine="SGLang (slo_scheduler)", provenance=_muxwise_source(notes), prefill_min_tokens=512,
    )  # fmt: skip


def _muxwise_8b() -> Profile:
    rows = {
        sms: _per_1024(_merged_prefill(pieces), tables.A100_8B_DECODE[sms])
        for sms, pieces in tables.A100_8B_PREFILL.items()
    }
    notes = (
        "The file fits prefill in three pieces (to 2K, to 8K, above); here one quadratic per SM count "
        "is fitted to points of the pieces, b taken from the middle one. Decode: the fit up to 128K "
        "context tokens; n floored at 512. The file does not name the tensor parallelism: a decode "
        "step of 5.4 ms and 9.6 ns per context token are faster than one, two or four A100 can read "
        "weights and KV, so 8 is inferred."
    )
    return _profile(
        "llama-8b-a100-tp8", MODELS["llama-8b"], A100, 8, rows,
        engine="SGLang (slo_scheduler)", provenance=_muxwise_source(notes), prefill_min_tokens=512,
    )  # fmt: skip


def _merged_prefill(pieces: tuple[tuple[float, ...], ...]) -> tuple[float, float, float, float]:
    """One quadratic through the three published pieces, in their units."""
    n = np.array([0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32])
    piece = np.digitize(n, [2.0, 8.0], right=True)
    a, _, c, d = np.array(pieces)[piece].T
    a_fit, _, c_fit, d_fit = fit_prefill(
        PrefillSamples(n=n, r=0 * n, seconds=a * n**2 + c * n + d), knots=False
    ).coefficients
    return a_fit, pieces[1][1], c_fit, d_fit


Scaling = dict[int, tuple[float, float, float]]  # per SM count: slow-down of prefill, KV term, weight reading


def _a100_scaling() -> Scaling:
    """How an A100 slows with fewer SMs: MuxWise's tables, within what its SMs can compute."""
    sms = sorted(tables.A100_8B_PREFILL)

    def prefill_4k(m: int) -> float:
        a, _, c, d = tables.A100_8B_PREFILL[m][1]
        return 16 * a + 4 * c + d

    fixed = {m: tables.A100_70B_DECODE[m][2] for m in sms}
    weights = _weights_s(MODELS["llama-70b"], A100, 8) * 1e3
    return {
        m: (
            prefill_4k(m) / prefill_4k(108),
            tables.A100_8B_DECODE[m][0] / tables.A100_8B_DECODE[108][0],
            _weight_slowdown(fixed, m, weights),
        )
        for m in sms
    }


def _h100_scaling() -> Scaling:
    """The same for H100 from the H800 columns; the KV term by SMs (the file fits the square of Σctx)."""
    fixed = tables.H800_DECODE_FIXED
    weights = _weights_s(MODELS["llama-70b"], H100, 8) * 1e3
    return {
        m: (
            max(slow for other, slow in tables.H800_PREFILL_SLOWDOWN.items() if other >= m),
            H100.sms / m,
            _weight_slowdown(fixed, m, weights),
        )
        for m in tables.H800_PREFILL_SLOWDOWN
    }


def _weight_slowdown(fixed_ms: Mapping[int, float], sms: int, weights_ms: float) -> float:
    """Slow-down of weight reading, if it alone explains how a table's fixed decode time grows."""
    gained = max(value for m, value in fixed_ms.items() if m >= sms) - fixed_ms[max(fixed_ms)]
    return 1.0 + gained / weights_ms


def _operators(name: str, device: Device, scaling: Scaling) -> Profile:
    """Llama-3-8B on one device: fitted to operator sums, scaled to SM shares by published slow-downs."""
    model = MODELS["llama-8b"]
    (a, _, c, d), _, _, (k_ctx, k_bs, k_fixed), error = tables.OPERATORS[name]
    weights = _weights_s(model, device, 1)
    per_token_floor = 2.0 * model.params / device.peak_flops
    rows: dict[int, dict[str, Any]] = {}
    for sms, (slow, slow_kv, slow_weights) in scaling.items():
        reachable = per_token_floor * device.sms / sms / COMPUTE_REACHED / c
        x = max(slow, reachable) if sms < device.sms else 1.0
        rows[sms] = {
            "prefill_s": (a * x, 2 * a * x, c * x, d * x),
            "decode_small_s": (
                k_ctx * slow_kv,
                k_bs * slow_weights,
                k_fixed + weights * (slow_weights - 1.0),
            ),
        }
    tables_used = {
        A100.name: "vidur Meta-Llama-3-8B mlp.csv, AISimulate A100 attention",
        H100.name: "LLMServingSim Llama-3.1-8B layers, vidur 7B norms, AISimulate H100 attention",
    }[device.name]
    shares_from = "A100" if device is A100 else "H800"
    notes = (
        f"Sums of published operator times ({tables_used}), fitted here; TTFT of a whole engine is "
        "higher by its host time: step_overhead_s is BLIS' fit on H100 (126 us a step + 32.1 us a "
        "layer). Cached-prefix coefficient b = 2a by operation count. SM shares: slow-downs of "
        f"MuxWise's {shares_from} tables, prefill held to 82 % of the SMs' peak (the 8B table alone "
        "would beat the roofline of one device: it is of eight), decode split into weight and KV "
        "reading, each slowed by its own column, and a constant rest (our inference). "
        f"{INFERRED}, {KV_INFERRED}."
    )
    return _profile(
        name, model, device, 1, rows,
        engine="operator sums (vLLM kernels)",
        provenance=Provenance(
            source="Vidur, AISimulate, LLMServingSim operator tables; MuxWise SM tables; BLIS host time",
            url="https://github.com/microsoft/vidur",
            commit="7d47513363ec447a741ac5e47241580b47724fbf",
            licence="MIT (Vidur, LLMServingSim), Apache-2.0 (AISimulate, SGLang, BLIS)",
            notes=notes,
        ),
        step_overhead_s=126e-6 + 32 * 32.1e-6,
        fit=_fit_error(error),
    )  # fmt: skip


def _splitwise(name: str, device: Device) -> Profile:
    prefill, knot_tokens, knot_s, decode, error = tables.SPLITWISE[name]
    a, _, c, d = prefill
    # A100's piecewise curve leaves no quadratic part: the same model's published coefficient stands in.
    b = 2 * a or tables.A100_70B_PREFILL[A100.sms][1] * 1e-3 / 1024**2
    row = {
        "prefill_s": (a, b, c, d),
        "knot_tokens": knot_tokens,
        "knot_s": knot_s,
        "decode_small_s": decode,
    }
    notes = (
        "Fitted here to 105 measured runs; host time is inside them. No run has a cached prefix: b = "
        f"2a by operation count (A100: MuxWise's b for the same shape). Whole device only. {INFERRED}, "
        f"{KV_INFERRED}."
    )
    return _profile(
        name, MODELS["llama2-70b"], device, 8, {device.sms: row},
        engine="vLLM (2023), as in splitwise-sim",
        provenance=Provenance(
            source="Splitwise (ISCA 2024), splitwise-sim data/perf_model.csv",
            url="https://github.com/Mutinifni/splitwise-sim",
            commit="8f99e7dc9b407f4ce2488d03dd44c0b8b946dab0",
            licence="MIT",
            notes=notes,
        ),
        fit=_fit_error(error),
    )  # fmt: skip


def _fit_error(error: tuple[float, float, int, int]) -> FitError:
    return FitError(prefill_mape=error[0], decode_mape=error[1], n_prefill=error[2], n_decode=error[3])


if __name__ == "__main__":
    for path in write(profiles_dir()):
        print(path.name)
