"""Reading a decision log back: one decision and what it was based on, or the log as a whole."""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from engine.common.lines import LONGEST_LINE
from engine.common.regular import LARGE, check_regular
from engine.errors import SlalomError


def read_log(path: Path, left_out: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """Every line, older files (``path.2``, ``path.1``) first. Lines that a crash has spoilt are left out.

    :param left_out: gets the places of these
    :raises SlalomError: no such file, or one that does not begin as a decision log
    """
    if not os.path.isfile(path):
        raise SlalomError("--log", str(path), "no such file; serve --decision-log FILE writes one")
    older = [p for p in path.parent.glob(f"{path.name}.*") if p.suffix[1:].isdigit()]
    files = [*sorted(older, key=lambda p: -int(p.suffix[1:])), path]
    for file in files:
        check_regular(file, LARGE)
        with file.open("rb") as stream:
            for number, line in enumerate(iter(lambda: stream.readline(LONGEST_LINE), b""), 1):
                try:
                    found = json.loads(line)
                    if not (line.endswith(b"\n") and isinstance(found, dict) and "type" in found):
                        raise ValueError("no object with a type")
                except (ValueError, RecursionError) as error:
                    if number == 1 and line.endswith(b"\n"):
                        fix = f"not a line of a decision log: {error}"
                        raise SlalomError(f"{file}:{number}", line[:60].decode(errors="replace"), fix) from error
                    if left_out is not None:
                        left_out.append(f"{file}:{number}")
                else:
                    yield found


def _key(line: dict[str, Any], number: str = "generation") -> tuple[str, int]:
    """A number that begins anew with each server, told apart by the server; logs of old say nothing about theirs."""
    return line.get("server", ""), line[number]


def _named(what: str, value: str) -> tuple[str | None, int]:
    """``17``, ``1f3a9c02-17`` or ``cmpl-1f3a9c02-17`` as (server or None, number).

    :raises SlalomError: nothing of the kind
    """
    server, _, number = value.removeprefix("chat").removeprefix("cmpl-").rpartition("-")
    if not (number.isascii() and number.isdigit()):
        raise SlalomError(what, value, "give a number, or SERVER-NUMBER as in cmpl-SERVER-NUMBER")
    return server or None, int(number)


F = TypeVar("F", bound=Callable[..., Any])


def _of_a_log(function: F) -> F:
    """Decorator: a line that lacks what every such line has is an error of the file."""

    @functools.wraps(function)
    def checked(path: Path, **given: Any) -> Any:
        try:
            return function(path, **given)
        except SlalomError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise SlalomError("--log", str(path), f"a line is not one of a decision log ({error!r})") from error

    return cast(F, checked)


@_of_a_log
def explain_decision(path: Path, *, request: str | None = None, seq: str | None = None) -> dict[str, Any]:
    """The decisions about a request (or the one numbered ``seq``), their policy, and the outcome.

    :param request: its number, or with its server's name before it (see :func:`_named`); ``seq`` likewise
    :raises SlalomError: the log holds no such decision, or several servers wrote one
    """
    what, value, name = ("--seq", seq, "seq") if seq is not None else ("--request", request, "request")
    server, number = _named(what, str(value))
    policies: dict[tuple[str, int], dict[str, Any]] = {}
    decisions, outcomes = [], {}
    for line in read_log(path):
        kind = line.get("type")
        if kind == "policy":
            policies[_key(line)] = line["policy"]
        elif server is not None and line.get("server", "") != server:
            continue
        elif kind == "decision" and line[name] == number:
            decisions.append(line)
        elif kind == "outcome":
            if decisions and _key(line, "request") == _key(decisions[-1], "request"):
                outcomes[_key(line, "request")] = line
            elif name == "request" and line["request"] == number and line.get("instance") is None:
                outcomes[_key(line, "request")] = line  # refused at the door: nothing was decided about it
    servers = sorted({line.get("server", "") for line in (*decisions, *outcomes.values())})
    if not servers:
        raise SlalomError(what, value, "the log holds no such decision; it may have been rotated away")
    if len(servers) > 1:
        fix = f"several servers wrote to this log; give one of {', '.join(f'{s}-{number}' for s in servers)}"
        raise SlalomError(what, value, fix)
    for decision in decisions:
        decision["policy"] = policies.get(_key(decision))
        decision["why"] = _why(decision)
    return {"decisions": decisions, "outcome": next(iter(outcomes.values()), None)}


def _why(decision: dict[str, Any]) -> list[str]:
    """The decision in sentences."""
    name = (decision["policy"] or {}).get("name", f"policy {decision['generation']}")
    said = []
    if decision["reason"] == "policy":
        said.append(f"{name} chose {decision['action']} out of {len(decision['candidates'])}.")
    elif decision["reason"] == "advisory":
        advised = _action_of(decision, decision["advised"])
        said.append(f"The fallback acted ({decision['action']}); {name} only advised {advised}.")
    else:
        said.append(f"The fallback answered {decision['action']}, because: {_REASONS[decision['reason']]}.")
    if decision["margin"] is not None:
        close = "a close call" if decision["margin"] < 0.1 else "a clear one"
        said.append(f"Its score beat the next one's by {decision['margin']:.3g}: {close}.")
    chosen = next((c for c in decision["candidates"] if c["row"] == decision["choice"]), None)
    others = [c for c in decision["candidates"] if c["row"] != decision["choice"] and "outstanding" in c]
    if chosen is None or "outstanding" not in chosen or not others:
        return said
    for key, text, unit in _CLAIMS:
        mine, rest = chosen.get(key, 0.0), [c.get(key, 0.0) for c in others]
        if not any(rest) and not mine:
            continue
        better = sum(r < mine for r in rest)
        place = "the least" if better == 0 else f"{better} of {len(rest)} others were lower"
        low, high = (f"{x * unit[0]:.4g}" for x in (min(rest), max(rest)))
        said.append(f"{text} {mine * unit[0]:.4g} {unit[1]}: {place} (others {low} to {high}).")
    return said


_REASONS = {
    "frozen": "an operator has frozen the arrangement",
    "restore": "the arrangement of the start is being restored",
    "breaker": "the circuit breaker is open",
    "ood": "the situation lies outside what the policy was trained on",
    "features": "a feature was not a number",
    "deadline": "the policy was late",
    "busy": "the policy was still at an earlier, abandoned question",
    "error": "the policy raised an error",
    "invalid": "the policy's answer was not allowed",
    "scores": "a score of the policy was not a number",
    "drift": "actual latencies have parted from the predicted ones",
}
_MS, _ONE = (1e3, "ms"), (1.0, "tokens")
_CLAIMS = (
    ("ttft_s", "Predicted TTFT", _MS),
    ("step_with_s", "Decode step with it", _MS),
    ("transfer_s", "KV transfer", _MS),
    ("outstanding", "Outstanding", _ONE),
)


def _action_of(decision: dict[str, Any], row: int | None) -> str:
    found = next((c["action"] for c in decision["candidates"] if c["row"] == row), None)
    return str(found or "nothing usable")


@_of_a_log
def summary(path: Path) -> dict[str, Any]:
    """Counts, latency, fallbacks by reason, agreement of advice, and predictions against what happened."""
    kinds: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    latency, ratios, met = [], {"ttft": [], "tpot": []}, Counter()  # type: ignore[var-annotated]
    advised = agreed = 0
    policies, events = [], []
    left_out: list[str] = []
    for line in read_log(path, left_out):
        kind = line.get("type")
        if kind == "decision":
            kinds[line["kind"]] += 1
            reasons[line["reason"]] += 1
            latency.append(line["latency_us"])
            if line["reason"] == "advisory":
                advised += 1
                agreed += line["advised"] == line["choice"]
        elif kind == "outcome":
            good = line.get("good", line["ttft_ok"] and line["tpot_ok"])
            met["requests"] += good is not None  # nobody knows of those whose clients left in time
            met["good"] += bool(good)
            for metric, found in ratios.items():
                actual, predicted = line[f"{metric}_s"], line[f"predicted_{metric}_s"]
                if actual and predicted:
                    found.append(actual / predicted)
        elif kind == "policy":
            policies.append(line["policy"]["name"])
        elif kind in ("breaker", "drift", "mode", "role"):
            events.append(line)
    return {
        "decisions": sum(kinds.values()),
        "unreadable": left_out,
        "kinds": dict(kinds),
        "reasons": dict(reasons),
        "latency_us": {f"p{q}": float(np.percentile(latency, q)) for q in (50, 99)} if latency else {},
        "advice_agreement": agreed / advised if advised else None,
        "policies": policies,
        "requests": met["requests"],
        "attainment": met["good"] / met["requests"] if met["requests"] else None,
        "actual_over_predicted": {m: float(np.median(v)) for m, v in ratios.items() if v},
        "events": events[-20:],
    }
