"""The replay against others: published figures, libCacheSim hit by hit, plain caches written here."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from policies.eviction import EvictionPolicy, Fifo, Lru, S3Fifo, Sieve
from policies.simulator.oracle import block_oracle, session_oracle
from policies.simulator.readers import read_trace
from policies.simulator.replay import BlockCache, Level, replay
from policies.simulator.trace import Request, Trace
from tests.policies.plain_caches import PlainS3Fifo, hits_under, zipf_with_scans
from tests.simulator.invariants import shared_data

CONVERSATION, SYNTHETIC = "mooncake_conversation_first_half", "mooncake_synthetic"
CAPACITIES = (20, 50)


@cache
def real_trace(name: str) -> Trace:
    return read_trace(shared_data("traces", f"{name}.parquet"))


# --- figures of an independent replay, in the data's README -----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "level", "share", "percent"),
    [
        *((CONVERSATION, Level.BLOCK, share, x) for share, x in ((0.05, 10.8), (0.1, 20.2), (0.25, 30.1))),
        *((CONVERSATION, Level.SESSION, share, x) for share, x in ((0.05, 6.6), (0.1, 16.3), (0.25, 26.1))),
        *((SYNTHETIC, Level.BLOCK, share, x) for share, x in ((0.01, 3.9), (0.05, 16.0), (0.1, 26.7))),
        *((SYNTHETIC, Level.BLOCK, share, x) for share, x in ((0.25, 45.2), (0.5, 60.0))),
        ("agent_sessions_even", Level.BLOCK, 0.01, 41.0),
    ],
)
def test_lru_agrees(name: str, level: Level, share: float, percent: float) -> None:
    rate = replay(real_trace(name), Lru(), share, level=level).hit_rate
    assert 100 * rate == pytest.approx(percent, abs=0.2)


@pytest.mark.parametrize(
    ("name", "share", "percent"),
    [
        *((CONVERSATION, share, x) for share, x in ((0.05, 32.9), (0.1, 34.7), (0.25, 34.8))),
        *((SYNTHETIC, share, x) for share, x in ((0.01, 18.9), (0.05, 40.3), (0.1, 51.6), (0.25, 63.7), (0.5, 65.1))),
    ],
)
def test_min_agrees_on_blocks(name: str, share: float, percent: float) -> None:
    trace = real_trace(name)
    assert 100 * replay(trace, block_oracle(trace), share, max_run=1).hit_rate == pytest.approx(percent, abs=0.2)


@pytest.mark.parametrize(("share", "percent"), [(0.05, 29.4), (0.1, 30.7), (0.25, 30.7)])
def test_min_agrees_on_sessions(share: float, percent: float) -> None:
    trace = real_trace(CONVERSATION)
    rate = replay(trace, session_oracle(trace), share, level=Level.SESSION).hit_rate
    assert 100 * rate == pytest.approx(percent, abs=0.2)


# --- libCacheSim ------------------------------------------------------------------------------------------------------


def libcachesim_hits(name: str, keys: list[int], capacity: int) -> list[bool]:
    library: Any = pytest.importorskip("libcachesim", reason="libcachesim is not installed: pip install '.[dev]'")
    reference = getattr(library, name)(capacity, hashpower=14)
    hits = []
    for key in keys:
        request = library.Request()
        request.obj_id, request.obj_size = key + 1, 1
        hits.append(bool(reference.get(request)))
    return hits


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize(("name", "make"), [("LRU", Lru), ("FIFO", Fifo)])
def test_one_block_prompts_hit_as_in_libcachesim(name: str, make: Callable[[], EvictionPolicy], capacity: int) -> None:
    keys = zipf_with_scans(1, 10_000)
    ours = BlockCache(make(), capacity, block_tokens=1)
    hits = [bool(ours.use(_request(number, (key,)), 1, float(number))) for number, key in enumerate(keys)]
    assert hits == libcachesim_hits(name, keys, capacity)


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_sieve_hits_as_in_libcachesim(capacity: int) -> None:
    keys = zipf_with_scans(2, 10_000)
    assert hits_under(Sieve(), keys, capacity) == libcachesim_hits("Sieve", keys, capacity)


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_s3_fifo_hits_as_in_libcachesim_but_for_two_liberties_of_it(capacity: int) -> None:
    """The plain one stands between: with the liberties it is the library's, without them it is ours."""
    keys = zipf_with_scans(3, 10_000)
    assert hits_under(S3Fifo(), keys, capacity) == PlainS3Fifo(capacity).run(keys)
    plain = PlainS3Fifo(capacity, as_in_libcachesim=True)
    assert plain.run(keys) == libcachesim_hits("S3FIFO", keys, capacity)


# --- runs against blocks ----------------------------------------------------------------------------------------------


class PlainLru:
    """Block by block, no runs: the tail of a prompt is touched first, so its head is the most recent."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def use(self, blocks: tuple[int, ...]) -> int:
        held = [block in self._blocks for block in blocks]
        for block in reversed(blocks):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)
        return (*held, False).index(False)


@settings(max_examples=150, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=60),
    capacity=st.integers(1, 20),
    max_run=st.sampled_from((1, 3, 1 << 30)),
)
def test_lru_over_runs_is_lru_over_blocks(prompts: list[list[int]], capacity: int, max_run: int) -> None:
    """Prompts are paths in a tree with three branches at every block: runs split, grow and shrink all the time."""
    runs, plain = BlockCache(Lru(), capacity, 1, max_run), PlainLru(capacity)
    for number, path in enumerate(prompts):
        blocks = prefix_ids(path)
        assert runs.use(_request(number, blocks), 1, float(number)) == plain.use(blocks)
        assert runs.used_tokens <= capacity


def prefix_ids(path: list[int]) -> tuple[int, ...]:
    """An id for every beginning of the path."""
    return tuple(int("1" + "".join(map(str, path[:end]))) for end in range(1, len(path) + 1))


def _request(number: int, blocks: tuple[int, ...]) -> Request:
    return Request(
        request_id=number,
        session_id=number,
        arrival_s=float(number),
        input_tokens=len(blocks),
        output_tokens=0,
        blocks=blocks,
    )
