"""Prompts computed by one engine and answered by another, which pulls the KV: mock engines that do as vLLM does."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from audit import recount
from remote_cases import Mock, Routed, all_at_once, mocks, routed
from waiting import until

from engine.core.kinds import Role
from engine.errors import SlalomError
from engine.live.observer import Observer
from engine.remote.handover import body_of_prefill, can_part, kv_of
from eval.benchmarks.mock_engine import text_of
from policies.route import Options, build

BODIES = [{"prompt": f"the story of {k}", "max_tokens": 12, "stream": k % 2 == 0} for k in range(16)]


@pytest.fixture
def apart() -> Iterator[tuple[list[Mock], Routed]]:
    """One engine computes prompts, the other answers."""
    with (
        mocks(2) as engines,
        routed(engines, kv_transfer=True, roles="prefill,decode", policy="static_split") as router,
    ):
        yield engines, router


def ask(router: Routed, bodies: list[dict[str, Any]]) -> None:
    """Every answer is the one that a single engine would give."""
    for body, (status, answer) in zip(bodies, all_at_once(router.url, bodies), strict=True):
        assert status == 200, answer.text
        words = text_of(body["prompt"], body["max_tokens"]).split()
        if body["stream"]:
            assert [answer.text.count(f'" {word}"') for word in words] == [1] * len(words)
            assert answer.text.count("[DONE]") == 1
        else:
            assert answer.json()["choices"][0]["text"].split() == words
    until(lambda: router.router.n_open == 0)
    router.router.call(lambda: recount(router.router.state))


def _paced(router: Routed, bodies: list[dict[str, Any]], gap_s: float) -> list[tuple[int, httpx.Response]]:
    """Send ``bodies`` one after the other, whether or not others were answered; statuses and answers, in order."""

    async def run() -> list[tuple[int, httpx.Response]]:
        async with httpx.AsyncClient(base_url=router.url, timeout=120.0, trust_env=False) as client:
            work = []
            for body in bodies:
                work.append(asyncio.ensure_future(client.post("/v1/completions", json=body)))
                await asyncio.sleep(gap_s)
            return [(answer.status_code, answer) for answer in await asyncio.gather(*work)]

    return asyncio.run(run())


def test_one_engine_computes_prompts_and_the_other_answers(apart: tuple[list[Mock], Routed]) -> None:
    engines, router = apart
    ask(router, BODIES)
    first, second = (engine.set() for engine in engines)
    assert (first["kept"], first["pulled"], first["begun"]) == (16, 0, 16)
    assert (second["kept"], second["pulled"], second["begun"]) == (0, 16, 16)
    cluster = router.router.state.cluster[0]
    assert (int(cluster["n_migrated"]), int(cluster["tokens_out"])) == (16, 16 * 12)


def test_what_cannot_be_parted_stays_where_its_prompt_is(apart: tuple[list[Mock], Routed]) -> None:
    engines, router = apart
    ask(router, [{"prompt": "short", "max_tokens": 1, "stream": False}])
    assert [engine.set()["begun"] for engine in engines] == [1, 0]
    assert not any(map(can_part, ({"n": 2}, {"echo": True}, {"max_completion_tokens": 1})))
    assert can_part({"max_tokens": 2, "n": 1})


def test_the_time_of_a_first_token_is_that_of_the_engine_whose_client_gets_it() -> None:
    with mocks(2) as engines:
        engines[1].set(prefill_s=0.4)  # as long as a pull might take
        options: dict[str, Any] = {"kv_transfer": True, "roles": "prefill,decode", "policy": "static_split"}
        with routed(engines, **options) as router:
            found: list[float] = []

            class First(Observer):
                def request_begun(self, request: Any, record: Any) -> None:
                    found.append((record["first_token"] - record["arrival"]) * 1e-12)

            router.router.observers.append(First())
            ask(router, BODIES[:1])
            assert 0.4 <= found[0] < 10.0
            assert len(found) == 1


@pytest.mark.parametrize("fault", ["pull_fails", "keeps_kv"])
def test_when_no_kv_comes_over_the_prompt_is_computed_anew(apart: tuple[list[Mock], Routed], fault: str) -> None:
    engines, router = apart
    for engine in engines:
        engine.set(**{fault: fault == "pull_fails"})
    ask(router, BODIES)
    assert [engine.set()["pulled"] for engine in engines] == [0, 0]
    retried = router.router.instances.retried["lost"]
    assert retried == (16 if fault == "pull_fails" else 0)


def test_the_engine_with_the_kv_dies_before_it_is_pulled(apart: tuple[list[Mock], Routed]) -> None:
    engines, router = apart
    engines[1].set(pull_hangs=True)  # as a pull from nobody may
    bodies = BODIES[:4]

    def kill() -> None:
        until(lambda: engines[1].set()["pulled"] >= 1)
        engines[0].kill()

    answers = all_at_once(router.url, bodies, kill)
    assert [status for status, _ in answers] == [200] * 4
    until(lambda: router.router.n_open == 0)
    router.router.call(lambda: recount(router.router.state))


def test_the_engine_that_answers_dies(apart: tuple[list[Mock], Routed]) -> None:
    engines, router = apart
    engines[1].set(prefill_s=5.0)

    def kill() -> None:
        until(lambda: engines[1].set()["pulled"] >= 1)
        engines[1].kill()

    bodies = [body | {"stream": True} for body in BODIES[:4]]
    answers = all_at_once(router.url, bodies, kill)
    assert [status for status, _ in answers] == [200] * 4
    until(lambda: router.router.n_open == 0)
    assert int(router.router.state.cluster[0]["tokens_out"]) == 4 * 12
    router.router.call(lambda: recount(router.router.state))


def test_roles_change_by_hand_while_answers_come_and_nothing_is_lost() -> None:
    roles = "prefill,decode,decode"
    with mocks(3) as engines, routed(engines, kv_transfer=True, roles=roles, policy="static_split") as router:

        def change() -> None:
            for instance, role in ((2, "prefill"), (0, "decode")):
                router.client.post("/admin/role", json={"instance": instance, "role": role}).raise_for_status()
                until(lambda: router.router.state.inst["target_role"].max() < 0)

        answers = all_at_once(router.url, BODIES, change)
        assert [status for status, _ in answers] == [200] * 16
        assert router.router.state.inst["role"].tolist() == [Role.DECODE, Role.DECODE, Role.PREFILL]
        before = [engine.set()["kept"] for engine in engines]
        ask(router, BODIES)
        assert [engine.set()["kept"] - kept for engine, kept in zip(engines, before, strict=True)] == [0, 0, 16]


@pytest.mark.slow
def test_the_controller_follows_a_drift_on_engines_of_others_and_loses_no_request() -> None:
    """As ``tests/env/test_drift_live.py``: long prompts with next to no answer, then short ones with long answers."""
    values = {
        "side": "mixed", "interval_s": 1.0, "window_s": 2.0, "commit_s": 0.0, "hysteresis": 0.1, "prefill": 1.0,
        "decode": 1.0, "lead": 1.0, "spare": 0.0, "backlog": 0.0, "ttft_risk": 0.0, "tpot_risk": 0.0, "start": 0.5,
    }  # fmt: skip
    policy = "planner:" + ",".join(f"{name}={value}" for name, value in values.items())
    options: dict[str, Any] = {"kv_transfer": True, "reallocate": True, "roles": "mixed", "prefix_cache": False}
    with mocks(2) as engines, routed(engines, policy=policy, **options) as router:
        seen: list[list[int]] = []
        for tokens, answer, rate, seconds in ((180, 2, 8, 5), (12, 48, 2, 8)):
            bodies = [{"prompt": [k] * tokens, "max_tokens": answer} for k in range(1, rate * seconds + 1)]
            answers = _paced(router, bodies, 1.0 / rate)
            assert [status for status, _ in answers] == [200] * len(bodies)
            assert [a.json()["usage"]["completion_tokens"] for _, a in answers] == [answer] * len(bodies)
            seen.append(router.router.state.inst["role"].tolist())
        assert sorted(seen[0]) == [Role.PREFILL, Role.MIXED]
        assert seen[1] == [Role.MIXED, Role.MIXED]
        until(lambda: router.router.n_open == 0)
        router.router.call(lambda: recount(router.router.state))


def test_roles_change_only_where_engines_hand_kv_over() -> None:
    with pytest.raises(SlalomError, match="--kv-transfer"):
        build(Options("http://127.0.0.1:1", reallocate=True))


def test_the_first_leg_asks_for_one_token_and_nothing_else() -> None:
    body = {"prompt": "x", "max_tokens": 9, "min_tokens": 4, "stream": True, "stream_options": {}, "temperature": 0.5}
    sent = body_of_prefill(body)
    assert (sent["max_tokens"], sent["stream"], sent["temperature"]) == (1, False, 0.5)
    assert sent["kv_transfer_params"]["do_remote_decode"] is True
    assert not {"min_tokens", "stream_options"} & sent.keys()
    assert kv_of({"kv_transfer_params": {"remote_block_ids": []}}) is None
    assert kv_of({}) is None
