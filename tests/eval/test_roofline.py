"""The table on paper: its sums against the model's own weights, and the page that shows it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from engine.kernels import make_kernels
from engine.model import Llama
from engine.model.config import DUMMY_SHAPES

pytest.importorskip("triton")
from eval.gpu_check import roofline

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu.md"
CONFIG = DUMMY_SHAPES["llama-8b"]


def weights() -> tuple[int, int]:
    """Elements of all layers, and of the head, of the model itself."""
    with torch.device("meta"):
        model = Llama(CONFIG, make_kernels("torch", "cpu"))
    assert model.head is not None
    return sum(p.numel() for p in model.layers.parameters() if p.dim() == 2), model.head.weight.numel()


@pytest.mark.parametrize("n", [1, 64])
def test_a_decode_step_reads_the_weights_once_and_every_context(n: int) -> None:
    layers, head = weights()
    n_bytes, flop = roofline._cost(CONFIG, n, True)
    kv = 2 * CONFIG.n_layers * CONFIG.n_kv_heads * CONFIG.head_dim * 2  # keys and values in bf16
    assert n_bytes == 2 * (layers + head) + n * (roofline.CONTEXT + 1) * kv
    products = 2 * n * (layers + head)
    attention = 2 * 2 * n * (roofline.CONTEXT + 1) * CONFIG.n_heads * CONFIG.head_dim * CONFIG.n_layers
    assert flop == products + attention


def test_a_prompt_multiplies_every_row_and_samples_one() -> None:
    layers, head = weights()
    _, flop = roofline._cost(CONFIG, 3, False)
    pairs = 1 + 2 + 3
    assert flop == 2 * (3 * layers + head) + 4 * pairs * CONFIG.n_heads * CONFIG.head_dim * CONFIG.n_layers


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is specialised then")
def test_the_page_shows_what_the_command_prints() -> None:
    """All but the host's time, which is of the machine that measured it."""
    rows = roofline.roofline(timed=False)
    page = PAGE.read_text(encoding="utf-8")
    for line in roofline.markdown(rows).splitlines():
        assert line in page
    per_layer = {row["launches"] // CONFIG.n_layers for row in rows}
    assert per_layer == {9, 10}, "nine kernels a layer, ten where contexts are split"
    assert {row["replayed"] for row in rows if row["step"] == "decode"} == {True}
