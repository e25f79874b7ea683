"""Checkpoints: where a model's tensors come from, and how they become a :class:`Llama`.

``open_checkpoint`` takes ``dummy:SHAPE``, ``package:NAME`` (the GGUF file inside an installed Python
package), a ``.gguf`` file, or a folder with ``config.json`` and ``*.safetensors``. All answer in Hugging Face
names.
"""

from __future__ import annotations

import importlib.util
import os
import zlib
from abc import ABC, abstractmethod
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.common.documents import json_of, read_text
from engine.common.regular import check_regular
from engine.errors import SlalomError
from engine.kernels import make_kernels
from engine.model.config import DUMMY_SHAPES, ModelConfig, RopeScaling, number_of, whole_number
from engine.model.gguf import GGUFFile
from engine.model.llama import Llama


class Checkpoint(ABC):
    """A model's shape and its tensors by Hugging Face name."""

    config: ModelConfig

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """The tensor called ``name``, on the CPU, in any floating type.

        :raises SlalomError: no such tensor
        """

    def rope_frequencies(self) -> Tensor:
        """Float32 [head_dim / 2]; a file may override what its config says."""
        return self.config.rope_frequencies()


def resolve_model(model: str) -> str:
    """``package:NAME`` to the path of the one GGUF file in that package (which is not imported).

    :raises SlalomError: no such package, or not exactly one GGUF file in it
    """
    if not model.startswith("package:"):
        return model
    name = model.removeprefix("package:")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    folders = (spec.submodule_search_locations or []) if spec else []
    files = [path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))]
    if len(files) != 1:
        raise SlalomError("model", model, f"{len(files)} GGUF files found; install a package that holds one")
    return str(files[0])


def open_checkpoint(model: str) -> Checkpoint:
    """The checkpoint that ``model`` names (see the module's first lines).

    :raises SlalomError: nothing of that name, or nothing this model code can compute
    """
    if model.startswith("dummy:"):
        return DummyCheckpoint(model.removeprefix("dummy:"))
    path = Path(resolve_model(model))
    if os.path.isfile(path) and path.suffix == ".gguf":
        return GGUFCheckpoint(path)
    if os.path.isfile(path / "config.json"):
        return SafetensorsCheckpoint(path)
    fix = "give a .gguf file, a folder with config.json, dummy:SHAPE or package:NAME"
    raise SlalomError("model", model, fix)


