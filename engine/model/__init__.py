"""The tensor half of the engine: weights, tokens, the transformer and its KV, sampling. No scheduling.

Start with :class:`ModelRunner` (a batch in, tokens out); `llama` is the model itself, `weights` says which
checkpoints load, `tokenizer` and `stopping` turn tokens into text.
"""

from __future__ import annotations

from engine.kernels import Batch, Span, Spans
from engine.model.config import ModelConfig
from engine.model.kv import KVPool
from engine.model.llama import Carry, Llama
from engine.model.runner import ModelRunner
from engine.model.sampling import SamplingParams
from engine.model.stopping import Finish, Generation
from engine.model.tokenizer import Tokenizer, load_tokenizer
from engine.model.weights import load_model, open_checkpoint

__all__ = [
    "Batch",
    "Carry",
    "Finish",
    "Generation",
    "KVPool",
    "Llama",
    "ModelConfig",
    "ModelRunner",
    "SamplingParams",
    "Span",
    "Spans",
    "Tokenizer",
    "load_model",
    "load_tokenizer",
    "open_checkpoint",
]
