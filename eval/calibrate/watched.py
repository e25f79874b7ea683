"""``calibrate --engine URL,... --watch``: a profile of the steps that engines make for the traffic they serve anyway.

Nothing is sent to them. vLLM tells its steps through our plug-in (:mod:`engine.remote.steps`): what each computed, and
when it ended. A step that follows another without a pause took what lies between the two ends, so the host's work
between them is counted, as are neighbours on the same hardware. Steps of several prompts are left out: the square of
each length would have to be known. Like steps count as their mean, because means add up to latencies where steps
scatter.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from engine.calibration.from_outside import KV_TOKENS, fused_error, profile_of, step_errors
from engine.calibration.points import Kind, Measured, Point
from engine.common.progress import Display
from engine.errors import SlalomError
from engine.latency.fit import MIN_POINTS
from engine.latency.profile import Profile
from engine.remote.discover import EngineFacts, discover
from engine.remote.steps import paced, read_steps
from eval.calibrate.gaps import averaged, with_fused
from eval.calibrate.remote import say

_CHECKED = 0.2  # last share of the steps, which no fit sees
_POLL_S = 5.0


def watch(urls: Sequence[str], budget_s: float) -> tuple[list[EngineFacts], list[np.ndarray]]:
    """What the engines say of themselves, and their steps: those they still know of and those of the next ``budget_s``.

    :return: facts and :data:`engine.remote.steps.STEP`, one each per engine
    :raises SlalomError: an engine that does not answer, or tells no steps
    """
    facts = [discover(url) for url in urls]
    print(f"watching {', '.join(urls)} for {budget_s:g} s; nothing is sent to them", file=sys.stderr)
    steps = [read_steps(url, 0) for url in urls]
    end = time.monotonic() + budget_s
    with Display() as display:
        display.phase("calibrate")
        while (left := end - time.monotonic()) > 0.0:
            display.update(1.0 - left / budget_s, f"{sum(map(len, steps))} steps")
            time.sleep(min(_POLL_S, left))
            for k, (url, known) in enumerate(zip(urls, steps, strict=True)):
                steps[k] = np.concatenate([known, read_steps(url, int(known["number"].max(initial=0)))])
    for url, found in zip(urls, steps, strict=True):
        if not len(found):
            fix = "it must have our plug-in and --enable-logging-iteration-details, and serve (docs/remote.md)"
            raise SlalomError("--watch", f"{url} tells no steps", fix)
    return facts, steps


def points_of(steps: np.ndarray, kv_tokens: int) -> list[Measured]:
    """The steps of one engine as points, those that cannot be told left out.

    :param steps: :data:`engine.remote.steps.STEP`, ``elapsed_s`` being all that a step took
    """
    found = []
    for step in steps:
        n, bs, took = int(step["prompt_tokens"]), int(step["decodes"]), float(step["elapsed_s"])
        if took <= 0.0 or step["prompts"] > 1 or n + bs == 0:
            continue
        ctx = max(round((float(step["kv"]) * kv_tokens - n) / max(bs, 1)), 1)
        kind: Kind = "fused" if n and bs else "prefill" if n else "decode"
        point = Point(kind, n=n, prompts=int(n > 0), bs=bs, ctx=ctx if bs else 0)
        found.append(Measured(point, took))
    return found


def fitted(
    facts: Sequence[EngineFacts], steps: Sequence[np.ndarray], name: str
) -> tuple[Profile, float, dict[str, dict[str, float]]]:
    """One profile of all the engines, its error on fused steps, and how far it is from the last fifth of all steps.

    That fifth no fit has seen. :raises SlalomError: too few steps
    """
    seen, unseen, points = 0, list[np.ndarray](), list[Measured]()
    for fact, own in zip(facts, steps, strict=True):
        cut = len(own) - round(_CHECKED * len(own))
        seen += cut
        whole = paced(own)
        unseen.append(whole[cut:])
        points += points_of(whole[:cut], fact.kv_tokens or KV_TOKENS)
    alike = averaged(points)
    of = Counter(m.point.kind for m in alike)
    if of["decode"] < MIN_POINTS or of["prefill"] + of["fused"] < MIN_POINTS:
        got = f"decode steps of {of['decode']} kinds, prompts of {of['prefill'] + of['fused']}"
        raise SlalomError("--watch", got, f"{MIN_POINTS} of each are needed: watch longer, or busier engines")
    measured = with_fused(alike)
    how = f"{seen} steps of {len(facts)} engines in their own traffic, host work between steps included"
    profile = profile_of(measured, facts[0], name, how=how)
    return profile, fused_error(profile, measured), step_errors(profile, np.concatenate(unseen))


def command(urls: Sequence[str], out: Path, budget_s: float, as_json: bool) -> None:
    """Watch the engines at ``urls``, write their profile to ``out`` and say how good it is.

    :raises SlalomError: an engine that does not answer, or too few steps
    """
    begin = time.monotonic()
    profile, fused, errors = fitted(*watch(urls, budget_s), out.stem)
    profile.save(out)
    how = {"seconds": round(time.monotonic() - begin, 1), "stopped": "watched", "out": str(out)}
    say(profile, fused, errors, how, as_json)
