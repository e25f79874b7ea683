"""Fidelity on engines of others: who plays the engine's side, with routers of others as rows beside our policies."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

from engine.errors import SlalomError

#: A router of others takes what comes; these are more than it will ever get at once.
_TOKENS, _SEQUENCES = 2**20, 4096


def is_router(policy: str) -> bool:
    """Whether ``policy`` is the address of a router of others, in front of the same engines."""
    return policy.startswith(("http://", "https://"))


def _whole(scenario: Any) -> Any:
    """``scenario`` with its instances as one that holds nothing back: what stands behind a router of others."""
    group = scenario.model_dump(mode="json")["cluster"][0]
    group |= {"count": 1, "role": "mixed", "max_batch": _SEQUENCES}
    group |= {"chunk_tokens": _TOKENS, "kv_tokens": _SEQUENCES * _TOKENS // 64}
    return type(scenario).parse(scenario.model_dump(mode="json") | {"cluster": [group], "decisions": {}})


def _replay(scenario: Any, policy: str, *, park: Any, engines: Sequence[Any], **options: Any) -> Any:
    from engine.remote.discover import discover
    from env.live.remote import replay

    if is_router(policy):
        return replay(_whole(scenario), "round_robin", engines=[discover(policy)], **options)
    return replay(scenario, policy, engines=engines, **options)


def engines_of_others(urls: Sequence[str]) -> dict[str, Any]:
    """How :func:`eval.fidelity.fidelity.fidelity` plays on the engines at ``urls``.

    :raises SlalomError: one of them does not answer
    """
    from engine.remote.discover import discover  # with an HTTP client, which our own engine does without

    engines = [discover(url) for url in urls]
    if not engines:
        raise SlalomError("--engines", urls, "give addresses: URL,URL,...")
    park = SimpleNamespace(name=f"{len(engines)} engines of {engines[0].model}")
    return {"park": lambda scenario: park, "replay": partial(_replay, engines=engines)}
