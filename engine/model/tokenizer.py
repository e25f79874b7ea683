"""Text to tokens and back: from ``tokenizer.json``, GGUF metadata, or made up for dummy models."""

from __future__ import annotations

import codecs
import json
import os
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from engine.common.documents import json_of, read_text
from engine.common.regular import SMALL, check_regular
from engine.errors import SlalomError
from engine.model.config import DUMMY_SHAPES
from engine.model.gguf import GGUFFile
from engine.model.weights import resolve_model

_BESIDE = "put the model's tokenizer.json beside the GGUF file"
_CONTROL, _USER_DEFINED = 3, 4  # token types of GGUF
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_DUMMY_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


class Tokenizer:
    """:param eos_ids: tokens after which the model has nothing more to say
    :param template: the chat template (Jinja), None for a base model
    :param variables: what the template may name besides the messages: ``bos_token``, ``eos_token``
    """

    def __init__(
        self, backend: Backend, *, eos_ids: frozenset[int], template: str | None, variables: dict[str, str]
    ) -> None:
        self.eos_ids = eos_ids
        self._backend = backend
        self._template = None if template is None else _compile(template)
        self._variables = variables
        self._special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
        self._added = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
        shape = json.loads(backend.to_str())["decoder"] or {}
        self._byte_level = "ByteLevel" in json.dumps(shape)
        self.token_bytes = lru_cache(maxsize=None)(self._token_bytes)

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of ``text``; ``special`` adds what the model expects around a prompt (such as BOS).

        :raises SlalomError: lone surrogates, which are no text
        """
        try:
            # Not ``encode``: the interpreter's other threads run only beside a batch.
            return self._backend.encode_batch_fast([text], add_special_tokens=special)[0].ids
        except (UnicodeError, TypeError) as error:  # which of them depends on the library's version
            raise SlalomError("prompt", ascii(text), "half a surrogate pair is no character") from error

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, special tokens left out."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def to_json(self) -> str:
        """The whole of it as the text of a ``tokenizer.json``."""
        return str(self._backend.to_str())

    def detokenizer(self) -> Detokenizer:
        return Detokenizer(self)

    def chat(self, messages: Sequence[dict[str, Any]], **extra: Any) -> list[int]:
        """Token ids of a conversation, ready for the assistant's turn.

        See :meth:`render`.
        """
        return self.encode(self.render(messages, **extra), special=False)

    def render(self, messages: Sequence[dict[str, Any]], **extra: Any) -> str:
        """A conversation as the text that the model was trained on.

        :param messages: ``{"role": ..., "content": ...}`` each
        :param extra: further names for the template, such as ``tools``
        :raises SlalomError: no template, or it refuses the messages
        """
        if self._template is None:
            fix = "this model has no chat template; use plain completions"
            raise SlalomError("messages", len(messages), fix)
        names = {"add_generation_prompt": True} | self._variables | extra
        try:
            return self._template.render(messages=messages, **names)
        except Exception as error:  # a stranger's template on a client's values: anything may be wrong with them
            raise SlalomError("messages", str(error), "the model's chat template refuses them") from error

    def _token_bytes(self, token: int) -> bytes:
        """What one token adds to the output, as UTF-8; empty for special and unknown tokens."""
        if token in self._special:
            return b""
        if token in self._added:
            return self._added[token].encode()
        piece = self._backend.id_to_token(token)
        if piece is None:
            return b""
        if self._byte_level:
            table = _byte_of_char()
            return bytes(table[c] for c in piece) if all(c in table for c in piece) else piece.encode()
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()


class Detokenizer:
    """Text of a growing output. A character cut by a token boundary waits for its remaining bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that ``token`` completes."""
        return self._decoder.decode(self._token_bytes(token))

    def flush(self) -> str:
        """What is left at the end: nothing, or a replacement character for a broken one."""
        return self._decoder.decode(b"", final=True)


def load_tokenizer(model: str) -> Tokenizer:
    """The tokenizer of what :func:`engine.model.weights.open_checkpoint` would open.

    A ``tokenizer.json`` beside a GGUF file wins over the file's own metadata.

    :raises SlalomError: none found, or one of a kind that cannot be rebuilt from metadata
    """
    if model.startswith("dummy:"):
        return _dummy(model.removeprefix("dummy:"))
    path = Path(resolve_model(model))
    folder = path if os.path.isdir(path) else path.parent
    if os.path.isfile(folder / "tokenizer.json"):
        return _from_folder(folder)
    if path.suffix == ".gguf":
        return _from_gguf(GGUFFile(path))
    raise SlalomError("model", model, "tokenizer.json is missing; fetch all files of the model")


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    """Templates come with the model, from strangers: they run sandboxed and cannot change what they see."""

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = time.strftime
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    return environment


def _compile(template: str) -> Template:
    try:
        return _environment().from_string(template)
    except TemplateError as error:
        raise SlalomError("chat_template", str(error), "the model's chat template is broken") from error


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    """Byte-level BPE writes each byte as a printable character: itself, or one from 256 on (as GPT-2)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in plain}
    others = [b for b in range(256) if chr(b) not in table]
    return table | {chr(256 + n): b for n, b in enumerate(others)}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found = json_of(read_text(path, "model"), str(path), constants=True)
    if not isinstance(found, dict):
        raise SlalomError(str(path), found, "the file is no JSON object; fetch it again")
    return found


