"""From measured points and findings to a profile, its held-out error and a picture."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar

from engine.calibration.points import Measured, Point, Store, arrays
from engine.errors import SlalomError
from engine.latency import evaluate
from engine.latency.fit import MIN_POINTS, DecodeSamples, PrefillSamples, fit_profile
from engine.latency.profile import Profile, Provenance, Roofline, Share, pack
from engine.model.llama import Llama

#: Wall slow-down beside busy neighbours that thread time does not show, beyond which somebody else was computing.
_DISTURBED = 1.3


@dataclass(frozen=True)
class Calibration:
    """:param fused_mape: error of fused steps under the fitted saving
    :param busy: share of points taken while somebody else used the machine
    :param neighbour_slowdown: of a step while every other instance computes
    :param bytes_per_s: of a KV transfer (``links: bandwidth_gb_s`` of a scenario); infinite: size does not show
    """

    profile: Profile
    fused_mape: float
    busy: float
    failed: int
    neighbour_slowdown: float
    bytes_per_s: float

    def facts(self) -> dict[str, Any]:
        """The figures a user wants to see, JSON-ready."""
        fit, p = self.profile.fit, self.profile
        return {
            "profile": p.name,
            "device": p.device,
            "prefill_held_out_error": fit.prefill_mape if fit else None,
            "decode_held_out_error": fit.decode_mape if fit else None,
            "fused_error": self.fused_mape,
            "points": {"prefill": fit.n_prefill if fit else 0, "decode": fit.n_decode if fit else 0},
            "failed_points": self.failed,
            "points_on_a_busy_machine": self.busy,
            "host_s_per_step": p.step_overhead_s,
            "neighbour_slowdown": self.neighbour_slowdown,
            "migrate_latency_s": p.migrate_latency_s,
            "kv_gb_per_s": None if np.isinf(self.bytes_per_s) else self.bytes_per_s * 1e-9,
            "switch_s": p.switch_s,
            "kv_tokens": p.kv_tokens,
        }


def device_name(model: Llama) -> str:
    """The device of ``model`` as its vendor calls it."""
    device = model.embed.weight.device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()}, 1 core"
    except OSError:
        pass
    return f"{platform.processor() or platform.machine()}, 1 core"


def model_facts(model: Llama) -> tuple[float, float, float]:
    """(parameters multiplied with every prompt token, bytes a decode step reads, KV bytes per token)."""
    size, c = model.embed.weight.dtype.itemsize, model.config  # not from the weights: they may be packed
    heads = c.n_heads + c.n_kv_heads + c.n_kv_heads
    inner = c.n_layers * c.width * ((heads + c.n_heads) * c.head_dim + 3 * c.ffn)
    return float(inner), float((inner + c.vocab * c.width) * size), float(c.kv_elements_per_token * size)


def predict_s(head: np.void, row: np.void, point: Point) -> float:
    """Seconds of ``point`` by a packed profile, host time excluded."""
    t = point.prompts * point.n
    prefill = evaluate.prefill_s(head, row, float(t * point.n), float(t * point.r), float(t))
    per_ctx, base = evaluate.decode_line(head, row, point.bs, 1.0) if point.bs else (0, 0)
    decode = (per_ctx * point.bs * point.ctx + base) * 1e-12 - (head["step_overhead_s"] if point.bs else 0.0)
    return float(prefill + decode - evaluate.fused_shared_s(row, prefill, decode))


def assemble(
    store: Store,
    model: Llama,
    *,
    name: str,
    model_name: str,
    kv_tokens: int,
    max_prompt: int,
    neighbours: int = 0,
    neighbour_load: float = 0.75,
    notes: str = "",
    seed: int = 0,
) -> Calibration:
    """Fit one profile to everything ``store`` holds.

    :param neighbours: other instances that compute on this machine at the same time
    :param neighbour_load: share of time they do, in the state the profile stands for
    :raises SlalomError: too few points, or a fit that the device cannot be as fast as
    """
    prefill, decode, fused = store.of("prefill"), store.of("decode"), store.of("fused")
    for kind, found in (("prefill", prefill), ("decode", decode)):
        if len(found) < MIN_POINTS:
            fix = f"at least {MIN_POINTS} are needed; give more --budget and run it again (finished points are kept)"
            raise SlalomError(f"{kind} points", len(found), fix)
    slowdown = _neighbour_slowdown(store.notes.get(f"neighbours_{neighbours}"))
    factor = 1.0 + (slowdown - 1.0) * neighbour_load * (neighbours > 0)
    facts = _facts(store, model, name, model_name, kv_tokens, max_prompt) | {"provenance": _provenance(store, notes)}
    n, r, prompts, seconds = (np.array(c) for c in arrays(prefill, "n", "r", "prompts", "seconds"))
    ctx, bs, decode_s = (np.array(c) for c in arrays(decode, "ctx", "bs", "seconds"))
    plain = fit_profile(
        PrefillSamples(n, r, seconds, prompts), DecodeSamples(ctx * bs, bs, decode_s), facts=facts, seed=seed
    )
    shared, error = _fused(plain, fused)
    per_sequence = float((store.notes.get("host") or {}).get("per_sequence_s", 0.0))
    whole = _loaded(plain.shares[-1], shared, factor, per_sequence)
    rows = _rows(whole, store.notes)
    total = {"total_sms": rows[-1].sms}
    profile = Profile.model_validate(plain.model_dump() | total | {"shares": tuple(row.model_dump() for row in rows)})
    everything = store.points
    return Calibration(
        profile=profile,
        fused_mape=error,
        busy=float(np.mean([m.busy for m in everything if not m.failed])),
        failed=len(store.failures()),
        neighbour_slowdown=slowdown,
        bytes_per_s=float((store.notes.get("link") or {}).get("bytes_per_s") or np.inf),
    )


def _facts(store: Store, model: Llama, name: str, model_name: str, kv_tokens: int, max_prompt: int) -> dict[str, Any]:
    params, weight_bytes, kv_bytes = model_facts(model)
    notes = store.notes
    flops, bandwidth = notes.get("roofline") or (1e18, 1e18)
    weights = model.embed.weight
    cuda = weights.device.type == "cuda"
    sms = torch.cuda.get_device_properties(weights.device).multi_processor_count if cuda else 1
    return {
        "name": name,
        "model": model_name,
        "device": device_name(model),
        "engine": f"slalom, torch {torch.__version__}, {str(weights.dtype).removeprefix('torch.')}",
        "n_layers": model.config.n_layers,
        "total_sms": sms,
        "max_prompt_tokens": max_prompt,
        "kv_tokens": kv_tokens,
        "kv_bytes_per_token": kv_bytes,
        "step_overhead_s": float((notes.get("host") or {}).get("fixed_s", 0.0)),
        "migrate_latency_s": float((notes.get("link") or {}).get("latency_s", 1e-3)),
        "switch_s": float(notes.get("switch_s") or 0.0),
        "roofline": Roofline(
            peak_flops=float(flops), memory_bytes_per_s=float(bandwidth), params=params, weight_bytes=weight_bytes
        ),
    }  # fmt: skip


def _provenance(store: Store, notes: str) -> Provenance:
    counts = ", ".join(f"{len(store.of(kind))} {kind}" for kind in ("prefill", "decode", "fused"))
    busy = sum(m.busy for m in store.points)
    tried = [name.removesuffix("_failed") for name in store.notes if name.endswith("_failed")]
    failed = [name for name in tried if name not in store.notes]  # a later start may have done better
    said = [
        f"Measured points: {counts}; {len(store.failures())} failed; {busy} on a busy machine (thread time used).",
        f"Not measured: {', '.join(failed)}." if failed else "",
        notes,
    ]
    return Provenance(source="slalom calibrate", notes=" ".join(s for s in said if s))


def _neighbour_slowdown(found: Mapping[str, float] | None) -> float:
    """By the wall; by thread time where the wall tells of somebody else's work (both at least 1).

    :param found: what was measured beside so many neighbours, as :func:`engine.calibration.live.neighbour_time` says
    """
    if not found:
        return 1.0
    wall, cpu = max(found["wall"], 1.0), max(found["cpu"], 1.0)
    return float(cpu if wall > _DISTURBED * cpu else wall)


def _fused(profile: Profile, fused: Sequence[Measured]) -> tuple[float, float]:
    """The saving of a fused step with the least relative error, and that error (0, 0 without points)."""
    if not fused:
        return 0.0, 0.0
    head, rows = pack([profile])
    y = np.array([m.seconds for m in fused])
    row = rows[0, -1].copy()

    def error(shared: float) -> float:
        row["fused_shared_s"] = shared
        return float(np.mean([abs(predict_s(head[0], row, m.point) / s - 1.0) for m, s in zip(fused, y, strict=True)]))

    # Beyond the shorter part of a step nothing more can be saved and the error is flat: a bracket around the best of
    # a coarse scan keeps the minimiser off that plain.
    scan = np.linspace(0.0, float(y.max()), 65)
    at = int(np.argmin([error(x) for x in scan]))
    bounds = (scan[max(at - 1, 0)], scan[min(at + 1, len(scan) - 1)])
    best = minimize_scalar(error, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    return float(best.x), float(best.fun)


def _rows(whole: Share, notes: Mapping[str, Any]) -> list[Share]:
    """A row per measured part of the device, ascending, then the whole of it."""
    parts = {int(k.removeprefix("share_")): v for k, v in notes.items() if k.startswith("share_") and "failed" not in k}
    if not parts:
        return [whole]
    total = int(notes["device_total"])
    found = []
    for size, f in sorted(parts.items()):
        slow, small, large = f["prefill"], whole.decode_small_s, whole.decode_large_s
        a, b, c, d = whole.prefill_s
        found.append(
            whole.model_copy(
                update={
                    "sms": size,
                    "prefill_s": (a * slow, b * slow, c * slow, d * slow),
                    "knot_s": tuple(y * slow for y in whole.knot_s),
                    "decode_small_s": (small[0] * f["decode"], small[1] * f["decode"], small[2] * f["decode"]),
                    "decode_large_s": large
                    and (large[0] * f["decode"], large[1] * f["decode"], large[2] * f["decode"]),
                    "corun_prefill": f["corun_prefill"],
                    "corun_decode": f["corun_decode"],
                    "guard": f["guard"],
                }
            )
        )
    return [*found, whole.model_copy(update={"sms": total})]


def _loaded(share: Share, shared: float, factor: float, per_sequence: float) -> Share:
    """``share`` with busy neighbours, the saving of fused steps and host time per sequence."""

    def decode(c: tuple[float, float, float]) -> tuple[float, float, float]:
        return (c[0] * factor, c[1] * factor + per_sequence, c[2] * factor)

    a, b, c, d = share.prefill_s
    return share.model_copy(
        update={
            "prefill_s": (a * factor, b * factor, c * factor, d * factor),
            "knot_s": tuple(y * factor for y in share.knot_s),
            "decode_small_s": decode(share.decode_small_s),
            "decode_large_s": decode(share.decode_large_s) if share.decode_large_s else None,
            "fused_shared_s": shared * factor,
        }
    )


def plot(calibration: Calibration, store: Store, path: Path) -> Path:
    """Three panels: prefill, decode, and the error of every point; replaced atomically.

    :param path: PNG, PDF or SVG by its ending
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    profile = calibration.profile
    head, rows = pack([profile])
    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    colours = {"prefill": "tab:blue", "decode": "tab:green", "fused": "tab:orange"}
    for kind, colour in colours.items():
        points = store.of(kind)  # type: ignore[arg-type]
        measured = np.array([m.seconds for m in points])
        predicted = np.array([predict_s(head[0], rows[0, -1], m.point) for m in points])
        if len(points) == 0:
            continue
        right.plot(1e3 * measured, 100 * (predicted / measured - 1), ".", color=colour, label=kind)
        if kind == "fused":
            continue
        axis = left if kind == "prefill" else middle
        size = [m.point.prompts * m.point.n if kind == "prefill" else m.point.bs for m in points]
        axis.plot(size, 1e3 * measured, "o", color=colour, markersize=4, label="measured")
        axis.plot(size, 1e3 * predicted, "x", color="black", markersize=4, label="fit")
    left.set(xscale="log", yscale="log", xlabel="prompt tokens in the step", ylabel="prefill [ms]")
    middle.set(xscale="log", yscale="log", xlabel="sequences (contexts differ)", ylabel="decode step [ms]")
    right.set(xscale="log", xlabel="measured [ms]", ylabel="fit ÷ measured − 1 [%]")
    right.axhline(0.0, color="grey", linewidth=0.8)
    for axis in (left, middle, right):
        axis.legend(fontsize="small", frameon=False)
    figure.suptitle(f"{profile.name}: {profile.model} on {profile.device}", fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    figure.savefig(part, dpi=120)
    os.replace(part, path)
    return path
