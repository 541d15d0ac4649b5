"""One request's choices: turns run side by side, their events in the order in which they come.

    choice 0 --client.run--> started, deltas ..., answer --.
    choice 1 --client.run--> started, deltas ..., answer --+--> one queue --> response

A response that is read slowly finds several deltas of a choice waiting and gets them as one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass

from actors.wire import Delta, TurnAccount, TurnRequest
from cluster.client import Answer, Client
from cluster.serving.recollection import Recalled
from cluster.serving.streaming import to_the_end


@dataclass(frozen=True, kw_only=True)
class Job:
    """One choice's turn."""

    request: TurnRequest
    recalled: Recalled


Event = TurnAccount | Delta | Answer
"""A choice starts once, has deltas, and ends with its answer."""

Finish = Callable[[Job, Answer], Awaitable[None]]


class Generation:
    """The running choices of one request. Whoever starts it must also close it."""

    def __init__(self, client: Client, jobs: Sequence[Job], finish: Finish, timeout_s: float) -> None:
        """`finish` is awaited for every answer before it is passed on."""
        self.jobs = list(jobs)
        self.accounts: dict[int, TurnAccount] = {}
        self._client, self._finish, self._timeout_s = client, finish, timeout_s
        self._events: asyncio.Queue[tuple[int, Event | BaseException]] = asyncio.Queue()
        self.on_close: Callable[[], None] = lambda: None
        """Called once, when nothing runs any more."""
        self.heard: list[list[Delta]] = [[] for _ in jobs]
        """Generated so far, by choice; also what nobody has read yet."""
        self.finished: set[int] = set()
        """Choices whose answer is whole and remembered; also those nobody has read yet."""
        self.failures: dict[int, Exception] = {}
        self._first: tuple[int, Event] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self.answers: dict[int, Answer] = {}
        """Those that were read."""

    async def begin(self) -> None:
        """Returns when a first choice has started. Raises what kept it from starting."""
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._run(index, job)) for index, job in enumerate(self.jobs)]
        self._first = await self._next()

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(choice, event) until every choice has ended. Raises what made one fail."""
        while self._first is not None:
            (index, event), self._first = self._first, None
            if isinstance(event, Delta):
                event = self._with_waiting(index, event)
            yield index, event
            if self._first is None and len(self.answers) < len(self.jobs):
                self._first = await self._next()

    async def collect(self) -> list[Answer]:
        """All answers, in the order of the choices."""
        async for _ in self.events():
            pass
        return [self.answers[index] for index in range(len(self.jobs))]

    async def close(self) -> None:
        """Ends what still runs: its turns are cancelled, and free their blocks."""
        await to_the_end(self._close())

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.on_close()
        self.on_close = lambda: None

    async def _run(self, index: int, job: Job) -> None:
        def put(event: Event) -> None:
            if isinstance(event, Delta):
                self.heard[index].append(event)
            self._events.put_nowait((index, event))

        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await self._client.run(job.request, on_delta=put, on_started=put)
            await self._finish(job, answer)
        except Exception as error:  # noqa: BLE001 - whoever reads the events hears of it
            self.failures[index] = error
            self._events.put_nowait((index, error))
        else:
            self.finished.add(index)
            put(answer)

    async def _next(self) -> tuple[int, Event]:
        return self._note(*await self._events.get())

    def _note(self, index: int, event: Event | BaseException) -> tuple[int, Event]:
        if isinstance(event, BaseException):
            raise event
        if isinstance(event, TurnAccount):
            self.accounts[index] = event
        elif isinstance(event, Answer):
            self.answers[index] = event
        return index, event

    def _with_waiting(self, index: int, delta: Delta) -> Delta:
        """The delta and those of the same choice that wait right behind it; what comes after them is kept for later."""
        while not self._events.empty():
            other, event = self._note(*self._events.get_nowait())
            if other != index or not isinstance(event, Delta):
                self._first = other, event
                break
            delta = Delta(delta.tokens + event.tokens, delta.text + event.text)
        return delta
