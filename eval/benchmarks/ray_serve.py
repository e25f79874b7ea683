"""Replicas of Ray Serve behind a policy of Slalom, and behind Ray's own router, with one workload::

    python -m eval.benchmarks.ray_serve --profile smollm2-cpu --policy ray --policy predicted_ttft
    python -m eval.benchmarks.ray_serve --engine vllm --model FOLDER --profile mine ...

Plain deployments that stream tokens: ``modelled`` ones take the time that the profile says and compute nothing,
``vllm`` ones hold an ``AsyncLLM`` each. Needs ``slalom[ray]`` with ``ray[serve]``, and for the latter vLLM beside them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

_RAY = "ray"  # the row of Ray's own router
_LONG = 0.2  # of the prompts


class Modelled:
    """An engine that only takes time: prompts that wait and running answers share a step, as the profile says."""

    def __init__(self, profile: str, max_batch: int, chunk_tokens: int = 2048) -> None:
        from engine.latency import Profile
        from policies.route.progress import Progress

        self._profile, self._batch, self._chunk = Profile.load(profile), max_batch, chunk_tokens
        self._waiting: list[tuple[int, asyncio.Queue[int]]] = []
        self._running: list[list[Any]] = []  # [tokens of context, who listens]
        self._news = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self.progress = Progress()

    async def generate(self, body: dict[str, Any]) -> AsyncIterator[str]:
        """Stream ``max_tokens`` tokens."""
        if self._loop is None:
            self._loop = asyncio.create_task(self._run())
        n, tokens = len(body["prompt"]), self._answer(len(body["prompt"]), int(body["max_tokens"]))
        async for _ in self.progress.watch(tokens, prompt_tokens=n):
            yield "x"

    async def _answer(self, n: int, length: int) -> AsyncIterator[int]:
        heard: asyncio.Queue[int] = asyncio.Queue()
        self._waiting.append((n, heard))
        self._news.set()
        try:
            for _ in range(length):
                yield await heard.get()
        finally:
            self._waiting = [x for x in self._waiting if x[1] is not heard]
            self._running = [x for x in self._running if x[1] is not heard]

    async def _run(self) -> None:
        while True:
            if not self._waiting and not self._running:
                self._news.clear()
                await self._news.wait()
            prompts: list[tuple[int, asyncio.Queue[int]]] = []
            while self._waiting and len(self._running) + len(prompts) < self._batch:
                if prompts and sum(n for n, _ in prompts) + self._waiting[0][0] > self._chunk:
                    break
                prompts.append(self._waiting.pop(0))
            seconds = sum(self._profile.prefill_s(n) for n, _ in prompts)
            if self._running:
                seconds += self._profile.decode_s(sum(context for context, _ in self._running), len(self._running))
            running = list(self._running)
            self._running += [[n, heard] for n, heard in prompts]
            await asyncio.sleep(seconds)
            for one in running:
                one[0] += 1
            for _, heard in [*running, *prompts]:
                heard.put_nowait(1)

    def record_routing_stats(self) -> dict[str, Any]:
        """How far the answers are, for routers."""
        return self.progress.stats()


class Vllm:
    """vLLM in this process."""

    def __init__(self, model: str, max_batch: int) -> None:
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from policies.route.progress import Progress

        arguments = AsyncEngineArgs(model=model, max_model_len=4096, max_num_seqs=max_batch, enforce_eager=True)
        self._engine = AsyncLLM.from_engine_args(arguments)
        self._number = 0
        self.progress = Progress()

    async def generate(self, body: dict[str, Any]) -> AsyncIterator[str]:
        """Stream ``max_tokens`` tokens."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._number += 1
        params = SamplingParams(
            max_tokens=int(body["max_tokens"]), ignore_eos=True, temperature=0.0, output_kind=RequestOutputKind.DELTA
        )
        prompt = {"prompt_token_ids": body["prompt"]}
        answer = self._engine.generate(prompt, params, str(self._number))
        async for part in self.progress.watch(answer, prompt_tokens=len(body["prompt"])):
            for _ in part.outputs[0].token_ids:
                yield "x"

    def record_routing_stats(self) -> dict[str, Any]:
        """How far the answers are, for routers."""
        return self.progress.stats()


