"""Sessions as their owners and administrators see and steer them: where the KV lies, advice, pins, deletion."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ray.exceptions import RayError

from cluster.prefixes import Prefixes
from cluster.serving.connection import Connection
from cluster.serving.errors import ApiError
from cluster.serving.recollection import Recollection
from cluster.serving.sessions import Session, SessionBook, scheduler_session
from policies import messages as m
from policies.inspection import ChunkView, WaitingView

ADVICE_S = 30.0
"""A session that was expected and does not speak for so long is expected no more."""

MAX_PIN_S = 24 * 3600.0
DELETE_LIMIT_S = 15.0
REFUSE_S = 60.0
"""For so long after a deletion, chunks that still come from the session are refused."""

RESIDENT = "resident"
POLL_S = 0.05
TIERS = ("hbm", "dram", "ssd", "object")


@dataclass
class Administration:
    """Works on one tenant's sessions at a time; `scope` is its root key."""

    connection: Connection
    book: SessionBook
    recollection: Recollection

    async def describe(self, scope: str, session_id: str) -> dict[str, Any]:
        """The session, its last turn, and its chunks with the tiers that have them, fastest first."""
        session = await self._get(scope, session_id)
        chunks = await self._chunks(session)
        return {
            "id": session.session_id,
            "turns": session.turns,
            "tokens": session.num_tokens,
            "updated_at": session.updated_at,
            "pinned_until": session.pinned_until,
            "last": asdict(session.last) if session.last is not None else None,
            "chunks": chunks,
        }

    async def _chunks(self, session: Session) -> list[dict[str, Any]]:
        """Runs of tokens up to each chunk boundary, and the history's end; `tiers` is empty where nothing is kept."""
        size = self.connection.model.chunk_tokens
        found = await self._where([mark.key for mark in session.marks])
        num_computed = session.num_tokens - 1  # the KV of the last token comes with the next turn
        ends = [mark for mark in session.marks if mark.end % size == 0 or mark.end == num_computed]
        in_hbm = await self.connection.kept([mark.key for mark in session.marks])
        kept_ends = {mark.end for mark in session.marks if mark.key in in_hbm}
        rows: list[dict[str, Any]] = []
        for start in range(0, num_computed, size):
            inside = [mark.end for mark in ends if start < mark.end <= start + size]
            if not inside:
                continue
            stored = [chunk for chunk in found if chunk.start == start]
            tiers = {str(copy.tier) for chunk in stored for copy in chunk.copies if copy.state == RESIDENT}
            if any(start < end <= start + size for end in kept_ends):
                tiers.add("hbm")
            num_bytes = max((chunk.num_bytes for chunk in stored), default=0)
            end = max(inside)
            rows.append(
                {
                    "start": start,
                    "end": end,
                    "bytes": num_bytes or (end - start) * self.connection.model.kv_bytes_per_token,
                    "tiers": [tier for tier in TIERS if tier in tiers],
                }
            )
        return rows

    async def advise(self, scope: str, session_id: str) -> None:
        """It is about to speak: its KV is brought near."""
        session = await self._get(scope, session_id)
        turn = m.Turn(
            turn_id=f"expected/{scheduler_session(scope, session_id)}",
            session_id=scheduler_session(scope, session_id),
            prompt=session.marks,
            num_prompt_tokens=session.num_tokens,
            max_new_tokens=1,
        )
        await self._tell(self.connection.state.scheduler.expect.remote(turn, ADVICE_S))

    async def pin(self, scope: str, session_id: str, seconds: float) -> Session:
        """Keeps its chunks for so long; 0 ends an earlier pin."""
        now = time.time()
        session = await self._get(scope, session_id)
        seconds = min(seconds, MAX_PIN_S)
        await self._pin(scope, session, seconds)
        session = replace(session, pinned_until=now + seconds if seconds > 0 else None)
        await self.book.put(scope, session, since=now)
        return session

    async def _pin(self, scope: str, session: Session, seconds: float) -> None:
        name = scheduler_session(scope, session.session_id)
        await self._tell(self.connection.state.scheduler.pin.remote(name, session.marks, seconds))

    async def renew_pin(self, scope: str, session: Session) -> None:
        """After a turn: what it added is pinned as well."""
        if session.pinned_until is not None and session.pinned_until > time.time():
            await self._pin(scope, session, session.pinned_until - time.time())

    async def expire(self, scope: str, session_id: str) -> None:
        """Its chunks are the first to go from now on."""
        session = await self._get(scope, session_id)
        name = scheduler_session(scope, session_id)
        await self._tell(self.connection.state.scheduler.expire.remote(name, session.own_marks))

    async def delete(self, scope: str, session_id: str) -> dict[str, Any]:
        """Cancels what it runs, and removes its KV from every tier and its history from memory and disk.

        Returns when it is gone, or after a while with how many chunks are still being removed.
        """
        session = await self._get(scope, session_id)
        name = scheduler_session(scope, session_id)
        keys = [mark.key for mark in session.own_marks]
        before = await self._where(keys)
        await self._tell(self.connection.state.scheduler.delete.remote(name, session.own_marks, REFUSE_S))
        self.recollection.forget(scope, session_id)
        await self.connection.shelf.delete(f"{scope}/{session_id}")
        left = await self._until_gone(keys)
        return {"deleted": True, "chunks": len(before), "chunks_left": left}

    # --- prefixes and tenants -----------------------------------------------------------------------------------------

    async def own_prefix(self, scope: str, session_id: str) -> m.Mark:
        """What is the session's alone."""
        session = await self._get(scope, session_id)
        return self._require(session.first_own_mark, f"the session {session_id!r} has nothing of its own yet")

    async def shared_prefix(self, scope: str, session_id: str) -> m.Mark:
        """What every conversation with this one's system prompt begins with."""
        session = await self._get(scope, session_id)
        words = f"nothing that the session {session_id!r} begins with is shared: its system prompt is too short"
        return self._require(session.shared_mark, words)

    @staticmethod
    def _require(mark: m.Mark | None, words: str) -> m.Mark:
        if mark is None:
            raise ApiError(404, words, code="prefix_not_found")
        return mark

    async def set_lifetime(self, prefix: m.Mark, seconds: float | None) -> None:
        await self._tell(self._prefixes.live(prefix, seconds))

    async def pin_prefix(self, prefix: m.Mark, seconds: float) -> None:
        await self._tell(self._prefixes.pin(prefix, min(seconds, MAX_PIN_S)))

    async def expire_prefix(self, prefix: m.Mark) -> None:
        await self._tell(self._prefixes.expire(prefix))

    async def delete_prefix(self, prefix: m.Mark) -> None:
        """Its KV; conversations that began with it are known as before, and computed anew."""
        await self._tell(self._prefixes.delete(prefix, REFUSE_S))

    @property
    def _prefixes(self) -> Prefixes:
        return Prefixes(self.connection.state.scheduler, self.connection.model)

    async def _until_gone(self, keys: list[str]) -> int:
        deadline = time.monotonic() + DELETE_LIMIT_S
        while True:
            left = len(await self._where(keys)) + len(await self.connection.kept(keys))
            if not left or time.monotonic() > deadline:
                return left
            await asyncio.sleep(POLL_S)

    async def cluster(self) -> dict[str, Any]:
        """The tiers' fill, the replicas, the queue."""
        scheduler, replicas, waiting = await asyncio.gather(
            self.connection.scheduler_stats(), self.connection.replica_stats(), self.connection.queue_view(20)
        )
        hbm_bytes = self.connection.model.kv_tokens * self.connection.model.kv_bytes_per_token
        return cluster_view(scheduler, replicas, waiting, hbm_bytes)

    async def _get(self, scope: str, session_id: str) -> Session:
        session = await self.book.get(scope, session_id)
        if session is None:
            raise ApiError(404, f"the session {session_id!r} is not known", code="session_not_found")
        return session

    async def _where(self, keys: list[str]) -> list[ChunkView]:
        rows: list[ChunkView] = await self._tell(self.connection.state.scheduler.where.remote(keys))
        return rows

    @staticmethod
    async def _tell(ref: Any) -> Any:
        try:
            return await ref
        except RayError as error:
            raise ApiError(503, f"the scheduler does not answer: {error}", retry_after_s=2.0) from error


