"""The waiting turns in the order in which they want to run, and who needs which mark first.

Where a turn stands is said by a policy (serving_order.py), when it comes; then by its arrival. Knows marks, not chunks:
which chunk serves a mark is the catalog's business.
"""

from __future__ import annotations

from bisect import bisect_left, insort

from policies.messages import ChunkKey, Turn, TurnId
from policies.ordered import SortedKeys

QueuePlace = tuple[int, float]
"""(class, virtual arrival in seconds)"""

Order = tuple[int, float, int]
"""A place and an arrival number: the lower one goes first. Unique for a turn as long as it waits."""

FIRST: Order = (-(1 << 62), 0.0, 0)  # before every turn
LAST_CLASS = 1 << 62  # behind every turn: of those that are only expected


class WaitingQueue:
    """Waiting turns, behind them the expected ones, and for every mark of their prompts the turns that have it.

    A mark's list of orders is sorted, so its first entry is the mark's next use. Marks shared by very many waiting
    turns (a system prompt) have long lists; taking the head out of one of 10,000 costs a few microseconds.
    """

    def __init__(self) -> None:
        self._turns: dict[TurnId, tuple[Turn, Order]] = {}
        self._by_order: dict[Order, TurnId] = {}
        self._orders: SortedKeys[Order] = SortedKeys()
        self._needs: dict[ChunkKey, list[Order]] = {}
        self._num_arrivals = 0
        self._num_prompt_tokens = 0

    def __len__(self) -> int:
        return len(self._turns)

    def __contains__(self, turn_id: TurnId) -> bool:
        return turn_id in self._turns

    def new_order(self, place: QueuePlace) -> Order:
        self._num_arrivals += 1
        return (*place, self._num_arrivals)

    def add(self, turn: Turn, order: Order) -> list[ChunkKey]:
        """Let the turn wait at `order`; returns the marks whose next use changed. The turn must not be waiting yet."""
        assert turn.turn_id not in self._turns
        assert order not in self._by_order
        self._turns[turn.turn_id] = (turn, order)
        self._by_order[order] = turn.turn_id
        self._orders.add(order)
        self._num_prompt_tokens += turn.num_prompt_tokens
        changed = []
        for key in needed_marks(turn):
            orders = self._needs.get(key)
            if orders is None:
                self._needs[key] = [order]
                changed.append(key)
            else:
                insort(orders, order)
                if orders[0] == order:
                    changed.append(key)
        return changed

    def remove(self, turn_id: TurnId) -> list[ChunkKey]:
        """The turn waits no more; returns the marks whose next use changed. KeyError when it was not waiting."""
        turn, order = self._turns.pop(turn_id)
        del self._by_order[order]
        self._orders.discard(order)
        self._num_prompt_tokens -= turn.num_prompt_tokens
        changed = []
        for key in needed_marks(turn):
            orders = self._needs[key]
            at = bisect_left(orders, order)
            del orders[at]
            if not orders:
                del self._needs[key]
            if at == 0:
                changed.append(key)
        return changed

    def turn(self, turn_id: TurnId) -> Turn:
        return self._turns[turn_id][0]

    def order_of(self, turn_id: TurnId) -> Order:
        return self._turns[turn_id][1]

    def turn_at(self, order: Order) -> TurnId | None:
        return self._by_order.get(order)

    def first(self, count: int) -> list[TurnId]:
        """The `count` turns that go first, in order."""
        return [self._by_order[order] for order in self._orders.first(count)]

    def nth(self, position: int) -> Order | None:
        """The order of the turn with exactly `position` turns before it."""
        return self._orders.nth(position)

    def position(self, order: Order) -> int:
        """How many waiting turns go before this order."""
        return self._orders.position(order)

    def next_use(self, mark: ChunkKey) -> Order | None:
        """The first waiting turn whose prompt has this mark."""
        orders = self._needs.get(mark)
        return orders[0] if orders else None

    @property
    def mean_prompt_tokens(self) -> float:
        return self._num_prompt_tokens / len(self._turns) if self._turns else 0.0


def needed_marks(turn: Turn) -> list[ChunkKey]:
    """The marks under which this turn looks for chunks, each once; none when it may not reuse."""
    return list(dict.fromkeys(mark.key for mark in turn.prompt)) if turn.reuse else []
