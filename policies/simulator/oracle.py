"""The ceiling: Belady's order (furthest next use first, with bypass), for the simulator, which knows the future.

"Next" is counted in prompts. Exact in the untimed replay; in a timed simulation, where turns may overtake each other,
it is the recorded order that counts.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any

from policies.eviction.contract import ChunkFacts
from policies.eviction.ranked import Ranked
from policies.messages import ChunkKey, Mark
from policies.outlook import Outlook
from policies.places import Place
from policies.simulator.trace import Trace

NEVER = 1 << 31


class Oracle(Ranked):
    """Belady (1966) over the leaves of a prefix tree: no prefix is used later than what extends it.

    `prompts`: the keys of every prompt to come, in order; `note_prompt` counts where the run is.
    """

    def __init__(self, prompts: Iterable[Sequence[ChunkKey]]) -> None:
        super().__init__()
        self._uses: dict[ChunkKey, array[int]] = {}
        self._num_seen = 0
        for number, keys in enumerate(prompts):
            for key in keys:
                uses = self._uses.get(key)
                if uses is None:
                    uses = self._uses[key] = array("i")
                uses.append(number)

    def note_prompt(self, prompt: Sequence[Mark], now: float) -> None:  # noqa: ARG002 - the contract
        self._num_seen += 1

    def note_answer(self, prompt: Sequence[Mark], turn: int, answer_tokens: int, now: float) -> None:
        pass  # it knows already

    def may_drop(self, chunk: ChunkFacts, position: int | None, outlook: Outlook) -> bool:  # noqa: ARG002 - the contract
        return position is None

    def _rank(self, place: Place, chunk: ChunkFacts) -> tuple[Any, ...]:  # noqa: ARG002 - the contract
        return (-self.next_prompt(chunk.key), -chunk.start)

    def next_prompt(self, key: ChunkKey) -> int:
        """The number of the next prompt with this key that has not come yet; NEVER if there is none."""
        uses = self._uses.get(key, ())
        at = bisect_left(uses, self._num_seen)
        return uses[at] if at < len(uses) else NEVER


def block_oracle(trace: Trace) -> Oracle:
    """For `replay` at block level, with `max_run=1`: every block has a next use of its own."""
    return Oracle([str(block) for block in request.blocks] for request in trace)


def session_oracle(trace: Trace) -> Oracle:
    """For `replay` at session level."""
    return Oracle([str(request.session_id)] for request in trace)
