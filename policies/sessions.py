"""What is remembered of conversations: how far they went, which turn they are at. Knows no chunks."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from policies.messages import ChunkKey, ReplicaId, SessionId, Turn, TurnId


@dataclass(slots=True, eq=False)
class SessionRecord:
    """One conversation. `turn` counts the turns it submitted (attempts at one turn count once)."""

    turn: int = 0
    last_turn_id: TurnId | None = None
    prompt_tokens: int = 0  # of its last turn
    answer_tokens: int = 0  # of the last turn that ended
    offered_end: int | None = None  # tokens offered for saving so far; None: nothing yet
    replica_id: ReplicaId | None = None  # where its last turn went; None: none has gone yet


class Sessions:
    """The conversations that spoke last; beyond `max_sessions` the longest silent one is forgotten."""

    def __init__(self, max_sessions: int) -> None:
        self.records: OrderedDict[SessionId, SessionRecord] = OrderedDict()
        self.deleted: dict[SessionId, float] = {}  # until when their offers are declined
        self.deleted_prefixes: dict[ChunkKey, float] = {}  # likewise: of what begins with these
        self._affinities: OrderedDict[str, ReplicaId] = OrderedDict()  # where the last turn of each went
        self._max_sessions = max_sessions

    def __len__(self) -> int:
        return len(self.records)

    def note_turn(self, session_id: SessionId, turn_id: TurnId, prompt_tokens: int) -> bool:
        """A turn of it was submitted; whether it is another turn than the last, not a new attempt at that one."""
        record = self._record(session_id)
        record.prompt_tokens = prompt_tokens
        if record.last_turn_id == turn_id:
            return False
        record.turn += 1
        record.last_turn_id = turn_id
        return True

    def note_offer(self, session_id: SessionId, end: int) -> None:
        """Its tokens up to `end` were offered for saving."""
        record = self._record(session_id)
        record.offered_end = max(end, record.offered_end or 0)
        record.answer_tokens = max(0, end - record.prompt_tokens)

    def note_dispatch(self, turn: Turn, replica_id: ReplicaId) -> None:
        """A turn of it goes to this replica."""
        record = self.records.get(turn.session_id)
        if record is not None:
            record.replica_id = replica_id
        if turn.affinity is not None:
            self._affinities[turn.affinity] = replica_id
            self._affinities.move_to_end(turn.affinity)
            if len(self._affinities) > self._max_sessions:
                self._affinities.popitem(last=False)

    def last_replicas(self, turn: Turn) -> tuple[ReplicaId | None, ReplicaId | None]:
        """(where its session's last turn went, where the last one with its affinity went), as far as is known."""
        record = self.records.get(turn.session_id)
        affinity = self._affinities.get(turn.affinity) if turn.affinity is not None else None
        return record.replica_id if record is not None else None, affinity

    def get(self, session_id: SessionId) -> SessionRecord | None:
        return self.records.get(session_id)

    def offered_end(self, session_id: SessionId) -> int | None:
        record = self.records.get(session_id)
        return record.offered_end if record is not None else None

    def _record(self, session_id: SessionId) -> SessionRecord:
        record = self.records.get(session_id)
        if record is None:
            record = self.records[session_id] = SessionRecord()
            if len(self.records) > self._max_sessions:
                self.records.popitem(last=False)
        else:
            self.records.move_to_end(session_id)
        return record
