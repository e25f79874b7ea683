"""Files of every kind that a user names, damaged in every way: see ``contract.py`` for what must hold."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from contract import EXAMPLES, keeps, mutants, scrambled
from gguf_file import small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.calibration.points import Store
from engine.errors import SlalomError
from engine.jit.kernel import CACHE_DIR
from engine.jit.sources import ROOT
from engine.latency import Profile
from engine.model import load_tokenizer, open_checkpoint
from env.scenario import Scenario, list_scenarios
from env.surrogate.arena import arena_of
from env.surrogate.simulate import simulate
from env.workload import read_trace
from eval.calibrate.request_log import read_log, read_settings
from eval.explain.log import explain_decision, summary
from policies.guard.config import GuardConfig
from policies.load import load_policy
from policies.serve import load_classes
from train.config import load_config
from train.recipe import load_recipe
from train.search.journal import Journal
from train.search.rule import SearchResult

SCENARIOS = {name: Scenario.load(name).model_dump(mode="json") for name in list_scenarios()}
SHIPPED = ROOT / "checkpoints" / "policies"
TINY = arena_of(Scenario.load("tiny-4xa100")).setting
OWN = [
    {"timestamp": 100.0 * k, "input_length": 40 + k, "output_length": 5, "hash_ids": [1, k], "hash_tokens": 16,
     "class": k % 2, "session_id": f"s{k // 2}", "slo_ttft_ms": 100.0, "slo_tpot_ms": 10}
    for k in range(24)
]  # fmt: skip
LOG = [
    {"arrival": 0.1 * k, "input_tokens": 5, "output_tokens": 1 + k % 4, "first_token": 0.1 * k + 0.05,
     "last_token": 0.1 * k + 0.1}
    for k in range(24)
]  # fmt: skip
DECISIONS = [
    {"type": "policy", "time": 1.0, "now_s": 0.0, "generation": 0, "isolated": False, "policy": {"name": "x"}},
    {"type": "decision", "time": 1.0, "seq": 0, "now_s": 0.1, "kind": "place_prefill", "request": 3, "generation": 0,
     "choice": 0, "action": "instance 0", "advised": 0, "margin": 0.1, "reason": "policy", "fallback": False,
     "latency_us": 3.0, "context": {}, "candidates": [{"row": 0, "action": "instance 0", "outstanding": 1.0}]},
    {"type": "outcome", "time": 2.0, "request": 3, "finish": "stop", "instance": 0, "ttft_s": 0.1,
     "predicted_ttft_s": 0.1, "ttft_ok": True, "tpot_s": 0.1, "predicted_tpot_s": 0.1, "tpot_ok": True},
]  # fmt: skip
CONFIG = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "eos_token_id": [1, 2], "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
}  # fmt: skip
ENGINE = {"max_num_seqs": 8, "max_num_batched_tokens": 512, "cache_config": {"num_gpu_blocks": 101, "block_size": 16}}
CLASSES = {"classes": [{"name": "chat", "ttft_s": 1.0, "tpot_s": 0.1}, {"name": "b", "ttft_s": 2, "tpot_s": 1}]}
GUARD = GuardConfig().model_dump(mode="json")
RECIPE = yaml.safe_load((ROOT / "train" / "recipes" / "generalist.yaml").read_text())
TRAINING = {"default": {"hidden": 16, "learning_rate": 1e-3, "rules": ["muxwise"]}, "mine": {"n_envs": 16, "groups": 4}}


def json_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _yaml(document: Any) -> bytes:
    return yaml.safe_dump(document, allow_unicode=True).encode(errors="surrogatepass")


def _json(document: Any) -> bytes:
    return json.dumps(document).encode()


def _lines(document: Any) -> bytes:
    return json_lines(document) if isinstance(document, list) else _json(document)


def _trace(path: Path) -> None:
    trace = read_trace(path, "slalom")
    simulate(Scenario.load("classes-6xa100"), "least_tokens", rate=1.0, trace=trace.compact())


def _explain(path: Path) -> None:
    for look in (summary, lambda path: explain_decision(path, request=3), lambda path: explain_decision(path, seq=0)):
        look(path)


def _points(path: Path) -> None:
    Store(path, {"model": "x"}).known()


#: Border: file name, a good document, how it is written, who reads it.
BORDERS: dict[str, tuple[str, Any, Callable[[Any], bytes], Callable[[Path], Any]]] = {
    "profile": ("a.json", json.loads(Profile.load("smollm2-cpu").to_json()), _json, Profile.load),
    "trace": ("a.jsonl", OWN, _lines, _trace),
    "request log": ("a.jsonl", LOG, _lines, read_log),
    "benchmark": ("a.json", {
        "start_times": [0.1 * k for k in range(24)], "input_lens": [5] * 24, "output_lens": [3] * 24,
        "ttfts": [0.1] * 24, "itls": [[0.1, 0.1]] * 24,
    }, _json, read_log),
    "engine settings": ("a.yaml", ENGINE, _yaml, read_settings),
    "classes": ("a.yaml", CLASSES, _yaml, lambda path: load_classes(str(path), 1.0, 1.0)),
    "guard": ("a.yaml", GUARD, _yaml, GuardConfig.load),
    "guard as JSON": ("a.json", GUARD, _json, GuardConfig.load),
    "recipe": ("a.yaml", RECIPE, _yaml, lambda path: load_recipe(str(path))),
    "training": ("a.yaml", TRAINING, _yaml, lambda path: load_config(path, "mine")),
    "decision log": ("a.jsonl", DECISIONS, _lines, _explain),
    "measured points": ("a.jsonl", [{"identity": {"model": "x"}}, {
        "point": {"kind": "decode", "n": 0, "r": 0, "prompts": 0, "bs": 1, "ctx": 5}, "seconds": 0.1, "wall_s": 0.1,
        "cpu_s": 0.1, "spread": 0.1, "repeats": 3, "busy": False, "failed": "",
    }, {"note": "host", "value": 1.0}], _lines, _points),
    "model config": ("config.json", CONFIG, _json, lambda path: open_checkpoint(str(path.parent))),
    "base of a run": ("base.json", {
        "rule": "linear_score", "values": {"a": 1.0, "b": "x"}, "knee": 1.0, "default_score": 0.5, "score": 0.6,
        "trials": 3, "requests": 100, "seconds": 1.5, "sampler": "direct", "plans": [{"role": 2}, {"role": None}],
        "theta": [0.0, 1.5], "folder": "", "universal": False,
    }, _json, SearchResult.read),
    "search": ("a.jsonl", [{"search": "a"}, [1, [0.5, None, 10], 0.1]], _lines,
               lambda path: Journal(path, "a").ask("x", lambda: 0)),
}  # fmt: skip


def once(read: Callable[[], Any]) -> None:
    """Whatever is compiled or loaded the first time, without limits."""
    with suppress(SlalomError):
        read()


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("border", BORDERS)
def test_a_document_with_things_changed(border: str, examples: int, tmp_path: Path) -> None:
    name, document, written, read = BORDERS[border]
    path = tmp_path / name
    path.write_bytes(written(document))
    once(lambda: read(path))

    @settings(max_examples=examples)
    @given(mutants(document))
    def check(mutant: Any) -> None:
        try:
            path.write_bytes(written(mutant))
        except (ValueError, yaml.YAMLError):
            return  # a document that nobody can write
        keeps(lambda: read(path))

    check()


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("border", BORDERS)
def test_a_file_with_bytes_changed(border: str, examples: int, tmp_path: Path) -> None:
    name, document, written, read = BORDERS[border]
    path = tmp_path / name
    path.write_bytes(written(document))
    once(lambda: read(path))

    @settings(max_examples=examples)
    @given(scrambled(written(document)), st.booleans())
    def check(raw: bytes, packed: bool) -> None:
        path.write_bytes(gzip.compress(raw, 1) if packed and "trace" in border else raw)
        keeps(lambda: read(path))

    check()


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("name", ["tiny-4xa100", "shift-pd-8xa100", "rag-prefix-4xa100", "classes-6xa100"])
def test_a_scenario_is_simulated_or_refused(name: str, examples: int) -> None:
    def read(content: Any) -> None:
        scenario = Scenario.parse(content, "mine.yaml")
        simulate(scenario, "least_tokens", rate=min(scenario.reference_rate, 5.0), n_requests=12)

    read(SCENARIOS[name])

    @settings(max_examples=examples)
    @given(mutants(SCENARIOS[name]))
    def check(mutant: Any) -> None:
        keeps(lambda: read(mutant))

    check()


def _bound(folder: Path) -> None:
    load_policy(str(folder), TINY)


@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("file", ["policy.json", "weights.safetensors", "profile.json"])
def test_a_checkpoint_is_bound_or_refused(file: str, examples: int, tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    shutil.copytree(SHIPPED / "tiny-4xa100", folder)
    raw = (folder / file).read_bytes()
    _bound(folder)
    kinds = scrambled(raw) if file == "weights.safetensors" else st.one_of(
        scrambled(raw), mutants(json.loads(raw)).map(lambda mutant: json.dumps(mutant).encode())
    )  # fmt: skip

    @settings(max_examples=examples)
    @given(kinds)
    def check(mutant: bytes) -> None:
        (folder / file).write_bytes(mutant)
        keeps(lambda: _bound(folder))

    check()


@pytest.mark.parametrize("examples", EXAMPLES)
def test_a_gguf_file_is_opened_or_refused(examples: int, tmp_path: Path) -> None:
    path, raw = tmp_path / "a.gguf", small_model()
    path.write_bytes(raw)

    def read() -> None:
        open_checkpoint(str(path))
        load_tokenizer(str(path)).encode("ab c")

    read()

    @settings(max_examples=examples)
    @given(scrambled(raw))
    def check(mutant: bytes) -> None:
        path.write_bytes(mutant)
        keeps(read)

    check()


@pytest.mark.slow
def test_what_the_readers_let_through_stays_within_the_arrays() -> None:
    """Scenarios and traces once more, with every access of the compiled core checked."""
    surroundings = os.environ | {"SLALOM_BOUNDS": "1", "SLALOM_CACHE_DIR": str(CACHE_DIR / "checked")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-m", "not slow and not fuzz", "-k",
         "scenario or trace", __file__],
        env=surroundings, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
