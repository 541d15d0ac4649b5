"""What a replica has for one client: the pieces of all its turns, in order, as one stream of messages.

A message holds all that came since the one before, so that a step of the engine costs one message however many turns
it moved, and a client that reads slowly gets fewer and longer ones. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress

from actors.wire import Piece

Message = tuple[tuple[str, Piece], ...]
"""(attempt's name, piece), in the order in which they came."""

SILENCE_S = 20.0


class Outbox:
    """Has one reader."""

    def __init__(self) -> None:
        self.is_left = False
        """Nobody reads it any more."""
        self._pieces: list[tuple[str, Piece]] = []
        self._news = asyncio.Event()

    def put(self, name: str, piece: Piece) -> None:
        """Of the attempt of this name."""
        if not self.is_left:
            self._pieces.append((name, piece))
            self._news.set()

    def leave(self) -> None:
        """There will be no more messages."""
        self.is_left = True
        self._pieces = []
        self._news.set()

    async def messages(self) -> AsyncIterator[Message]:
        """Until it is left. An empty one after a silence: sending it tells whether somebody is still there."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(SILENCE_S):
                    await self._news.wait()
            if self.is_left:
                return
            self._news.clear()
            pieces, self._pieces = self._pieces, []
            yield tuple(pieces)
