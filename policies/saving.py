"""The way in: offers of new chunks, Save, Decline, write-through, and chunks that replace shorter ones."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto

from policies.admission import AdmissionPolicy, Offer
from policies.board import Board
from policies.catalog import INCOMING, Chunk, Copy, CopyState
from policies.evicting import Evictor
from policies.messages import (
    Cause,
    ChunkInfo,
    ChunkKey,
    ChunksReady,
    ChunksSaved,
    Decline,
    NodeId,
    NodeJoined,
    ReplicaId,
    Save,
    Tier,
)
from policies.places import Place, place_of
from policies.queue import FIRST
from policies.restore import find_copy
from policies.sessions import SessionRecord


class Verdict(Enum):
    """What becomes of an offered chunk."""

    SAVE = auto()  # bytes are reserved
    WAIT = auto()  # bytes are not free yet
    DECLINE = auto()
    REPEATED = auto()  # the same offer is being dealt with already


@dataclass(frozen=True, slots=True)
class PendingOffer:
    info: ChunkInfo
    replica_id: ReplicaId
    session: SessionRecord | None


class Saver:
    """Every offered chunk is answered once: with a Save, or with a Decline at once, after a deadline, or on failure."""

    def __init__(self, board: Board, evictor: Evictor, policy: AdmissionPolicy) -> None:
        # By age: parents stand before their children.
        self.pending: defaultdict[NodeId, OrderedDict[ChunkKey, PendingOffer]] = defaultdict(OrderedDict)
        self._board, self._evictor, self._policy = board, evictor, policy
        self._catalog = board.catalog
        board.when_overdue[CopyState.SAVING] = self._fail

    # --- offers -------------------------------------------------------------------------------------------------------

    def on_ready(self, event: ChunksReady) -> None:
        saves, declines = [], []
        for info in event.chunks:
            self._board.sessions.note_offer(event.session_id, info.end)
            verdict = self._judge(event, info)
            if verdict is Verdict.SAVE:
                saves.append(info)
            elif verdict is Verdict.DECLINE:
                declines.append(info.key)
            elif verdict is Verdict.REPEATED:
                self._board.note_stale("ChunksReady")
        self._send_save(event.node_id, event.replica_id, saves)
        self._decline(event.replica_id, declines)

    def _judge(self, event: ChunksReady, info: ChunkInfo) -> Verdict:
        place = Place(event.node_id, Tier.DRAM)
        account = self._catalog.accounts.get(place)
        if account is None or event.replica_id not in self._board.fleet.replicas:
            self._catalog.remember(info.key, Cause.DECLINED)
            return Verdict.DECLINE
        if self._is_repeated(event, info):
            return Verdict.REPEATED
        if self._is_stored(info, place):
            return Verdict.DECLINE
        if self._is_deleted(event, info):
            self._catalog.remember(info.key, Cause.DECLINED)
            return Verdict.DECLINE
        session = self._board.sessions.get(event.session_id)
        has_parent = info.start == 0 or self._has_parent(info, event.node_id)
        if not has_parent or info.num_bytes > account.budget_bytes or not self._is_admitted(event, info):
            self._catalog.remember(info.key, Cause.DECLINED)
            return Verdict.DECLINE
        if not self.pending[event.node_id] and self._begin(PendingOffer(info, event.replica_id, session), place):
            return Verdict.SAVE
        return self._let_wait(PendingOffer(info, event.replica_id, session), event.node_id)

    def _is_repeated(self, event: ChunksReady, info: ChunkInfo) -> bool:
        offer = self.pending[event.node_id].get(info.key)
        if offer is not None:
            return offer.replica_id == event.replica_id
        chunk = self._catalog.chunks.get(info.key)
        copy = chunk.copies.get(Place(event.node_id, Tier.DRAM)) if chunk is not None else None
        return copy is not None and copy.state is CopyState.SAVING and copy.replica_id == event.replica_id

    def _is_stored(self, info: ChunkInfo, place: Place) -> bool:
        """Whether the chunk, or a longer one, is or will be readable somewhere: shared prefixes are stored once.

        A chunk that lies elsewhere and could not be fetched to this node a moment ago is worth a copy here.
        """
        if info.key in self.pending[place.node_id]:
            return True
        chunk = self._catalog.covering(info.key)
        if chunk is None:
            return False
        self._catalog.add_marks(chunk, info.marks)
        if chunk.key != info.key or not self._board.has_failed(info.key, place):
            return True
        return place in chunk.copies or find_copy(chunk, self._board.fleet.places_of(place.node_id)) is not None

    def _is_deleted(self, event: ChunksReady, info: ChunkInfo) -> bool:
        """Whether its session or what it begins with was deleted a moment ago, or what is stored of it is going."""
        sessions, chunk = self._board.sessions, self._catalog.chunks.get(info.key)
        if event.session_id in sessions.deleted or (chunk is not None and chunk.is_doomed):
            return True
        prefixes = sessions.deleted_prefixes
        return bool(prefixes) and (info.parent in prefixes or any(mark.key in prefixes for mark in info.marks))

    def _has_parent(self, info: ChunkInfo, node_id: NodeId) -> bool:
        if info.parent is None or info.parent in self.pending[node_id]:
            return info.parent is not None
        parent = self._catalog.chunks.get(info.parent)
        return parent is not None and parent.is_live and not parent.is_doomed

    def _is_admitted(self, event: ChunksReady, info: ChunkInfo) -> bool:
        account = self._catalog.accounts[Place(event.node_id, Tier.DRAM)]
        offer = Offer(
            session_id=event.session_id,
            chunk=info,
            is_awaited=self._board.queue.next_use(info.key) is not None,
            dram_fill=account.filled_bytes / max(1, account.budget_bytes),
        )
        return self._board.guard.consult(
            self._policy,
            "admit",
            ask=lambda: self._policy.admit(offer, self._board.outlook()),
            problem=lambda answer: None if isinstance(answer, bool) else f"answered {answer!r}, not True or False",
            default=lambda: True,
        )

    def _begin(self, offer: PendingOffer, place: Place) -> bool:
        """Reserve the chunk's bytes in DRAM, if they are free and no older copy is on its way out there."""
        chunk = self._catalog.chunks.get(offer.info.key)
        if chunk is not None and place in chunk.copies:
            return False
        copy = self._catalog.begin_save(offer.info, offer.session, place, self._board.now)
        if copy is None:
            return False
        copy.replica_id = offer.replica_id
        self._board.expect(self._catalog.chunks[offer.info.key], copy, self._board.config.command_deadline_s)
        self._board.changed_places.add(place)
        return True

    # --- offers that wait for bytes -----------------------------------------------------------------------------------

    def _let_wait(self, offer: PendingOffer, node_id: NodeId) -> Verdict:
        pending = self.pending[node_id]
        if len(pending) >= self._board.config.max_pending_offers:
            self._catalog.remember(offer.info.key, Cause.DECLINED)
            return Verdict.DECLINE
        pending[offer.info.key] = offer
        self._board.claim(node_id, FIRST)
        self._board.timers.at(self._board.now + self._board.config.offer_deadline_s, self._give_up, node_id, offer)
        self._evictor.make_room(Place(node_id, Tier.DRAM), offer.info.num_bytes)
        return Verdict.WAIT

    def retry(self, node_id: NodeId) -> None:
        """Bytes may be free: save what waits for them, oldest first, until one does not fit."""
        place = Place(node_id, Tier.DRAM)
        pending = self.pending[node_id]
        saves: dict[ReplicaId, list[ChunkInfo]] = defaultdict(list)
        while pending:
            _, offer = pending.popitem(last=False)
            info = offer.info
            if self._is_stored(info, place) or not (info.start == 0 or self._has_parent(info, node_id)):
                self._catalog.remember(info.key, Cause.DECLINED)
                self._decline(offer.replica_id, [info.key])
            elif self._begin(offer, place):
                saves[offer.replica_id].append(info)
            else:
                pending[info.key] = offer
                pending.move_to_end(info.key, last=False)
                self._evictor.make_room(place, info.num_bytes)
                break
        self._settle_claim(node_id)
        for replica_id, infos in saves.items():
            self._send_save(node_id, replica_id, infos)

    def _give_up(self, node_id: NodeId, offer: PendingOffer) -> None:
        if self.pending[node_id].get(offer.info.key) is offer:
            self.withdraw(node_id, offer)

    def withdraw(self, node_id: NodeId, offer: PendingOffer) -> None:
        """An offer that waits there does so no longer: it is declined."""
        del self.pending[node_id][offer.info.key]
        self._settle_claim(node_id)
        self._board.freed_nodes.add(node_id)
        self._catalog.remember(offer.info.key, Cause.DECLINED)
        self._decline(offer.replica_id, [offer.info.key])

    def forget_replica(self, replica_id: ReplicaId) -> None:
        """Its write buffer is gone; Saves under way fail by themselves."""
        for node_id, pending in self.pending.items():
            for key in [key for key, offer in pending.items() if offer.replica_id == replica_id]:
                del pending[key]
            self._settle_claim(node_id)
            self._board.freed_nodes.add(node_id)

    def _settle_claim(self, node_id: NodeId) -> None:
        """Offers that wait there have a claim on bytes that become free, before every turn."""
        if not self.pending[node_id]:
            self._board.disclaim(node_id, FIRST)

    def forget_node(self, node_id: NodeId) -> None:
        for offer in self.pending.pop(node_id, OrderedDict()).values():
            self._decline(offer.replica_id, [offer.info.key])
        self._settle_claim(node_id)

    # --- answers ------------------------------------------------------------------------------------------------------

    def on_saved(self, event: ChunksSaved) -> None:
        place = Place(event.node_id, Tier.DRAM)
        for key in event.chunks:
            chunk = self._catalog.chunks.get(key)
            copy = chunk.copies.get(place) if chunk is not None else None
            if chunk is None or copy is None:
                self._evictor.settle_stray(key, place, None)
            elif copy.state not in INCOMING:
                self._board.note_stale("ChunksSaved")
            else:
                self._catalog.arrive(chunk, copy, self._board.now)
                self._board.changed_chunks.add(key)
                self._board.freed_nodes.add(event.node_id)
                if not chunk.is_doomed:
                    self._replace_shorter(chunk)
                    self._write_through(chunk, event.node_id)

    def on_save_failed(self, command: Save) -> None:
        place = Place(command.node_id, Tier.DRAM)
        for info in command.chunks:
            chunk = self._catalog.chunks.get(info.key)
            copy = chunk.copies.get(place) if chunk is not None else None
            if chunk is None or copy is None or copy.state is not CopyState.SAVING:
                self._board.note_stale("CommandFailed")
            else:
                self._fail(chunk, copy)

    def _fail(self, chunk: Chunk, copy: Copy) -> None:
        replica_id = copy.replica_id
        self._catalog.abandon(chunk, copy, Cause.LOST)
        self._board.changed_chunks.add(chunk.key)
        self._board.freed_nodes.add(copy.place.node_id)
        if replica_id is not None:
            self._decline(replica_id, [chunk.key])

    def adopt_inventory(self, event: NodeJoined) -> None:
        """Know what a joining node holds. More than its budget allows is evicted like anything else."""
        places = self._board.fleet.places_of(event.node_id)
        inventory = event.inventory
        if self._catalog.lifetimes.by_prefix:  # children live as their parents do
            inventory = tuple(sorted(inventory, key=lambda stored: stored.info.start))
        for stored in inventory:
            place = place_of(event.node_id, stored.tier)
            chunk = self._catalog.chunks.get(stored.info.key)
            if place not in places or (chunk is not None and place in chunk.copies):
                continue
            self._catalog.adopt(stored.info, place, self._board.now)
            self._board.changed_chunks.add(stored.info.key)
        for stored in event.inventory:
            chunk = self._catalog.chunks.get(stored.info.key)
            if chunk is not None:
                self._replace_shorter(chunk)

    # --- consequences -------------------------------------------------------------------------------------------------

    def _replace_shorter(self, chunk: Chunk) -> None:
        """Chunks that are the beginning of this one are redundant; and so is this one if a longer one is there."""
        longer = [other for other in self._catalog.carriers(chunk.key) if other is not chunk]
        by = next((other for other in longer if find_copy(other, list(other.copies)) is not None), None)
        if by is not None:
            self._supersede(chunk, by)
        for key in list(chunk.marks):
            shorter = self._catalog.chunks.get(key)
            if shorter is not None and shorter is not chunk:
                self._supersede(shorter, chunk)

    def _supersede(self, shorter: Chunk, by: Chunk) -> None:
        is_going = shorter.superseded or shorter.is_doomed
        if shorter.start == by.start and shorter.key not in self._catalog.families and not is_going:
            self._catalog.supersede(shorter, by)
            self._board.superseded[shorter.key] = None

    def _write_through(self, chunk: Chunk, node_id: NodeId) -> None:
        """Copy a new chunk down at once: a later eviction from DRAM is then free."""
        node = self._board.fleet.nodes[node_id]
        below = node.below(Tier.DRAM)
        if self._board.config.write_through and below is not None and not chunk.superseded:
            self._evictor.demote(chunk, node, below)

    def _send_save(self, node_id: NodeId, replica_id: ReplicaId, infos: Iterable[ChunkInfo]) -> None:
        chunks = tuple(infos)
        if chunks:
            self._board.send(Save(node_id=node_id, replica_id=replica_id, chunks=chunks))

    def _decline(self, replica_id: ReplicaId, keys: Iterable[ChunkKey]) -> None:
        chunks = tuple(keys)
        if chunks and replica_id in self._board.fleet.replicas:
            self._board.send(Decline(replica_id=replica_id, chunks=chunks))
