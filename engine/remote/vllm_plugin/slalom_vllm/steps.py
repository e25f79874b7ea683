"""The state of a vLLM engine and its last steps, over HTTP.

* ``GET /slalom/state``: ``{"steps", "time", "running", "waiting", "kv"}``, as of the last step; ``kv`` is a share.
* ``GET /slalom/steps?since=N``: the steps after number N, oldest first, each a list in the order of :data:`FIELDS`.
  vLLM says what a step computed only with ``--enable-logging-iteration-details``.

vLLM loads routes of others only where they are named: ``VLLM_PLUGINS=slalom,slalom_nixl``. They tell counts and times,
nothing of any request, but vLLM's ``--api-key`` does not guard them.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from vllm.v1.metrics.loggers import StatLoggerBase

#: Of a step; ``end`` in seconds since the epoch, ``elapsed_ms`` from the start of scheduling to its last token.
FIELDS = ("number", "end", "prompts", "prompt_tokens", "decodes", "elapsed_ms", "running", "waiting", "kv")
_KEPT = 20_000
_steps: deque[tuple[Any, ...]] = deque(maxlen=_KEPT)
_state: dict[str, float] = {"steps": 0}


class StepLog(StatLoggerBase):
    """Hears of every step, in the process of the API server."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.engine_index = engine_index

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """Keep what the step of ``scheduler_stats`` was."""
        if scheduler_stats is None:
            return
        s, now = scheduler_stats, time.time()
        _state["steps"] += 1
        _state.update(time=now, running=s.num_running_reqs, waiting=s.num_waiting_reqs, kv=s.kv_cache_usage)
        d = s.iteration_details
        if d is not None and not d.is_dummy:
            computed = d.num_ctx_requests, d.num_ctx_tokens, d.num_generation_requests, d.elapsed_ms
            _steps.append((_state["steps"], now, *computed, s.num_running_reqs, s.num_waiting_reqs, s.kv_cache_usage))

    def log_engine_initialized(self) -> None:
        """Nothing is logged."""


class Routes:
    """Adds the routes to vLLM's API server."""

    name = "slalom"
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Add them to the application ``app``."""

        @app.get("/slalom/state")
        async def state() -> dict[str, float]:
            return _state

        @app.get("/slalom/steps")
        async def steps(since: int = 0) -> dict[str, Any]:
            return {"fields": FIELDS, "steps": [step for step in _steps if step[0] > since]}

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """The routes need nothing of the engine."""
