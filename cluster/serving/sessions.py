"""The book of sessions: how far each conversation went, and the marks under which its KV lies. Holds no words.

Several front processes share it through the shelf; what one writes the others read. The marks of all branches and
earlier ends stay with the session, so that deleting it reaches everything that was ever stored for it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cluster.client import Answer
from cluster.serving.recollection import Shelf
from policies.messages import Mark
from storage.histories import Record

MAX_EARLIER_MARKS = 20_000  # of branches and former ends; the longest known are forgotten beyond it


@dataclass(frozen=True, kw_only=True)
class LastTurn:
    """The figures of a session's last turn. Times in milliseconds."""

    prompt_tokens: int
    completion_tokens: int
    reused: dict[str, int]
    recomputed: dict[str, int]
    drift_at: int | None
    ttft_ms: float | None
    ttft_without_reuse_ms: float | None
    queue_ms: float
    restore_ms: float
    finish_reason: str


def last_turn(answer: Answer, drift_at: int | None, prefill_tokens_per_s: float) -> LastTurn:
    """The figures of an answer. Without reuse its first token would have come later by the time to compute what was
    reused, and sooner by that of restoring it; the former is an estimate."""
    account = answer.account
    ttft_without_s = None
    if answer.ttft_s is not None:
        computing_s = sum(account.reused.values()) / max(1e-9, prefill_tokens_per_s)
        ttft_without_s = max(0.0, answer.ttft_s - account.restore_s) + computing_s
    return LastTurn(
        prompt_tokens=account.num_prompt_tokens,
        completion_tokens=len(answer.tokens),
        reused={str(tier): count for tier, count in account.reused.items()},
        recomputed={str(cause): count for cause, count in account.recomputed.items()},
        drift_at=drift_at,
        ttft_ms=_ms(answer.ttft_s),
        ttft_without_reuse_ms=_ms(ttft_without_s),
        queue_ms=round(answer.queue_wait_s * 1e3, 3),
        restore_ms=round(account.restore_s * 1e3, 3),
        finish_reason=str(answer.finish_reason),
    )


def _ms(seconds: float | None) -> float | None:
    return round(seconds * 1e3, 3) if seconds is not None else None


@dataclass(frozen=True, kw_only=True)
class Session:
    """One conversation."""

    session_id: str
    turns: int = 0
    marks: tuple[Mark, ...] = ()
    """Of its history as the last turn left it, ascending."""
    earlier: tuple[Mark, ...] = ()
    """That the history had before, and has no more."""
    num_shared: int = 0
    """Tokens that every conversation with this system prompt begins with."""
    updated_at: float = 0.0
    """Unix seconds."""
    pinned_until: float | None = None
    """Unix seconds."""
    last: LastTurn | None = None

    @property
    def num_tokens(self) -> int:
        return self.marks[-1].end if self.marks else 0

    @property
    def own_marks(self) -> tuple[Mark, ...]:
        """All marks that are this conversation's alone, also former ones."""
        return tuple(mark for mark in (*self.marks, *self.earlier) if mark.end > self.num_shared)

    @property
    def shared_mark(self) -> Mark | None:
        """Of what every conversation with this system prompt begins with, if it was long enough for a mark."""
        return next((mark for mark in self.marks if mark.end == self.num_shared), None)

    @property
    def first_own_mark(self) -> Mark | None:
        """All that is this conversation's alone begins with it (branches may begin otherwise)."""
        return next((mark for mark in self.marks if mark.end > self.num_shared), None)

    def after(self, marks: Sequence[Mark], num_shared: int, last: LastTurn | None, now: float) -> Session:
        """One turn later. `last` of None: the turn has only begun, with this prompt."""
        present = {mark.key for mark in marks}
        gone = [mark for mark in (*self.earlier, *self.marks) if mark.key not in present]
        earlier = tuple({mark.key: mark for mark in gone}.values())[-MAX_EARLIER_MARKS:]
        return replace(
            self,
            turns=self.turns + (last is not None),
            marks=tuple(marks),
            earlier=earlier,
            num_shared=num_shared if not self.turns else min(num_shared, self.num_shared),
            updated_at=now,
            last=last or self.last,
        )


@dataclass
class SessionBook:
    """Reads and writes sessions; `scope` is a tenant's root key."""

    shelf: Shelf

    async def get(self, scope: str, session_id: str) -> Session | None:
        """None for one that is not known (any more)."""
        records = await self.shelf.get([_key(scope, session_id)])
        return _from_json(records[-1].value) if records else None

    async def put(self, scope: str, session: Session, since: float) -> None:
        """Keeps it, unless it was deleted after `since` (Unix seconds)."""
        owner = f"{scope}/{session.session_id}"
        await self.shelf.put([Record(_key(scope, session.session_id), owner, _to_json(session))], since)


def scheduler_session(scope: str, session_id: str) -> str:
    """A session's name in the scheduler: tenants may use the same ids."""
    return f"{scope[:16]}/{session_id}"


def _key(scope: str, session_id: str) -> str:
    return f"session/{scope}/{session_id}"


def _to_json(session: Session) -> bytes:
    fields = asdict(session)
    for name in ("marks", "earlier"):
        fields[name] = [[mark.end, mark.key] for mark in getattr(session, name)]
    return json.dumps(fields, separators=(",", ":")).encode()


def _from_json(value: bytes) -> Session:
    fields: dict[str, Any] = json.loads(value)
    for name in ("marks", "earlier"):
        fields[name] = tuple(Mark(end, key) for end, key in fields[name])
    fields["last"] = LastTurn(**fields["last"]) if fields["last"] is not None else None
    return Session(**fields)
