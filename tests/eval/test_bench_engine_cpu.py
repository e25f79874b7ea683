"""The engine's benchmark at a size where figures mean nothing: both sides answer, with the same tokens."""

from __future__ import annotations

import pytest

from engine.model.config import DUMMY_SHAPES
from eval.benchmarks import engine_cpu


@pytest.mark.slow
def test_both_sides_are_timed_and_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from engine.model import weights

    def tensor(self: weights.DummyCheckpoint, name: str) -> object:
        """Tensors by Hugging Face name, cut out of those the dummy model is filled with."""
        import torch

        config = self.config
        for outer, source in weights._OUTER.items():
            if name == f"{source}.weight":
                rows = config.width if outer == "norm.weight" else (config.vocab, config.width)
                return self.fill(outer, torch.empty(rows))
        _, _, index, rest = name.split(".", 3)
        module, leaf = rest.rsplit(".", 1)
        shapes = {
            "self_attn.q_proj": config.n_heads * config.head_dim,
            "self_attn.k_proj": config.n_kv_heads * config.head_dim,
            "self_attn.v_proj": config.n_kv_heads * config.head_dim, "self_attn.o_proj": config.width,
            "mlp.gate_proj": config.ffn, "mlp.up_proj": config.ffn, "mlp.down_proj": config.width,
        }  # fmt: skip
        for ours, sources in weights._INNER.items():
            if module in sources:
                if "norm" in ours:
                    return self.fill(f"layers.{index}.{ours}.{leaf}", torch.empty(config.width))
                wide = {"attention.out": config.n_heads * config.head_dim, "ffn.down": config.ffn}.get(
                    ours, config.width
                )
                sizes = [shapes[source] for source in sources]
                whole = self.fill(f"layers.{index}.{ours}.{leaf}", torch.empty(sum(sizes), wide))
                return whole.split(sizes)[sources.index(module)].clone()
        raise AssertionError(name)

    monkeypatch.setattr(weights.DummyCheckpoint, "tensor", tensor)
    assert DUMMY_SHAPES["tiny"].tied
    found = engine_cpu.compare("dummy:tiny", prompt=9, tokens=6, batch=3, rounds=1, continuous=False)
    assert found["same_tokens"]
    assert found["theirs_continuous_batching"] == "not run"
    assert set(found["ratio"]) == {
        "ours_to_theirs_batch_1", "ours_batch_3_to_theirs_sequential", "ours_to_theirs_batch_3"
    }  # fmt: skip
    assert all(value > 0 for value in found["decode_tokens_per_second"].values())
