"""The GGUF reader: values, and an answer to every kind of damage."""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_file import BF16, F16, F32, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q6_K, Q8_0, gguf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import SlalomError
from engine.model.gguf import GGUFFile


def opened(data: bytes, folder: Path) -> GGUFFile:
    path = folder / "model.gguf"
    path.write_bytes(data)
    return GGUFFile(path)


def half(value: float) -> bytes:
    return np.float16(value).tobytes()


META = {"general.architecture": "llama", "numbers": [1, -2, 3], "words": ["a", "ü"], "scale": 0.5, "count": 7}


def test_metadata_and_plain_tensors(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4) - 5.25
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    tensors = {
        "a": ((3, 4), F32, values.tobytes()),
        "b": ((3, 4), F16, values.astype(np.float16).tobytes()),
        "c": ((12,), BF16, bits.tobytes()),
    }
    file = opened(gguf(META, tensors), tmp_path)
    assert file.metadata == META
    np.testing.assert_array_equal(file.load("a"), values)
    np.testing.assert_array_equal(file.load("b"), values)
    np.testing.assert_array_equal(file.load("c"), values.ravel())
    assert file.load("a").flags.writeable
    with pytest.raises(SlalomError, match="lacks it"):
        file.load("d")


def test_blocks_by_hand(tmp_path: Path) -> None:
    """Byte i of a 4-bit block holds elements i (low half) and i + 16 (high half)."""
    nibbles = bytes((i % 16) | (15 - i % 16) << 4 for i in range(16))
    up, down = np.arange(16, dtype=np.float32), np.arange(15, -1, -1, dtype=np.float32)
    quants = np.concatenate((up, down))
    eight = np.arange(-16, 16, dtype=np.int8)
    high = struct.pack("<I", 0x0000FFFF)  # the fifth bit of the first 16 elements
    file = opened(
        gguf(
            {},
            {
                "q4_0": ((1, 32), Q4_0, half(0.5) + nibbles),
                "q4_1": ((32,), Q4_1, half(0.5) + half(-3.0) + nibbles),
                "q5_0": ((32,), Q5_0, half(2.0) + high + nibbles),
                "q5_1": ((32,), Q5_1, half(2.0) + half(1.0) + high + nibbles),
                "q8_0": ((2, 32), Q8_0, (half(0.25) + eight.tobytes()) * 2),
            },
        ),
        tmp_path,
    )
    fifth = quants + np.repeat([16, 0], 16)
    np.testing.assert_array_equal(file.load("q4_0"), [(quants - 8) * 0.5])
    np.testing.assert_array_equal(file.load("q4_1"), quants * 0.5 - 3)
    np.testing.assert_array_equal(file.load("q5_0"), (fifth - 16) * 2)
    np.testing.assert_array_equal(file.load("q5_1"), fifth * 2 + 1)
    np.testing.assert_array_equal(file.load("q8_0"), [eight * 0.25] * 2)


def halves(raw: np.ndarray) -> np.ndarray:
    return raw.copy().view(np.float16).astype(np.float32)


def q4_k(raw: np.ndarray) -> np.ndarray:
    """8 groups of 32; 6-bit scales and minima share 12 bytes, the last four of each with split bits."""
    low, mid, high = np.split(raw[:, 4:16], 3, axis=1)
    scales = np.concatenate((low & 63, (high & 15) | ((low >> 2) & 48)), axis=1)
    minima = np.concatenate((mid & 63, (high >> 4) | ((mid >> 2) & 48)), axis=1)
    pairs = raw[:, 16:].reshape(-1, 4, 32)
    quants = np.stack((pairs & 15, pairs >> 4), axis=2).reshape(-1, 8, 32)
    step, base = halves(raw[:, :2]) * scales, halves(raw[:, 2:4]) * minima
    return (step[..., None] * quants - base[..., None]).reshape(-1, 256)


