"""Partitions: how fast each part of the device is, where a graph runs, what a change costs."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch.nn.functional as F

from engine.kernels import Batch, Span, Spans
from engine.lanes.base import Lane
from engine.live.graphs import LaneGraphs
from eval.gpu_check.report import Cases
from eval.gpu_check.rig import Rig


def attention_batch(rig: Rig, n: int, new: int, context: int, sms: int) -> tuple[Batch, int]:
    """``n`` sequences of ``new`` rows at the end of ``context`` tokens, and the blocks they take."""
    each = -(-context // 16)
    spans = [Span([0] * new, context - new, range(k * each, (k + 1) * each)) for k in range(n)]
    return Batch.build(spans, block_tokens=16, device=rig.device, sm_count=sms), n * each


def slowdown(rig: Rig, cases: Cases) -> dict[str, Any]:
    """One product and two attention calls on each half of each cut, alone; milliseconds by SMs."""
    m, k, n = rig.sizes.gemm
    x, w = rig.noise(m, k), rig.noise(n, k, seed=1)
    heads, kv_heads, dim = rig.sizes.heads
    context = 2 * rig.sizes.context
    decodes = min(64, max(rig.sizes.batches))
    query = rig.noise(decodes, heads, dim)
    prompt = rig.sizes.prompts[len(rig.sizes.prompts) // 2]
    long = rig.noise(prompt, heads, dim)
    cache = rig.noise(2, decodes * -(-context // 16), 16, kv_heads, dim)

    def on(cut: int | None, l: int) -> dict[str, Any]:
        lane = (rig.gpu.whole() if cut is None else rig.gpu.split(cut))[l]
        decode, _ = attention_batch(rig, decodes, 1, context, lane.size)
        prefill, _ = attention_batch(rig, 1, prompt, prompt, lane.size)
        return {
            "sms": lane.size,
            "matmul_ms": rig.ms(lambda: F.linear(x, w), lane),
            "decode_attention_ms": rig.ms(lambda: rig.kernels.attend(query, cache, decode, dim**-0.5), lane),
            "prefill_attention_ms": rig.ms(lambda: rig.kernels.attend(long, cache, prefill, dim**-0.5), lane),
        }

    cases.take({"cut": None}, partial(on, None, 1))
    for cut in rig.sizes.cuts:
        cases.take({"cut": cut, "lane": "decode"}, partial(on, cut, 1))
        cases.take({"cut": cut, "lane": "prefill"}, partial(on, cut, 0))
    return {"shape": {"gemm": [m, k, n], "heads": [heads, kv_heads, dim], "decodes": decodes, "context": context,
                      "prompt": prompt}}  # fmt: skip


def decode_spans(rig: Rig, n: int) -> Spans:
    """The next step of ``n`` sequences at the context that is measured."""
    each = -(-(rig.sizes.context + 2) // 16)
    return Spans.of(Span([7], rig.sizes.context, range(k * each, (k + 1) * each)) for k in range(n))


def graphs_on(rig: Rig, lane: Lane, *decodes: int, chunks: tuple[int, ...] = ()) -> LaneGraphs:
    """Graphs of the big model captured on ``lane``."""
    width = -(-(max(rig.sizes.context, *chunks, 0) + 2) // 16) if chunks else -(-(rig.sizes.context + 2) // 16)
    return LaneGraphs(
        rig.runner, lane, rig.capturer(), width=width, decodes=decodes, chunks=chunks, most_bytes=40 << 30,
        replayable=True,
    )  # fmt: skip


def graph_follows_capture(rig: Rig, cases: Cases) -> dict[str, Any]:
    """A graph captured on a small lane and on a plain stream, each replayed on the other."""
    n = rig.sizes.itl_batch
    spans = decode_spans(rig, n)
    small, plain = rig.gpu.split(rig.sizes.cuts[0]).decode, rig.gpu.whole().decode

    def timed(graphs: LaneGraphs, lane: Lane) -> dict[str, Any]:
        return {"ms": rig.ms(partial(graphs.replay, spans), lane)}

    for captured, on in (("small", small), ("plain", plain)):
        graphs = graphs_on(rig, on, n)
        for replayed, lane in (("small", small), ("plain", plain)):
            cases.take(
                {"captured": captured, "replayed": replayed},
                partial(timed, graphs, lane),
            )
        graphs.close()
    return {"small_sms": small.size}


def switch_cost(rig: Rig, cases: Cases) -> dict[str, Any]:
    """Milliseconds of a decode step (host) without a change of partition, with one by event, with one by full drain."""
    n = rig.sizes.batches[0]
    spans = decode_spans(rig, n)
    lanes = [rig.gpu.split(cut).decode for cut in rig.sizes.cuts[:2]]
    sets = [graphs_on(rig, lane, n) for lane in lanes]

    def steps(kind: str) -> dict[str, Any]:
        begin = time.perf_counter()
        for k in range(rig.sizes.itl_steps):
            use = k % len(lanes) if kind != "none" else 0
            lane, before = lanes[use], lanes[use - 1]
            if kind == "drain":
                rig.sync()
            with lane.open():
                if kind == "event":
                    lane.follow(before)
                sets[use].replay(spans)
            lane.wait()  # the static input is overwritten by the next step
        return {"step_ms": (time.perf_counter() - begin) / rig.sizes.itl_steps * 1e3}

    for kind in ("none", "event", "drain"):
        steps(kind)
        cases.take({"kind": kind}, partial(steps, kind))
    return {"decode_sms": [lane.size for lane in lanes], "batch": n}
