"""The walk of a request over two engines of vLLM that hand KV over (``NixlConnector`` with ``kv_both``).

The first computes the prompt, gives one token that nobody gets, and says where the KV lies; the second is sent the same
request with that, pulls the KV, and answers. (vLLM's own proxy of its disaggregated prefill does the same.)
"""

from __future__ import annotations

from typing import Any

KV = "kv_transfer_params"
_ASK = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
#: Fields that make the first leg answer more than it should.
_LEFT_OUT = ("max_completion_tokens", "min_tokens", "stream_options", "logprobs", "top_logprobs")


def can_part(body: dict[str, Any]) -> bool:
    """Whether the prompt of ``body`` may be computed by another engine: one answer, and nothing asked of the prompt."""
    longest = body.get("max_completion_tokens") or body.get("max_tokens") or 16
    several = (body.get("n") or 1) != 1 or (body.get("best_of") or 1) != 1
    asks = body.get("echo") or body.get("prompt_logprobs") is not None or KV in body
    return longest != 1 and not several and not asks


def body_of_prefill(body: dict[str, Any]) -> dict[str, Any]:
    """What the first engine is sent."""
    kept = {key: value for key, value in body.items() if key not in _LEFT_OUT}
    return kept | {"max_tokens": 1, "stream": False, KV: _ASK}


def body_of_decode(body: dict[str, Any], kv: dict[str, Any] | None) -> dict[str, Any]:
    """What the second engine is sent; ``kv`` None where it is the first one, too."""
    return body if kv is None else body | {KV: kv}


def kv_of(answer: dict[str, Any]) -> dict[str, Any] | None:
    """Where the KV lies, by the answer of the first engine; None where it keeps none."""
    found = answer.get(KV)
    return found if isinstance(found, dict) and found.get("remote_block_ids") else None