def load_model(
    model: str | Checkpoint,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    kernels: str = "auto",
) -> Llama:
    """Load ``model`` onto ``device`` as ``dtype``, tensor by tensor (never twice in memory).

    :param kernels: see :func:`engine.kernels.make_kernels`
    :raises SlalomError: as :func:`open_checkpoint`; a tensor missing or of the wrong shape
    """
    checkpoint = open_checkpoint(model) if isinstance(model, str) else model
    with torch.device("meta"):
        llama = Llama(checkpoint.config, make_kernels(kernels, device))
    state: dict[str, Tensor] = {}
    for name, blank in llama.state_dict().items():
        if name == "frequencies":
            state[name] = checkpoint.rope_frequencies().to(device)
        elif isinstance(checkpoint, DummyCheckpoint):
            state[name] = checkpoint.fill(name, torch.empty(blank.shape, dtype=dtype, device=device))
        else:
            parts = [checkpoint.tensor(source).to(device, dtype) for source in _sources(name)]
            state[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
        if state[name].shape != blank.shape:
            fix = f"expected {tuple(blank.shape)}: config and weights do not belong together"
            raise SlalomError(f"weights: {name}: shape", tuple(state[name].shape), fix)
    llama.load_state_dict(state, assign=True)
    llama.requires_grad_(False).eval().pack()
    return llama


_OUTER = {"embed.weight": "model.embed_tokens", "norm.weight": "model.norm", "head.weight": "lm_head"}
_INNER = {
    "attention_norm": ("input_layernorm",),
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.q_norm": ("self_attn.q_norm",),
    "attention.k_norm": ("self_attn.k_norm",),
    "attention.out": ("self_attn.o_proj",),
    "ffn_norm": ("post_attention_layernorm",),
    "ffn.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "ffn.down": ("mlp.down_proj",),
}


def _sources(name: str) -> list[str]:
    """Hugging Face tensors that, stacked, make ours called ``name``."""
    if name in _OUTER:
        return [f"{_OUTER[name]}.weight"]
    _, index, rest = name.split(".", 2)
    module, leaf = rest.rsplit(".", 1)
    return [f"model.layers.{index}.{source}.{leaf}" for source in _INNER[module]]


class DummyCheckpoint(Checkpoint):
    """Random weights of a known shape, the same on every run; made on the device, for timing and tests."""

    def __init__(self, shape: str) -> None:
        if shape not in DUMMY_SHAPES:
            raise SlalomError("model", f"dummy:{shape}", f"shapes: {', '.join(DUMMY_SHAPES)}")
        self.config = DUMMY_SHAPES[shape]

    def tensor(self, name: str) -> Tensor:
        raise SlalomError("model", name, "a dummy model has no stored tensors")

    def fill(self, name: str, blank: Tensor) -> Tensor:
        """Scaled so that activations keep their size from layer to layer; norms are 1, biases 0."""
        if blank.dim() < 2:
            return blank.fill_(1.0 if name.endswith("weight") else 0.0)
        generator = torch.Generator(blank.device).manual_seed(zlib.crc32(name.encode()))
        return blank.normal_(std=blank.shape[1] ** -0.5, generator=generator)


class SafetensorsCheckpoint(Checkpoint):
    """A Hugging Face folder. Files stay mapped until the object goes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        raw = json_of(read_text(folder / "config.json", "model"), f"{folder}/config.json", constants=True)
        self.config = ModelConfig.from_hf(raw, f"{folder}/config.json")
        self._files = ExitStack()
        self._where: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            check_regular(path, 2**50)  # mapped, not read
            try:
                file = self._files.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise SlalomError(str(path), str(error), "the file is damaged; fetch it again") from error
            self._where |= dict.fromkeys(file.keys(), file)
        if not self._where:
            raise SlalomError(f"{folder}/*.safetensors", None, "the folder holds no safetensors weights")

    def tensor(self, name: str) -> Tensor:
        if name not in self._where:
            fix = "the weights lack it; fetch all files of the model"
            raise SlalomError(f"{self.folder}: tensor", name, fix)
        return self._where[name].get_tensor(name)


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


class GGUFCheckpoint(Checkpoint):
    """One GGUF file of architecture llama (Llama, Mistral, SmolLM2), qwen2 or qwen3."""

    def __init__(self, path: Path) -> None:
        self.file = GGUFFile(path)
        self.architecture = str(self.file.metadata.get("general.architecture"))
        if self.architecture not in ("llama", "qwen2", "qwen3"):
            raise SlalomError(f"{path}: general.architecture", self.architecture, "supported: llama, qwen2, qwen3")
        self.config = self._read_config()

    def _read_config(self) -> ModelConfig:
        path = self.file.path

        def get(key: str, default: Any = None) -> Any:
            value = self.file.metadata.get(f"{self.architecture}.{key}", default)
            if value is None:
                raise SlalomError(f"{path}: {self.architecture}.{key}", None, "the metadata lacks it")
            return value

        def whole(key: str, default: Any = None) -> int:
            return whole_number(f"{path}: {self.architecture}.{key}", get(key, default))

        def number(key: str, default: Any = None) -> float:
            return number_of(f"{path}: {self.architecture}.{key}", get(key, default))

        width, n_heads = whole("embedding_length"), whole("attention.head_count")
        head_dim = whole("attention.key_length", width // n_heads)
        if "token_embd.weight" not in self.file.tensors:
            raise SlalomError(f"{path}: tensor", "token_embd.weight", "the file holds no language model")
        kind = get("rope.scaling.type", "none")
        if kind not in ("none", "linear"):
            raise SlalomError(f"{path}: rope.scaling.type", kind, "supported: none, linear")
        scaling = RopeScaling("linear", number("rope.scaling.factor")) if kind == "linear" else None
        if get("expert_count", 0) != 0:
            raise SlalomError(f"{path}: expert_count", get("expert_count"), "mixtures are not supported")
        return ModelConfig(
            vocab=self.file.tensors["token_embd.weight"].shape[0],
            width=width,
            n_layers=whole("block_count"),
            n_heads=n_heads,
            n_kv_heads=whole("attention.head_count_kv", n_heads),
            head_dim=head_dim,
            ffn=whole("feed_forward_length"),
            max_tokens=whole("context_length"),
            rope_base=number("rope.freq_base", 10000.0),
            rope_scaling=scaling,
            norm_eps=number("attention.layer_norm_rms_epsilon"),
            qk_norm="blk.0.attn_q_norm.weight" in self.file.tensors,
            qkv_bias="blk.0.attn_q.bias" in self.file.tensors,
            tied="output.weight" not in self.file.tensors,
        )

    def tensor(self, name: str) -> Tensor:
        module, leaf = name.rsplit(".", 1)
        if module.startswith("model.layers."):
            index, inner = module.removeprefix("model.layers.").split(".", 1)
            array = self.file.load(f"blk.{index}.{_GGUF_NAMES[inner]}.{leaf}")
        else:
            inner, array = module, self.file.load(f"{_GGUF_NAMES[module]}.{leaf}")
        tensor = torch.from_numpy(array)
        if self.architecture == "llama" and inner in ("self_attn.q_proj", "self_attn.k_proj"):
            # stored with a head's rotation pairs side by side; we pair its two halves
            heads = self.config.n_heads if inner.endswith("q_proj") else self.config.n_kv_heads
            pairs = tensor.view(heads, self.config.head_dim // 2, 2, -1)
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)
        return tensor

    def rope_frequencies(self) -> Tensor:
        plain = super().rope_frequencies()
        if "rope_freqs.weight" not in self.file.tensors:
            return plain
        return plain / torch.from_numpy(self.file.load("rope_freqs.weight"))