def cluster_view(
    scheduler: dict[str, Any], replicas: list[dict[str, Any]], waiting: Sequence[WaitingView], hbm_bytes: int
) -> dict[str, Any]:
    """Plain figures for the page, from what the actors say of themselves. `hbm_bytes`: of one replica's pool."""
    tiers = [
        {
            "tier": "hbm",
            "node_id": stats["replica_id"],
            "used_bytes": round(hbm_bytes * (1 - stats["blocks_free"] / stats["blocks"])),
            "budget_bytes": hbm_bytes,
        }
        for stats in replicas
    ]
    for place, figures in scheduler.get("tiers", {}).items():
        node_id, _, tier = place.rpartition("/")
        tiers.append(
            {
                "tier": tier,
                "node_id": node_id,
                "used_bytes": figures["used_bytes"],
                "budget_bytes": figures["budget_bytes"],
            }
        )
    return {
        "tiers": tiers,
        "replicas": scheduler.get("fleet", []),
        "waiting": [
            {
                "turn_id": turn.turn_id,
                "session_id": turn.session_id.partition("/")[2],
                "waiting_s": round(turn.waiting_s, 3),
                "prompt_tokens": turn.num_prompt_tokens,
                "fetching": turn.num_fetches,
            }
            for turn in waiting
        ],
        "num_waiting": scheduler.get("turns_waiting", 0),
        "num_running": scheduler.get("turns_running", 0),
        "sessions_expected": scheduler.get("sessions_expected", 0),
        "fetches_in_flight": sum(states.get("fetching", 0) for states in scheduler.get("incoming", {}).values()),
    }
