"""What somebody else's engine leaves behind: a request log, and the settings that it ran with.

**Request log**, one of

* JSON Lines or CSV, one request a line, with these columns (seconds, any zero; other columns are ignored):
  ``arrival`` (when the engine had it), ``input_tokens``, ``output_tokens``, ``first_token`` and ``last_token`` (when
  they came). LLMServingSim's names are understood as well: ``queued_ts``, ``input_toks``, ``output_toks``,
  ``first_token_ts``, ``last_token_ts``.
* the JSON that ``vllm bench serve --save-result --save-detailed`` writes, of a version that saves ``start_times``.

Failed requests (no output) are left out. Two requests of the same engine never wait for each other's client, so a log
through a gateway is fine as long as the stamps are the engine's or the gateway is fast.

**Engine settings**, a JSON or YAML file; what it holds beside these keys, at any depth, is ignored, so vLLM's own
resolved configuration (or the ``meta.json`` of LLMServingSim) can be given as it is:

``max_num_seqs``, ``max_num_batched_tokens`` (required); ``num_gpu_blocks`` × ``block_size``, or ``kv_tokens`` (KV
capacity; ample if neither is given); ``enable_prefix_caching``; ``scheduler_reserve_full_isl``; and for the profile's
head ``model``, ``device_name``, ``vllm_version``, ``tensor_parallel_size``, ``num_hidden_layers``.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from engine.common.regular import LARGE, check_regular
from engine.errors import SlalomError

__all__ = ["EngineSettings", "RequestLog", "read_log", "read_settings"]

#: For engines that do not say how much KV they had: more than they used.
AMPLE_KV_TOKENS = 600_000
_NAMES = {
    "arrival": ("arrival", "queued_ts", "arrival_s"),
    "prompt": ("input_tokens", "input_toks", "prompt_tokens"),
    "output": ("output_tokens", "output_toks", "completion_tokens"),
    "first": ("first_token", "first_token_ts", "first_token_s"),
    "last": ("last_token", "last_token_ts", "last_token_s"),
}
_LEAST = 20


class RequestLog(NamedTuple):
    """Requests in the order of arrival; arrays (n,).

    :param arrival_s: from the first one on
    :param tpot_s: ``nan`` where only one token was asked for
    """

    arrival_s: np.ndarray
    prompt: np.ndarray
    output: np.ndarray
    ttft_s: np.ndarray
    tpot_s: np.ndarray

    @property
    def n(self) -> int:
        return len(self.prompt)


class EngineSettings(NamedTuple):
    """How the engine schedules, by vLLM's names where it has one.

    :param kv_tokens: KV capacity, a null block taken off where blocks were counted
    :param known_kv: whether the settings said so
    :param prefix_caching: blocks of finished and preempted requests are found again
    :param whole_prompt: a prompt starts only when all its blocks are free
    :param about: model, device and version, for the profile's head
    """

    max_batch: int
    chunk_tokens: int
    kv_tokens: int
    known_kv: bool
    prefix_caching: bool
    whole_prompt: bool
    block_tokens: int
    about: Mapping[str, Any]


def read_log(path: Path) -> RequestLog:
    """Read a request log in any of the formats above.

    :raises SlalomError: unreadable, a column is missing or not numeric, times out of order, too few requests
    """
    check_regular(path, LARGE)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SlalomError("--from-requests", str(path), f"give a readable request log ({error})") from error
    try:
        rows = list(_csv_rows(text)) if path.suffix == ".csv" else list(_json_rows(text))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        fix = f"write JSON Lines, CSV or a vLLM benchmark's JSON with arrival and token times ({error!r})"
        raise SlalomError(f"--from-requests: {path.name}", str(path), fix) from error
    return _checked(path, rows)


def _csv_rows(text: str) -> Iterator[tuple[float, ...]]:
    for row in csv.DictReader(text.splitlines()):
        yield _row(row)


def _json_rows(text: str) -> Iterator[tuple[float, ...]]:
    head = text.lstrip()[:1]
    if head == "{" and "\n{" not in text.strip():
        whole = json.loads(text)
        if "ttfts" in whole:
            yield from _bench_rows(whole)
            return
    for line in text.splitlines():
        if line.strip():
            yield _row(json.loads(line))


def _row(row: Mapping[str, Any]) -> tuple[float, ...]:
    found = []
    for known in _NAMES.values():
        key = next((k for k in known if k in row and row[k] not in (None, "")), None)
        if key is None:
            raise KeyError(f"no {known[0]}")
        found.append(float(row[key]))
    return tuple(found)


def _bench_rows(whole: Mapping[str, Any]) -> Iterator[tuple[float, ...]]:
    """``vllm bench serve``: per request start, TTFT and the gaps between tokens."""
    columns = (whole["start_times"], whole["input_lens"], whole["output_lens"], whole["ttfts"], whole["itls"])
    for start, prompt, output, ttft, gaps in zip(*columns, strict=True):
        if output and ttft:
            first = start + ttft
            yield float(start), float(prompt), float(output), float(first), float(first + sum(gaps))


def _checked(path: Path, rows: list[tuple[float, ...]]) -> RequestLog:
    where = f"--from-requests: {path.name}"
    rows = sorted(row for row in rows if row[2] >= 1)
    if len(rows) < _LEAST:
        raise SlalomError(where, f"{len(rows)} answered requests", f"give at least {_LEAST}")
    arrival, prompt, output, first, last = (np.array(column) for column in zip(*rows, strict=True))
    if not np.isfinite([arrival, first, last]).all():
        raise SlalomError(where, "a time that is not finite", "leave such requests out")
    wrong = np.flatnonzero((first < arrival) | (last < first) | (prompt < 1))
    if len(wrong):
        fix = "stamps must be of one clock, arrival ≤ first_token ≤ last_token, and prompts have a token"
        raise SlalomError(where, f"request {int(wrong[0])} by arrival", fix)
    gaps = np.where(output > 1, output - 1, np.nan)
    return RequestLog(
        arrival - arrival[0], prompt.astype(np.int32), output.astype(np.int32), first - arrival, (last - first) / gaps
    )


def read_settings(path: Path) -> EngineSettings:
    """Read engine settings, see the module's first lines.

    :raises SlalomError: unreadable, or a required key is missing or no positive number
    """
    check_regular(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SlalomError("--engine-config", str(path), f"give a readable JSON or YAML file ({error})") from error
    if not isinstance(content, dict):
        raise SlalomError("--engine-config", str(path), "write 'max_num_seqs: 256' and so on")
    flat: dict[str, Any] = {}
    for key, value in _flattened(content):
        if value is not None and key not in flat:
            flat[key] = value

    def count(key: str) -> int:
        value = flat.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise SlalomError(f"--engine-config: {key}", value, "give a positive whole number")
        return value

    block = count("block_size") if "block_size" in flat else 16
    kv, known = AMPLE_KV_TOKENS, True
    if "num_gpu_blocks" in flat:
        kv = (count("num_gpu_blocks") - 1) * block  # vLLM keeps one as the null block
    elif "kv_tokens" in flat:
        kv = count("kv_tokens")
    else:
        known = False
    return EngineSettings(
        max_batch=count("max_num_seqs"),
        chunk_tokens=count("max_num_batched_tokens"),
        kv_tokens=kv,
        known_kv=known,
        prefix_caching=bool(flat.get("enable_prefix_caching", True)),
        whole_prompt=bool(flat.get("scheduler_reserve_full_isl", False)),
        block_tokens=block,
        about=flat,
    )


def _flattened(content: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every key with a plain value, the outermost first."""
    for key, value in content.items():
        if not isinstance(value, dict):
            yield str(key), value
    for value in content.values():
        if isinstance(value, dict):
            yield from _flattened(value)
