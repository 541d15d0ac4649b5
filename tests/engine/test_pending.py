"""Work of helper threads is handed back once, and always."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from actors.engine.pending import Pending


class EndsWhenAskedTwice(Future[Any]):
    """Its thread ends it between two questions."""

    def done(self) -> bool:
        was_done = super().done()
        if not was_done:
            self.set_result(None)
        return was_done


def test_a_job_that_ends_while_it_is_looked_at_is_handed_out_by_the_next_call() -> None:
    pending = Pending[str]()
    pending.add("save", EndsWhenAskedTwice())
    assert pending.take_done() == []
    assert [job for job, _ in pending] == ["save"]
    assert [job for job, _ in pending.take_done()] == ["save"]
    assert len(pending) == 0
    assert pending.take_done() == []


def test_jobs_are_handed_out_in_order_and_the_others_stay() -> None:
    pending = Pending[int]()
    futures: list[Future[Any]] = [Future() for _ in range(4)]
    for i, future in enumerate(futures):
        pending.add(i, future)
    for i in (3, 1):
        futures[i].set_result(None)
    assert [job for job, _ in pending.take_done()] == [1, 3]
    assert [job for job, _ in pending] == [0, 2]
