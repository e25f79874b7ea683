"""Readers of public trace formats, by name. Every flaw of a file is a ``SlalomError`` naming its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import SlalomError
from env.workload.hashing import chain
from env.workload.rawfile import Table, read_csv, read_jsonl
from env.workload.timeunit import to_seconds
from env.workload.trace import COLUMNS, Trace


@dataclass(frozen=True)
class TraceFormat:
    """How a public format looks.

    :param read: file and names -> columns of raw values
    :param names: our names -> names in the file; a leading ``?`` marks a column that may be absent
    :param time_unit: the unit the format's definition fixes, None where it does not
    :param hash_tokens: tokens per block id where the format's definition fixes them, else 0
    :param drop_zero: rows with zero tokens are failures and are dropped, not refused
    :param about: one line for ``--help``
    """

    read: Callable[[Path, dict[str, str]], Table]
    names: dict[str, str]
    time_unit: str | None
    hash_tokens: int = 0
    drop_zero: bool = False
    about: str = ""


_MOONCAKE = {
    "time": "timestamp",
    "prompt": "input_length",
    "output": "output_length",
    "hash_ids": "?hash_ids",
}
_SESSIONS = {"session": "?session_id", "delay": "?delay", "delay_ms": "?delay_ms"}
_OURS = {
    "cls": "?class",
    "slo_ttft_ms": "?slo_ttft_ms",
    "slo_tpot_ms": "?slo_tpot_ms",
    "priority": "?priority",
    "hash_tokens": "?hash_tokens",
}

FORMATS: dict[str, TraceFormat] = {
    "mooncake": TraceFormat(
        read_jsonl,
        _MOONCAKE | _SESSIONS,
        None,
        512,
        about="Mooncake JSON Lines, 512-token block ids; stamps in ms",
    ),
    "timed": TraceFormat(
        read_jsonl, _MOONCAKE | _SESSIONS, None, about="vLLM timed_trace: Mooncake keys under any names"
    ),
    "slalom": TraceFormat(
        read_jsonl,
        _MOONCAKE | _SESSIONS | _OURS,
        "ms",
        about="Mooncake plus classes, targets and sessions",
    ),
    "azure": TraceFormat(
        read_csv,
        {"time": "TIMESTAMP", "prompt": "ContextTokens", "output": "GeneratedTokens"},
        "datetime",
        drop_zero=True,
        about="Azure LLM inference CSV",
    ),
    "burstgpt": TraceFormat(
        read_csv,
        {"time": "Timestamp", "prompt": "Request tokens", "output": "Response tokens"},
        "s",
        drop_zero=True,
        about="BurstGPT CSV; zero-token rows are failures",
    ),
}


def read_trace(
    path: str | Path,
    format: str,
    *,
    time_unit: str | None = None,
    spread_s: float = 0.0,
    seed: int = 0,
    columns: dict[str, str] | None = None,
    multiplier: float | None = None,
    hash_tokens: int | None = None,
    max_context: int | None = None,
    classes: tuple[str, ...] = (),
) -> Trace:
    """Read a trace file (plain or ``.gz``); arrivals start at 0.

    :param format: a key of ``FORMATS``
    :param time_unit: s, ms, us, ns or datetime; may be left out only where the format fixes it
    :param spread_s: add U(0, spread_s) to every arrival (Mooncake stamps are 3 s apart), seeded by ``seed``
    :param columns: our names (time, prompt, output, hash_ids, session, delay, ...) -> names in the file
    :param multiplier: seconds per unit of the file's times, instead of ``time_unit``
    :param hash_tokens: tokens per block id, instead of the format's
    :param max_context: drop rows with prompt + output above this, counted in ``meta["dropped"]``
    :param classes: class names in index order, for files whose ``class`` is a name
    :raises SlalomError: anything wrong with the file or the arguments
    """
    path = Path(path)
    if format not in FORMATS:
        raise SlalomError("format", format, f"give one of {', '.join(FORMATS)}")
    form = FORMATS[format]
    unknown = set(columns or {}) - set(form.names)
    if unknown:
        raise SlalomError("columns", sorted(unknown), f"rename only {', '.join(form.names)}")
    if multiplier is not None and time_unit is not None:
        raise SlalomError("multiplier", multiplier, "give time_unit or multiplier, not both")
    table = form.read(path, form.names | (columns or {}))
    dropped: dict[str, int] = {}
    if form.drop_zero:
        table = table.keep((table.numbers("prompt") != 0) & (table.numbers("output") != 0), dropped, "zero tokens")
    unit = time_unit or form.time_unit
    first_turn, parent = _turns(table)
    open_loop = table.rows_at(first_turn)
    arrival_s, used_unit = to_seconds(open_loop, unit, multiplier)
    seconds = np.full(table.n, np.inf)
    seconds[first_turn] = arrival_s
    trace = _build(table, seconds, parent, hash_tokens or form.hash_tokens, used_unit, classes)
    if spread_s:
        trace = _spread(trace, spread_s, seed)
    if max_context is not None:
        fits = trace.prompt.astype(np.int64) + trace.output <= max_context
        before = trace.n
        trace = trace.rows(fits)
        dropped["over max_context"] = before - trace.n
        if not trace.n:
            raise SlalomError(str(path), max_context, "every row is longer; raise max_context")
    start = trace.arrival_s[0]
    meta = trace.meta | {"source": path.name, "format": format, "unit": used_unit, "dropped": dropped}
    if spread_s:
        meta["spread_s"] = spread_s
    return replace(trace, arrival_s=trace.arrival_s - start, meta=meta, name=path.name.split(".")[0])


def _turns(table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Open-loop rows, and per row the row of its previous turn (-1 for open-loop rows)."""
    parent = np.full(table.n, -1)
    if "session" not in table.columns:
        return np.arange(table.n), parent
    table.require("session", lambda name: isinstance(name, str | int), "give a text or a number")
    delayed = np.zeros(table.n, bool)
    for name in ("delay", "delay_ms"):
        if name in table.columns:
            delayed |= np.array([value is not None for value in table.columns[name]])
    last: dict[Any, int] = {}
    for row, session in enumerate(table.columns["session"]):
        if session is None:
            continue
        if delayed[row]:  # without a delay a later turn keeps its own time stamp
            if session not in last:
                raise SlalomError(table.place(row), session, "the first turn of a session has no delay but a time")
            parent[row] = last[session]
        last[session] = row
    return np.flatnonzero(parent < 0), parent


