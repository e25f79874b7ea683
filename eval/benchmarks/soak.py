"""Hours of misfortune in minutes: requests are served while steps fail, threads die, links break, clients leave.

Each round builds a live engine on the tiny random model, and a modelled cluster on a virtual clock, and mistreats
both. Afterwards nobody may still wait, every block must be back, answers must be those of an undisturbed engine,
and from engine to engine neither memory nor threads may grow.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from engine.calibration.quick import measure
from engine.core.events import interrupt
from engine.core.events.slots import slots_of
from engine.core.kinds import RequestState, Role
from engine.core.setup import ClusterOptions, InstanceSpec, LinkSpec, SloClass
from engine.core.state import NEVER, ClusterState
from engine.errors import SlalomError
from engine.lanes.cpu import CpuDevice
from engine.live.clock import VirtualClock
from engine.live.door import Overloaded, Unavailable
from engine.live.engine import Engine, build_state
from engine.live.hosts import LocalExecutor, LocalHost, local_hosts
from engine.live.integrity import faults
from engine.live.modelled import ModelledInstances
from engine.live.request import Delta, Request
from engine.live.runtime import Runtime
from engine.live.transfer import CopyTransport, Transfer
from engine.model import KVPool, ModelRunner, SamplingParams, Span, load_model, load_tokenizer
from engine.model.llama import Llama
from env.scenario import Scenario, list_scenarios
from env.surrogate.arena import arena_of, build_trace, horizon_s
from eval.benchmarks.growth import growth_of

_KV = 1024
_ROUND_S = 15.0
_DRAIN_S, _OPEN = 60.0, 24  # seconds; requests at once
_SHAPES = 70  # beyond 64 rows nothing is kept
_ROUNDS = 60  # in a short run; a long one has longer rounds, and more of them
_MOST_GROWTH_MB = 0.1  # of resident memory, with every engine built and closed
_GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
_LAYOUTS: tuple[tuple[InstanceSpec, ...], ...] = (
    (InstanceSpec(Role.PREFILL, 0, _KV), InstanceSpec(Role.DECODE, 1, _KV, link=1)),
    tuple(InstanceSpec(Role.MIXED, i, 512, link=i, chunk_tokens=40) for i in range(3)),
    (
        InstanceSpec(Role.PREFILL, 0, _KV),
        InstanceSpec(Role.DECODE, 1, _KV, link=1, max_batch=4),
        InstanceSpec(Role.MIXED, 2, _KV, link=2, chunk_tokens=40),
        InstanceSpec(Role.MULTIPLEXED, 2, _KV, link=3, chunk_tokens=40),
    ),
)
_OPTIONS = ClusterOptions(
    hold=True, place_decode=True, reallocate=True, tune=True, hold_s=0.005, control_s=0.05, hold_limit_s=0.5
)


class _Anyhow:
    """A policy that answers at random, and sometimes raises or answers nonsense."""

    name, needs, arrangement = "anyhow", 1, None
    params, memory = np.zeros(1), np.zeros(1)

    def __init__(self, rng: np.random.Generator, trouble: float) -> None:
        self._rng, self._trouble = rng, trouble

    def decide(self, context: Any, candidates: Any, mask: Any, params: Any, memory: Any) -> int:
        luck = self._rng.random()
        if luck < self._trouble:
            raise ZeroDivisionError("injected")
        return 10**6 if luck < 2 * self._trouble else int(self._rng.choice(np.flatnonzero(mask)))

    def describe(self) -> dict[str, Any]:
        return {}


# -- a live engine -----------------------------------------------------------------------------------------


class _Trouble:
    """Draws the faults of one round; counts them. Any thread may ask."""

    def __init__(self, seed: int, lives: int) -> None:
        self._rng, self._lock, self._lives = np.random.default_rng(seed), threading.Lock(), lives
        self.counts: Counter[str] = Counter()

    def happens(self, what: str, chance: float) -> bool:
        with self._lock:
            hit = bool(self._rng.random() < chance) and (what != "thread_deaths" or self._lives > 0)
            self.counts[what] += hit
            self._lives -= hit and what == "thread_deaths"
            return hit


class _Host:
    """A host whose steps fail and whose lanes' threads end, now and then."""

    def __init__(self, host: LocalHost, trouble: _Trouble) -> None:
        self._host, self._trouble = host, trouble
        self.pool, self.watch, self.close = host.pool, host.watch, host.close

    def executor(self, l: int) -> LocalExecutor:
        executor, trouble = self._host.executor(l), self._trouble
        run = executor.run

        def unreliable(*args: Any) -> list[int]:
            if trouble.happens("thread_deaths", 0.0005):
                raise SystemExit
            if trouble.happens("step_failures", 0.002):
                raise RuntimeError("injected")
            return run(*args)

        executor.run = unreliable  # type: ignore[method-assign, assignment]
        return executor


