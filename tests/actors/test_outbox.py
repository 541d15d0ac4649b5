"""A client's stream of pieces: in order, nothing twice, and as few messages as its reader allows."""

from __future__ import annotations

import asyncio

from actors.outbox import Message, Outbox
from actors.wire import Delta


def delta(text: str) -> Delta:
    return Delta((), text)


def test_what_comes_together_is_one_message():
    async def scenario() -> None:
        outbox = Outbox()
        messages = outbox.messages()
        first = asyncio.ensure_future(anext(messages))
        await asyncio.sleep(0)  # it waits
        for name in "abc":
            outbox.put(name, delta(name))
        assert [name for name, _ in await first] == ["a", "b", "c"]
        outbox.put("a", delta("more"))
        assert await anext(messages) == (("a", delta("more")),)

    asyncio.run(scenario())


def test_a_slow_reader_gets_longer_messages_and_loses_nothing():
    async def scenario() -> list[Message]:
        outbox, heard = Outbox(), []

        async def write() -> None:
            for i in range(200):
                outbox.put("a", delta(str(i)))
                await asyncio.sleep(0.0005)

        writer = asyncio.ensure_future(write())
        async for message in outbox.messages():
            heard.append(message)
            if message[-1][1] == delta("199"):
                break
            await asyncio.sleep(0.01)
        await writer
        return heard

    heard = asyncio.run(scenario())
    assert [piece for message in heard for _, piece in message] == [delta(str(i)) for i in range(200)]
    assert len(heard) < 100


def test_nothing_is_kept_for_who_has_left():
    async def scenario() -> None:
        outbox = Outbox()
        outbox.put("a", delta("x"))
        outbox.leave()
        outbox.put("a", delta("y"))
        assert [message async for message in outbox.messages()] == []
        assert outbox._pieces == []

    asyncio.run(scenario())