def _from_folder(folder: Path) -> Tokenizer:
    check_regular(folder / "tokenizer.json", 2 * SMALL)
    try:
        backend = Backend.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library raises bare Exception
        fix = "the file is damaged; fetch it again"
        raise SlalomError(f"{folder}/tokenizer.json", str(error), fix) from error
    settings = _read_json(folder / "tokenizer_config.json")

    def text(key: str) -> str:
        value = settings.get(key) or ""
        value = value.get("content") if isinstance(value, dict) else value
        if not isinstance(value, str):
            raise SlalomError(f"{folder}/tokenizer_config.json: {key}", value, "give a text")
        return value

    eos: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        found = _read_json(folder / name).get("eos_token_id")
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(token) is int for token in ids):
            raise SlalomError(f"{folder / name}: eos_token_id", found, "give a token id, or a list of them")
        eos.update(ids)
    if text("eos_token"):
        found = backend.token_to_id(text("eos_token"))
        eos.update([] if found is None else [found])
    template = settings.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0].get("template") if named else None
    if (folder / "chat_template.jinja").exists():
        template = read_text(folder / "chat_template.jinja", "model")
    if not isinstance(template, str | None):
        raise SlalomError(f"{folder}/tokenizer_config.json: chat_template", template, "give a Jinja template")
    variables = {key: text(key) for key in ("bos_token", "eos_token")}
    return Tokenizer(backend, eos_ids=frozenset(eos), template=template, variables=variables)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def pre_tokenizer(kind: str, path: Path) -> pre_tokenizers.PreTokenizer:
    """How text is cut before merging, by the name GGUF gives it."""
    if kind in ("default", "gpt-2"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind == "smollm":
        return pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    if kind == "llama-bpe":
        return _split(_CONTRACTIONS + _WORDS % "{1,3}")
    if kind == "qwen2":
        return _split(_CONTRACTIONS + _WORDS % "")
    raise SlalomError(f"{path}: tokenizer.ggml.pre", kind, _BESIDE)


def _from_gguf(file: GGUFFile) -> Tokenizer:
    try:
        return _made_of_gguf(file)
    except SlalomError:
        raise
    except Exception as error:  # the library raises bare Exception; the rest are lists that do not fit each other
        fix = "the file is damaged; fetch it again"
        raise SlalomError(f"{file.path}: tokenizer", f"{type(error).__name__}: {error}", fix) from error


def _made_of_gguf(file: GGUFFile) -> Tokenizer:
    meta = file.metadata
    kind, pre = meta.get("tokenizer.ggml.model"), str(meta.get("tokenizer.ggml.pre", "default"))
    if kind != "gpt2":
        raise SlalomError(f"{file.path}: tokenizer.ggml.model", kind, _BESIDE)
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    backend.pre_tokenizer = pre_tokenizer(pre, file.path)
    backend.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    types = meta.get("tokenizer.ggml.token_type", [])
    special = [
        AddedToken(token, normalized=False, special=type_ == _CONTROL)
        for token, type_ in zip(tokens, types, strict=False)
        if type_ in (_CONTROL, _USER_DEFINED)
    ]
    backend.add_tokens(special)

    def text(key: str) -> str:
        index = meta.get(f"tokenizer.ggml.{key}_token_id")
        return tokens[index] if index is not None else ""

    if meta.get("tokenizer.ggml.add_bos_token") and text("bos"):
        bos = (text("bos"), meta["tokenizer.ggml.bos_token_id"])
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos[0]} $A", pair=f"{bos[0]} $A $B", special_tokens=[bos]
        )
    template = meta.get("tokenizer.chat_template")
    ends = (meta.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom"))
    return Tokenizer(
        backend,
        eos_ids=frozenset(int(end) for end in ends if end is not None),
        template=None if template is None else str(template),
        variables={"bos_token": text("bos"), "eos_token": text("eos")},
    )


def _dummy(shape: str) -> Tokenizer:
    """One token a byte, an end token, and made-up words for the rest, so that every id shows as text."""
    if shape not in DUMMY_SHAPES:
        raise SlalomError("model", f"dummy:{shape}", f"shapes: {', '.join(DUMMY_SHAPES)}")
    vocab = dict(_byte_of_char())
    vocab |= {f"\u0120w{i}": i for i in range(257, DUMMY_SHAPES[shape].vocab)}  # U+0120 stands for a space
    vocab["<eos>"] = 256
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<eos>", normalized=False, special=True)])
    variables = {"bos_token": "", "eos_token": "<eos>"}
    return Tokenizer(backend, eos_ids=frozenset([256]), template=_DUMMY_TEMPLATE, variables=variables)
