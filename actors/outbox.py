"""What a replica has for one client: the pieces of all its turns, in order, as one stream of messages.

A message holds all that came since the one before, so that a step of the engine costs one message however many turns
it moved, and a client that reads slowly gets fewer and longer ones. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from actors.wire import Piece

Message = tuple[tuple[str, Piece], ...]
"""(attempt's name, piece), in the order in which they came."""


class Outbox:
    """Has one reader."""

    def __init__(self) -> None:
        self.is_left = False
        self._pieces: list[tuple[str, Piece]] = []
        self._news = asyncio.Event()

    def put(self, name: str, piece: Piece) -> None:
        """Of the attempt of this name."""
        if not self.is_left:
            self._pieces.append((name, piece))
            self._news.set()

    async def messages(self) -> AsyncIterator[Message]:
        """Without end."""
        while True:
            await self._news.wait()
            self._news.clear()
            pieces, self._pieces = self._pieces, []
            yield tuple(pieces)
