"""The steps of a vLLM that has our plug-in (``engine/remote/vllm_plugin``): what each computed, and how long."""

from __future__ import annotations

import httpx
import numpy as np

from engine.remote.discover import own_key

#: ``prompt_tokens`` of ``prompts`` prompts beside ``decodes`` sequences; ``elapsed_s`` from its scheduling to its
#: ``end_s``, since the epoch; then ``running`` sequences go on, and ``kv`` is the share of the KV in use.
STEP = np.dtype(
    [
        ("number", np.int64),
        ("end_s", float),
        ("prompts", np.int64),
        ("prompt_tokens", np.int64),
        ("decodes", np.int64),
        ("elapsed_s", float),
        ("running", np.int64),
        ("kv", float),
    ]
)
_AS_TOLD = {"end_s": ("end", 1.0), "elapsed_s": ("elapsed_ms", 1e-3)}  # where name and unit differ
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
    answer = _get(url, f"/slalom/steps?since={since}")
    if answer is None:
        return np.zeros(0, STEP)
    said = answer.json()
    at = {name: k for k, name in enumerate(said["fields"])}
    rows = np.array(said["steps"], float).reshape(-1, len(at))
    found = np.zeros(len(rows), STEP)
    for name in STEP.names or ():
        told, unit = _AS_TOLD.get(name, (name, 1.0))
        found[name] = unit * rows[:, at[told]]
    return found


def paced(steps: np.ndarray) -> np.ndarray:
    """An engine's ``steps`` (``STEP``, (n,)), ``elapsed_s`` being all the time that each of them held it up.

    From end to end where the engine went on without a pause, host work between two steps included. After a pause the
    engine's own figure, and what that typically leaves out.
    """
    went_on = np.zeros(len(steps), bool)
    went_on[1:] = (np.diff(steps["number"]) == 1) & (steps["running"][:-1] > 0)
    between = np.diff(steps["end_s"], prepend=steps["end_s"][:1])
    left_out = between[went_on] - steps["elapsed_s"][went_on]
    typical = max(float(np.median(left_out)), 0.0) if len(left_out) else 0.0
    found = steps.copy()
    found["elapsed_s"] = np.where(went_on, between, steps["elapsed_s"] + typical)
    return found
