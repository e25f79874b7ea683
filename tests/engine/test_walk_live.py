"""A served request, as in ``docs/walk.md``: no room calls another one that calls back, except the core."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

from test_server import GREEDY, PROMPT, Served, events

ROOT = Path(__file__).resolve().parents[2]
_FLOORS = ("engine", "policies", "env", "train", "eval")


@cache
def _room(file: str) -> str | None:
    """The folder of a file of the product; None of the core, and of what is not ours."""
    path = Path(file)
    if not path.is_relative_to(ROOT):
        return None
    folder = path.parent.relative_to(ROOT)
    return str(folder) if folder.parts[:1] and folder.parts[0] in _FLOORS and folder.parts[1:2] != ("core",) else None


def _stays(frame: FrameType | None) -> Iterator[tuple[str, str]]:
    """The rooms on the stack, innermost first, each stay in one of them once, with the function that was entered."""
    room = None
    while frame is not None:
        here = _room(frame.f_code.co_filename)
        if here is not None and here != room:
            room = here
            yield here, frame.f_code.co_qualname
        frame = frame.f_back


def returns_of(frame: FrameType | None) -> list[tuple[str, str]]:
    """The stays of a stack that enters a room again; empty where none does."""
    stays = list(_stays(frame))
    return stays if len({room for room, _ in stays}) < len(stays) else []


def test_a_request_never_comes_back_to_a_room_it_has_left(tmp_path: Path) -> None:
    entered: set[str] = set()
    returns: set[tuple[tuple[str, str], ...]] = set()

    def look(frame: FrameType, event: str, argument: Any) -> None:
        room = _room(frame.f_code.co_filename) if event == "call" else None
        if room is not None:
            entered.add(room)
            returns.add(tuple(returns_of(frame)))

    log = str(tmp_path / "decisions.jsonl")
    threading.setprofile(look)  # of the threads that begin from now on: server, scheduler, lanes, links
    try:
        served = Served(instances=2, roles="prefill,decode", decision_log=log)
    finally:
        threading.setprofile(None)
    try:
        served.post("/v1/completions", {"prompt": PROMPT, **GREEDY})  # what is made once is no part of the walk
        entered.clear()
        returns.clear()
        body = {"prompt": f"{PROMPT} at night", "stream": True, **GREEDY}
        with served.client.stream("POST", "/v1/completions", json=body) as response:
            events(response)
    finally:
        served.close()
    assert entered >= {"engine/server", "engine/live", "engine/model", "policies/guard", "policies/rules"}
    assert returns == {()}, "engine/live must not call what calls engine/live: book, announce or return it instead"


def test_a_call_back_would_be_seen() -> None:
    seen: list[list[tuple[str, str]]] = []

    def named(room: str, inner: str) -> Any:
        code = compile(f"def step(): {inner}", str(ROOT / room / "made_up.py"), "exec")
        names: dict[str, Any] = {"seen": seen, "returns_of": returns_of, "sys": __import__("sys")}
        exec(code, names)
        return names

    there = named("engine/live", "seen.append(returns_of(sys._getframe()))")
    between = named("policies/guard", "there()")
    between["there"] = there["step"]
    again = named("engine/live", "between()")
    again["between"] = between["step"]
    between["step"]()
    again["step"]()
    assert [[room for room, _ in stays] for stays in seen] == [[], ["engine/live", "policies/guard", "engine/live"]]
