"""What a replica of Ray Serve tells routers of its answers: how many tokens each has.

self.progress = Progress()                              # in the deployment's __init__
async for token in self.progress.watch(stream): ...     # around each answer, one item a token
def record_routing_stats(self): return self.progress.stats()
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, TypeVar

#: Where a router finds it in the statistics of a replica: request to [tokens of the prompt or 0, tokens so far].
STATS = "slalom_progress"

T = TypeVar("T")


class Progress:
    """Counts the tokens of every answer that is under way."""

    def __init__(self) -> None:
        self._answers: dict[str, list[int]] = {}

    async def watch(self, stream: AsyncIterator[T], *, prompt_tokens: int = 0, request: str = "") -> AsyncIterator[T]:
        """Pass ``stream`` on, and count.

        :param prompt_tokens: if known
        :param request: what Ray calls the request; by default the one that is being answered
        """
        key = request or _request_here()
        counts = self._answers[key] = [prompt_tokens, 0]
        try:
            async with aclosing(stream) as items:  # type: ignore[type-var]
                async for item in items:
                    counts[1] += 1
                    yield item
        finally:
            self._answers.pop(key, None)

    def stats(self) -> dict[str, Any]:
        """What ``record_routing_stats`` returns, or adds to what else it returns."""
        return {STATS: {key: list(counts) for key, counts in self._answers.items()}}


def _request_here() -> str:
    from ray.serve.context import _get_serve_request_context

    return str(_get_serve_request_context()._internal_request_id)
