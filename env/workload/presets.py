"""Named length models. ``data/lengths.json`` holds quantile tables measured on public traces, each with
its source and licence; the models below join tables, or state a paper's own rule."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from env.workload.lengths import (
    JointLengths,
    LognormalMarginal,
    MixtureLengths,
    MixturePart,
    QuantileMarginal,
    UniformMarginal,
)

__all__ = ["preset", "preset_facts", "preset_names"]

_DATA = Path(__file__).parent / "data" / "lengths.json"


@lru_cache(maxsize=1)
def _tables() -> dict[str, dict[str, Any]]:
    tables: dict[str, dict[str, Any]] = json.loads(_DATA.read_text(encoding="utf-8"))
    return tables


def _table(name: str) -> JointLengths:
    entry = _tables()[name]
    prompt, output = (
        QuantileMarginal(kind="quantiles", q=tuple(entry[side]["q"]), v=tuple(entry[side]["v"]))
        for side in ("prompt", "output")
    )
    return JointLengths(kind="joint", prompt=prompt, output=output, spearman=entry["spearman"])


def _uniform(low: int, high: int) -> UniformMarginal:
    return UniformMarginal(kind="uniform", low=low, high=high)


def _longbench() -> JointLengths:
    """DistServe cuts LongBench contexts to a random 1,900 to 2,040 tokens; answers are those of QA."""
    return JointLengths(kind="joint", prompt=_uniform(1900, 2040), output=_table("longbench-answers").output)


def _tool_agent() -> MixtureLengths:
    """Surrogate of Mooncake's Tool&Agent trace, which cannot be had: three populations seen in a slice.

    37 % share a 6,144-token prefix, 14 % a 2,560-token one, 49 % look like Mooncake Conversation. The
    prompts of the last are scaled by 0.907 so that the published means (8,596 in, 182 out) come out.
    """
    tools = JointLengths(kind="joint", prompt=_uniform(6200, 8000), output=_uniform(3, 50))
    agents = JointLengths(kind="joint", prompt=_uniform(2900, 3300), output=_uniform(16, 24))
    chat = _table("mooncake-conversation")
    assert isinstance(chat.prompt, QuantileMarginal)
    shorter = QuantileMarginal(kind="quantiles", q=chat.prompt.q, v=tuple(0.907 * tokens for tokens in chat.prompt.v))
    return MixtureLengths(
        kind="mixture",
        parts=(
            MixturePart(weight=0.37, lengths=tools),
            MixturePart(weight=0.14, lengths=agents),
            MixturePart(weight=0.49, lengths=JointLengths(kind="joint", prompt=shorter, output=chat.output)),
        ),
    )


def _burstgpt() -> JointLengths:
    """BurstGPT GPT-4 rows without failures: means 763 in, 348 out as vLLM's benchmark reports them
    (vllm-project/vllm pull request 13063). Only the means are published; the medians are those of the first
    rows of the file, the shape is assumed lognormal.
    """
    prompt = LognormalMarginal(kind="lognormal", median=590, mean=763, high=31_400)
    output = LognormalMarginal(kind="lognormal", median=280, mean=348, high=12_500)
    return JointLengths(kind="joint", prompt=prompt, output=output)


_RULES: dict[str, Callable[[], JointLengths | MixtureLengths]] = {
    "burstgpt": _burstgpt,
    "longbench": _longbench,
    "tool-agent": _tool_agent,
}


def preset_names() -> tuple[str, ...]:
    """Names ``lengths: {kind: preset, name: ...}`` accepts."""
    tables = {name for name, entry in _tables().items() if not entry.get("part")}
    return tuple(sorted(tables | set(_RULES)))


@lru_cache(maxsize=64)
def preset(name: str) -> JointLengths | MixtureLengths:
    """The length model of a preset (``KeyError`` if unknown)."""
    return _RULES[name]() if name in _RULES else _table(name)


def preset_facts(name: str) -> dict[str, Any]:
    """Source, licence and the statistics a tabulated preset was checked against."""
    return {key: value for key, value in _tables()[name].items() if key not in ("prompt", "output")}
