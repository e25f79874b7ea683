"""The steps of a vLLM that has our plug-in (``engine/remote/vllm_plugin``): what each computed, and how long."""

from __future__ import annotations

import httpx
import numpy as np

from engine.remote.discover import own_key

#: ``prompt_tokens`` of ``prompts`` prompts beside ``decodes`` sequences; ``kv`` is the share of its KV in use then.
STEP = np.dtype(
    [("prompts", np.int64), ("prompt_tokens", np.int64), ("decodes", np.int64), ("elapsed_s", float), ("kv", float)]
)
_TIMEOUT_S = 10.0


def _get(url: str, path: str) -> httpx.Response | None:
    with httpx.Client(base_url=url.rstrip("/"), timeout=_TIMEOUT_S, trust_env=False, headers=own_key()) as client:
        found = client.get(path)
    return found if found.status_code == 200 else None


def steps_so_far(url: str) -> int | None:
    """How many steps the engine at ``url`` has made; None where it has no plug-in."""
    found = _get(url, "/slalom/state")
    return None if found is None else int(found.json()["steps"])


def read_steps(url: str, since: int) -> np.ndarray:
    """The steps after number ``since``, ``STEP`` of shape (n,), as many as the engine keeps.

    Empty where vLLM runs without ``--enable-logging-iteration-details``, or the plug-in is not there.
    """
    found = _get(url, f"/slalom/steps?since={since}")
    if found is None:
        return np.zeros(0, STEP)
    said = found.json()
    at = {name: k for k, name in enumerate(said["fields"])}
    rows = [
        (s[at["prompts"]], s[at["prompt_tokens"]], s[at["decodes"]], 1e-3 * s[at["elapsed_ms"]], s[at["kv"]])
        for s in said["steps"]
    ]
    return np.array(rows, STEP)