class _Transport(CopyTransport):
    def __init__(self, trouble: _Trouble) -> None:
        self._trouble = trouble

    def copy(self, transfer: Transfer) -> None:
        if self._trouble.happens("broken_links", 0.05):
            raise ConnectionError("injected")
        if self._trouble.happens("hanging_copies", 0.02):
            while not transfer.cancelled:
                time.sleep(0.002)
        if self._trouble.happens("deaf_copies", 0.01):
            time.sleep(0.25)  # longer than both timeouts: lost, and back much later
        super().copy(transfer)


class _Client:
    def __init__(self, prompt: int) -> None:
        self.prompt, self.tokens, self.finish, self.left = prompt, list[int](), "", False
        self.request: Request | None = None

    def __call__(self, delta: Delta) -> None:
        if delta.token is not None:
            self.tokens.append(delta.token)
        self.finish = delta.finish or self.finish


def _meet_all_shapes(model: Llama) -> None:
    """Products of every number of rows: what libraries keep for each is bounded (``engine.model.linear``), and no leak.

    In a thread set up as a lane's, since code is compiled for a number of threads, too.
    """
    runner = ModelRunner(model, KVPool(model.config, blocks=_SHAPES))

    def work() -> None:
        with CpuDevice().whole().decode.open():
            for n in range(1, _SHAPES + 1):
                batch = runner.batch([Span([0], 0, [k]) for k in range(n)])
                runner.run(batch, [_GREEDY] * n, [0] * n)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


