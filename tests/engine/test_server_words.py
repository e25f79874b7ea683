"""What the server says by itself: what operators change, what a policy's arrangement changes, what lanes share."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_server import Served

from policies.serve import Options, build


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served(instances=2)
    yield server
    server.close()


def said(caplog: pytest.LogCaptureFixture, name: str) -> list[tuple[str, str]]:
    return [(r.levelname, r.getMessage()) for r in caplog.records if r.name == name]


@pytest.mark.parametrize(
    ("path", "body", "line"),
    [
        ("role", {"instance": 1, "role": "decode"}, ("INFO", "role of instance 1 to decode")),
        ("role", {"instance": 9, "role": "mixed"}, ("WARNING", "role of instance 9 to mixed: refused: instance")),
        ("policy", {"policy": "round_robin"}, ("INFO", "policy round_robin")),
        ("policy", {"policy": "no_such"}, ("WARNING", "policy no_such: refused: ")),
        ("mode", {"mode": "frozen", "restore": True}, ("INFO", "mode frozen, with restore")),
        ("mode", {"mode": "active"}, ("INFO", "mode active")),
        ("drain", {}, ("INFO", "drain: no new request is taken")),
        ("undrain", {}, ("INFO", "undrain: requests are taken again")),
    ],
)
def test_what_an_operator_does_leaves_a_line(
    served: Served, caplog: pytest.LogCaptureFixture, path: str, body: dict[str, object], line: tuple[str, str]
) -> None:
    with caplog.at_level(logging.INFO, "slalom.admin"):
        served.post(f"/admin/{path}", body)
    ((level, text),) = said(caplog, "slalom.admin")
    assert level == line[0]
    assert text.startswith(line[1])


@pytest.mark.parametrize("path", ["/admin/mode", "/v1/completions"])
def test_a_body_that_is_no_json_object_says_what_to_send(served: Served, path: str) -> None:
    """``curl -d`` alone sends a form."""
    form = {"content-type": "application/x-www-form-urlencoded"}
    for body, headers, words in (
        (b'{"mode": "active"}', form, "content-type: application/json"),
        (b'{"mode": ', {"content-type": "application/json"}, "body: this is not valid JSON: Expecting value"),
    ):
        answer = served.client.post(path, content=body, headers=headers)
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]
        assert answer.json()["error"]["param"] is None


def test_a_role_that_the_server_has_not_is_named(served: Served) -> None:
    answer = served.post("/admin/role", {"instance": 0, "role": "multiplexed"})
    assert answer.status_code == 400
    assert "instances here may change to: prefill, decode, mixed" in answer.json()["error"]["message"]


def test_a_drained_server_does_not_call_itself_shutting_down(served: Served) -> None:
    served.post("/admin/drain", {})
    try:
        answer = served.post("/v1/completions", {"prompt": "x", "max_tokens": 1})
    finally:
        served.post("/admin/undrain", {})
    assert answer.status_code == 503
    assert "the server is drained or shuts down" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("options", "arranged", "shared"),
    [
        ({"policy": "static_split", "instances": 2}, 2, False),
        ({"policy": "static_split", "instances": 2, "roles": "prefill,decode"}, 0, False),
        ({"roles": "multiplexed"}, 0, True),
    ],
)
def test_an_arrangement_and_shared_lanes_are_told(
    caplog: pytest.LogCaptureFixture, options: dict[str, object], arranged: int, shared: bool
) -> None:
    with caplog.at_level(logging.INFO, "slalom.serve"):
        engine, _ = build(Options("dummy:tiny", **options))  # type: ignore[arg-type]
        engine.close()
    lines = said(caplog, "slalom.serve")
    assert sum("policy static_split arranges instance" in text for _, text in lines) == arranged
    assert [text[:28] for level, text in lines if level == "WARNING"] == ["instances 0 are multiplexed,"] * shared


def test_a_learned_arrangement_is_told_by_its_roles(caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = str(Path(__file__).resolve().parents[2] / "checkpoints" / "policies" / "azure-conv-4xa100")
    with caplog.at_level(logging.INFO, "slalom.serve"):
        engine, _ = build(Options("dummy:tiny", policy=checkpoint, instances=4))
        engine.close()
    told = [text for _, text in said(caplog, "slalom.serve") if "arranges instance" in text]
    changes = [text.split(": ")[1].split(" (")[0] for text in told]
    assert changes == ["mixed to prefill"] * 2 + ["mixed to multiplexed"] * 2
