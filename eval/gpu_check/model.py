"""The 8B model: decode against the bandwidth floor, prefill against the matmul ceiling, and the two side by side."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from engine.kernels import Span, Spans
from engine.lanes.base import Lane
from engine.model import SamplingParams
from eval.gpu_check.device import ceilings
from eval.gpu_check.partitions import decode_spans, graphs_on
from eval.gpu_check.report import Cases
from eval.gpu_check.rig import Rig

_GREEDY = SamplingParams(temperature=0.0)


def _weight_bytes(rig: Rig) -> int:
    """Bytes a step must read: every weight but the embedding, of which it reads a row a token."""
    model = rig.runner.model
    elements = sum(p.numel() for p in model.parameters())
    if model.head is not None or rig.dry:
        elements -= model.embed.weight.numel()
    return max(elements, 1) * model.embed.weight.element_size()


def decode(rig: Rig, cases: Cases) -> dict[str, Any]:
    """Milliseconds of a step by batch: by graph on the device, all of it on the host, without a graph; the floor."""
    bandwidth = ceilings(rig)["copy_bytes_per_s"]
    runner, lane = rig.runner, rig.gpu.whole().decode
    graphs = graphs_on(rig, lane, *rig.sizes.batches)
    per_token = runner.model.config.kv_elements_per_token * runner.model.embed.weight.element_size()

    def one(n: int) -> dict[str, Any]:
        spans = decode_spans(rig, n)
        floor_ms = (_weight_bytes(rig) + n * (rig.sizes.context + 1) * per_token) / bandwidth * 1e3
        graphs.replay(spans)
        graph_ms = rig.ms(graphs._graphs[True, n].replay, lane)

        def eager() -> Any:
            return runner.run(runner.batch(spans, sm_count=lane.size), [_GREEDY] * n, [0] * n)

        def whole() -> Any:
            found = graphs.replay(spans)
            assert found is not None
            assert found.logits is not None
            return runner.choose(found.logits, [_GREEDY] * n, [0] * n).tolist()

        return {
            "floor_ms": floor_ms, "graph_ms": graph_ms, "speed_of_floor": floor_ms / graph_ms,
            "step_ms": rig.ms(whole, lane), "eager_ms": rig.ms(eager, lane, max(2, rig.sizes.repeats // 4)),
        }  # fmt: skip

    for n in rig.sizes.batches:
        cases.take({"batch": n}, partial(one, n))
    graphs.close()
    return {"context": rig.sizes.context, "bandwidth_bytes_per_s": bandwidth}


def chunks(rig: Rig, cases: Cases) -> dict[str, Any]:
    """Milliseconds of a short chunk by rows: its graph on the device, and launched by the host."""
    runner, lane = rig.runner, rig.gpu.whole().prefill
    graphs = graphs_on(rig, lane, chunks=rig.sizes.chunks)

    def one(rows: int) -> dict[str, Any]:
        spans = replace(Spans.of([_prompt(rig, rows)]), prompts=1)
        graphs.replay(spans)

        def eager() -> Any:
            return runner.run_layers(runner.batch(spans, sm_count=lane.size), (0, runner.n_layers))

        return {
            "graph_ms": rig.ms(graphs._graphs[False, rows].replay, lane),
            "step_ms": rig.ms(lambda: graphs.replay(spans), lane),
            "eager_ms": rig.ms(eager, lane, max(2, rig.sizes.repeats // 4)),
        }

    for rows in rig.sizes.chunks:
        cases.take({"rows": rows}, partial(one, rows))
    graphs.close()
    return {}


def _prompt(rig: Rig, tokens: int, start: int = 0) -> Span:
    """A prompt on the blocks behind those of the decodes."""
    used = max(rig.sizes.batches) * -(-(rig.sizes.context + 2) // 16)
    return Span([5] * (tokens - start), start, range(used, used + -(-tokens // 16)))


def _prefill_flop(rig: Rig, tokens: int) -> float:
    config = rig.runner.model.config
    layer = config.width * (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    layer += config.n_heads * config.head_dim * config.width + 3 * config.width * config.ffn
    attention = 2 * tokens * tokens * config.n_heads * config.head_dim  # causal: half of the square
    return config.n_layers * (2.0 * tokens * layer + attention)


def prefill(rig: Rig, cases: Cases) -> dict[str, Any]:
    """Milliseconds of a prompt, whole, in chunks and in slices of layers, and its share of the measured ceiling."""
    ceiling = ceilings(rig)["matmul_flop_per_s"]
    runner, lane, few = rig.runner, rig.gpu.whole().prefill, max(2, rig.sizes.repeats // 4)
    n_layers = runner.n_layers

    def one(tokens: int) -> dict[str, Any]:
        chunk = max(16, tokens // 4)

        def whole() -> None:
            runner.run_layers(runner.batch([_prompt(rig, tokens)], sm_count=lane.size), (0, n_layers))

        def chunked() -> None:
            for end in range(chunk, tokens + chunk, chunk):
                end = min(end, tokens)
                span = _prompt(rig, end, max(0, end - chunk))
                runner.run_layers(runner.batch([span], sm_count=lane.size), (0, n_layers))

        whole_ms = rig.ms(whole, lane, few)
        return {
            "whole_ms": whole_ms, "chunked_ms": rig.ms(chunked, lane, few), "chunk": chunk,
            "layer_sliced_ms": rig.ms(lambda: _slices(rig, tokens, lane, lambda: None), lane, few),
            "share_of_ceiling": _prefill_flop(rig, tokens) / (whole_ms * 1e-3) / ceiling,
        }  # fmt: skip

    for tokens in rig.sizes.prompts:
        cases.take({"tokens": tokens}, partial(one, tokens))
    return {"ceiling_flop_per_s": ceiling}


def _slices(rig: Rig, tokens: int, lane: Lane, between: Callable[[], None]) -> None:
    """One prompt in eight slices of layers, each launched when the one before has ended."""
    runner, carry = rig.runner, None
    cuts = sorted({round(k * runner.n_layers / 8) for k in range(9)})
    batch = runner.batch([_prompt(rig, tokens)], sm_count=lane.size)
    for layers in pairwise(cuts):
        carry = runner.run_layers(batch, layers, carry)
        lane.wait()
        between()


def itl(rig: Rig, cases: Cases) -> dict[str, Any]:
    """Inter-token latency of a decode graph: alone, with prefill on plain streams, with prefill on a partition."""
    n, spans = rig.sizes.itl_batch, decode_spans(rig, rig.sizes.itl_batch)
    plans: list[tuple[str, int | None, bool, float | None]] = [
        ("alone", None, False, None), ("plain streams", None, True, None), ("plain streams", None, True, 1e-4)
    ]  # fmt: skip
    for sms in rig.sizes.cuts[:5]:
        plans += [("partition, alone", sms, False, None), ("partition", sms, True, 1e-4)]

    def one(cut: int | None, beside: bool, interval: float | None) -> dict[str, Any]:
        pair = rig.gpu.whole() if cut is None else rig.gpu.split(cut)
        graphs = graphs_on(rig, pair.decode, n)
        usual = sys.getswitchinterval()
        sys.setswitchinterval(interval or usual)
        try:
            found = _side_by_side(rig, pair.decode, pair.prefill if beside else None, partial(graphs.replay, spans))
        finally:
            sys.setswitchinterval(usual)
            graphs.close()
        return found | {"decode_sms": pair.decode.size, "prefill_sms": pair.prefill.size if beside else None,
                        "switch_interval_s": interval or usual}  # fmt: skip

    for mode, cut, beside, interval in plans:
        cases.take({"mode": mode}, partial(one, cut, beside, interval))
    return {"batch": n, "prompt": rig.sizes.itl_prompt, "context": rig.sizes.context}


def _side_by_side(rig: Rig, decode_lane: Lane, prefill_lane: Lane | None, step: Callable[[], Any]) -> dict[str, Any]:
    stop, prompts, errors = threading.Event(), [0], []

    def prefills(lane: Lane) -> None:
        try:
            if not rig.dry:
                torch.cuda.set_device(0)
            with lane.open(), torch.inference_mode():
                while not stop.is_set():
                    _slices(rig, rig.sizes.itl_prompt, lane, lambda: None)
                    prompts[0] += 1
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=prefills, args=(prefill_lane,)) if prefill_lane is not None else None
    seconds = []
    with decode_lane.open(), torch.inference_mode():
        step()
        decode_lane.wait()
        begin = time.perf_counter()
        if thread is not None:
            thread.start()
        for _ in range(rig.sizes.itl_steps):
            before = time.perf_counter()
            step()
            decode_lane.wait()
            seconds.append(time.perf_counter() - before)
    done, elapsed = prompts[0], time.perf_counter() - begin
    stop.set()
    if thread is not None:
        thread.join()
    if errors:
        raise errors[0]
    p50, p99 = np.percentile(np.array(seconds) * 1e3, (50, 99))
    return {"itl_p50_ms": float(p50), "itl_p99_ms": float(p99), "itl_max_ms": max(seconds) * 1e3,
            "prefill_tokens_per_s": done * rig.sizes.itl_prompt / elapsed if thread is not None else None}  # fmt: skip
