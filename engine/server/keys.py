"""Who may ask: an optional key for every route, and for administration a client that sits on this machine itself."""

from __future__ import annotations

import base64
import binascii
import secrets
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Any

from fastapi import HTTPException, Request
from starlette.responses import JSONResponse

from engine.common.documents import read_text
from engine.errors import SlalomError
from engine.server.protocol import error_body

_LEAST = 16
_OPEN = ("/health",)  # for load balancers
_ASKED = 'Bearer, Basic realm="slalom", charset="UTF-8"'  # a browser asks for the second: the key is the password
#: Headers by which proxies say for whom they ask, beside those that begin with _FORWARDED.
_PROXIED = (
    "cf-connecting-ip", "fastly-client-ip", "forwarded", "true-client-ip", "via", "x-client-ip", "x-cluster-client-ip",
    "x-envoy-external-address", "x-original-host", "x-real-ip",
)  # fmt: skip
_FORWARDED = ("x-forwarded", "x-original-forwarded")


def find_key(given: str, file: str) -> str:
    """The key that clients must know; empty where none is asked for.

    :param given: on the command line or in the environment; ``file``: one that holds it
    :raises SlalomError: both, an unreadable file, or a key that is short or no plain text
    """
    if given and file:
        raise SlalomError("--api-key-file", file, "give it or --api-key, not both")
    key = read_text(Path(file), "--api-key-file", 4096).strip() if file else given
    if (file or given) and not (len(key) >= _LEAST and key.isascii() and key.isprintable() and " " not in key):
        fix = f"use {_LEAST} printable ASCII characters or more, without spaces; e.g. from `openssl rand -hex 32`"
        raise SlalomError("--api-key-file" if file else "--api-key", f"{len(key)} characters", fix)
    return key


class KeyCheck:
    """ASGI middleware: what does not carry ``key`` gets status 401 before anything of it is read."""

    def __init__(self, app: Any, key: str) -> None:
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One connection's request, as ASGI has it."""
        if scope["type"] != "http" or scope["path"] in _OPEN or self._carried(scope["headers"]):
            await self._app(scope, receive, send)
            return
        body = error_body("authorization: no key, or another one", "invalid_request_error", "invalid_api_key")
        headers = {"www-authenticate": _ASKED, "connection": "close"}
        await JSONResponse(body, 401, headers=headers)(scope, receive, send)

    def _carried(self, headers: list[tuple[bytes, bytes]]) -> bool:
        found = [value for name, value in headers if name == b"authorization"]
        if len(found) != 1:
            return False
        scheme, _, given = found[0].partition(b" ")
        given = given.strip()
        if scheme.lower() == b"basic":
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        elif scheme.lower() != b"bearer":
            return False
        return secrets.compare_digest(given, self._key)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address.is_loopback


def check_local(http: Request) -> None:
    """Refuse all but clients on this machine that mean this server.

    Not theirs are: another machine; a proxy on this one, which asks for somebody else; a page of another site in a
    browser here, which may send forms (``Origin``, ``Sec-Fetch-Site``), or read answers under a name of its own that
    it has made point here (``Host``).
    """
    headers = http.headers
    if http.client is None or not _is_loopback(http.client.host):
        raise HTTPException(403, "administration is for clients on this machine")
    if any(name in _PROXIED or name.startswith(_FORWARDED) for name in headers):
        raise HTTPException(403, "administration is not for what a proxy passes on")
    named = headers.get("host", "")
    host = named if named.endswith("]") or ":" not in named else named.rpartition(":")[0]
    if not _is_loopback(host.lower()):
        raise HTTPException(403, "administration: call this server localhost, 127.0.0.1 or [::1]")
    foreign = headers.get("origin", f"http://{named}") not in (f"http://{named}", f"https://{named}")
    if foreign or headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise HTTPException(403, "administration is not for pages of other sites")
