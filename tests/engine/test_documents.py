"""YAML, JSON and files of lines as anybody may write them: plain data within limits, or one line that says why not."""

from __future__ import annotations

import gzip
import json
from collections import deque
from pathlib import Path

import pytest

from engine.common.documents import DEEPEST, json_of, read_json
from engine.common.lines import lines
from engine.common.yaml_documents import read_yaml, yaml_text
from engine.errors import SlalomError

BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}]\n" for k in range(1, 40))


def yaml_of(tmp_path: Path, text: str) -> object:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    return read_yaml(path, "--config")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, "more than 50000 values"),
        ("&a [*a]", "alias of what it stands in"),
        ("x: &a {y: *a}", "alias of what it stands in"),
        ("[" * 100_000, "nested more than 64 deep"),
        ("\n".join(" " * k + "a:" for k in range(100)), "nested more than 64 deep"),
        ("".join(f"k{k}: 1\n" for k in range(50_000)), "more than 50000 values"),
        ("a: 1\na: 2\n", "line 2.*key 'a' twice"),
        ("a: " + "9" * 5000, "more than 64 bits"),
        ("a: -18446744073709551616", "more than 64 bits"),
        ("!!python/object/apply:os.system ['true']", "python/object"),
        ("!!set {a, b}", "tag:yaml.org,2002:set"),
        ("? [a]\n: 1\n", "a key that is no text"),
        ("a: \0", "not allowed"),
        ("a: 1\n---\nb: 2\n", "another document"),
        ("# " + "x" * 2**20, "at most"),
    ],
    ids=lambda text: text[:12],
)
def test_yaml_that_grows_or_makes_objects_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(SlalomError, match=says) as caught:
        yaml_of(tmp_path, text)
    assert "\n" not in str(caught.value)


def test_yaml_keys_are_texts_and_dates_stay_text(tmp_path: Path) -> None:
    found = yaml_of(tmp_path, "2024-01-01: 2024-01-02\n1: .inf\nyes: no\nx: &a {p: 1}\ny: {<<: *a, q: 2}\n")
    assert found == {
        "2024-01-01": "2024-01-02", "1": float("inf"), "yes": False, "x": {"p": 1}, "y": {"p": 1, "q": 2},
    }  # fmt: skip


def test_powers_of_ten_are_numbers_unless_quoted(tmp_path: Path) -> None:
    assert yaml_of(tmp_path, "[1e3, -2E-1, 1.5e+2, .5e1, 2.e0]") == [1e3, -0.2, 150.0, 5.0, 2.0]
    assert yaml_of(tmp_path, "[e3, 1e, '1e3', 1e3s]") == ["e3", "1e", "1e3", "1e3s"]
    kept = {"1e3": ["1e3", 1e3, "2024-01-01", 1e300, "e3", "no"]}
    assert yaml_of(tmp_path, yaml_text(kept)) == kept


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * (DEEPEST + 1) + "]" * (DEEPEST + 1), "at most 64 deep"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": 1, "a": 2}', "key 'a' twice"),
        ("9" * 5000, "more than 64 bits"),
        ("[18446744073709551616]", "more than 64 bits"),
        ("[NaN]", "NaN is no JSON"),
        ("[" + "1," * 3_000_000 + "1]", "at most 3000000 values"),
        ("", "not valid JSON"),
    ],
    ids=lambda text: text[:12],
)
def test_json_that_grows_is_refused(text: str, says: str) -> None:
    for given in (text, text.encode()):
        with pytest.raises(SlalomError, match=says):
            json_of(given, "a.json")


def test_json_within_the_limits_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {"a": [1, 2.5, None, True, "ü"], "b": {}}
    path.write_text(json.dumps(value))
    assert read_json(path, "model") == value
    assert json_of("[" * (DEEPEST - 1) + "]" * (DEEPEST - 1), "a")
    with pytest.raises(SlalomError, match="readable"):
        read_json(tmp_path / "none", "model")
    path.write_bytes(b"\xff")
    with pytest.raises(SlalomError, match="UTF-8"):
        read_json(path, "model")


def test_packed_lines_that_unpack_to_far_more_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wb", 9) as file:
        for _ in range(80):
            file.write(b" " * 2**20 + b"\n")
    given = lines(path)
    with pytest.raises(SlalomError, match="are read"):
        deque(given, maxlen=0)


def test_an_error_is_one_printable_line_of_bounded_length() -> None:
    error = SlalomError("a\nb\x1b[31m" + "c" * 1000, "x\u202ey" * 1000, "because\n  of\x07 " + "z" * 5000)
    text = str(error)
    assert text.isprintable()
    assert len(text) < 1500
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    assert "a list" in str(SlalomError("field", deep, "fix"))
    assert "a int" in str(SlalomError("field", 10**5000, "fix"))
