"""The device and its partitions: what there is, what splits give, how fast each part is, what a switch costs."""

from __future__ import annotations

import importlib.metadata
import time
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from engine.errors import SlalomError
from engine.kernels import Batch, Span, Spans
from engine.lanes.base import Lane
from engine.live.graphs import DecodeGraphs
from eval.gpu_check.rig import Rig

__all__ = ["all_splits", "ceilings", "graph_follows_capture", "slowdown", "sm_resource", "switch_cost", "versions"]


def versions(rig: Rig) -> dict[str, Any]:
    """Packages, driver and device by name."""
    found: dict[str, Any] = {}
    for package in ("torch", "triton", "cuda-bindings", "numpy", "numba", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    if not rig.dry:
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "multiprocessors": properties.multi_processor_count,
                  "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}  # fmt: skip
    return found


def sm_resource(rig: Rig) -> dict[str, Any]:
    """SMs that can be partitioned, the fewest of a part, their alignment."""
    whole = rig.driver.sms()
    return {"sms": whole.sms, "least": whole.least, "alignment": whole.alignment}


def all_splits(rig: Rig) -> dict[str, Any]:
    """What the driver makes of a group of n SMs: (asked, group, remainder)."""
    whole = rig.driver.sms()
    rows: list[dict[str, Any]] = []
    for asked in rig.sizes.decode_sms:
        try:
            group, rest = rig.driver.split(whole, asked)
            rows.append({"asked": asked, "group": group.sms, "remainder": rest.sms})
        except SlalomError as error:
            rows.append({"asked": asked, "error": str(error)})
    return {"splits": rows}


def ceilings(rig: Rig) -> dict[str, Any]:
    """Bytes per second of a large copy (read and written), FLOP per second of a large matrix product."""
    source = torch.empty(rig.sizes.copy_bytes, dtype=torch.uint8, device=rig.device)
    target = torch.empty_like(source)
    copy_ms = rig.ms(lambda: target.copy_(source))
    n = rig.sizes.square
    a, b = rig.noise(n, n), rig.noise(n, n, seed=1)
    product_ms = rig.ms(lambda: a @ b)
    return {"copy_bytes_per_s": 2 * source.numel() / copy_ms * 1e3, "matmul_flop_per_s": 2 * n**3 / product_ms * 1e3}


def attention_batch(rig: Rig, n: int, new: int, context: int, sms: int) -> tuple[Batch, int]:
    """``n`` sequences of ``new`` rows at the end of ``context`` tokens, and the blocks they take."""
    each = -(-context // 16)
    spans = [Span([0] * new, context - new, range(k * each, (k + 1) * each)) for k in range(n)]
    return Batch.build(spans, block_tokens=16, device=rig.device, sm_count=sms), n * each


def slowdown(rig: Rig) -> dict[str, Any]:
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

    def on(lane: Lane) -> dict[str, Any]:
        decode, _ = attention_batch(rig, decodes, 1, context, lane.size)
        prefill, _ = attention_batch(rig, 1, prompt, prompt, lane.size)
        return {
            "sms": lane.size,
            "matmul_ms": rig.ms(lambda: F.linear(x, w), lane),
            "decode_attention_ms": rig.ms(lambda: rig.kernels.attend(query, cache, decode, dim**-0.5), lane),
            "prefill_attention_ms": rig.ms(lambda: rig.kernels.attend(long, cache, prefill, dim**-0.5), lane),
        }

    rows = [on(rig.gpu.whole().decode)]
    for cut in rig.sizes.cuts:
        pair = rig.gpu.split(cut)
        rows += [on(pair.decode), on(pair.prefill)]
    return {"shape": {"gemm": [m, k, n], "heads": [heads, kv_heads, dim], "decodes": decodes, "context": context,
                      "prompt": prompt},
            "lanes": sorted(rows, key=lambda row: row["sms"])}  # fmt: skip


def decode_spans(rig: Rig, n: int) -> Spans:
    """The next step of ``n`` sequences at the context that is measured."""
    each = -(-(rig.sizes.context + 2) // 16)
    return Spans.of(Span([7], rig.sizes.context, range(k * each, (k + 1) * each)) for k in range(n))


def graphs_on(rig: Rig, lane: Lane, *buckets: int) -> DecodeGraphs:
    """Decode graphs of the big model captured on ``lane``; refuses to go on without."""
    width = -(-(rig.sizes.context + 2) // 16)
    graphs = DecodeGraphs(
        rig.runner, lane, rig.capturer(), width=width, buckets=buckets, most_bytes=40 << 30, replayable=rig.replayable
    )
    if graphs.missing:
        raise RuntimeError(f"no graph: {graphs.missing}")
    return graphs


def graph_follows_capture(rig: Rig) -> dict[str, Any]:
    """A graph captured on a small lane and on a plain stream, each replayed on the other."""
    n = rig.sizes.itl_batch
    spans = decode_spans(rig, n)
    small, plain = rig.gpu.split(rig.sizes.cuts[1]).decode, rig.gpu.whole().decode
    rows = []
    for captured, on in (("small", small), ("plain", plain)):
        graphs = graphs_on(rig, on, n)
        for replayed, lane in (("small", small), ("plain", plain)):
            ms = rig.ms(partial(graphs.logits, n, spans), lane)
            rows.append({"captured": captured, "replayed": replayed, "ms": ms})
    return {"small_sms": small.size, "rows": rows}


def switch_cost(rig: Rig) -> dict[str, Any]:
    """Milliseconds of a decode step (host) without a change of partition, with one by event, with one by full drain."""
    n = rig.sizes.batches[0]
    spans = decode_spans(rig, n)
    lanes = [rig.gpu.split(cut).decode for cut in rig.sizes.cuts[1:3]]
    sets = [graphs_on(rig, lane, n) for lane in lanes]

    def steps(kind: str) -> float:
        begin = time.perf_counter()
        for k in range(rig.sizes.itl_steps):
            use = k % len(lanes) if kind != "none" else 0
            lane, before = lanes[use], lanes[use - 1]
            if kind == "drain":
                rig.sync()
            with lane.open():
                if kind == "event":
                    lane.follow(before)
                sets[use].logits(n, spans)
        rig.sync()
        return (time.perf_counter() - begin) / rig.sizes.itl_steps * 1e3

    for kind in ("none", "event", "drain"):
        steps(kind)
    return {"decode_sms": [lane.size for lane in lanes], "batch": n,
            "step_ms": {kind: steps(kind) for kind in ("none", "event", "drain")}}  # fmt: skip
