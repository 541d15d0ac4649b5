"""A scheduler that knows very many sessions, and actors that do at once as they are told: only the deciding takes time.

Every session is a conversation of chunks; sessions speak at random. A turn reads its session's chunks, adds one, and
when it ends another turn is submitted, so the queue keeps its length. After MAX_CHUNKS turns a session begins anew. The
clock goes as it would if a turn took TURN_S on its replica.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterator
from random import Random

from policies import messages as m
from policies.messages import Tier
from policies.scheduler import Scheduler

CHUNK_TOKENS, BYTES_PER_TOKEN = 256, 131_072  # Llama-3-8B in bf16
CHUNK_BYTES = CHUNK_TOKENS * BYTES_PER_TOKEN
MAX_CHUNKS = 12  # of a session
ROOT = "f" * 64  # of everybody's texts
NUM_SLOTS = 8  # of a replica; a node has one
TURN_S, EVENTS_PER_TURN = 10.0, 12
DRAM_SHARE, SSD_SHARE = 0.2, 1.5  # of what is stored at the beginning

Handle = Callable[[m.Event, float], list[m.Command]]


class Crowd:
    """`fill` makes it known, `events` are then to be handled one after the other by `hear`."""

    def __init__(self, num_sessions: int, num_nodes: int, num_waiting: int, seed: int = 0) -> None:
        self.scheduler = Scheduler(m.SchedulerConfig(ghosts=num_sessions))
        self.num_sessions, self.num_nodes, self.num_waiting = num_sessions, num_nodes, num_waiting
        self._random = Random(seed)
        self._num_chunks = bytearray([1]) * num_sessions
        self._generation = array("H", bytes(2 * num_sessions))
        self._heard: deque[m.Event] = deque()
        self._running: deque[tuple[m.Dispatch, int]] = deque()
        self._speaker: dict[m.TurnId, int] = {}
        self._num_turns = 0
        self._now = 0.0
        self._event_s = TURN_S / (NUM_SLOTS * num_nodes * EVENTS_PER_TURN)

    # --- what is there at the beginning -------------------------------------------------------------------------------

    def fill(self) -> Iterator[None]:
        """Nodes join with one chunk of each session on their SSDs, every session is heard of; then the queue fills."""
        share = CHUNK_BYTES * self.num_sessions // self.num_nodes
        tiers = (
            m.TierSpec(tier=Tier.DRAM, budget_bytes=max(40 * CHUNK_BYTES, int(DRAM_SHARE * share))),
            m.TierSpec(tier=Tier.SSD, budget_bytes=max(40 * CHUNK_BYTES, int(SSD_SHARE * share))),
        )
        for number in range(self.num_nodes):
            sessions = range(number, self.num_sessions, self.num_nodes)
            inventory = tuple(m.StoredChunk(info=self._chunk(session, 0), tier=Tier.SSD) for session in sessions)
            self.scheduler.handle(m.NodeJoined(node_id=f"n{number}", tiers=tiers, inventory=inventory), 0.0)
            yield
        for session in range(self.num_sessions):
            turn = self._turn(session)
            self.scheduler.handle(m.TurnSubmitted(turn), 0.0)
            self.scheduler.handle(m.TurnCancelled(turn.turn_id), 0.0)
            if session % 1000 == 0:
                yield
        for number in range(self.num_nodes):
            replica = m.ReplicaReady(
                replica_id=f"r{number}", node_id=f"n{number}", max_running_turns=NUM_SLOTS, max_running_tokens=10**6
            )
            self.hear(replica)
        while len(self._speaker) < self.num_waiting:
            self.hear(self._submission())
            if self._heard:
                self.hear(self._heard.popleft())
            yield

    # --- events, for ever ---------------------------------------------------------------------------------------------

    def events(self) -> Iterator[m.Event]:
        """The next events; each must be heard before the next is asked for."""
        while True:
            while self._heard:
                yield self._heard.popleft()
            dispatch, session = self._running.popleft()
            node_id = "n" + dispatch.replica_id[1:]
            chunk = self._chunk(session, self._num_chunks[session])
            self._num_chunks[session] += 1
            yield m.ChunksReady(
                replica_id=dispatch.replica_id, node_id=node_id, session_id=f"s{session}", chunks=(chunk,)
            )
            yield m.TurnFinished(turn_id=dispatch.turn_id, replica_id=dispatch.replica_id, attempt=dispatch.attempt)
            while len(self._speaker) < self.num_waiting:
                yield self._submission()

    def hear(self, event: m.Event, handle: Handle | None = None) -> None:
        """Let the scheduler handle it, and do at once as it says."""
        self._now += self._event_s
        for command in (handle or self.scheduler.handle)(event, self._now):
            self._obey(command)

    def _obey(self, command: m.Command) -> None:
        match command:
            case m.Dispatch():
                self._running.append((command, self._speaker.pop(command.turn_id)))
                self._heard.append(
                    m.TurnStarted(turn_id=command.turn_id, replica_id=command.replica_id, attempt=command.attempt)
                )
            case m.Save():
                keys = tuple(info.key for info in command.chunks)
                self._heard.append(m.ChunksSaved(node_id=command.node_id, chunks=keys))
            case m.Demote():
                self._heard.append(
                    m.ChunkDemoted(
                        node_id=command.node_id, chunk=command.chunk, tier=command.tier, num_bytes=CHUNK_BYTES
                    )
                )
            case m.Drop():
                self._heard.append(m.ChunkDropped(node_id=command.node_id, chunk=command.chunk, tier=command.tier))
            case m.Fetch():
                self._heard.append(m.ChunkFetched(node_id=command.node_id, chunk=command.chunk))
            case m.Decline():
                pass  # the session goes on without that chunk
            case _:
                raise AssertionError(f"nobody cancels or forgets here: {command}")

    # --- sessions -----------------------------------------------------------------------------------------------------

    def _submission(self) -> m.TurnSubmitted:
        session = self._random.randrange(self.num_sessions)
        if self._num_chunks[session] >= MAX_CHUNKS:
            self._num_chunks[session] = 0
            self._generation[session] = (self._generation[session] + 1) % 65_536
        turn = self._turn(session)
        self._speaker[turn.turn_id] = session
        return m.TurnSubmitted(turn)

    def _turn(self, session: int) -> m.Turn:
        self._num_turns += 1
        num_chunks = self._num_chunks[session]
        stored = [mark for number in range(num_chunks) for mark in self._chunk(session, number).marks]
        end = num_chunks * CHUNK_TOKENS + CHUNK_TOKENS // 2
        return m.Turn(
            turn_id=f"t{self._num_turns}",
            session_id=f"s{session}",
            prompt=(*stored, m.Mark(end, self._key(session, num_chunks, is_cut=True))),
            num_prompt_tokens=end,
            max_new_tokens=CHUNK_TOKENS // 2,
        )

    def _chunk(self, session: int, number: int) -> m.ChunkInfo:
        """With the mark where the prompt ended that brought it, and the one of its end."""
        start, key = number * CHUNK_TOKENS, self._key(session, number)
        cut = m.Mark(start + CHUNK_TOKENS // 2, self._key(session, number, is_cut=True))
        return m.ChunkInfo(
            key=key,
            parent=self._key(session, number - 1) if number else ROOT,
            start=start,
            end=start + CHUNK_TOKENS,
            num_bytes=CHUNK_BYTES,
            marks=(cut, m.Mark(start + CHUNK_TOKENS, key)),
        )

    def _key(self, session: int, number: int, is_cut: bool = False) -> m.ChunkKey:
        """As long as a real one (sha256 in hexadecimal)."""
        return f"{2 * number + is_cut:08x}{self._generation[session]:08x}{session:048x}"
