"""The oracle of a timed run: it knows every prompt to come, by the keys that the scheduler will hear of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from policies.eviction.contract import ChunkFacts
from policies.eviction.look_ahead import from_the_tail
from policies.messages import ChunkKey, Mark
from policies.places import Place
from policies.simulator.oracle import NEVER, Oracle
from policies.simulator.setup import Setup
from policies.simulator.simulation import marker_of
from policies.simulator.trace import Trace


class TimedOracle(Oracle):
    """What waiting turns need stays, from the head of the queue on; of the rest goes what is needed furthest ahead.

    Turns come in another order than recorded, so uses are counted key by key: the n-th coming of a key is its n-th use
    in the recorded order. Not a proven ceiling: it does not weigh sizes, tiers or time, so a policy may pass it by a
    little.
    """

    def __init__(self, prompts: Iterator[Sequence[ChunkKey]]) -> None:
        super().__init__(prompts)
        self._num_uses: Counter[ChunkKey] = Counter()

    def note_prompt(self, prompt: Sequence[Mark], now: float) -> None:  # noqa: ARG002 - the contract
        self._num_uses.update(mark.key for mark in prompt)

    def next_prompt(self, key: ChunkKey) -> int:
        uses = self._uses.get(key, ())
        at = self._num_uses[key]
        return uses[at] if at < len(uses) else NEVER

    def _rank(self, place: Place, chunk: ChunkFacts) -> tuple[Any, ...]:  # noqa: ARG002 - the contract
        if chunk.next_use is not None:
            return (1, *from_the_tail(chunk.next_use), -chunk.start)
        return (0, -self.next_prompt(chunk.key), -chunk.start)


def timed_oracle(trace: Trace, setup: Setup) -> TimedOracle:
    """For one simulation of this trace on this set-up."""
    return TimedOracle(_prompts(trace, setup))


def _prompts(trace: Trace, setup: Setup) -> Iterator[list[ChunkKey]]:
    marker = marker_of(trace, setup)
    for request in trace:
        yield [mark.key for mark in marker.turn(request).prompt]
        marker.ended(request)
