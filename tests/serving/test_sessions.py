"""The book of sessions keeps every mark a conversation ever had."""

from __future__ import annotations

import asyncio

from cluster.serving.sessions import LastTurn, Session, SessionBook
from policies.messages import Mark
from tests.serving.test_recollection import OTHER, SCOPE, LocalShelf

LAST = LastTurn(
    prompt_tokens=5,
    completion_tokens=2,
    reused={"dram": 3},
    recomputed={"never_stored": 2},
    drift_at=None,
    ttft_ms=1.5,
    ttft_without_reuse_ms=3.0,
    queue_ms=0.1,
    restore_ms=0.2,
    finish_reason="stop",
)


def marks(*ends: int, branch: str = "a") -> list[Mark]:
    return [Mark(end, f"{branch}{end}") for end in ends]


def test_a_session_survives_the_shelf():
    book = SessionBook(LocalShelf())
    session = Session(session_id="s").after(marks(4, 8, 9), 4, LAST, 12.5)
    asyncio.run(book.put(SCOPE, session, since=0.0))
    assert asyncio.run(book.get(SCOPE, "s")) == session
    assert asyncio.run(book.get(OTHER, "s")) is None
    assert asyncio.run(book.get(SCOPE, "t")) is None


def test_former_ends_and_branches_stay_with_it():
    session = Session(session_id="s").after(marks(4, 8, 9), 0, LAST, 0.0)
    session = session.after(marks(4, 8, 12), 0, LAST, 1.0)
    session = session.after([*marks(4), *marks(8, branch="b")], 0, LAST, 2.0)
    assert session.turns == 3
    assert session.num_tokens == 8
    assert {mark.key for mark in session.own_marks} == {"a4", "a8", "a9", "a12", "b8"}
    again = session.after(marks(4, 8), 0, LAST, 3.0)  # back on the first branch
    assert len(again.own_marks) == len({mark.key for mark in again.own_marks})


def test_what_everybody_shares_is_not_its_own():
    session = Session(session_id="s").after(marks(4, 8, 9), 4, LAST, 0.0)
    assert {mark.end for mark in session.own_marks} == {8, 9}
