"""The door: what every HTTP request passes through before and after its route. Plain ASGI, no body is copied.

It names requests, bounds their bodies and the time a client may take to send one, writes one log line and counts one
metric for each, and says in OpenAI's shape what went wrong.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import MutableMapping
from typing import Any

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.serving.errors import ApiError
from cluster.serving.metrics import Metrics
from cluster.serving.service import new_request_id

log = logging.getLogger(__name__)
access_log = logging.getLogger("reprise.access")

BODY_LIMIT_S = 30.0
"""A client that has not sent its body by then is told so."""

GONE = 499
"""The status of a request whose client left before there was an answer."""

SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
}


class Door:
    """ASGI middleware around the whole application."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        max_body_bytes: int,
        endpoints: frozenset[str],
        names_requests: bool,
    ) -> None:
        """`endpoints`: the paths that have a label of their own in metrics."""
        self._app, self._metrics = app, metrics
        self._max_body_bytes = max_body_bytes
        self._endpoints, self._names_requests = endpoints, names_requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        visit = _Visit(scope, self._names_requests)
        scope = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        endpoint = scope["path"] if scope["path"] in self._endpoints else "other"
        self._metrics.request_started(endpoint)
        try:
            body = _Body(receive, self._max_body_bytes, BODY_LIMIT_S)
            try:
                body.check_length(Headers(scope=scope))
                await self._app(scope, body.receive, visit.sender(send))
            except HTTPException as error:  # raised while the body was read
                await visit.answer(ApiError(error.status_code, error.detail), send)
            except Exception:  # a bug: the client is told, and the server goes on
                log.exception("request %s broke", visit.request_id)
                await visit.answer(ApiError(500, "an error of this server; its log says more"), send)
        finally:
            self._metrics.request_finished(endpoint, str(visit.status or GONE))
            visit.log()


class _Visit:
    """One request's name, status and times."""

    def __init__(self, scope: MutableMapping[str, Any], is_named: bool) -> None:
        given = Headers(scope=scope).get("x-request-id", "")
        self.request_id = (
            given if 0 < len(given) <= 128 and given.isascii() and given.isprintable() else new_request_id()
        )
        self.status = 0
        self.facts: dict[str, Any] = {}
        self._scope, self._is_named = scope, is_named
        self._began = time.monotonic()
        scope.setdefault("state", {})
        scope["state"]["request_id"] = self.request_id
        scope["state"]["facts"] = self.facts

    def sender(self, send: Send) -> Send:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                headers = MutableHeaders(scope=message)
                if self._is_named:
                    headers["x-request-id"] = self.request_id
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            elif self._scope["method"] == "HEAD":  # answered like a GET, without its body
                message = {**message, "body": b""}
            await send(message)

        return with_headers

    async def answer(self, error: ApiError, send: Send) -> None:
        """Says what went wrong, unless an answer has begun already."""
        if self.status:
            return
        headers = {"content-type": "application/json", "connection": "close", **error.headers}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        send = self.sender(send)
        await send({"type": "http.response.start", "status": error.status, "headers": raw})
        await send({"type": "http.response.body", "body": json.dumps(error.body).encode()})

    def log(self) -> None:
        if not access_log.isEnabledFor(logging.INFO):
            return
        line = {
            "request_id": self.request_id,
            "method": self._scope["method"],
            "path": self._scope["path"],
            "status": self.status or GONE,
            "ms": round((time.monotonic() - self._began) * 1e3, 1),
            **self.facts,
        }
        access_log.info(json.dumps(line, ensure_ascii=True))


class _Body:
    """A request's body as it comes, within bounds."""

    def __init__(self, receive: Receive, max_bytes: int, limit_s: float) -> None:
        self._receive, self._max_bytes, self._limit_s = receive, max_bytes, limit_s
        self._num_bytes, self._is_complete = 0, False
        self._began = time.monotonic()

    def check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._max_bytes:
            raise self._too_big()

    async def receive(self) -> Message:
        if self._is_complete:
            return await self._receive()
        try:
            left_s = self._limit_s - (time.monotonic() - self._began)
            message = await asyncio.wait_for(self._receive(), max(0.0, left_s))
        except TimeoutError:
            raise HTTPException(408, f"the body was not here after {self._limit_s:g} s: send it faster") from None
        if message["type"] == "http.request":
            self._num_bytes += len(message.get("body", b""))
            self._is_complete = not message.get("more_body", False)
            if self._num_bytes > self._max_bytes:
                raise self._too_big()
        else:
            self._is_complete = True
        return message

    def _too_big(self) -> HTTPException:
        return HTTPException(413, f"the body is larger than {self._max_bytes:,} bytes: send less")