def q6_k(raw: np.ndarray) -> np.ndarray:
    """16 groups of 16; four low bits in 128 bytes, two high bits in 64, int8 scales."""
    packed = raw[:, :128].reshape(-1, 2, 1, 64)
    low = np.concatenate((packed & 15, packed >> 4), axis=2).reshape(-1, 8, 32)
    high = raw[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    quants = (low | ((high & 3) << 4).reshape(-1, 8, 32)).astype(np.float32).reshape(-1, 16, 16) - 32
    scales = halves(raw[:, 208:210]) * raw[:, 192:208].view(np.int8)
    return (scales[..., None] * quants).reshape(-1, 256)


@pytest.mark.parametrize(("kind", "size", "decode"), [(Q4_K, 144, q4_k), (Q6_K, 210, q6_k)])
def test_large_blocks_by_their_specification(kind: int, size: int, decode: Any, tmp_path: Path) -> None:
    raw = np.random.default_rng(0).integers(0, 256, (40, 2 * size), dtype=np.uint8)
    with np.errstate(all="ignore"):  # random bytes hold infinite and undefined scales too
        file = opened(gguf({}, {"t": ((40, 512), kind, raw.tobytes())}), tmp_path)
        np.testing.assert_array_equal(file.load("t"), decode(raw.reshape(-1, size)).reshape(40, 512))


def test_a_format_that_nobody_decodes_is_refused_by_its_name(tmp_path: Path) -> None:
    q8_k = 15  # intermediate results of ggml, never weights
    with pytest.raises(SlalomError, match="Q8_K"):
        opened(gguf({}, {"t": ((256,), q8_k, bytes(292))}), tmp_path).load("t")


GOOD = gguf(META, {"t": ((2, 32), Q8_0, (half(1) + bytes(32)) * 2)})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot open"),
        (b"GG", "cut short"),
        (gguf({}, {}, magic=b"GGML"), "not a GGUF file"),
        (GOOD.replace(struct.pack("<IQQ", 3, 1, 5), struct.pack("<IQQ", 1, 1, 5)), "version"),
        (gguf({}, {"t": ((32,), 99, b"")}), "tensor type"),
        (gguf({}, {"t": ((33,), Q8_0, bytes(68))}), "shape"),
        (gguf({}, {"t": ((2**40, 2**20), F32, b"")}), "cut short"),
        (gguf({"general.alignment": 0}, {}), "alignment"),
    ],
    ids=["empty", "stub", "magic", "version", "type", "odd-row", "huge", "alignment"],
)
def test_damage_is_named(data: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(SlalomError, match=message):
        opened(data, tmp_path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(SlalomError, match="cannot open"):
        GGUFFile(tmp_path / "absent.gguf")


@pytest.mark.parametrize("length", range(0, len(GOOD) - 28, 3))
def test_every_cut_is_noticed(length: int, tmp_path: Path) -> None:
    """28 bytes of padding follow the last tensor."""
    with pytest.raises(SlalomError):
        opened(GOOD[:length], tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, len(GOOD) - 1), byte=st.integers(0, 255))
def test_a_flipped_byte_never_escapes_as_another_error(position: int, byte: int, tmp_path: Path) -> None:
    damaged = bytearray(GOOD)
    damaged[position] = byte
    try:
        file = opened(bytes(damaged), tmp_path)
        for name in file.tensors:
            file.load(name)
    except SlalomError:
        pass


def test_model_file_equals_the_model_it_was_made_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, fused parts, and the llama architecture's order of query and key rows (pairs side by side)."""
    import torch

    from engine.model import load_model
    from engine.model.llama import Llama

    monkeypatch.setattr(Llama, "pack", lambda self: None)  # the weights as they stand in the file, to compare
    model = load_model("dummy:tiny")
    config, heads = model.config, (4, 2, 2)
    metadata = {
        "general.architecture": "llama", "llama.embedding_length": 64, "llama.block_count": 4,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.feed_forward_length": 128,
        "llama.context_length": 4096, "llama.rope.freq_base": 10000.0,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
    }  # fmt: skip
    tensors: dict[str, tuple[tuple[int, ...], int, bytes]] = {}

    def put(name: str, tensor: torch.Tensor) -> None:
        tensors[f"{name}.weight"] = (tuple(tensor.shape), F32, tensor.contiguous().numpy().tobytes())

    def side_by_side(tensor: torch.Tensor) -> torch.Tensor:
        order = [h * 16 + i + half * 8 for h in range(len(tensor) // 16) for i in range(8) for half in (0, 1)]
        return tensor[order]

    state = model.state_dict()
    put("token_embd", state["embed.weight"])
    put("output_norm", state["norm.weight"])
    put("rope_freqs", torch.full((8,), 2.0))
    for i in range(4):
        query, key, value = state[f"layers.{i}.attention.qkv.weight"].split([h * 16 for h in heads])
        put(f"blk.{i}.attn_q", side_by_side(query))
        put(f"blk.{i}.attn_k", side_by_side(key))
        put(f"blk.{i}.attn_v", value)
        gate, up = state[f"layers.{i}.ffn.gate_up.weight"].chunk(2)
        put(f"blk.{i}.ffn_gate", gate)
        put(f"blk.{i}.ffn_up", up)
        put(f"blk.{i}.ffn_down", state[f"layers.{i}.ffn.down.weight"])
        put(f"blk.{i}.attn_output", state[f"layers.{i}.attention.out.weight"])
        put(f"blk.{i}.attn_norm", state[f"layers.{i}.attention_norm.weight"])
        put(f"blk.{i}.ffn_norm", state[f"layers.{i}.ffn_norm.weight"])
    path = tmp_path / "tiny.gguf"
    path.write_bytes(gguf(metadata, tensors))
    loaded = load_model(str(path))
    assert replace(loaded.config, norm_eps=config.norm_eps) == config
    assert loaded.config.norm_eps == np.float32(config.norm_eps)
    assert torch.equal(loaded.frequencies, model.frequencies / 2)
    for name, tensor in loaded.state_dict().items():
        assert name == "frequencies" or torch.equal(tensor, state[name]), name

    path.write_bytes(gguf(metadata | {"general.architecture": "bert"}, tensors))
    with pytest.raises(SlalomError, match="supported: llama"):
        load_model(str(path))
    del tensors["blk.2.ffn_up.weight"]
    path.write_bytes(gguf(metadata, tensors))
    with pytest.raises(SlalomError, match=r"blk\.2\.ffn_up"):
        load_model(str(path))