def _build(
    table: Table,
    arrival_s: np.ndarray,
    parent: np.ndarray,
    hash_tokens: int,
    unit: str,
    classes: tuple[str, ...],
) -> Trace:
    order = np.argsort(arrival_s, kind="stable")
    place = np.empty(table.n, np.int64)
    place[order] = np.arange(table.n)
    later = np.flatnonzero(parent >= 0)
    next_turn, think_s = np.full(table.n, -1, np.int32), np.zeros(table.n)
    next_turn[place[parent[later]]] = place[later]
    think_s[place[parent[later]]] = _delays(table, later, unit)
    meta: dict[str, Any] = {}
    extra = _labels(table, order, classes, meta) | _hashes(table, order, hash_tokens)
    hash_tokens = extra.pop("hash_tokens", 0)
    return Trace.make(
        arrival_s[order],
        table.tokens("prompt")[order],
        table.tokens("output")[order],
        n_roots=table.n - len(later),
        next_turn=next_turn,
        think_s=think_s,
        hash_tokens=hash_tokens,
        meta=meta,
        **extra,
    )


def _delays(table: Table, rows: np.ndarray, unit: str) -> np.ndarray:
    """Seconds; ``delay`` is in the file's unit, ``delay_ms`` says its own."""
    seconds = np.zeros(len(rows))
    factor = {"s": 1.0, "datetime": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}.get(unit) or float(unit.split()[-1])
    for name, scale in (("delay", factor), ("delay_ms", 1e-3)):
        if name in table.columns and len(rows):
            raw = table.optional_numbers(name)[rows]
            bad = np.flatnonzero(raw < 0)
            if len(bad):
                raise SlalomError(table.place(rows[bad[0]]), float(raw[bad[0]]), "give a delay >= 0")
            seconds = np.where(np.isnan(raw), seconds, raw * scale)
    return seconds


