"""What only a whole engine shows: host time of a step, busy neighbours, a KV transfer, a role change."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import nnls

from engine.calibration.probe import StepProbe, StepTrace
from engine.core.kinds import Batching, LaneKind, Role
from engine.core.setup import InstanceSpec, LinkSpec, SloClass
from engine.core.state import ClusterState
from engine.latency.rough import device_tables, relative_nnls
from engine.live.engine import Engine, build_state
from engine.live.request import Delta
from engine.model.llama import Llama
from engine.model.sampling import SamplingParams
from engine.model.tokenizer import Tokenizer

_PROMPTS = (32, 128, 512, 1024)


class _First:
    """Takes the first allowed candidate: prompts go to instance 0, and from a PREFILL instance to the next."""

    name, needs, arrangement = "first", 1, None
    params, memory = np.zeros(1), np.zeros(1)

    def decide(self, context: Any, candidates: Any, mask: Any, params: Any, memory: Any) -> int:
        return int(np.flatnonzero(mask)[0])

    def describe(self) -> dict[str, Any]:
        return {}


class _InTurn(_First):
    """Prompts go to all instances in turn, so that as many requests as instances keep every one busy."""

    name = "in_turn"

    def __init__(self) -> None:
        self._calls = 0

    def decide(self, context: Any, candidates: Any, mask: Any, params: Any, memory: Any) -> int:
        allowed = np.flatnonzero(mask)
        self._calls += 1
        return int(allowed[self._calls % len(allowed)])


@dataclass(frozen=True)
class Host:
    """Seconds that a step costs beside its computing: ``fixed_s + per_sequence_s · bs``.

    :param steps: that it was measured on
    """

    fixed_s: float
    per_sequence_s: float
    steps: int


@dataclass(frozen=True)
class Link:
    """A KV transfer takes ``latency_s + bytes ÷ bytes_per_s`` (None: size does not show)."""

    latency_s: float
    bytes_per_s: float | None
    transfers: int


def _state(model: Llama, specs: Sequence[InstanceSpec], requests: int) -> ClusterState:
    """A cluster for ``specs``; nothing here decides by the profile, so it says next to nothing."""
    tables = device_tables((0.0, 0.0, 1e-3, 0.0), (0.0, 0.0, 1e-3), n_layers=model.config.n_layers)
    links = [LinkSpec() for _ in specs]
    targets = [SloClass(60.0, 60.0)]
    return build_state(specs, *tables, classes=targets, links=links, max_requests=requests, prefix_cache=False)


def _serve(engine: Engine, prompts: Sequence[int], output: int, timeout_s: float = 120.0) -> None:
    """Serve requests of these prompt lengths together and wait for all."""
    left = threading.Semaphore(0)

    def sink(delta: Delta) -> None:
        if delta.finish is not None:
            left.release()

    params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
    for n in prompts:
        engine.submit([1 + k % 7 for k in range(n)], params, sink)
    for _ in prompts:
        if not left.acquire(timeout=timeout_s):
            raise TimeoutError("the engine did not answer")


def _decode_steps(
    model: Llama, tokenizer: Tokenizer, instances: int, batches: Sequence[int], output: int, eager: bool
) -> dict[int, list[StepTrace]]:
    """Decode steps by batch size, of ``instances`` equally busy instances with KV of their own; each size twice."""
    most = max(batches)
    spec = InstanceSpec(Role.MIXED, 0, most * (output + 48), batching=Batching.CHUNKED, max_batch=most)
    specs = [replace(spec, pool=i, link=i) for i in range(instances)]
    engine = Engine(model, tokenizer, _state(model, specs, 2 * most * instances), _InTurn(), eager=eager)
    probe = StepProbe(engine)
    engine.start()
    try:
        for bs in batches:
            for _ in range(2):
                _serve(engine, [16] * (bs * instances), output)
    finally:
        engine.close()
    decode = [s for s in probe.steps if s.lane["kind"] == LaneKind.DECODE]
    groups = {bs: [s for s in decode if s.lane["bs"] == bs] for bs in batches}
    return {bs: steps for bs, steps in groups.items() if steps}


def host_time(
    model: Llama, tokenizer: Tokenizer, batches: Sequence[int] = (1, 8), output: int = 16, *, eager: bool = False
) -> Host:
    """Measure :class:`Host` on the decode steps of one instance; ``eager``: without graphs, here and below."""
    groups = _decode_steps(model, tokenizer, 1, batches, output, eager)
    middle = [(bs, float(np.median([s.host_s for s in steps]))) for bs, steps in groups.items()]
    fixed, per = nnls(np.array([[1.0, float(bs)] for bs, _ in middle]), np.array([s for _, s in middle]))[0]
    return Host(float(fixed), float(per), sum(map(len, groups.values())))


def neighbour_time(
    model: Llama,
    tokenizer: Tokenizer,
    instances: int,
    batches: Sequence[int] = (1, 4, 8),
    output: int = 24,
    *,
    eager: bool = False,
) -> dict[str, float]:
    """How much longer a decode step takes when every instance of the engine decodes as much: ``wall`` and thread
    time (``cpu``), mean over batch sizes.

    Measured on a running engine because lanes share their cores with its scheduler, its clients and Python's lock,
    not only the memory with each other.

    :raises ValueError: no batch size was met both alone and beside neighbours
    """
    alone, beside = (
        {
            bs: (float(np.median([s.run_s for s in steps])), float(np.median([s.cpu_s for s in steps])))
            for bs, steps in _decode_steps(model, tokenizer, count, batches, output, eager).items()
        }
        for count in (1, instances)
    )
    common = sorted(alone.keys() & beside.keys())
    if not common:
        raise ValueError(f"no decode batch of {list(batches)} ran both alone and beside neighbours")
    wall, cpu = (float(np.mean([beside[bs][k] / max(alone[bs][k], 1e-9) for bs in common])) for k in (0, 1))
    return {"wall": wall, "cpu": cpu if alone[common[0]][1] > 0.0 else wall}


def link_time(
    model: Llama, tokenizer: Tokenizer, longest: int = 1024, repeats: int = 4, *, eager: bool = False
) -> Link:
    """Measure :class:`Link` between two instances with pools of their own."""
    sizes = [n for n in _PROMPTS if n <= longest] or [longest]
    room = max(sizes) + 64
    specs = [InstanceSpec(Role.PREFILL, 0, room), InstanceSpec(Role.DECODE, 1, room, link=1)]
    engine = Engine(model, tokenizer, _state(model, specs, 4), _First(), eager=eager)
    probe = StepProbe(engine)
    engine.start()
    try:
        for n in sizes * repeats:
            _serve(engine, [n], 2)
    finally:
        engine.close()
    by_size: dict[int, list[float]] = {}
    for blocks, seconds in probe.transfers:
        by_size.setdefault(blocks, []).append(seconds)
    block_bytes = model.config.kv_elements_per_token * model.embed.weight.dtype.itemsize * 16
    rows = np.array([[1.0, blocks * block_bytes * 1e-9] for blocks in by_size])
    middle = np.array([float(np.median(seconds)) for seconds in by_size.values()])
    latency, per_gb = relative_nnls(rows, middle)
    return Link(float(latency), 1e9 / float(per_gb) if per_gb > 0 else None, len(probe.transfers))


def role_change_s(model: Llama, tokenizer: Tokenizer, repeats: int = 5, *, eager: bool = False) -> float:
    """Median seconds of a role change of a drained instance, from asking to serving in the new role."""
    specs = [InstanceSpec(Role.MIXED, i, 256, link=i) for i in range(2)]
    state = _state(model, specs, 4)
    engine = Engine(model, tokenizer, state, _First(), eager=eager).start()
    taken = []
    try:
        for k in range(2 * repeats):
            role = Role.DECODE if k % 2 == 0 else Role.MIXED
            begin = time.perf_counter()
            engine.set_role(1, role)
            while engine.call(lambda: int(state.inst[1]["role"])) != role:
                pass
            taken.append(time.perf_counter() - begin)
    finally:
        engine.close()
    return float(np.median(taken))
