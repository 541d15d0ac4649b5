"""The way up: Fetch on behalf of a turn at the head of the queue, and ahead of need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum, auto
from itertools import islice

from policies.board import Board
from policies.catalog import INCOMING, Chunk, Copy, CopyState
from policies.evicting import Evictor
from policies.fleet import Node
from policies.messages import Cause, ChunkFetched, ChunkKey, Fetch, NodeId, Tier, Turn
from policies.ordered import SortedKeys
from policies.places import STORE_TIERS, Place
from policies.prefetch import FetchNeed, PrefetchPolicy
from policies.queue import Order
from policies.restore import find_links, live

TURNS_PER_PASS = 4  # waiting turns looked at for prefetching after one event
WOKEN_PER_NODE = 1  # of those parked on a node, when there may be slots or bytes
NODES_PER_TICK = 8  # whose parked turns are looked at although nothing is known to have changed


class FetchOutcome(Enum):
    """What came of asking for a chunk in a node's DRAM."""

    ON_ITS_WAY = auto()
    NO_SLOT = auto()  # too many fetches in flight there
    NO_BYTES = auto()  # bytes are being freed
    IMPOSSIBLE = auto()  # no source, no tier, no bytes to be had, or it failed a moment ago


class Fetcher:
    """Raises chunks into DRAM.

    `unready` are the waiting turns that may have chunks to be fetched. A turn leaves it when all its chunks are in DRAM
    or under way, and comes back when one of them is saved, fails or goes. One that found no slot or no bytes on its
    node is `parked` there until some may be had: nobody is looked at in vain at every event.
    """

    def __init__(self, board: Board, evictor: Evictor, policy: PrefetchPolicy) -> None:
        self.unready: SortedKeys[Order] = SortedKeys()
        self.parked: dict[NodeId, SortedKeys[Order]] = {}
        self._parked_at: dict[Order, NodeId] = {}
        self._board, self._evictor, self._policy = board, evictor, policy
        self._catalog = board.catalog
        self._is_due = False
        board.when_overdue[CopyState.FETCHING] = self._fail

    # --- one chunk ----------------------------------------------------------------------------------------------------

    def fetch(self, chunk: Chunk, node: Node, needed_by: Order, share: float = 1.0) -> FetchOutcome:
        """Raise the chunk into the node's DRAM for the turn at `needed_by`, filling at most `share` of the budget."""
        place = Place(node.node_id, Tier.DRAM)
        account = self._catalog.accounts.get(place)
        copy = chunk.copies.get(place)
        if copy is not None and copy.is_live:
            return FetchOutcome.ON_ITS_WAY
        source = self.best_source(chunk, node)
        if account is None or source is None or self._board.has_failed(chunk.key, place):
            return FetchOutcome.IMPOSSIBLE
        if account.num_fetching >= self._board.config.max_fetches_in_flight:
            return FetchOutcome.NO_SLOT
        if copy is not None or self._board.is_claimed(node.node_id, needed_by):  # an older copy is on its way out
            return FetchOutcome.NO_BYTES
        if account.filled_bytes + chunk.num_bytes > share * account.budget_bytes:
            is_coming = self._evictor.make_room(place, chunk.num_bytes, share, needed_by)
            return FetchOutcome.NO_BYTES if is_coming else FetchOutcome.IMPOSSIBLE
        self._send(chunk, place, source)
        return FetchOutcome.ON_ITS_WAY

    def _send(self, chunk: Chunk, place: Place, source: Copy) -> None:
        copy = self._catalog.begin_copy(chunk, place, CopyState.FETCHING, source)
        assert copy is not None, "the bytes were counted a moment ago"
        self._board.expect(chunk, copy, self._board.config.command_deadline_s)
        self._board.changed_places.add(place)
        at = source.place
        self._board.send(Fetch(node_id=place.node_id, chunk=chunk.key, source=at.tier, source_node=at.node_id))

    def best_source(self, chunk: Chunk, node: Node) -> Copy | None:
        """The copy to fetch from: this node's own before others', faster tiers before slower ones."""
        best: tuple[tuple[bool, int, NodeId], Copy] | None = None
        for place, copy in chunk.copies.items():
            is_own = place in node.places
            is_out_of_reach = place.tier is Tier.OBJECT and not is_own
            if copy.state is not CopyState.RESIDENT or is_out_of_reach or place == Place(node.node_id, Tier.DRAM):
                continue
            rank = (not is_own, STORE_TIERS.index(place.tier), place.node_id)
            if best is None or rank < best[0]:
                best = (rank, copy)
        return best[1] if best else None

    # --- answers ------------------------------------------------------------------------------------------------------

    def on_fetched(self, event: ChunkFetched) -> None:
        place = Place(event.node_id, Tier.DRAM)
        chunk = self._catalog.chunks.get(event.chunk)
        copy = chunk.copies.get(place) if chunk is not None else None
        if chunk is None or copy is None:
            self._evictor.settle_stray(event.chunk, place, None)
        elif copy.state not in INCOMING:
            self._board.note_stale("ChunkFetched")
        else:
            self._catalog.arrive(chunk, copy, self._board.now)
            copy.fetched_at = self._board.now
            self._board.changed_chunks.add(chunk.key)
            self._board.raised_chunks.add(chunk.key)
            self._board.freed_nodes.add(event.node_id)

    def on_fetch_failed(self, command: Fetch) -> None:
        chunk = self._catalog.chunks.get(command.chunk)
        copy = chunk.copies.get(Place(command.node_id, Tier.DRAM)) if chunk is not None else None
        if chunk is None or copy is None or copy.state is not CopyState.FETCHING:
            self._board.note_stale("CommandFailed")
        else:
            self._fail(chunk, copy)

    def _fail(self, chunk: Chunk, copy: Copy) -> None:
        self._board.note_failure(chunk.key, copy.place)
        self._catalog.abandon(chunk, copy, Cause.LOST)
        self._board.changed_chunks.add(chunk.key)
        self._board.freed_nodes.add(copy.place.node_id)

    # --- ahead of need ------------------------------------------------------------------------------------------------

    def note_waiting(self, order: Order) -> None:
        """A turn waits, or a chunk that it needs left DRAM."""
        self._unpark(order)
        self.unready.add(order)
        self._is_due = self._is_due or self.unready.position(order) < TURNS_PER_PASS

    def note_gone(self, order: Order, marks: Sequence[ChunkKey]) -> None:
        """A turn waits no more; `marks` are those that others now need first. What it left to be fetched is theirs."""
        was_parked = self._unpark(order)
        if self.unready.discard(order) or was_parked:
            for heir in {self._board.queue.next_use(mark): None for mark in marks}:
                if heir is not None:
                    self._unpark(heir)
                    self.unready.add(heir)
        self._is_due = True

    def note_freed(self, node_id: NodeId) -> None:
        """Bytes or slots may be had there: the first that are parked there are looked at again."""
        for order in self.parked[node_id].first(WOKEN_PER_NODE) if node_id in self.parked else ():
            self._unpark(order)
            self.unready.add(order)
        self._is_due = True

    def note_time(self) -> None:
        """Time has passed: whatever was overlooked is found in the end."""
        for node_id in list(islice(self.parked, NODES_PER_TICK)):
            self.note_freed(node_id)
            if node_id in self.parked:
                self.parked[node_id] = self.parked.pop(node_id)  # the others come first next time
        self._is_due = True

    def _park(self, order: Order, node_id: NodeId) -> None:
        self.unready.discard(order)
        self.parked.setdefault(node_id, SortedKeys()).add(order)
        self._parked_at[order] = node_id

    def _unpark(self, order: Order) -> bool:
        """Whether it was parked."""
        node_id = self._parked_at.pop(order, None)
        if node_id is None:
            return False
        orders = self.parked[node_id]
        orders.discard(order)
        if not orders:
            del self.parked[node_id]
        return True

    def note_fleet(self) -> None:
        """Nodes or replicas came or went: turns may run elsewhere now, and need their chunks there."""
        queue = self._board.queue
        for turn_id in queue.first(self._ask_window()):
            if queue.turn(turn_id).reuse:
                self._unpark(queue.order_of(turn_id))
                self.unready.add(queue.order_of(turn_id))
        self._is_due = True

    def prefetch(self) -> None:
        """One pass over the first unready turns inside the policy's window, if anything changed since the last one."""
        if not self._is_due or not self.unready:
            return
        self._is_due = False
        window = self._ask_window()
        if window <= 0:
            return
        limit = self._board.queue.nth(window)
        needs: list[FetchNeed] = []
        for order in self.unready.first(TURNS_PER_PASS):
            if limit is not None and order >= limit:
                break
            turn_id = self._board.queue.turn_at(order)
            assert turn_id is not None, "only waiting turns are unready"
            found = self._find_needs(self._board.queue.turn(turn_id))
            needs.extend(found)
            if not found:
                self.unready.discard(order)
                self._is_due = True
        if needs:
            self._fetch_ahead(needs, self._ask_choice(needs))

    def _fetch_ahead(self, needs: Iterable[FetchNeed], chosen: Iterable[FetchNeed]) -> None:
        """Issue what can be issued now; who finds a node without slots or bytes waits until there may be some.

        DRAM is filled no further than to the low watermark: the rest is for new chunks, whose coming would otherwise
        push out again what was just raised.
        """
        full: set[NodeId] = set()
        left = Counter(need.turn_id for need in needs)
        for need in chosen:
            chunk = self._catalog.chunks.get(need.chunk)
            if chunk is None:
                continue
            order = self._board.queue.order_of(need.turn_id)
            if need.node_id not in full:
                node = self._board.fleet.nodes[need.node_id]
                outcome = self.fetch(chunk, node, order, self._board.config.low_watermark)
                if outcome is FetchOutcome.ON_ITS_WAY:
                    left[need.turn_id] -= 1
                    if not left[need.turn_id]:
                        self.unready.discard(order)
                    continue
                full.add(need.node_id)
            self._park(order, need.node_id)
        self._is_due = self._is_due or bool(full) or not all(left.values())

    def _find_needs(self, turn: Turn) -> list[FetchNeed]:
        """What the turn would read and is neither in DRAM where it will probably run nor on its way there."""
        links = find_links(turn.prompt, self._catalog, live)
        node = self.likely_node([link.chunk for link in links])
        if node is None:
            return []
        place = Place(node.node_id, Tier.DRAM)
        needs = []
        for chunk in (link.chunk for link in links):
            copy = chunk.copies.get(place)
            if copy is not None and copy.state is CopyState.RESIDENT:
                continue
            source = self.best_source(chunk, node)
            if (copy is not None and copy.is_live) or source is None or self._board.has_failed(chunk.key, place):
                continue
            needs.append(
                FetchNeed(
                    turn_id=turn.turn_id,
                    chunk=chunk.key,
                    start=chunk.start,
                    num_bytes=chunk.num_bytes,
                    node_id=node.node_id,
                    source=source.place.tier,
                    source_node=source.place.node_id,
                )
            )
        return needs

    def likely_node(self, chunks: Sequence[Chunk]) -> Node | None:
        """The node with a replica and DRAM that holds most tokens of these chunks; with none, the emptiest one."""
        hosts = self._board.fleet.hosts
        held: dict[NodeId, int] = {}
        for chunk in chunks:
            for node_id in {place.node_id for place, copy in chunk.copies.items() if copy.is_live}:
                if node_id in hosts:
                    held[node_id] = held.get(node_id, 0) + chunk.end - chunk.start
        return self._best_node(held) or (self._best_node(dict.fromkeys(hosts, 0)) if chunks else None)

    def _best_node(self, held: Mapping[NodeId, int]) -> Node | None:
        """Of these nodes, as far as they have DRAM, the one that holds most tokens, the emptiest among equals."""
        best: tuple[tuple[int, int, NodeId], Node] | None = None
        for node_id, num_tokens in held.items():
            node = self._board.fleet.nodes.get(node_id)
            account = self._catalog.accounts.get(node.dram) if node is not None else None
            if node is None or account is None:
                continue
            rank = (-num_tokens, account.filled_bytes - account.budget_bytes, node_id)
            if best is None or rank < best[0]:
                best = (rank, node)
        return best[1] if best else None

    def _ask_window(self) -> int:
        return self._board.guard.consult(
            self._policy,
            "window",
            ask=lambda: self._policy.window(self._board.outlook()),
            problem=lambda answer: None if isinstance(answer, int) else f"answered {answer!r}, not a number of turns",
            default=lambda: 0,
        )

    def _ask_choice(self, needs: Sequence[FetchNeed]) -> Sequence[FetchNeed]:
        known = set(needs)
        return self._board.guard.consult(
            self._policy,
            "choose",
            ask=lambda: tuple(self._policy.choose(needs)),
            problem=lambda chosen: None if known.issuperset(chosen) else "chose something that was not offered",
            default=lambda: tuple(needs),
        )