def _hashes(table: Table, order: np.ndarray, hash_tokens: int) -> dict[str, Any]:
    if "hash_ids" not in table.columns:
        return {}
    told = False  # whether the rows themselves say how many tokens an id stands for
    if "hash_tokens" in table.columns:
        table.require("hash_tokens", lambda size: type(size) is int and size > 0, "give whole tokens per block")
        sizes = {value for value in table.columns["hash_tokens"] if value is not None}
        if len(sizes) > 1:
            raise SlalomError(f"{table.path.name}: hash_tokens", sorted(sizes), "use one block size per file")
        told, hash_tokens = bool(sizes), sizes.pop() if sizes else hash_tokens
    count = np.zeros(table.n, np.int32)
    flat: list[int] = []
    raw = table.columns["hash_ids"]
    for place, row in enumerate(order):
        ids = raw[row] or []
        if not isinstance(ids, list) or not all(type(i) is int and -(2**63) <= i < 2**64 for i in ids):
            raise SlalomError(table.place(int(row)), ids, "hash_ids is a list of whole numbers")
        count[place] = len(ids)
        flat.extend(i & 0xFFFFFFFFFFFFFFFF for i in ids)
    if not flat:
        return {}
    if not told:
        _check_block_size(table, order, count, hash_tokens)
    start = np.cumsum(count, dtype=np.int64) - count
    hashes = chain(np.array(flat, np.uint64), count)
    return {"hash_tokens": hash_tokens, "hash_n": count, "hash_start": start, "hashes": hashes}


def _check_block_size(table: Table, order: np.ndarray, count: np.ndarray, hash_tokens: int) -> None:
    """Ids of a row stand for its prompt, and its answer at most: a size under which they say more is not the file's.

    :raises SlalomError: nobody says the size, or it is another
    """
    length = (table.tokens("prompt").astype(np.int64) + table.tokens("output"))[order]
    most = int(np.min(np.where(count > 1, (length - 1) // np.maximum(count - 1, 1), length.max())))
    hint = f"pass hash_tokens; by these rows it is at most {most}"
    if hash_tokens <= 0:
        raise SlalomError(f"{table.path.name}: hash_tokens", None, f"the format does not say it: {hint}")
    wrong = np.flatnonzero((count - 1) * np.int64(hash_tokens) >= length)
    if len(wrong):
        row = int(wrong[0])
        what = f"{count[row]} ids of {hash_tokens} tokens for a request of {length[row]}"
        raise SlalomError(f"{table.place(int(order[row]))}, hash_ids", what, hint)


def _labels(table: Table, order: np.ndarray, classes: tuple[str, ...], meta: dict[str, Any]) -> dict[str, Any]:
    """Class indices and per-request targets; ``priority`` is accepted but classes carry the weight here."""
    labels: dict[str, Any] = {}
    for name, column in (("slo_ttft_ms", "ttft_s"), ("slo_tpot_ms", "tpot_s")):
        if name in table.columns:
            table.require(name, lambda ms: type(ms) in (int, float) and 0 < ms < 1e12, "give milliseconds > 0")
            labels[column] = table.optional_numbers(name)[order] / 1e3
    if "cls" in table.columns:
        fix = "give class names or indices from 0"
        table.require("cls", lambda v: isinstance(v, str) or (type(v) is int and 0 <= v < 2**15), fix)
        raw = [table.columns["cls"][row] for row in order]
        given = {type(value) for value in raw if value is not None}
        if len(given) > 1:
            raise SlalomError(f"{table.path.name}: class", "names and numbers", "write all as names, or all as numbers")
        labels["bound"] = bool(given)
        if str in given:  # without a name: of the first class, as in serving
            names = list(classes) or list(dict.fromkeys("" if value is None else value for value in raw))
            place = {name: k for k, name in enumerate(names)}
            unknown = next((v for v in raw if v is not None and v not in place), None)
            if unknown is not None:
                raise SlalomError(f"{table.path.name}: class", unknown, f"use one of {', '.join(classes)}")
            if len(names) > 2**15:
                raise SlalomError(f"{table.path.name}: class", f"{len(names)} names", "use at most 32768 classes")
            raw = [place.get(value or "", 0) for value in raw]
            meta["classes"] = names
        labels["cls"] = np.array([value or 0 for value in raw], np.int16)
    if "priority" in table.columns:
        meta["priority"] = "ignored; give the class a weight"
    return labels


def _spread(trace: Trace, spread_s: float, seed: int) -> Trace:
    """Rows of one stamp arrive within the following ``spread_s`` seconds, not all at once."""
    jitter = np.random.default_rng(seed).uniform(0.0, spread_s, trace.n_roots)
    moved = trace.arrival_s.copy()
    moved[: trace.n_roots] += jitter
    order = np.concatenate([np.argsort(moved[: trace.n_roots], kind="stable"), np.arange(trace.n_roots, trace.n)])
    columns = {column: getattr(trace, column)[order] for column in COLUMNS}
    return replace(trace, **(columns | {"arrival_s": moved[order]}))
