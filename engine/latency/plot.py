"""Draw a latency profile: prefill over tokens, decode over batch, one line per SM share."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from engine.latency import evaluate
from engine.latency.fit import DecodeSamples, PrefillSamples
from engine.latency.profile import Profile, pack

__all__ = ["plot_profile"]

#: Context of each sequence in the decode panel, tokens.
CONTEXT = 1024


def plot_profile(
    profile: Profile,
    path: str | os.PathLike[str],
    prefill: PrefillSamples | None = None,
    decode: DecodeSamples | None = None,
) -> Path:
    """Write a two-panel picture; measured points, if given, appear as dots.

    :param path: PNG, PDF or SVG by its ending; replaced atomically
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    head, shares = pack([profile])
    tokens = np.unique(np.geomspace(16, min(profile.max_prompt_tokens, 32768), 60).astype(int))
    batches = np.unique(np.geomspace(1, min(256, max(2, profile.kv_tokens // CONTEXT)), 40).astype(int))
    for j, share in enumerate(profile.shares):
        colour = (0.10, 0.35 + 0.45 * (1 - share.sms / profile.total_sms), 0.65)
        row = shares[0, j]
        prefill_ms = [1e3 * evaluate.prefill_s(head[0], row, n * n, 0, n) for n in tokens.tolist()]
        decode_ms = [1e3 * evaluate.decode_s(head[0], row, CONTEXT * b, b) for b in batches.tolist()]
        left.plot(tokens, prefill_ms, color=colour, label=f"{share.sms} SMs")
        right.plot(batches, decode_ms, color=colour)
    if prefill is not None:
        sizes = prefill.features()[:, 2]
        left.plot(sizes, 1e3 * np.asarray(prefill.seconds), ".", color="black", markersize=4, label="measured")
    if decode is not None:
        right.plot(decode.bs, 1e3 * np.asarray(decode.seconds), ".", color="black", markersize=4)
    left.set(xscale="log", yscale="log", xlabel="prompt tokens in the step", ylabel="prefill [ms]")
    right.set(xscale="log", yscale="log", xlabel=f"sequences of {CONTEXT} tokens", ylabel="decode step [ms]")
    left.legend(fontsize="x-small", ncols=2, frameon=False)
    figure.suptitle(f"{profile.name}: {profile.model} on {profile.tp} x {profile.device}", fontsize="medium")
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.stem}.part{target.suffix}")
    figure.savefig(part, dpi=120)
    os.replace(part, target)
    return target
