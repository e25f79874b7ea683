"""NIXL's progress thread polls without a pause, which on a CPU takes the core that the engine computes on."""

from __future__ import annotations

import os
from typing import Any


def calm() -> None:
    """Let the thread sleep between two polls, ``SLALOM_NIXL_POLL_US`` microseconds (200)."""
    try:
        import nixl._api as api
    except ImportError:  # no NIXL here: nothing polls
        return
    bindings = api.nixlBind
    if getattr(bindings, "_slalom", False):
        return  # vLLM loads plug-ins in every process, and may do so twice
    make, pause_us = bindings.nixlAgent, int(os.environ.get("SLALOM_NIXL_POLL_US", "200"))

    def agent(name: str, config: Any) -> Any:
        config.pthrDelay = pause_us
        return make(name, config)

    bindings.nixlAgent, bindings._slalom = agent, True
