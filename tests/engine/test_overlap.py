"""Load or compute: the decisions, from numbers alone, against a simulation of what would happen."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.engine.overlap import (
    STALL_SHARE,
    LoadOrder,
    TailLoad,
    choose_order,
    front_tokens,
    may_join,
)

seconds = st.floats(1e-4, 10.0)


@given(load_s=seconds, history_s=seconds, new_s=seconds)
def test_the_order_that_ends_sooner(load_s: float, history_s: float, new_s: float) -> None:
    layers_s = max(load_s, new_s)
    tail_s = load_s * history_s / (load_s + history_s) + new_s
    order = choose_order(load_s, history_s, new_s)
    chosen, other = (layers_s, tail_s) if order is LoadOrder.LAYERS else (tail_s, layers_s)
    assert chosen <= other * (1 + 1e-9)


def test_what_is_not_known_is_measured_from_the_tail() -> None:
    assert choose_order(None, 1.0, 1.0) is LoadOrder.TAIL
    assert choose_order(0.0, 1.0, 1.0) is LoadOrder.LAYERS


@given(
    load_s=st.floats(1e-5, 1e-1),
    compute_s=st.floats(1e-5, 1e-1),
    num_layers=st.integers(1, 80),
    ready=st.integers(0, 80),
)
def test_a_turn_that_may_join_finds_every_layer_nearly_in_time(
    load_s: float, compute_s: float, num_layers: int, ready: int
) -> None:
    ready = min(ready, num_layers)
    now, stalled = 0.0, 0.0
    for layer in range(num_layers):
        there_at = max(0, layer + 1 - ready) * load_s
        stalled += max(0.0, there_at - now)
        now = max(now, there_at) + compute_s
    joins = may_join(ready, num_layers, load_s, compute_s)
    assert joins == (stalled <= STALL_SHARE * num_layers * compute_s + 1e-12)


def _tail(
    frontier: int, load_s: float, *, under_way_s: float = 0.0, chunk: int = 64, claimed: bool = False
) -> TailLoad:
    return TailLoad(
        frontier=frontier,
        gap_end=frontier - chunk if claimed else frontier,
        starts=range(0, frontier, chunk),
        s_per_token=load_s,
        under_way_s=under_way_s,
    )


@pytest.mark.parametrize("claims", [False, True])
@pytest.mark.parametrize(
    ("load_s", "compute_s"), [(1e-3, 1e-3), (3e-3, 1e-3), (1e-4, 1e-3), (1e-3, 3e-4), (2e-3, 1e-3)]
)
def test_front_and_load_meet_at_the_ideal_time(load_s: float, compute_s: float, claims: bool) -> None:
    """Steps of at most 256 tokens against chunks of 64 that come from the tail."""
    total, chunk = 4096, 64
    computed, loaded, now, chunk_s = 0, total, 0.0, chunk * load_s
    next_chunk_at = chunk_s
    while computed < loaded:
        tail = _tail(loaded, load_s, under_way_s=now - (next_chunk_at - chunk_s), claimed=claims)
        wanted = min(256, front_tokens(computed, tail, compute_s))
        until = now + wanted * compute_s if wanted else next_chunk_at
        while next_chunk_at <= until and computed + wanted < loaded:
            loaded -= chunk
            next_chunk_at += chunk_s
        computed, now = computed + wanted, until
    ideal = total * load_s * compute_s / (load_s + compute_s)
    assert now <= ideal + chunk * min(load_s, compute_s) + 1e-9


def test_a_load_that_is_nearly_there_is_waited_for() -> None:
    assert front_tokens(0, _tail(2048, 1e-6), 1e-3) == 0
    assert front_tokens(0, _tail(2048, 0.0), 1e-3) == 0
    assert front_tokens(0, _tail(2048, 1.0), None) == 0
    assert front_tokens(0, _tail(64, 1e-3, under_way_s=0.06), 1e-3) == 0


def test_a_chunk_that_would_come_later_than_it_is_computed_is_computed_unless_it_is_being_written() -> None:
    assert front_tokens(0, _tail(64, 1e-3), 1e-4) == 64
    assert front_tokens(50, _tail(64, 1e-2), 1e-3) == 14
    assert front_tokens(0, _tail(64, 1e-3, claimed=True), 1e-4) == 0
    assert front_tokens(0, _tail(128, 1e-3, claimed=True), 1e-4) == 64


def test_the_layers_that_must_be_ready_are_the_papers_read_buffer() -> None:
    """S_buf / (bytes of a layer) = L * (load - compute) / load, up to a layer and the slack."""
    num_layers, load_s, compute_s = 80, 0.192, 0.1
    ready = next(n for n in range(81) if may_join(n, num_layers, load_s / num_layers, compute_s / num_layers))
    assert ready == pytest.approx(num_layers * (load_s - compute_s) / load_s, abs=2)
