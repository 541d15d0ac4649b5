"""The way up: Fetch on behalf of a turn at the head of the queue, and ahead of need."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from enum import Enum, auto

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


class FetchOutcome(Enum):
    """What came of asking for a chunk in a node's DRAM."""

    ON_ITS_WAY = auto()
    NO_SLOT = auto()  # too many fetches in flight there
    NO_BYTES = auto()  # bytes are being freed
    IMPOSSIBLE = auto()  # no source, no tier, no bytes to be had, or it failed a moment ago


class Fetcher:
    """Raises chunks into DRAM.

    `unready` are the waiting turns that may have chunks to be fetched. A turn leaves it when all its chunks are in DRAM
    or under way, and comes back when one of them arrives, fails or goes.
    """

    def __init__(self, board: Board, evictor: Evictor, policy: PrefetchPolicy) -> None:
        self.unready: SortedKeys[Order] = SortedKeys()
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
        self.unready.add(order)
        self._is_due = self._is_due or self.unready.position(order) < TURNS_PER_PASS

    def note_gone(self, order: Order, marks: Sequence[ChunkKey]) -> None:
        """A turn waits no more; `marks` are those that others now need first. What it left to be fetched is theirs."""
        if self.unready.discard(order):
            heirs = [self._board.queue.next_use(mark) for mark in marks]
            for heir in heirs:
                if heir is not None:
                    self.unready.add(heir)
        self._is_due = True

    def note_change(self) -> None:
        """Bytes, slots or time: another look may find more to do."""
        self._is_due = True

    def note_fleet(self) -> None:
        """Nodes or replicas came or went: turns may run elsewhere now, and need their chunks there."""
        queue = self._board.queue
        for turn_id in queue.first(self._ask_window()):
            if queue.turn(turn_id).reuse:
                self.unready.add(queue.order_of(turn_id))
        self._is_due = True

    def prefetch(self) -> None:
        """One pass over the first unready turns inside the policy's window, if anything changed since the last one."""
        if not self._is_due or not self.unready or not self._has_slot():
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
            self._fetch_ahead(self._ask_choice(needs))

    def _has_slot(self) -> bool:
        """Whether any node with a replica can start another fetch."""
        accounts = (self._catalog.accounts.get(Place(node_id, Tier.DRAM)) for node_id in self._board.fleet.hosts)
        limit = self._board.config.max_fetches_in_flight
        return any(account is not None and account.num_fetching < limit for account in accounts)

    def _fetch_ahead(self, needs: Iterable[FetchNeed]) -> None:
        """Issue what can be issued now; a node without slots or bytes waits until something changes there.

        DRAM is filled no further than to the low watermark: the rest is for new chunks, whose coming would otherwise
        push out again what was just raised.
        """
        full: set[NodeId] = set()
        for need in needs:
            chunk = self._catalog.chunks.get(need.chunk)
            node = self._board.fleet.nodes[need.node_id]
            if chunk is None or need.node_id in full:
                continue
            order = self._board.queue.order_of(need.turn_id)
            outcome = self.fetch(chunk, node, order, self._board.config.low_watermark)
            if outcome is not FetchOutcome.ON_ITS_WAY:
                full.add(need.node_id)

    def _find_needs(self, turn: Turn) -> list[FetchNeed]:
        """What the turn would read and is neither in DRAM where it will probably run nor on its way there."""
        links = find_links(turn.prompt, self._catalog, live)
        node = self._likely_node([link.chunk for link in links])
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

    def _likely_node(self, chunks: Sequence[Chunk]) -> Node | None:
        """The node with a replica and DRAM that holds most tokens of these chunks; with none, the emptiest one."""
        fleet = self._board.fleet
        held: Counter[NodeId] = Counter()
        for chunk in chunks:
            for node_id in {place.node_id for place, copy in chunk.copies.items() if copy.is_live}:
                held[node_id] += chunk.end - chunk.start
        best: tuple[tuple[int, int, NodeId], Node] | None = None
        for node_id in fleet.hosts:
            node = fleet.nodes.get(node_id)
            account = self._catalog.accounts.get(Place(node_id, Tier.DRAM))
            if node is None or account is None:
                continue
            rank = (-held[node_id], account.filled_bytes - account.budget_bytes, node_id)
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
