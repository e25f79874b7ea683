"""Connections to one engine, as many as there are requests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import httpx

from engine.remote.discover import own_key

_CONNECT_S = 5.0
#: Servers hang up on idle connections, after 5 s and more, and a request must not meet that.
_KEPT_S = 2.0


class Wire:
    """:param keeps: a connection is used again soon after; else there is one for each request
    :ivar client: for what is not urgent; it brings our key, where we have one
    """

    def __init__(self, url: str, keeps: bool) -> None:
        limits = httpx.Limits(
            max_connections=None, max_keepalive_connections=256 if keeps else 0, keepalive_expiry=_KEPT_S
        )
        self._transport = httpx.AsyncHTTPTransport(limits=limits, trust_env=False)
        own = {"accept-encoding": "identity", **own_key()}
        self.client = httpx.AsyncClient(
            base_url=url, transport=self._transport, timeout=httpx.Timeout(None, connect=_CONNECT_S), headers=own
        )
        self._url, self._own = httpx.URL(url), {"content-type": "application/json", **own}
        self._urls: dict[str, httpx.URL] = {}
        self._extensions = {"timeout": {"connect": _CONNECT_S, "read": None, "write": None, "pool": None}}

    @asynccontextmanager
    async def post(
        self, path: str, content: bytes, headers: Mapping[str, str] | None = None
    ) -> AsyncIterator[httpx.Response]:
        """The answer to ``content`` (JSON), of which nothing but the head has been read.

        By httpx's transport, since what its client does around one (cookies, redirects, authentication, joined URLs)
        takes half a millisecond of every request.

        :raises httpx.HTTPError: no connection, or a broken one
        """
        url = self._urls.get(path)
        if url is None:
            url = self._urls[path] = self._url.copy_with(raw_path=self._url.raw_path.rstrip(b"/") + path.encode())
        sent = self._own if not headers else {**self._own, **headers}
        request = httpx.Request("POST", url, headers=sent, content=content, extensions=self._extensions)
        response = await self._transport.handle_async_request(request)
        try:
            yield response
        finally:
            await response.aclose()

    async def close(self) -> None:
        """Hang up."""
        await self.client.aclose()
