"""Sampling: the right distribution, reproducible for each request; and where an output ends."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from engine.errors import SlalomError
from engine.model import Finish, Generation, SamplingParams, load_tokenizer
from engine.model.sampling import choose_tokens, uniform

torch.set_num_threads(1)
TOKENIZER = load_tokenizer("dummy:tiny")
EOS = 256
NONE: frozenset[int] = frozenset()


def test_greedy_takes_the_largest() -> None:
    logits = torch.randn(6, 50)
    tokens = choose_tokens(logits, [SamplingParams(temperature=0.0)] * 6, [0] * 6, NONE)
    assert torch.equal(tokens, logits.argmax(-1))


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"temperature": 1.0}, [0, 1, 2, 3, 4]),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4]),
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.65}, [0, 1]),  # 0.4 alone is too little, 0.4 + 0.3 is enough
        ({"top_p": 0.35}, [0]),
        ({"top_k": 3, "top_p": 0.8}, [0, 1, 2]),  # of the three best, two hold 0.78
    ],
    ids=str,
)
def test_draws_follow_the_truncated_distribution(params: dict[str, Any], kept: list[int]) -> None:
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.07, 0.03], dtype=torch.float64)
    shuffled = torch.tensor([3, 0, 4, 2, 1])
    n = 4000
    asked = [SamplingParams(seed=seed, **params) for seed in range(n)]
    tokens = choose_tokens(probabilities.log()[shuffled].expand(n, -1), asked, [0] * n, NONE)
    seen = torch.bincount(shuffled[tokens], minlength=5)
    weights = probabilities ** (1 / params.get("temperature", 1.0))
    expected = torch.zeros(5, dtype=torch.float64)
    expected[kept] = weights[kept] / weights[kept].sum() * n
    assert seen[expected == 0].sum() == 0
    if len(kept) > 1:
        assert chisquare(seen[kept], expected[kept]).pvalue > 1e-4


def test_a_seed_draws_the_same_whatever_shares_the_batch() -> None:
    logits = torch.randn(8, 100)
    asked = [SamplingParams(seed=i, top_p=0.9, temperature=0.7 + i / 10) for i in range(8)]
    steps = list(range(8))
    together = choose_tokens(logits, asked, steps, NONE)
    greedy = SamplingParams(temperature=0.0)
    for i in (0, 3, 7):
        mixed = choose_tokens(logits[[1, i, 2]], [greedy, asked[i], asked[2]], [0, steps[i], 2], NONE)
        assert mixed[1] == together[i]
        assert mixed[0] == logits[1].argmax()
    later = [choose_tokens(logits[:1], asked[:1], [step], NONE).item() for step in range(30)]
    assert len(set(later)) > 5, "the draw must change from step to step"


def test_flat_distributions_reach_past_the_first_look() -> None:
    """Top-p over nearly equal tokens keeps far more of them than are sorted at first."""
    n = 3000
    logits = torch.zeros(1, n)
    tokens = [choose_tokens(logits, [SamplingParams(seed=seed, top_p=0.9)], [0], NONE).item() for seed in range(400)]
    assert len(set(tokens)) > 300
    ranks = torch.linspace(0, 0.01, n).flip(0)  # falling slightly: token i has rank i
    drawn = [
        choose_tokens(ranks[None], [SamplingParams(seed=seed, top_p=0.5)], [0], NONE).item() for seed in range(400)
    ]
    assert 1300 < max(drawn) < 1505


def test_uniform_is_uniform() -> None:
    draws = [uniform(seed, step) for seed in range(100) for step in range(100)]
    assert 0.0 <= min(draws) < max(draws) < 1.0
    assert chisquare(torch.histc(torch.tensor(draws), 20, 0, 1)).pvalue > 1e-4
    assert uniform(0, 0) == (0xE220A8397B1DCDAF >> 11) * 2.0**-53  # SplitMix64's published first output


def test_ends_are_barred_below_min_tokens() -> None:
    logits = torch.zeros(3, 300)
    logits[:, EOS], logits[:, 7], logits[:, 9] = 9.0, 8.0, 7.0
    asked = [SamplingParams(temperature=0.0, min_tokens=2, stop_token_ids=(7,))] * 3
    before = logits.clone()
    assert choose_tokens(logits, asked, [0, 1, 2], frozenset([EOS])).tolist() == [9, 9, EOS]
    assert torch.equal(logits, before), "the caller's logits must not change"


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0}, {"temperature": -1.0}, {"temperature": math.nan}, {"top_p": 0.0}, {"top_p": 1.1},
        {"top_k": -1}, {"min_tokens": 99}, {"stop": ("",)},
    ],
    ids=str,
)  # fmt: skip
def test_values_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(SlalomError, match=next(iter(wrong))):
        SamplingParams(**wrong)


# -- ends


def generate(tokens: list[int], **params: Any) -> tuple[str, Finish | None, int]:
    """Text, reason and number of tokens taken when ``tokens`` are what the model samples."""
    output = Generation(SamplingParams(**({"max_tokens": 1000} | params)), TOKENIZER)
    text = ""
    for token in tokens:
        text += output.push(token)
        if output.finish:
            break
    return text, output.finish, output.n_tokens


def test_end_tokens() -> None:
    tokens = [*b"hi", EOS, *b"there"]
    assert generate(tokens) == ("hi", Finish.STOP, 3)
    assert generate(tokens, ignore_eos=True) == ("hithere", None, 8)
    assert generate(tokens, ignore_eos=True, max_tokens=4) == ("hit", Finish.LENGTH, 4)
    assert generate(tokens, stop_token_ids=(ord("i"),)) == ("h", Finish.STOP, 2)
    assert generate(tokens, min_tokens=3) == ("hithere", None, 8)


def test_stop_strings_end_the_text_before_them() -> None:
    tokens = list(b"one two three")
    assert generate(tokens, stop=(" three", "two")) == ("one ", Finish.STOP, 7)
    assert generate(tokens, stop=("absent",)) == ("one two three", None, 13)
    assert generate(tokens, stop=("two",), max_tokens=6) == ("one tw", Finish.LENGTH, 6)


def test_a_possible_stop_string_is_held_back() -> None:
    output = Generation(SamplingParams(max_tokens=100, stop=("abc",)), TOKENIZER)
    assert [output.push(token) for token in b"xababd"] == ["x", "", "", "ab", "", "abd"]


@given(st.text(alphabet="ab", max_size=30), st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3))
def test_streamed_text_is_the_text_cut_at_the_first_stop(text: str, stops: list[str]) -> None:
    """However the pieces fall: what was streamed is what one would cut from the text seen so far."""
    output = Generation(SamplingParams(max_tokens=100, stop=tuple(stops)), TOKENIZER)
    streamed = ""
    for token in text.encode():
        streamed += output.push(token)
        if output.finish:
            break
    seen = text[: output.n_tokens]
    cut = min((seen.find(stop) for stop in stops if stop in seen), default=None)
    if cut is not None:
        assert (streamed, output.finish) == (seen[:cut], Finish.STOP)
    else:
        assert output.finish is None
        held = seen.removeprefix(streamed)
        assert seen.startswith(streamed)
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_min_p_leaves_what_is_likely_enough_and_a_bias_moves_a_logit() -> None:
    probabilities = torch.tensor([0.4, 0.3, 0.2, 0.07, 0.03], dtype=torch.float64)
    n = 2000
    for min_p, kept in ((0.5, {0, 1, 2}), (0.6, {0, 1}), (1.0, {0}), (0.01, {0, 1, 2, 3, 4})):
        asked = [SamplingParams(seed=seed, min_p=min_p) for seed in range(n)]
        assert set(choose_tokens(probabilities.log().expand(n, -1), asked, [0] * n, NONE).tolist()) == kept
    biased = [SamplingParams(temperature=0.0, logit_bias=((3, 3.0), (0, -1.0))), SamplingParams(temperature=0.0)]
    assert choose_tokens(probabilities.log().expand(2, -1), biased, [0] * 2, NONE).tolist() == [3, 0]
    for bad in ({"min_p": 1.1}, {"logit_bias": ((0, float("nan")),)}, {"logit_bias": ((0, 1.0),) * 301}):
        with pytest.raises(SlalomError):
            SamplingParams(**bad)
