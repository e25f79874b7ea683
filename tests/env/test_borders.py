"""What comes from files and becomes an index, or is read whole, is looked at first."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.common.regular import SMALL, check_regular
from engine.errors import SlalomError
from engine.latency import Profile
from engine.model import load_tokenizer, open_checkpoint
from env.scenario import Scenario
from env.surrogate.arena import build_trace
from env.surrogate.simulate import simulate
from env.workload import Trace, concat, read_trace
from env.workload.rawfile import read_csv
from eval.calibrate.request_log import read_log, read_settings
from policies.checkpoint.folder import load
from policies.guard.config import GuardConfig
from policies.serve import load_classes
from train.recipe import load_recipe


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    return Scenario.load("tiny-4xa100")


def test_classes_that_the_scenario_lacks_are_refused(scenario: Scenario, tmp_path: Path) -> None:
    n = 50
    trace = Trace.make(
        np.arange(n) * 0.1, np.full(n, 20, np.int32), np.full(n, 5, np.int32), cls=np.full(n, 30_000, np.int16)
    )
    with pytest.raises(SlalomError, match=r"class: got 30000; the scenario has 1"):
        simulate(scenario, "least_tokens", rate=1.0, trace=trace)
    path = tmp_path / "trace.jsonl"
    row = {"timestamp": 0, "input_length": 10, "output_length": 5, "class": 7}
    path.write_text("".join(json.dumps(row | {"timestamp": k}) + "\n" for k in range(50)))
    assert read_trace(path, "slalom").cls.tolist() == [7] * 50
    from_file = scenario.with_overrides(
        {"workload": {"kind": "trace", "source": {"path": str(path), "format": "slalom"}}}
    )
    with pytest.raises(SlalomError, match="class"):
        build_trace(from_file, 1.0, 5, 0, "test")


@pytest.mark.parametrize("cls", [1, 32_767, 40_000, 10**30])
def test_a_part_of_a_mix_is_bound_to_a_class_that_there_is(scenario: Scenario, cls: int) -> None:
    part = {"weight": 1.0, "cls": cls, "workload": scenario.workload.model_dump(mode="json")}
    with pytest.raises(SlalomError, match=r"class|cls"):
        build_trace(scenario.with_overrides({"workload": {"kind": "mix", "parts": [part]}}), 1.0, 5, 0, "test")


def two_classes(scenario: Scenario, workload: dict[str, Any]) -> Scenario:
    chat, batch = ({"name": name, "share": 0.5, "ttft_s": 1.0, "tpot_s": 0.1} for name in ("chat", "batch"))
    return scenario.with_overrides({"classes": [chat, batch], "workload": workload})


def named_trace(path: Path, names: list[str | int | None]) -> dict[str, Any]:
    """A trace whose requests have these classes in turn, 99 tokens for each ``batch`` and 10 for the others."""
    rows = [
        {"timestamp": 100 * k, "input_length": 99 if name == "batch" else 10, "output_length": 5, "class": name}
        for k, name in enumerate((names * 120)[:120])
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"kind": "trace", "source": {"path": str(path), "format": "slalom"}}


@pytest.mark.parametrize("names", [["chat", "batch"], ["batch", "chat"], ["batch"], ["chat"], [None, "batch"]], ids=str)
@pytest.mark.parametrize("mixed", [False, True])
def test_classes_of_a_trace_go_by_name(scenario: Scenario, tmp_path: Path, names: list[Any], mixed: bool) -> None:
    workload = named_trace(tmp_path / "t.jsonl", names)
    if mixed:
        workload = {"kind": "mix", "parts": [{"weight": 1.0, "workload": workload}]}
    trace = build_trace(two_classes(scenario, workload), 10.0, 20, 0, "test")
    batch = trace.prompt == 99
    assert trace.cls.tolist() == [int(is_batch) for is_batch in batch]


def test_traces_with_names_in_other_orders_are_put_together_by_name(scenario: Scenario, tmp_path: Path) -> None:
    paths = [tmp_path / f"{k}.jsonl" for k in range(2)]
    for path, names in zip(paths, (["chat", "batch"], ["batch", "chat"]), strict=True):
        named_trace(path, list(names))
    joined = concat([read_trace(path, "slalom") for path in paths])
    both = two_classes(scenario, scenario.workload.model_dump(mode="json"))
    run = simulate(both, "least_tokens", rate=1.0, trace=joined)
    assert run.req["cls"].tolist() == [int(prompt == 99) for prompt in joined.prompt]


@pytest.mark.parametrize("mixed", [False, True])
def test_a_class_that_no_scenario_has_is_refused_by_its_name(scenario: Scenario, tmp_path: Path, mixed: bool) -> None:
    workload = named_trace(tmp_path / "t.jsonl", ["chat", "bulk"])
    if mixed:
        workload = {"kind": "mix", "parts": [{"weight": 1.0, "workload": workload}]}
    with pytest.raises(SlalomError, match=r"class: got 'bulk'; the scenario has chat, batch"):
        build_trace(two_classes(scenario, workload), 10.0, 20, 0, "test")
    workload = named_trace(tmp_path / "t.jsonl", ["chat", 1])
    with pytest.raises(SlalomError, match="names and numbers"):
        build_trace(two_classes(scenario, workload), 10.0, 20, 0, "test")


@pytest.mark.parametrize(("cls", "number"), [("batch", 1), ("chat", 0), (1, 1), (0, 0)])
def test_a_part_of_a_mix_is_bound_by_name_or_number(scenario: Scenario, cls: Any, number: int) -> None:
    part = {"weight": 1.0, "cls": cls, "workload": scenario.workload.model_dump(mode="json")}
    trace = build_trace(two_classes(scenario, {"kind": "mix", "parts": [part]}), 10.0, 20, 0, "test")
    assert set(trace.cls.tolist()) == {number}
    with pytest.raises(SlalomError, match=r"bulk.*chat, batch"):
        build_trace(two_classes(scenario, {"kind": "mix", "parts": [part | {"cls": "bulk"}]}), 10.0, 20, 0, "test")


READERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "trace": ("a.jsonl", lambda path: read_trace(path, "mooncake", time_unit="ms")),
    "azure trace": ("a.csv", lambda path: read_trace(path, "azure")),
    "scenario": ("a.yaml", lambda path: Scenario.load(path)),
    "profile": ("a.json", lambda path: Profile.load(path)),
    "classes": ("a.yaml", lambda path: load_classes(str(path), 1.0, 1.0)),
    "guard": ("a.json", lambda path: GuardConfig.load(path)),
    "recipe": ("a.yaml", lambda path: load_recipe(str(path))),
    "request log": ("a.jsonl", lambda path: read_log(path)),
    "engine settings": ("a.yaml", lambda path: read_settings(path)),
    "model": ("a.gguf", lambda path: open_checkpoint(str(path))),
    "config of a model": ("config.json", lambda path: open_checkpoint(str(path.parent))),
    "tokenizer": ("tokenizer.json", lambda path: load_tokenizer(str(path.parent))),
    "checkpoint": ("policy.json", lambda path: load(path.parent)),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["fifo", "device", "sparse"])
def test_only_regular_files_of_a_sensible_size_are_read(reader: str, kind: str, tmp_path: Path) -> None:
    name, read = READERS[reader]
    path = tmp_path / name
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif reader == "model":
        pytest.skip("weights are mapped, not read")
    else:
        with path.open("wb") as file:
            file.truncate(3 * 2**30)
    with pytest.raises(SlalomError, match=r"regular file|at most|give a .gguf|is missing"):
        read(path)


def test_files_of_the_greatest_size_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a"
    with path.open("wb") as file:
        file.truncate(SMALL)
    check_regular(path)
    check_regular(tmp_path / "missing")
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(SlalomError, match="at most"):
        check_regular(path)


@pytest.mark.parametrize("packed", [False, True])
def test_a_line_without_an_end_is_refused(packed: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with gzip.open(path, "wb", 1) if packed else path.open("wb") as file:
        for _ in range(20):
            file.write(b"\0" * 2**20)
    with pytest.raises(SlalomError, match="line 1"):
        read_trace(path, "mooncake", time_unit="ms")


def test_what_the_parsers_themselves_refuse_has_a_line(tmp_path: Path) -> None:
    deep, wide = tmp_path / "a.jsonl", tmp_path / "a.csv"
    deep.write_text("[" * 100_000 + "\n")
    with pytest.raises(SlalomError, match="line 1"):
        read_trace(deep, "mooncake", time_unit="ms")
    wide.write_text("TIMESTAMP,ContextTokens\n" + "1" * 200_000 + ",2\n")
    with pytest.raises(SlalomError, match="line 2"):
        read_csv(wide, {"time": "TIMESTAMP"})
