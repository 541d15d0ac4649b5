"""An eviction policy of one's own: LRU, but conversations that have gone on for long are given more time.

    reprise lab compare chat:sessions=100 --eviction "examples/loyal_policy.py:Loyal(bonus_s=60)"

The longer a conversation is, the likelier its next turn. See docs/policies.md.
"""

from __future__ import annotations

from typing import Any

from policies.eviction import ChunkFacts
from policies.eviction.ranked import Ranked
from policies.outlook import Outlook
from policies.places import Place


class Loyal(Ranked):
    """Goes first: what was used longest ago, where every turn of its conversation counts as `bonus_s` seconds less."""

    def __init__(self, bonus_s: float = 60.0, max_turns: int = 10) -> None:
        super().__init__()
        if bonus_s < 0 or max_turns < 0:
            raise ValueError(f"bonus_s is {bonus_s} and max_turns {max_turns}: choose 0 or more")
        self._bonus_s, self._max_turns = bonus_s, max_turns

    def _rank(self, place: Place, chunk: ChunkFacts) -> tuple[Any, ...]:  # noqa: ARG002 - the contract
        bonus_s = self._bonus_s * min(chunk.turn, self._max_turns)
        return (chunk.last_used + bonus_s, -chunk.start)

    def may_drop(self, chunk: ChunkFacts, position: int | None, outlook: Outlook) -> bool:  # noqa: ARG002 - the contract
        return position is None  # what a waiting turn needs is kept as long as it can be
