"""An OpenAI-compatible engine that computes nothing: it waits, and its tokens follow from the prompt alone.

For tests and measurements of what stands in front of an engine. It needs nothing of Slalom and starts in a moment::

    python eval/benchmarks/mock_engine.py 8101 --prefill-s 0.02 --token-s 0.01

It keeps KV for others and pulls it as vLLM does (``kv_transfer_params``), or fails to (``keeps_kv``, ``pull_fails``).
``POST /control`` sets ``refuse`` (503 to every request), ``break_at`` (hang up after so many tokens) or the times;
``GET /control`` says how many requests began, ended, and were hung up on, and which prompts began in which order.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import time
from typing import Any

import uvicorn

MODEL = "mock"


def text_of(prompt: Any, n: int) -> str:
    """The first ``n`` tokens of the answer to ``prompt``."""
    key = json.dumps(prompt, sort_keys=True)
    return "".join(" " + hashlib.sha256(f"{key}/{k}".encode()).hexdigest()[:4] for k in range(n))


class MockEngine:
    """The ASGI application."""

    def __init__(self, prefill_s: float, token_s: float) -> None:
        self.set = {
            "prefill_s": prefill_s,
            "token_s": token_s,
            "refuse": False,
            "break_at": 0,
            "status": 503,
            "whole": False,
            "keeps_kv": True,
            "pull_fails": False,
            "pull_hangs": False,
        }
        self.seen = {
            "kept": 0,
            "pulled": 0,
            "begun": 0,
            "ended": 0,
            "hung_up": 0,
            "refused": 0,
            "most_running": 0,
            "wrong": 0,
        }
        self.order: list[Any] = []  # prompts, as they began
        self.clients: set[Any] = set()  # addresses, one for each connection
        self.last: dict[str, Any] = {}  # what else the last one brought
        self.running = 0
        self.prefilling = asyncio.Lock()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        path = scope["path"]
        if path == "/control":
            self.set |= json.loads(body or b"{}")
            await _json(
                send,
                200,
                self.set
                | self.seen
                | {"running": self.running, "order": self.order, "last": self.last, "connections": len(self.clients)},
            )
        elif path == "/health":
            await _json(send, 200, {})
        elif path == "/v1/models":
            await _json(send, 200, {"data": [{"id": MODEL, "owned_by": "mock", "max_model_len": 4096}]})
        elif path == "/metrics":
            text = f'# TYPE x gauge\nvllm:num_requests_running{{model_name="m"}} {self.running}.0\n'
            await _answer(send, 200, b"text/plain", text.encode())
        elif path.startswith("/v1/") and dict(scope["headers"]).get(b"content-type") != b"application/json":
            await _json(send, 415, {"error": {"message": "Unsupported Media Type", "code": 415}})  # as vLLM does
        elif path in ("/v1/completions", "/v1/chat/completions"):
            client = tuple(scope["client"])
            await self.generate(json.loads(body), dict(scope["headers"]), client, receive, send, chat="chat" in path)
        else:
            await _json(send, 404, {"error": {"message": "no such path", "code": 404}})

    async def generate(
        self, body: dict[str, Any], headers: Any, client: Any, receive: Any, send: Any, *, chat: bool
    ) -> None:
        """Answer one request, until its client hangs up."""
        prompt = body.get("messages" if chat else "prompt")
        if self.set["refuse"]:
            self.seen["refused"] += 1
            await _json(send, int(self.set["status"]), {"error": {"message": "full", "code": self.set["status"]}})
            return
        if body.get("max_tokens") == 999:
            self.seen["wrong"] += 1
            await _json(send, 400, {"error": {"message": "max_tokens: too many", "code": 400}})
            return
        kv = body.get("kv_transfer_params") or {}
        if kv.get("do_remote_prefill"):
            if self.set["pull_fails"] or kv.get("remote_request_id") != text_of(prompt, 1):
                self.seen["wrong"] += 1
                await _json(send, 500, {"error": {"message": "the transfer failed", "code": 500}})
                return
            self.seen["pulled"] += 1
            if self.set["pull_hangs"]:
                await _hung_up(receive)
                return
        self.clients.add(client)
        self.seen["begun"] += 1
        self.order.append(prompt)
        self.last = {"priority": body.get("priority"), "authorization": headers.get(b"authorization", b"").decode()}
        self.running += 1
        self.seen["most_running"] = max(self.seen["most_running"], self.running)
        work = asyncio.ensure_future(self.work(body, prompt, send, chat))
        gone = asyncio.ensure_future(_hung_up(receive))
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        self.running -= 1
        self.seen["ended" if work.done() else "hung_up"] += 1
        work.cancel()
        gone.cancel()
        if work.done() and not work.cancelled():
            work.result()

    async def work(self, body: dict[str, Any], prompt: Any, send: Any, chat: bool) -> None:
        """Prefill, one prompt after the other, then a token at a time."""
        n = int(body.get("max_tokens") or 16)
        async with self.prefilling:
            await asyncio.sleep(float(self.set["prefill_s"]))
        words = text_of(prompt, n).split(" ")[1:]
        head = {"id": "mock-1", "object": "chat.completion.chunk" if chat else "text_completion", "model": MODEL}
        stream = bool(body.get("stream")) and not self.set["whole"]
        counts = {"prompt_tokens": max(len(json.dumps(prompt)) // 4, 1), "completion_tokens": n}
        usage = counts | {"total_tokens": sum(counts.values())}
        if not stream:
            await asyncio.sleep(float(self.set["token_s"]) * n)
            choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": "length"}
            text = "".join(" " + word for word in words)
            choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            whole = "chat.completion" if chat else "text_completion"
            kept: dict[str, Any] = {}
            if (body.get("kv_transfer_params") or {}).get("do_remote_decode") and self.set["keeps_kv"]:
                self.seen["kept"] += 1
                where = {"do_remote_prefill": True, "remote_block_ids": [[1]], "remote_request_id": text_of(prompt, 1)}
                kept = {"kv_transfer_params": where}
            await _json(send, 200, head | {"object": whole, "choices": [choice], "usage": usage} | kept)
            return
        kind = (b"content-type", b"text/event-stream")
        await send({"type": "http.response.start", "status": 200, "headers": [kind]})
        if chat:
            await _event(send, head | {"choices": [_choice({"delta": {"role": "assistant", "content": ""}})]})
        begin = time.monotonic()
        for k, word in enumerate(words):
            if self.set["break_at"] and k >= int(self.set["break_at"]):
                raise ConnectionAbortedError("asked to")
            piece = {"delta": {"content": " " + word}} if chat else {"text": " " + word}
            await _event(send, head | {"choices": [_choice(piece, "length" if k == n - 1 else None)]})
            await asyncio.sleep(max(begin + (k + 1) * float(self.set["token_s"]) - time.monotonic(), 0.0))
        if (body.get("stream_options") or {}).get("include_usage"):
            await _event(send, head | {"choices": [], "usage": usage})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def _choice(piece: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"index": 0, "logprobs": None, "finish_reason": finish} | piece


async def _hung_up(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _event(send: Any, data: dict[str, Any]) -> None:
    await send({"type": "http.response.body", "body": f"data: {json.dumps(data)}\n\n".encode(), "more_body": True})


async def _json(send: Any, status: int, data: dict[str, Any]) -> None:
    await _answer(send, status, b"application/json", json.dumps(data).encode())


async def _answer(send: Any, status: int, kind: bytes, body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind)]})
    await send({"type": "http.response.body", "body": body})


def main() -> None:
    parser = argparse.ArgumentParser(description="an engine that only waits")
    parser.add_argument("port", type=int)
    parser.add_argument("--prefill-s", type=float, default=0.02)
    parser.add_argument("--token-s", type=float, default=0.01)
    given = parser.parse_args()
    app = MockEngine(given.prefill_s, given.token_s)
    uvicorn.run(app, port=given.port, log_level="critical", lifespan="off")


if __name__ == "__main__":
    main()
