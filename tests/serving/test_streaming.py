"""What must be done when a client has gone is done, however often and whenever its request is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextvars import ContextVar
from typing import Any

import pytest
from starlette.requests import Request

from cluster.serving.errors import ApiError
from cluster.serving.streaming import Apart, EventStream, unless_gone


class Client:
    """The other end of a request, in this process."""

    def __init__(self) -> None:
        self.has_gone = asyncio.Event()
        self.sent: list[Any] = []

    async def receive(self) -> Any:
        await self.has_gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    def request(self) -> Request:
        return Request({"type": "http", "method": "POST", "headers": []}, self.receive)


SOMEBODY = ContextVar("somebody", default="nobody")


@pytest.mark.parametrize("num_cancels", [0, 1, 3])
def test_a_request_runs_apart_and_ends_whatever_happens_to_it(num_cancels):
    async def scenario() -> None:
        seen, ended = [], []

        async def app(*_: Any) -> None:
            seen.append(SOMEBODY.get())
            try:
                await asyncio.sleep(0.05)
            finally:
                await asyncio.sleep(0.01)
                ended.append(True)

        SOMEBODY.set("Ray's task")
        task = asyncio.ensure_future(Apart(app)({"type": "http"}, None, None))
        for _ in range(num_cancels):
            await asyncio.sleep(0)
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled() == bool(num_cancels)
        await asyncio.sleep(0.05)
        assert (seen, ended) in ((["nobody"], [True]), ([], []))

    asyncio.run(scenario())


async def endless() -> AsyncIterator[bytes]:
    while True:
        yield b"data: x\n\n"
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("num_cancels", [0, 1, 2, 3])
def test_a_stream_is_closed_however_often_it_is_cancelled(num_cancels):
    async def scenario() -> None:
        client, closed = Client(), asyncio.Event()

        async def close() -> None:
            await asyncio.sleep(0.01)
            closed.set()

        stream = EventStream(endless(), close, {})
        task = asyncio.ensure_future(stream({"type": "http"}, client.receive, client.send))
        await asyncio.sleep(0.02)
        if not num_cancels:
            client.has_gone.set()
        for _ in range(num_cancels):
            task.cancel()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await asyncio.wait_for(closed.wait(), 5)

    asyncio.run(scenario())


@pytest.mark.parametrize("num_cancels", [0, 1, 2])
@pytest.mark.parametrize("num_steps", range(1, 7))
def test_what_comes_when_nobody_waits_any_more_is_dropped(num_cancels, num_steps):
    """The client goes, or the request is cancelled, a few steps of the loop before or after the result is there."""

    async def scenario() -> None:
        client, made, dropped = Client(), [], []

        async def work() -> str:
            for _ in range(3):
                await asyncio.sleep(0)
            made.append("generation")
            return "generation"

        async def drop(result: str) -> None:
            await asyncio.sleep(0)
            dropped.append(result)

        working = asyncio.ensure_future(work())
        task = asyncio.ensure_future(unless_gone(client.request(), working, drop))
        for _ in range(num_steps):
            await asyncio.sleep(0)
        if not num_cancels:
            client.has_gone.set()
        for _ in range(num_cancels):
            task.cancel()
            await asyncio.sleep(0)
        try:
            taken = [await task]
        except (asyncio.CancelledError, ApiError):
            taken = []
        await asyncio.sleep(0.02)
        assert taken + dropped == made

    asyncio.run(scenario())


def test_a_result_that_came_too_late_is_dropped():
    async def scenario() -> None:
        client, dropped = Client(), []

        async def stubborn() -> str:
            try:
                await asyncio.sleep(5)
            except asyncio.CancelledError:
                return "generation"
            return ""

        async def drop(result: str) -> None:
            dropped.append(result)

        task = asyncio.ensure_future(unless_gone(client.request(), stubborn(), drop))
        await asyncio.sleep(0.01)
        client.has_gone.set()
        with pytest.raises(ApiError, match="has gone"):
            await task
        assert dropped == ["generation"]

    asyncio.run(scenario())
