"""What somebody else's engine leaves behind: a request log, and the settings that it ran with.

**Request log**, one of

* JSON Lines or CSV, one request a line, with these columns (seconds or ``--time-unit``, any zero; other columns are
  ignored):
  ``arrival`` (when the engine had it), ``input_tokens``, ``output_tokens``, ``first_token`` and ``last_token`` (when
  they came). LLMServingSim's names are understood as well: ``queued_ts``, ``input_toks``, ``output_toks``,
  ``first_token_ts``, ``last_token_ts``.
* the JSON that ``vllm bench serve --save-result --save-detailed`` writes, of a version that saves ``start_times``.

Failed requests (no output) and rows that cannot be read (null, cut off, stamps out of order) are left out. The latter
are counted; where they are the most, the log is refused. Two requests of the same engine never wait for each other's
client, so a log through a gateway is fine as long as the stamps are the engine's or the gateway is fast.

**Engine settings**, a JSON or YAML file; what it holds beside these keys, at any depth, is ignored, so vLLM's own
resolved configuration (or the ``meta.json`` of LLMServingSim) can be given as it is:

``max_num_seqs``, ``max_num_batched_tokens`` (required); ``num_gpu_blocks`` × ``block_size``, or ``kv_tokens`` (KV
capacity; ample if neither is given); ``enable_prefix_caching``; ``scheduler_reserve_full_isl``; and for the profile's
head ``model``, ``device_name``, ``vllm_version``, ``tensor_parallel_size``, ``num_hidden_layers``.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.common.documents import json_of, read_json
from engine.common.lines import lines
from engine.common.yaml_documents import read_yaml
from engine.errors import SlalomError
from env.workload.timeunit import UNITS

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
#: Times of this length and more are read as seconds only where the user says so.
_SLOWEST_TPOT_S, _SLOWEST_TTFT_S = 1.0, 1000.0
_FORMATS = "write JSON Lines, CSV or a vLLM benchmark's JSON with arrival and token times ({})"
_MOST_TOKENS = 2**24


class RequestLog(NamedTuple):
    """Requests in the order of arrival; arrays (n,).

    :param arrival_s: from the first one on
    :param tpot_s: ``nan`` where only one token was asked for
    :param left_out: rows that could not be read
    """

    arrival_s: np.ndarray
    prompt: np.ndarray
    output: np.ndarray
    ttft_s: np.ndarray
    tpot_s: np.ndarray
    left_out: int = 0

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


def read_log(path: Path, unit: str = "") -> RequestLog:
    """Read a request log in any of the formats above.

    :param unit: of its times, one of ``env.workload.timeunit.UNITS``; empty: seconds, if they can be
    :raises SlalomError: unreadable, most rows cannot be read, times are no seconds, too few requests
    """
    if unit and unit not in UNITS:
        raise SlalomError("--time-unit", unit, f"give one of {', '.join(UNITS)}")
    try:
        found = list(_csv_rows(path) if path.suffix == ".csv" else _json_rows(path))
    except SlalomError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, csv.Error) as error:
        raise SlalomError(f"--from-requests: {path.name}", str(path), _FORMATS.format(repr(error))) from error
    return _checked(path, found, UNITS[unit or "s"], bool(unit))


def read_bench(path: Path) -> dict[str, Any]:
    """The result of ``vllm bench serve`` at ``path``; empty where it is another kind of log."""
    if path.suffix == ".csv":
        return {}
    begin = next((line for line in lines(path, "--from-requests") if line.strip()), "")
    if begin.strip() != "{" and '"ttfts"' not in begin:
        return {}
    content = read_json(path, "--from-requests")
    return content if isinstance(content, dict) else {}


class _Bad(NamedTuple):
    """A row that cannot be read, and why."""

    why: str


_Row = tuple[float, ...] | _Bad


def _csv_rows(path: Path) -> Iterator[_Row]:
    for row in csv.DictReader(lines(path, "--from-requests")):
        yield _row(row)


def _json_rows(path: Path) -> Iterator[_Row]:
    begun = False
    for number, line in enumerate(lines(path, "--from-requests"), 1):
        if not line.strip():
            continue
        if not begun and (line.strip() == "{" or '"ttfts"' in line):  # one document, not a line for each request
            yield from _bench_rows(read_json(path, "--from-requests"))
            return
        begun = True
        try:
            row = json_of(line, f"line {number}", constants=True)
        except SlalomError as error:
            yield _Bad(f"not JSON: {error}")
        else:
            yield _row(row) if isinstance(row, dict) else _Bad("no JSON object")


def _row(row: Mapping[str, Any]) -> _Row:
    found = []
    for known in _NAMES.values():
        key = next((k for k in known if k in row and row[k] not in (None, "")), None)
        if key is None:
            return _Bad(f"no {known[0]}")
        try:
            found.append(float(row[key]))
        except (TypeError, ValueError):
            return _Bad(f"{key}: {row[key]!r} is no number")
    return tuple(found)


def _bench_rows(whole: Mapping[str, Any]) -> Iterator[_Row]:
    """``vllm bench serve``: per request start, TTFT and the gaps between tokens. Failed ones have no output."""
    columns = (whole["start_times"], whole["input_lens"], whole["output_lens"], whole["ttfts"], whole["itls"])
    for start, prompt, output, ttft, gaps in zip(*columns, strict=True):
        try:
            if not output:
                yield float(start), float(prompt), 0.0, 0.0, 0.0
            elif not ttft:
                yield _Bad("no ttft")
            else:
                first = float(start) + float(ttft)
                yield float(start), float(prompt), float(output), first, first + float(sum(gaps))
        except (TypeError, ValueError) as error:
            yield _Bad(str(error))


def _fault(row: _Row) -> str:
    """Why a row is no answered request whose times can be believed; empty when it is one."""
    if isinstance(row, _Bad):
        return row.why
    arrival, prompt, output, first, last = row
    if not all(map(math.isfinite, row)):
        return "a figure that is not finite"
    if not (1 <= prompt <= _MOST_TOKENS and output <= _MOST_TOKENS):
        return f"a request has 1 to {_MOST_TOKENS} tokens"
    return "" if arrival <= first <= last else "stamps must be of one clock, arrival ≤ first_token ≤ last_token"


def _checked(path: Path, found: list[_Row], scale: float, told: bool) -> RequestLog:
    where = f"--from-requests: {path.name}"
    answered = [row for row in found if isinstance(row, _Bad) or not row[2] < 1]
    faults = [why for row in answered if (why := _fault(row))]
    rows = sorted(row for row in answered if not isinstance(row, _Bad) and not _fault(row))
    if faults and len(faults) >= len(rows):
        first = next(k for k, row in enumerate(answered) if _fault(row))
        fix = _FORMATS.format(f"of {len(answered)} rows {len(faults)} cannot be read, row {first + 1}: {faults[0]}")
        raise SlalomError(where, str(path), fix)
    if len(rows) < _LEAST:
        raise SlalomError(where, f"{len(rows)} answered requests", f"give at least {_LEAST}")
    arrival, prompt, output, first_token, last = (np.array(column) for column in zip(*rows, strict=True))
    arrival, first_token, last = arrival * scale, first_token * scale, last * scale
    if output.max() < 2:
        raise SlalomError(where, "answers of one token only", "give some longer ones: they tell what a step takes")
    gaps = np.where(output > 1, output - 1, np.nan)
    tpot = (last - first_token) / gaps
    if not told:
        _check_unit(where, tpot[output > 1], first_token - arrival)
    return RequestLog(
        arrival - arrival[0], prompt.astype(np.int32), output.astype(np.int32), first_token - arrival, tpot, len(faults)
    )


def _check_unit(where: str, tpot_s: np.ndarray, ttft_s: np.ndarray) -> None:
    """:raises SlalomError: no engine that serves anybody is that slow: these are no seconds"""
    slow, what = (
        (float(np.median(tpot_s)), "between two tokens") if len(tpot_s) else (float(np.median(ttft_s)), "to wait")
    )
    if slow >= (_SLOWEST_TPOT_S if len(tpot_s) else _SLOWEST_TTFT_S):
        shown = ", ".join(f"{name}: {slow * factor:.3g} s" for name, factor in UNITS.items())
        raise SlalomError(where, f"{slow:.3g} s {what}", f"say the unit with --time-unit ({shown} {what})")


def read_settings(path: Path) -> EngineSettings:
    """Read engine settings, see the module's first lines.

    :raises SlalomError: unreadable, or a required key is missing or no positive number
    """
    content = (read_json if path.suffix == ".json" else read_yaml)(path, "--engine-config")
    if not isinstance(content, dict):
        raise SlalomError("--engine-config", str(path), "write 'max_num_seqs: 256' and so on")
    flat: dict[str, Any] = {}
    for key, value in _flattened(content):
        if value is not None and key not in flat:
            flat[key] = value

    def count(key: str) -> int:
        value = flat.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
            raise SlalomError(f"--engine-config: {key}", value, "give a whole number, 1 or more and below 2^31")
        return value

    block = count("block_size") if "block_size" in flat else 16
    kv, known = AMPLE_KV_TOKENS, True
    if "num_gpu_blocks" in flat:
        kv = (count("num_gpu_blocks") - 1) * block  # vLLM keeps one as the null block
    elif "kv_tokens" in flat:
        kv = count("kv_tokens")
    else:
        known = False
    if not 2 * block <= kv < 2**31:
        raise SlalomError("--engine-config: KV capacity", kv, "give at least two blocks, and less than 2^31 tokens")
    for key in ("tensor_parallel_size", "num_hidden_layers", "n_layers", "kv_bytes_per_token"):
        if key in flat:
            count(key)
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
