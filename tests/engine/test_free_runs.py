"""Runs of free blocks against a set of them, and which blocks are taken."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from actors.engine.free_runs import FreeRuns, Run, runs_of

SIZE = 30


def _free(runs: list[Run]) -> FreeRuns:
    """Only these are free."""
    free = FreeRuns(SIZE)
    free.take(SIZE)
    for start, length in runs:
        free.add(start, length)
    return free


def _runs_of(blocks: set[int]) -> list[Run]:
    starts = sorted(block for block in blocks if block - 1 not in blocks)
    return [(start, next(n for n in range(1, SIZE + 2) if start + n not in blocks)) for start in starts]


@given(st.data())
def test_runs_are_those_of_the_free_blocks(data: st.DataObject) -> None:
    free, blocks = FreeRuns(SIZE), set(range(SIZE))
    for _ in range(data.draw(st.integers(1, 25))):
        used = sorted(set(range(SIZE)) - blocks)
        if used and data.draw(st.booleans()):
            freed = data.draw(st.lists(st.sampled_from(used), unique=True, max_size=8))
            for start, length in runs_of(freed) if data.draw(st.booleans()) else runs_of(sorted(freed)):
                free.add(start, length)
            blocks |= set(freed)
            continue
        count = data.draw(st.integers(0, len(blocks)))
        after = data.draw(st.none() | st.integers(0, SIZE - 1))
        spare = data.draw(st.integers(0, 10))
        behind = [] if after is None else list(range(after + 1, after + 1 + count))
        run_starts = {start for start, _ in _runs_of(blocks)}
        longest = max((length for _, length in _runs_of(blocks)), default=0)
        taken = free.take(count, after, spare)
        assert len(set(taken)) == len(taken) == count
        assert blocks >= set(taken)
        if count and behind[:1] and behind[0] in run_starts and blocks >= set(behind):
            assert taken == behind
        elif count and longest >= count:
            assert taken == list(range(taken[0], taken[0] + count)), "neighbours where there are some"
        blocks -= set(taken)
        assert free.runs() == _runs_of(blocks)


def test_room_is_left_behind_and_long_runs_are_left_whole() -> None:
    free = _free([(0, 9), (10, 6), (17, 13)])
    assert free.take(4, spare=2) == [10, 11, 12, 13]  # the shortest run with room for six
    assert free.take(4, spare=2) == [3, 4, 5, 6]  # at its end, so that what is in front of it has room too
    assert free.runs() == [(0, 3), (7, 2), (14, 2), (17, 13)]


def test_without_room_behind_neighbours_come_first() -> None:
    free = _free([(0, 5), (10, 7)])
    assert free.take(6, spare=20) == [10, 11, 12, 13, 14, 15]
    assert free.take(3, after=15) == [2, 3, 4]


def test_pieces_are_few() -> None:
    free = _free([(0, 2), (5, 6), (12, 3), (20, 9)])
    assert free.take(17) == [*range(20, 29), *range(5, 11), 0, 1]