def run_app(given: argparse.Namespace, policy: str) -> Any:
    """Deploy the replicas behind ``policy`` (``ray``: Ray's own router); returns a handle that streams."""
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    kwargs: dict[str, Any] = {}
    if policy != _RAY:
        own = {"policy": policy, "profile": given.profile, "replicas": given.replicas, "max_batch": given.max_batch}
        router = "policies.route.ray_serve:SlalomRouter"
        config = RequestRouterConfig(
            request_router_class=router, request_router_kwargs=own, request_routing_stats_period_s=0.2
        )
        kwargs["request_router_config"] = config
    which, first = (Modelled, given.profile) if given.engine == "modelled" else (Vllm, given.model)
    deployed = serve.deployment(
        num_replicas=given.replicas,
        max_ongoing_requests=1024,
        graceful_shutdown_timeout_s=1.0,
        ray_actor_options={"num_cpus": 0},
        **kwargs,
    )(which)
    handle = serve.run(deployed.bind(first, given.max_batch), name="slalom", route_prefix=None)
    return handle.options(method_name="generate", stream=True)


async def play(handle: Any, given: argparse.Namespace) -> list[tuple[float, float, int]]:
    """(time to first token, time per further token, tokens) of every request of an open-loop run."""
    rng = np.random.default_rng(given.seed)
    gaps = rng.exponential(1.0 / given.rate, given.requests)
    prompts = np.where(rng.random(given.requests) < _LONG, rng.integers(1400, 1600, given.requests), 0)
    prompts = np.where(prompts > 0, prompts, rng.integers(32, 256, given.requests))
    outputs = rng.integers(16, 96, given.requests)

    async def one(k: int) -> tuple[float, float, int]:
        body = {"prompt": rng_ids(k, int(prompts[k])), "max_tokens": int(outputs[k])}
        begin = time.perf_counter()
        stamps = [time.perf_counter() async for _ in handle.remote(body)]
        return stamps[0] - begin, (stamps[-1] - stamps[0]) / max(len(stamps) - 1, 1), len(stamps)

    work = []
    for k in range(given.requests):
        work.append(asyncio.ensure_future(one(k)))
        await asyncio.sleep(float(gaps[k]))
    found = await asyncio.gather(*work)
    assert [n for *_, n in found] == outputs.tolist(), "tokens were lost"
    return found


def rng_ids(k: int, n: int) -> list[int]:
    """Token ids of prompt ``k``."""
    return np.random.default_rng([7, k]).integers(100, 10_000, n).tolist()


def main() -> None:
    """Play the workload behind each policy and print a line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("modelled", "vllm"), default="modelled")
    parser.add_argument("--model", default="", help="with vllm: a folder, or a name")
    parser.add_argument("--profile", required=True, help="of one replica")
    parser.add_argument("--policy", action="append", help=f"a rule or a checkpoint, or {_RAY} for Ray's own router")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1.5)
    parser.add_argument("--requests", type=int, default=90)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ttft-s", type=float, default=2.0)
    parser.add_argument("--tpot-s", type=float, default=0.25)
    given = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # all of it is on this machine
    import ray
    from ray import serve

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    for policy in given.policy or [_RAY, "predicted_ttft"]:
        handle = run_app(given, policy)
        found = asyncio.run(play(handle, given))
        ttft, tpot = np.array([x[0] for x in found]), np.array([x[1] for x in found])
        met = float(((ttft <= given.ttft_s) & (tpot <= given.tpot_s)).mean())
        row = {"policy": policy, "attainment": round(met, 3), "requests": len(found)}
        row |= {f"ttft_p{q}_s": round(float(np.percentile(ttft, q)), 3) for q in (50, 90)}
        row |= {f"tpot_p{q}_ms": round(1e3 * float(np.percentile(tpot, q)), 1) for q in (50, 90)}
        print(json.dumps(row), flush=True)
        serve.delete("slalom")
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
