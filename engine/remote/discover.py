"""What an engine says about itself: its model, how much KV it has and how many sequences it runs at once."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

import httpx

from engine.errors import SlalomError

_TIMEOUT_S = 5.0
_CACHE = re.compile(r"^vllm:cache_config_info\{(.*)\} ", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


@dataclass(frozen=True)
class EngineFacts:
    """None where the engine does not say.

    :param kv_tokens: its KV capacity
    :param max_batch: sequences that it runs at once
    :param context: tokens of its longest request
    :param keeps: a connection to it may be used again (llama.cpp hangs up after a stream without a word)
    :param counts: it can count tokens in every chunk of a stream (``continuous_usage_stats``)
    """

    url: str
    model: str
    kv_tokens: int | None = None
    max_batch: int | None = None
    context: int | None = None
    keeps: bool = True
    counts: bool = False


def own_key() -> dict[str, str]:
    """The header with the key in ``SLALOM_ENGINE_KEY``, for engines that ask for one; a client's own key wins."""
    key = os.environ.get("SLALOM_ENGINE_KEY")
    return {"authorization": f"Bearer {key}"} if key else {}


def discover(url: str) -> EngineFacts:
    """Ask the engine at ``url``.

    :raises SlalomError: no such address, or no OpenAI-compatible engine there
    """
    if not url.startswith(("http://", "https://")):
        raise SlalomError("--engines", url, "give addresses such as http://host:8000")
    try:
        with httpx.Client(base_url=url.rstrip("/"), timeout=_TIMEOUT_S, trust_env=False, headers=own_key()) as client:
            models = _json(client, "/v1/models")
            card = models["data"][0]
            props = _json(client, "/props")
            metrics = client.get("/metrics")
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise SlalomError("--engines", url, f"no OpenAI-compatible engine answers there ({error!r:.100})") from error
    context = card.get("max_model_len") or (card.get("meta") or {}).get("n_ctx")
    kv_tokens = max_batch = None
    if isinstance(props.get("total_slots"), int):  # llama.cpp: each slot has a context of its own
        max_batch = props["total_slots"]
        context = (props.get("default_generation_settings") or {}).get("n_ctx") or context
        kv_tokens = context * max_batch if context else None
    elif metrics.status_code == 200:
        kv_tokens = _vllm_cache(metrics.text)
    owner = card.get("owned_by")
    keeps, counts = owner != "llamacpp", owner in ("vllm", "slalom")
    return EngineFacts(url, str(card["id"]), kv_tokens, max_batch, context, keeps, counts)


def _json(client: httpx.Client, path: str) -> dict[str, Any]:
    found = client.get(path)
    if found.status_code != 200:
        if path == "/v1/models":
            found.raise_for_status()
        return {}
    content = found.json()
    return content if isinstance(content, dict) else {}


def _vllm_cache(text: str) -> int | None:
    """Tokens of KV, by vLLM's metrics (one line for each of its cores)."""
    total = 0
    for line in _CACHE.findall(text):
        labels = dict(_LABEL.findall(line))
        try:
            total += int(labels["num_gpu_blocks"]) * int(labels["block_size"])
        except (KeyError, ValueError):
            return None
    return total or None
