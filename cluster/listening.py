"""A client's end of a replica's outbox: one stream, from which every running turn gets its pieces."""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from actors.replica import attempt_name
from actors.wire import Piece, TurnEnd, TurnRequest
from policies import messages as m

log = logging.getLogger(__name__)

MAX_MESSAGES = 8
"""Under way at a time; what comes meanwhile goes with the next."""


class StreamBroke(RayError):  # noqa: N818 - named like what happened
    """Pieces are not heard any more, although nothing is known of the replica's death."""


@dataclass(slots=True)
class _Sink:
    receive: Callable[[Piece], None]
    ended: asyncio.Future[None]
    is_over: bool = False
    """The replica has nothing to do for it any more."""

    def take(self, piece: Piece) -> None:
        if self.ended.done():
            return
        self.is_over = isinstance(piece, TurnEnd)
        try:
            self.receive(piece)
        except Exception as error:  # noqa: BLE001 - whoever waits for the end hears of it
            self.ended.set_exception(error)
        else:
            if self.is_over:
                self.ended.set_result(None)

    def fail(self, error: BaseException) -> None:
        if not self.ended.done():
            self.ended.set_exception(error)


class Listener:
    """Belongs to one event loop. Once it is not open any more, another one is needed."""

    def __init__(self, replica: Any) -> None:
        """`replica` is the actor's handle."""
        self._replica = replica
        self._id = uuid.uuid4().hex
        self._sinks: dict[str, _Sink] = {}
        self._is_closing = False
        self._reader = asyncio.get_running_loop().create_task(self._read())

    @property
    def is_open(self) -> bool:
        return not self._reader.done()

    def close(self) -> None:
        """It ends with the last turn that runs."""
        self._is_closing = True
        if not self._sinks:
            self._reader.cancel()

    async def run(self, request: TurnRequest, dispatch: m.Dispatch, receive: Callable[[Piece], None]) -> None:
        """Runs the attempt; `receive` gets its pieces as they come, the last one is a TurnEnd. Raises RayError when the
        replica cannot go on, and what `receive` raises. Leaving early ends the attempt."""
        name = attempt_name(dispatch.turn_id, dispatch.attempt)
        sink = self._sinks[name] = _Sink(receive, asyncio.get_running_loop().create_future())
        call = self._replica.generate.remote(request, dispatch, self._id)
        watch = asyncio.ensure_future(_watch(call, sink))
        try:
            await sink.ended
        finally:
            watch.cancel()
            del self._sinks[name]
            if not sink.is_over:
                cancel = m.Cancel(turn_id=dispatch.turn_id, replica_id=dispatch.replica_id, attempt=dispatch.attempt)
                self._replica.cancel.remote(cancel)
            if self._is_closing:
                self.close()

    async def _read(self) -> None:
        error: BaseException = StreamBroke("the replica's stream ended")
        options = {"num_returns": "streaming", "_generator_backpressure_num_objects": MAX_MESSAGES}
        try:
            stream = self._replica.listen.options(**options).remote(self._id)
            async for ref in stream:
                for name, piece in await ref:
                    sink = self._sinks.get(name)
                    if sink is not None:
                        sink.take(piece)
        except RayError as failure:
            error = failure
        except Exception as failure:
            log.exception("a replica's stream broke")
            error = StreamBroke(f"{type(failure).__name__}: {failure}")
        finally:
            for sink in self._sinks.values():
                sink.fail(error)
            if ray.is_initialized():
                self._replica.leave.remote(self._id)  # its turns end with it


async def _watch(call: Any, sink: _Sink) -> None:
    """The replica's own word on the attempt comes when it is over; only what went wrong is news."""
    try:
        await call
    except RayError as error:
        sink.fail(error)
