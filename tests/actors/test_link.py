"""The socket between a replica and its shard."""

from __future__ import annotations

import asyncio
import os
import stat
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from actors.link import ReplicaEnd, ShardEnd

LARGE = os.urandom(3 << 20)  # more than a socket or a stream's buffer takes at once


Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Ray's asynchronous actors have uvloop's event loop where it is installed."""
    new_loop = pytest.importorskip(request.param).new_event_loop

    def run_in(work: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(work)

    return run_in


async def _pair() -> tuple[ReplicaEnd, ShardEnd]:
    replica = ReplicaEnd()
    shard = ShardEnd(replica.address)
    await replica.connect()
    return replica, shard


async def _received(shard: ShardEnd) -> object:
    return await asyncio.wait_for(asyncio.to_thread(shard.receive), 10)


def test_messages_arrive_in_order_both_ways(run: Run) -> None:
    async def exchange() -> None:
        replica, shard = await _pair()
        messages = [("turn", (1, 2, 3)), {"empty": b""}, LARGE, None]
        for message in messages:
            replica.send(message)
        assert [await _received(shard) for _ in messages] == messages
        sender = threading.Thread(target=lambda: [shard.send(message) for message in messages])
        sender.start()
        assert [await asyncio.wait_for(replica.receive(), 10) for _ in messages] == messages
        sender.join()
        replica.close()
        shard.close()

    run(exchange())


def test_either_end_hears_that_the_other_is_gone(run: Run) -> None:
    async def part() -> None:
        replica, shard = await _pair()
        shard.send("last words")
        shard.close()
        assert await replica.receive() == "last words"
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(replica.receive(), 10)
        replica.send("into the void")  # says nothing
        replica.close()

        replica, shard = await _pair()
        replica.send("last words")
        replica.close()
        assert await _received(shard) == "last words"
        with pytest.raises(ConnectionError):
            await _received(shard)
        with pytest.raises(ConnectionError):
            shard.send(LARGE)
        shard.close()

    run(part())


def test_a_message_cut_short_is_none(run: Run) -> None:
    async def cut() -> None:
        replica, shard = await _pair()
        shard._socket.sendall((1000).to_bytes(8, "little") + b"not a thousand bytes")
        shard.close()
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(replica.receive(), 10)
        replica.close()

    run(cut())


def test_nobody_else_can_connect(run: Run) -> None:
    async def look() -> None:
        replica = ReplicaEnd()
        folder = Path(replica.address).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        shard = ShardEnd(replica.address)
        await replica.connect()
        assert not folder.exists()
        with pytest.raises(FileNotFoundError):
            ShardEnd(replica.address)
        shard.close()
        replica.close()

    run(look())


def test_a_replica_that_never_meets_its_shard_leaves_nothing(run: Run) -> None:
    async def give_up() -> None:
        replica = ReplicaEnd()
        replica.close()
        assert not Path(replica.address).parent.exists()

    run(give_up())
