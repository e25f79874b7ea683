"""Named length models. ``data/lengths.json`` holds quantile tables measured on public traces, each with
its source and licence; the models below join tables, or state a paper's own rule."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, model_validator

from engine.errors import SlalomError
from env.workload.base import Model, Split
from env.workload.lengths import (
    MAX_TOKENS,
    EmpiricalLengths,
    FixedLengths,
    JointLengths,
    Lengths,
    LognormalMarginal,
    Pair,
    QuantileMarginal,
    UniformMarginal,
)

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


class PresetLengths(Lengths):
    """Lengths of a published workload by name (:func:`preset_names`), measured figures, no download.

    :param scale: factor on prompt and output tokens, e.g. for another tokenizer
    """

    kind: Literal["preset"]
    name: str
    scale: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _known(self) -> PresetLengths:
        if self.name not in preset_names():
            raise ValueError(f"unknown preset; choose from {', '.join(preset_names())}")
        return self

    def draw(self, n: int, rng: np.random.Generator, split: Split = "train") -> Pair:
        prompt, output = preset(self.name).draw(n, rng, split)
        if self.scale == 1:
            return prompt, output
        return _scaled(prompt, self.scale), _scaled(output, self.scale)


class MixturePart(Model):
    """One component and its weight."""

    weight: float = Field(gt=0)
    lengths: LengthsSpec


class MixtureLengths(Lengths):
    """Each request draws its component."""

    kind: Literal["mixture"]
    parts: tuple[MixturePart, ...] = Field(min_length=1)

    def draw(self, n: int, rng: np.random.Generator, split: Split = "train") -> Pair:
        weights = np.array([part.weight for part in self.parts])
        which = np.searchsorted(weights.cumsum()[:-1] / weights.sum(), rng.random(n), side="right")
        return draw_parts([part.lengths for part in self.parts], which, rng, split)


def draw_parts(models: list[Lengths], which: np.ndarray, rng: np.random.Generator, split: Split) -> Pair:
    """Row ``i`` from ``models[which[i]]``."""
    prompt, output = np.empty(len(which), np.int32), np.empty(len(which), np.int32)
    for place, model in enumerate(models):
        rows = np.flatnonzero(which == place)
        if len(rows):
            prompt[rows], output[rows] = model.draw(len(rows), rng, split)
    return prompt, output


LengthsSpec = Annotated[
    FixedLengths | JointLengths | PresetLengths | EmpiricalLengths | MixtureLengths,
    Field(discriminator="kind"),
]


def within_context(
    model: Lengths, n: int, rng: np.random.Generator, split: Split, max_context: int | None
) -> tuple[np.ndarray, np.ndarray, int]:
    """Lengths with prompt + output <= max_context: longer draws are drawn again, never cut short.

    :return: prompt i4 (n,), output i4 (n,), how many draws were dropped
    :raises SlalomError: the model gives almost only longer requests
    """
    prompt, output = model.draw(n, rng, split)
    dropped = 0
    if max_context is None:
        return prompt, output, dropped
    for _ in range(1000):
        over = np.flatnonzero(prompt.astype(np.int64) + output > max_context)
        if not len(over):
            return prompt, output, dropped
        dropped += len(over)
        fresh_prompt, fresh_output = model.draw(4 * len(over), rng, split)
        fits = np.flatnonzero(fresh_prompt.astype(np.int64) + fresh_output <= max_context)[: len(over)]
        prompt[over[: len(fits)]], output[over[: len(fits)]] = fresh_prompt[fits], fresh_output[fits]
    raise SlalomError("workload.max_context", max_context, "allow longer requests or choose shorter lengths")


def _scaled(tokens: np.ndarray, factor: float) -> np.ndarray:
    return np.clip(np.rint(tokens * factor), 1, MAX_TOKENS).astype(np.int32)


MixturePart.model_rebuild()
MixtureLengths.model_rebuild()
