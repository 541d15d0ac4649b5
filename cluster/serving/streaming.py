"""Sending what a generation brings, and noticing at every moment when its client has gone.

Serve tells of that twice: by a message, and by cancelling the request, perhaps several times. What must be done at the
end is therefore done in a task of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from contextvars import Context
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.serving.errors import ApiError

log = logging.getLogger(__name__)

Result = TypeVar("Result")


_at_work: set[asyncio.Future[Any]] = set()  # asyncio holds its tasks weakly


async def to_the_end(work: Awaitable[Result]) -> Result:
    """The work's result. It goes on when whoever waits here is cancelled."""
    task = asyncio.ensure_future(work)
    _at_work.add(task)
    task.add_done_callback(_at_work.discard)
    return await asyncio.shield(task)


class Apart:
    """ASGI middleware: each request in a task and context of its own.

    With a request whose client has gone Serve cancels what Ray finds submitted in its context: calls to actors that
    other requests need too (the stream from a replica, a note for the conversations' actor), after which such an
    actor's queue may stand still (Ray 2.60). So Ray finds nothing, and the request is cancelled once and ends as it
    should.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def run() -> None:
            await self._app(scope, receive, send)

        task = asyncio.get_running_loop().create_task(run(), context=Context())
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            task.cancel()
            await to_the_end(asyncio.wait({task}))
            raise


async def unless_gone(
    request: Request, work: Awaitable[Result], drop: Callable[[Result], Awaitable[None]] | None = None
) -> Result:
    """The work's result; when the client disconnects first, the work is cancelled and ApiError 499 raised.

    `drop` is awaited with a result that came all the same, and that nobody takes.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(until_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has gone")
    except BaseException:
        task.cancel()
        await to_the_end(_dispose(task, drop))
        raise
    finally:
        gone.cancel()
    return task.result()


async def _dispose(task: asyncio.Future[Result], drop: Callable[[Result], Awaitable[None]] | None) -> None:
    with suppress(asyncio.CancelledError, Exception):
        result = await task
        if drop is not None:
            await drop(result)


async def until_gone(receive: Receive) -> None:
    """Returns when the client has disconnected. Its request's body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """A response of server-sent events. `close` is awaited however it ends."""

    def __init__(
        self, events: AsyncIterator[bytes], close: Callable[[], Awaitable[None]], headers: Mapping[str, str]
    ) -> None:
        super().__init__(
            events,
            headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers},
            media_type="text/event-stream",
        )
        self._events, self._close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        pump = asyncio.ensure_future(self._pump(send))
        gone = asyncio.ensure_future(until_gone(receive))
        try:
            await asyncio.wait({pump, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (pump, gone):
                task.cancel()
            await to_the_end(self._end(pump, gone))

    async def _end(self, pump: asyncio.Future[None], gone: asyncio.Future[None]) -> None:
        outcome, _ = await asyncio.gather(pump, gone, return_exceptions=True)
        await self._close()
        if isinstance(outcome, Exception):
            log.error("a stream broke", exc_info=outcome)

    async def _pump(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def as_header(counts: Mapping[Any, int]) -> str:
    """`hbm=12,dram=96`."""
    return ",".join(f"{name}={count}" for name, count in counts.items()) or "none"
