"""``python -m eval.bench NAME [--json]``: the figures of BENCHMARKS.md, each with its machine and commit.

Every benchmark prints one JSON object. A new one is a file in ``eval/benchmarks`` and a line in ``NAMES``.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from typing import Any

from engine.common.options import refuses
from engine.common.provenance import commit, machine
from engine.errors import no_such

NAMES = {
    "surrogate": "requests simulated per second, one core",
    "scale": "cost per request and memory at 10 thousand to 1 million requests, and in an overload",
    "clusters": "requests per second on 64 instances, and on Mooncake's prompts with the prefix cache",
    "goodput": "cost of one sustained goodput, beside a plain bisection with full-length runs",
    "env": "decisions per second of the batched environment, observations handed to Python",
    "training": "frames learned from per second and core, interleaved with stock MaskablePPO",
    "engine-cpu": "tokens per second of the engine on one core, beside transformers in the same run",
    "serving": "microseconds of a decision in the engine's scheduler, guard and log included, 16 instances",
    "rules": "microseconds per decision of every rule, compiled, 16 instances",
    "ray": "rollout rate of two Ray nodes on this machine against one",
    "startup": "seconds of a small eval-policy command, cold and warm",
    "route": "what the router adds to TTFT and token gaps at 8 streams, and 500 streams through it; a mock engine",
    "scheduling": "microseconds of the live scheduler per iteration at batch 64, and of a placement on 16 instances",
    "attack": "200 streams for --minutes, half of them beside a client that sends all that is wrong; 1 if any fails",
    "soak": "random faults on live and modelled instances for --minutes; exit code 1 if anything is lost or leaks",
}


def run(name: str, **options: Any) -> dict[str, Any]:
    """Run one benchmark; ``options`` are its own.

    :raises SlalomError: unknown name
    """
    if name not in NAMES:
        raise no_such("benchmark", name, NAMES)
    figures = import_module(f"eval.benchmarks.{name.replace('-', '_')}").run(**options)
    return {"benchmark": name, **figures, "commit": commit(), "machine": machine()}


@refuses("bench")
def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit code is 2 on an unknown name, 1 when a soak or an attack found something."""
    parser = argparse.ArgumentParser(prog="python -m eval.bench", description=__doc__)
    parser.add_argument("name", help="; ".join(f"{name}: {what}" for name, what in NAMES.items()))
    parser.add_argument("--json", action="store_true", help="one line instead of an indented object")
    parser.add_argument("--minutes", type=float, help="of the soak (30) and of the attack (3)")
    parser.add_argument("--model", help="of the attack (dummy:tiny): as for serve")
    options = parser.parse_args(arguments)
    taken = {"soak": ("minutes",), "attack": ("minutes", "model")}.get(options.name, ())
    result = run(options.name, **{k: v for k in taken if (v := getattr(options, k)) is not None})
    print(json.dumps(result, indent=None if options.json else 1))
    return 0 if result.get("ok", True) else 1


if __name__ == "__main__":
    sys.exit(main())