class _Live:
    """Live engines on the tiny model, one a round."""

    def __init__(self) -> None:
        self.model, self.tokenizer = load_model("dummy:tiny"), load_tokenizer("dummy:tiny")
        self.tables = measure(self.model)
        _meet_all_shapes(self.model)
        rng = np.random.default_rng(0)
        self.prompts = [rng.integers(0, 256, n).tolist() for n in (1, 7, 16, 33, 70, 150)]
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        with_one = self._state((InstanceSpec(Role.MIXED, 0, _KV),))
        engine = Engine(self.model, self.tokenizer, with_one, _Anyhow(rng, 0.0)).start()
        self.expected = [engine.generate(prompt, _GREEDY) for prompt in self.prompts]
        engine.close()

    def _state(self, specs: Sequence[InstanceSpec]) -> ClusterState:
        return build_state(
            specs, *self.tables, classes=[SloClass(1.0, 0.1)], options=_OPTIONS, links=[LinkSpec() for _ in specs],
            max_requests=2 * _OPEN,
        )  # fmt: skip

    def round(self, seed: int, seconds: float) -> None:
        rng, specs = np.random.default_rng(seed), _LAYOUTS[seed % len(_LAYOUTS)]
        state, trouble = self._state(specs), _Trouble(seed, lives=len(specs) - 1)
        hosts = [_Host(host, trouble) for host in local_hosts(self.model, state, self.tokenizer.eos_ids)]
        engine = Engine(
            self.model, self.tokenizer, state, _Anyhow(np.random.default_rng([seed, 1]), 0.01),
            hosts=hosts, transport=_Transport(trouble), transfer_timeout_s=0.1,
        ).start()  # fmt: skip
        clients = self._mistreat(engine, rng, seconds)
        for client in clients:
            self._judge(client, seed)
        if engine.n_open:
            self.wrong.append(f"round {seed}: {engine.n_open} requests are stuck")
        self._wait(lambda: bool((state.pool["free"] == state.pool["n_blocks"]).all()), 5.0)
        self.wrong += [f"round {seed}: {fault}" for fault in engine.integrity_faults()]
        if not engine.close(5.0) or engine.failure is not None:
            self.wrong.append(f"round {seed}: the engine did not close ({engine.failure!r})")
        self.counts.update(trouble.counts)
        self.counts["transfer_failures"] += engine.instances.transfer_failures
        self.counts["policy_failures"] += engine.runtime.fallbacks.total()
        for name in ("n_preempted", "n_migrated", "n_switches"):
            self.counts[name.removeprefix("n_")] += int(state.cluster[0][name])

    def _mistreat(self, engine: Engine, rng: np.random.Generator, seconds: float) -> list[_Client]:
        clients: list[_Client] = []
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            luck = rng.random()
            if luck < 0.7 and engine.n_open < _OPEN:
                client = _Client(int(rng.integers(len(self.prompts))))
                try:
                    prompt, priority = self.prompts[client.prompt], int(rng.integers(-1, 2))
                    client.request = engine.submit(prompt, _GREEDY, client, priority=priority)
                    clients.append(client)
                except Overloaded:
                    self.counts["overloaded"] += 1
            elif luck < 0.8 and clients:
                client = clients[-int(rng.integers(1, min(_OPEN, len(clients)) + 1))]
                if client.request is not None and not client.finish:
                    client.left = True
                    engine.abort(client.request)
            elif luck < 0.82:
                try:
                    engine.set_role(int(rng.integers(len(engine.state.inst))), Role(int(rng.integers(4))))
                except SlalomError:
                    self.counts["refused_role_changes"] += 1
                except Unavailable as error:
                    self.wrong.append(f"a role change: {error}")
            time.sleep(float(rng.exponential(0.01)))
        self._wait(lambda: engine.n_open == 0, _DRAIN_S)
        return clients

    def _judge(self, client: _Client, seed: int) -> None:
        self.counts["requests"] += 1
        self.counts[f"ended_{client.finish or 'never'}"] += 1
        if client.finish == "length" and client.tokens != self.expected[client.prompt]:
            self.wrong.append(f"round {seed}: other tokens for prompt {client.prompt}")
        if client.finish not in ("length", "error") and not (client.finish == "abort" and client.left):
            self.wrong.append(f"round {seed}: a request ended with {client.finish!r}")

    @staticmethod
    def _wait(condition: Any, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition() and time.monotonic() < end:
            time.sleep(0.01)


# -- a modelled cluster ------------------------------------------------------------------------------------


class _Chaos(ModelledInstances):
    """Clients leave, transfers fail, instances die and roles change at random boundaries."""

    def __init__(self, state: ClusterState, clock: VirtualClock, n_roots: int, seed: int) -> None:
        super().__init__(state, clock, n_roots)
        self._rng = np.random.default_rng(seed)
        self._doomed: set[int] = set()
        self._lost: set[int] = set()
        self.kept: list[tuple[int, int, int]] = []
        self.counts: Counter[str] = Counter()

    def _misfortune(self) -> None:
        luck, n = self._rng.random(), len(self._state.inst)
        if luck < 0.01:
            states = self._state.req["state"]
            alive = np.flatnonzero((states > RequestState.NEW) & (states < RequestState.FINISHED))
            if len(alive):
                self._doomed.add(int(self._rng.choice(alive)))
        elif luck < 0.02:
            role = int(self._rng.integers(4))
            self.counts["role_changes"] += interrupt.request_role(self._words, int(self._rng.integers(n)), role)
        elif luck < 0.021 and len(self._lost) < n - 1:
            self._lost.add(i := int(self._rng.integers(n)))
            interrupt.lose(self._words, i)
            for l in range(2):
                self._clock.at(2 * i + l, NEVER)
        for i in self._lost:
            interrupt.evacuate(self._words, i)
        for r in list(self._doomed):
            if interrupt.abort(self._words, r, self._clock.now):
                self._doomed.remove(r)
                self.counts["aborted"] += 1
        if self.kept and luck > 0.5:
            interrupt.release_blocks(self._words, *self.kept.pop())

    def lane_ends(self, i: int, l: int, outcome: Any) -> None:
        super().lane_ends(i, l, outcome)
        self._misfortune()

    def arrives(self, outcome: Any) -> None:
        super().arrives(outcome)
        self._misfortune()

    def link_ends(self, link: int, outcome: Any) -> None:
        if self._rng.random() < 0.9:
            super().link_ends(link, outcome)
        else:
            lists, lose = self._state.lists, bool(self._rng.random() < 0.5)
            receiver = int(self._state.req[lists[len(lists) - len(self._state.link) + link, 0]]["dest"])
            tail, n, starts = interrupt.fail_transfer(self._words, link, lose)
            self.kept += [(receiver, tail, n)] if lose else []
            self.counts["transfer_failures"] += 1
            if starts:
                self.start_link(link)
        self._misfortune()


def _modelled_round(seed: int, counts: Counter[str]) -> list[str]:
    """Play one shipped scenario with misfortunes; sentences about what went wrong."""
    name = list_scenarios()[seed % len(list_scenarios())]
    scenario = Scenario.load(name)
    trace = build_trace(scenario, scenario.reference_rate, 200, seed, "test")
    state = arena_of(scenario).cluster(None, trace, horizon_s(trace) + 3600.0)
    clock = VirtualClock(slots_of(len(state.inst), len(state.link)).total, int(state.cluster[0]["horizon_ticks"]))
    chaos = _Chaos(state, clock, trace.n_roots, seed)
    runtime = Runtime(state, _Anyhow(np.random.default_rng(seed), 0.01), chaos, clock)
    runtime.run()
    for kept in chaos.kept:
        interrupt.release_blocks(runtime.words, *kept)
    counts.update(chaos.counts, lost_instances=len(chaos._lost))
    counts["requests"] += int(state.cluster[0]["n_sent"])
    counts["finished"] += int(state.cluster[0]["n_finished"])
    open_ = int(state.cluster[0]["n_sent"] - state.cluster[0]["n_done"])
    stuck = [f"{open_} requests are stuck"] if open_ else []
    return [f"modelled round {seed} ({name}): {x}" for x in stuck + faults(state)]


# -- the whole ---------------------------------------------------------------------------------------------


def _resident_mb() -> float:
    """Of this process, once garbage is collected and malloc has given back what it only keeps: what is still held."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library keeps its pages, and what they hide
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status") as status:
        return next(float(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))


def _settled(memory: Sequence[float]) -> Sequence[float]:
    """The rounds after the first fifth, in which caches fill and every layout comes by: at least three."""
    return memory[min(max(len(_LAYOUTS), len(memory) // 5), len(memory) - 3) :]


def run(minutes: float = 30.0) -> dict[str, Any]:
    """Rounds for ``minutes``, each with an engine of its own. ``ok`` is false when anything was lost, stuck or wrong,
    or when resident memory certainly goes on growing by more than 0.1 MB an engine (:func:`growth_of`).
    """
    for name in ("slalom.instance", "slalom.runtime"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)  # thousands of injected faults
    begin, live, modelled = time.monotonic(), _Live(), Counter[str]()
    wrong = live.wrong
    memory: list[float] = []
    threads = threading.active_count()
    rounds, shown, told = 0, begin, 0
    while rounds < 12 or time.monotonic() - begin < 60.0 * minutes:
        live.round(rounds, min(_ROUND_S, 60.0 * minutes / _ROUNDS))
        for k in range(4):
            wrong += _modelled_round(4 * rounds + k, modelled)
        memory.append(_resident_mb())
        if threading.active_count() != threads:
            wrong.append(f"round {rounds}: {threading.active_count()} threads, {threads} at the start")
        rounds += 1
        for sentence in wrong[told:]:
            print(f"soak: {sentence}", file=sys.stderr, flush=True)
        told = len(wrong)
        if time.monotonic() - shown > 60.0:
            shown = time.monotonic()
            done = f"{(shown - begin) / 60:.0f} of {minutes:.0f} min, {live.counts['requests']} live requests"
            print(f"soak: {done}, {len(wrong)} faults, {memory[-1]:.0f} MB", file=sys.stderr, flush=True)
    settled = _settled(memory)
    growth = growth_of(settled)
    if growth.low > _MOST_GROWTH_MB:
        wrong.append(f"resident memory grows by {growth.low:.2f} to {growth.high:.2f} MB an engine")
    return {
        "ok": not wrong,
        "wrong": wrong[:20],
        "minutes": (time.monotonic() - begin) / 60.0,
        "rounds": rounds,
        "live": dict(sorted(live.counts.items())),
        "modelled": dict(sorted(modelled.items())),
        "resident_mb": {"first": memory[0], "settled": settled[0], "end": memory[-1], "most": max(memory)},
        "growth_mb_per_engine": {name: round(mb, 3) for name, mb in growth._asdict().items()},
        "threads": {"start": threads, "end": threading.active_count()},
    }
